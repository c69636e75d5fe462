import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from selma_ray.errors import TrainingError
from selma_ray.experts.examples import BucketTurns, EncodedExamples, dropped_captions, example_generators
from selma_ray.experts.layout import EMPTY_CAPTION
from selma_ray.order import batch_positions
from selma_ray.storage import RunFolder

counts = st.integers(min_value=1, max_value=50)


def write_shard(folder: RunFolder, path: str, rows: dict[str, float]) -> None:
    target = folder.local_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"latent_mean": torch.tensor([[value] for value in rows.values()])}, target, {"ids": json.dumps(list(rows))}
    )


@given(num_examples=counts, batch_size=counts, epochs=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_example_comes_once_an_epoch(num_examples: Any, batch_size: Any, epochs: int, seed: int) -> None:
    steps = -(-num_examples * epochs // batch_size)
    drawn = [place for step in range(steps) for place in batch_positions(num_examples, batch_size, step, seed)]
    whole_epochs = drawn[: num_examples * epochs]
    assert Counter(whole_epochs) == dict.fromkeys(range(num_examples), epochs)


@given(num_examples=counts, batch_size=counts, step=st.integers(0, 1000), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_batch_depends_on_seed_and_step_alone(num_examples: Any, batch_size: Any, step: int, seed: int) -> None:
    batch = batch_positions(num_examples, batch_size, step, seed)
    assert len(batch) == batch_size
    assert batch == batch_positions(num_examples, batch_size, step, seed)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    assert batch_positions(100, 100, 0, seed=0) != batch_positions(100, 100, 0, seed=1)
    assert batch_positions(100, 100, 0, seed=0) != batch_positions(100, 100, 1, seed=0)


def test_noise_is_the_same_however_a_batch_is_split() -> None:
    whole = [torch.rand(1, generator=generator) for generator in example_generators(3, range(4), seed=5)]
    parts = [
        torch.rand(1, generator=generator)
        for places in (range(0, 2), range(2, 4))
        for generator in example_generators(3, places, seed=5)
    ]
    assert whole == parts
    assert len(set(map(float, whole))) == 4


def test_examples_are_ordered_by_id_over_shards_and_caches(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write_shard(folder, "cache/k/one/0.safetensors", {"d": 4.0, "a": 1.0})
    write_shard(folder, "cache/k/two/0.safetensors", {"c": 3.0, "b": 2.0})
    for name, ids in (("one", ["d", "a"]), ("two", ["b", "c"])):
        folder.write_json({"shards": [f"cache/k/{name}/0.safetensors"], "ids": ids}, "cache/k", name, "index.json")
    examples = EncodedExamples(folder, ["cache/k/two", "cache/k/one"])
    assert examples.ids == ["b", "c", "d", "a"]
    assert examples.batch([3, 0, 1])["latent_mean"].flatten().tolist() == [1.0, 2.0, 3.0]


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write_shard(folder, "cache/k/one/0.safetensors", {"a": 1.0})
    folder.write_json({"shards": ["cache/k/one/0.safetensors"], "ids": ["a"]}, "cache/k/one/index.json")
    whole = folder.read_bytes("cache/k/one/0.safetensors")
    folder.write_bytes(whole[:-2], "cache/k/one/0.safetensors")
    with pytest.raises(TrainingError, match=r"0.safetensors must be a whole shard .*; delete the folder cache"):
        EncodedExamples(folder, ["cache/k/one"])


def test_captions_are_dropped_at_the_asked_share_however_a_batch_is_split() -> None:
    assert dropped_captions(3, range(64), seed=5, share=0.0) == []
    dropped = [dropped_captions(step, range(64), seed=5, share=0.25) for step in range(64)]
    assert 0.2 < sum(map(len, dropped)) / 64**2 < 0.3
    halves = [dropped_captions(3, range(32), 5, 0.25), dropped_captions(3, range(32, 64), 5, 0.25)]
    assert dropped[3] == halves[0] + [32 + row for row in halves[1]]


def test_a_dropped_caption_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write_shard(folder, "cache/k/one/0.safetensors", {"a": 1.0})
    folder.write_json({"shards": ["cache/k/one/0.safetensors"], "ids": ["a"]}, "cache/k/one/index.json")
    save_file({"text_NTD": torch.full((1, 2, 3), 7.0)}, folder.local_path("cache/k/one", EMPTY_CAPTION))
    batch = {"latent_mean": torch.rand(4, 2), "text_NTD": torch.rand(4, 2, 3)}
    replaced = EncodedExamples(folder, ["cache/k/one"]).without(batch, [1, 3])
    assert torch.equal(replaced["latent_mean"], batch["latent_mean"])
    assert torch.equal(replaced["text_NTD"][[0, 2]], batch["text_NTD"][[0, 2]])
    assert replaced["text_NTD"][[1, 3]].eq(7).all()
    assert not batch["text_NTD"].eq(7).any()


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=4), steps=st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_buckets_take_turns_by_their_shares(counts: list[int], steps: int) -> None:
    turns = [BucketTurns(counts).of_step(step) for step in range(steps)]
    for bucket, count in enumerate(counts):
        own = [turn for each, turn in turns if each == bucket]
        assert own == list(range(len(own)))
        assert abs(len(own) - steps * count / sum(counts)) < len(counts)


def test_a_batch_holds_examples_of_one_size_and_all_come_equally_often(tmp_path: Path) -> None:
    folder, shards = RunFolder(str(tmp_path)), []
    for width, rows in ((4, 6), (8, 12), (6, 3)):
        shards.append(f"cache/k/one/{width}.safetensors")
        folder.local_path(shards[-1]).parent.mkdir(parents=True, exist_ok=True)
        ids = [f"{width}-{row}" for row in range(rows)]
        save_file({"latent_mean": torch.zeros(rows, 1, width)}, folder.local_path(shards[-1]), {"ids": json.dumps(ids)})
    ids = [f"{width}-{row}" for row in range(12) for width, rows in ((4, 6), (8, 12), (6, 3)) if row < rows]
    folder.write_json({"shards": shards, "ids": ids}, "cache/k/one/index.json")
    examples = EncodedExamples(folder, ["cache/k/one"])
    drawn = [examples.positions(3, step, seed=0) for step in range(70)]
    assert all(examples.batch(batch)["latent_mean"].shape[0] == 3 for batch in drawn)
    assert Counter(position for batch in drawn for position in batch) == dict.fromkeys(range(21), 10)
    assert drawn[5] == EncodedExamples(folder, ["cache/k/one"]).positions(3, 5, seed=0)
    assert drawn != [examples.positions(3, step, seed=1) for step in range(70)]
