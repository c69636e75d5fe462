from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from selma_ray.images.config import ImagesConfig
from selma_ray.images.plan import PLAN_SCHEMA, PlanImages
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.records import PROMPT_SCHEMA


@pytest.fixture
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


def prompts(*texts: str, split: str = "train") -> pa.Table:
    rows = [
        {"id": text, "skill": "one", "index": index, "prompt": text, "split": split} for index, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


def test_each_image_of_a_prompt_has_its_own_id_and_seed(model: ModelConfig) -> None:
    planned = PlanImages(ImagesConfig(per_prompt=3), model, 0)(prompts("a cat", "a dog"))
    assert planned.schema == PLAN_SCHEMA
    assert planned["prompt"].to_pylist() == ["a cat"] * 3 + ["a dog"] * 3
    assert planned["image_index"].to_pylist() == [0, 1, 2] * 2
    assert len(set(planned["id"].to_pylist())) == len(set(planned["seed"].to_pylist())) == 6


def test_ids_and_seeds_do_not_depend_on_the_block(model: ModelConfig) -> None:
    plan = PlanImages(ImagesConfig(), model, 0)
    together = plan(prompts("a cat", "a dog")).to_pylist()
    assert plan(prompts("a dog")).to_pylist() == [row for row in together if row["prompt"] == "a dog"]


def test_ids_depend_on_all_that_the_image_depends_on(model: ModelConfig) -> None:
    def ids(config: ImagesConfig, model: ModelConfig, seed: int = 0) -> str:
        return PlanImages(config, model, seed)(prompts("a cat"))["id"][0].as_py()

    variants = [
        ids(ImagesConfig(), model),
        ids(ImagesConfig(), model, seed=1),
        ids(ImagesConfig(sampling=SamplingConfig(steps=20)), model),
        ids(ImagesConfig(sampling=SamplingConfig(guidance_scale=2)), model),
        ids(ImagesConfig(), model.model_copy(update={"dtype": "bf16"})),
        ids(ImagesConfig(), ModelConfig(name="owner/model", revision="one")),
        ids(ImagesConfig(), ModelConfig(name="owner/model", revision="two")),
    ]
    assert len(set(variants)) == len(variants)
    assert ids(ImagesConfig(batch_size=3, max_renderers=4), model) == variants[0]


def test_only_training_prompts_are_rendered(model: ModelConfig) -> None:
    assert PlanImages(ImagesConfig(), model, 0)(prompts("a cat", split="dev")).num_rows == 0


def test_finished_images_are_left_out(model: ModelConfig) -> None:
    config = ImagesConfig(per_prompt=2)
    first, second = PlanImages(config, model, 0)(prompts("a cat"))["id"].to_pylist()
    assert PlanImages(config, model, 0, {first})(prompts("a cat"))["id"].to_pylist() == [second]


def test_unfinished_prompts_are_those_with_an_image_to_render(model: ModelConfig) -> None:
    config, texts = ImagesConfig(per_prompt=2), ("done", "half", "new")
    ids = PlanImages(config, model, 0)(prompts(*texts))["id"].to_pylist()
    plan = PlanImages(config, model, 0, ids[:3])
    held_out = prompts("never rendered", split="dev")
    unfinished = plan.unfinished(pa.concat_tables([prompts(*texts), held_out]))
    assert unfinished["prompt"].to_pylist() == ["half", "new"]
    assert unfinished.schema == PROMPT_SCHEMA
    assert plan(unfinished) == plan(prompts(*texts))


BUCKETS = ImagesConfig(
    per_prompt=2, sampling=SamplingConfig(width_px=64, height_px=64), buckets_px=((48, 80), (80, 48))
)


def test_a_prompt_s_images_have_one_size_that_its_seed_draws(model: ModelConfig) -> None:
    texts = [f"cat {number}" for number in range(60)]
    rows = PlanImages(BUCKETS, model, 0)(prompts(*texts)).to_pylist()
    sizes = {row["prompt"]: (row["width"], row["height"]) for row in rows}
    assert all((row["width"], row["height"]) == sizes[row["prompt"]] for row in rows)
    assert set(sizes.values()) == set(BUCKETS.sizes_px)
    assert rows[2:4] == PlanImages(BUCKETS, model, 0)(prompts("cat 1")).to_pylist()
    other_seed = PlanImages(BUCKETS, model, 1)(prompts(*texts)).to_pylist()
    assert [row["width"] for row in other_seed] != [row["width"] for row in rows]


def test_an_id_depends_on_the_image_s_own_size_alone(model: ModelConfig) -> None:
    square = ImagesConfig(per_prompt=2, sampling=BUCKETS.sampling)
    texts = [f"cat {number}" for number in range(20)]
    alone = PlanImages(square, model, 0)(prompts(*texts)).to_pylist()
    for row, of_square in zip(PlanImages(BUCKETS, model, 0)(prompts(*texts)).to_pylist(), alone, strict=True):
        assert (row["id"] == of_square["id"]) == (row["width"] == row["height"])


@pytest.mark.parametrize(
    ("buckets", "fault"),
    [
        ([(60, 64)], "buckets_px must have sides that divide by 8, got 60x64"),
        ([(48, 80), (48, 80)], "buckets_px must be different sizes"),
        ([(64, 64)], "buckets_px must be different sizes"),
    ],
)
def test_buckets_are_sizes_that_differ(buckets: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        ImagesConfig(sampling=BUCKETS.sampling, buckets_px=buckets)


def test_memory_is_planned_for_the_largest_size() -> None:
    config = ImagesConfig(sampling=SamplingConfig(width_px=64, height_px=64), buckets_px=((48, 80), (72, 64)))
    assert (config.largest_sampling.width_px, config.largest_sampling.height_px) == (72, 64)
