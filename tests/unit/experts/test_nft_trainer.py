"""Rounds of drawing and training in one process, on a tiny model: the renderer draws where Ray's would."""

import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from selma_ray.adapters.config import LoraSettings
from selma_ray.errors import TrainingError
from selma_ray.experts.config import ExpertsConfig, NftConfig
from selma_ray.experts.drawing import DrawRounds
from selma_ray.experts.expert_rounds import ExpertRounds
from selma_ray.experts.job import ExpertJob, finished_result
from selma_ray.experts.nft_trainer import NftTrainer
from selma_ray.experts.plan import plan_experts
from selma_ray.experts.rounds import DrawnData, Round
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.storage import RunFolder
from tests.unit.experts.fitting import adapter, assert_same_bits

pytestmark = pytest.mark.usefixtures("process_group")

PROMPTS = tuple(("counting", f"{number} apples") for number in ("one", "two", "three"))
NFT = NftConfig(rounds=3, prompts_per_round=2, images_per_prompt=3, prompts_per_call=1)


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """Score images by something that a model may learn and that is never equal."""
    means = [sum(image.convert("L").tobytes()) / image.width / image.height / 255 for image in images]
    return [mean + 1e-4 * place for place, mean in enumerate(means)]


class Drawn:
    """An expert whose rounds are drawn in this process, and a count of what was."""

    def __init__(
        self,
        folder: RunFolder,
        model: ModelConfig,
        score: Any = brightness,
        precision: Literal["fp32", "bf16"] = "fp32",
        **changes: Any,
    ) -> None:
        nft = NFT.model_copy(update=changes)
        config = ExpertsConfig(
            lora=LoraSettings(rank=2, alpha=2), batch_size=3, learning_rate=1e-2, precision=precision, nft=nft
        )
        planned = plan_experts(["counting"], config)[0]
        sampling = SamplingConfig(steps=1, guidance_scale=1.0, width_px=32, height_px=32)
        self.job = ExpertJob(
            "counting", folder, (), (), model, planned.config, 0, ("counting",),
            drawn=DrawnData(PROMPTS, sampling, "model", "judge"),
        )  # fmt: skip
        assert self.job.rounds is not None
        self.plan = self.job.rounds
        self.images = 0
        self._draw = DrawRounds([self.plan], model, lambda: score, config.precision)

    def draw(self, round_: Round) -> None:
        for chunk in round_.missing_chunks():
            self.images += self._draw(0, round_.number, chunk)

    def fit(self, stop_at: int | None = None, start_from: str | None = None, save_to: str | None = None) -> NftTrainer:
        trainer = NftTrainer(self.job)
        trainer.rounds.wait_for_images = self.draw  # type: ignore[method-assign]
        if start_from:
            trainer.load(start_from)
        while trainer.steps_done < (stop_at or self.job.config.steps):
            trainer.step()
        if save_to:
            trainer.save(save_to)
        else:
            trainer.export(1.0)
        return trainer


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


@pytest.fixture(scope="module")
def finished(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    drawn = Drawn(RunFolder(str(tmp_path_factory.mktemp("run"))), model)
    drawn.fit()
    return drawn


def test_every_round_is_a_folder_with_its_adapter_images_and_scores(finished: Drawn) -> None:
    folder, result = finished.plan.folder, finished_result(finished.job)
    assert result is not None
    assert (result.steps, result.examples) == (6, 18)
    assert finished.images == 18
    ids = []
    for number in (1, 2, 3):
        round_ = finished.plan.of(number)
        assert round_.can_be_drawn()
        rows = folder.read_table(folder.files(round_.directory, "images", suffix=".parquet")).to_pylist()
        assert len(rows) == 6
        assert all(row["score"] is not None and row["image"]["bytes"] for row in rows)
        assert folder.read_json(round_.directory, "round.json")["equal_groups"] == 0
        assert not folder.files(round_.directory, "examples")  # given up once they are learnt
        ids += [row["id"] for row in rows]
    assert len(set(ids)) == 18
    curve = folder.read_json(finished.job.directory, "curve.json")
    assert {"loss", "score", "equal_groups"} <= curve[0].keys()


def test_the_first_round_is_drawn_by_the_base_and_later_ones_by_what_was_learnt(finished: Drawn) -> None:
    from safetensors.torch import load_file

    adapters = [
        load_file(finished.plan.folder.local_path(finished.plan.of(number).adapter, "adapter_model.safetensors"))
        for number in (1, 2, 3)
    ]
    deltas = [sum(float(t.abs().sum()) for name, t in each.items() if "lora_B" in name) for each in adapters]
    assert deltas[0] == 0
    assert deltas[1] > 0
    assert not torch.equal(*(next(t for name, t in each.items() if "lora_B" in name) for each in adapters[1:]))


def test_a_model_in_fp32_is_drawn_in_the_precision_that_its_expert_is_fitted_in(
    finished: Drawn, model: ModelConfig, tmp_path: Path
) -> None:
    lowered = Drawn(RunFolder(str(tmp_path / "run")), model, precision="bf16")
    lowered.fit()
    assert finished_result(lowered.job) is not None

    again = replace(finished.plan, folder=RunFolder(str(tmp_path / "again")))
    before, after = finished.plan.of(1), again.of(1)
    shutil.copytree(before.plan.folder.path(before.adapter), again.folder.path(after.adapter))
    draw = DrawRounds([again], model, lambda: brightness, "bf16")
    assert sum(draw(0, 1, chunk) for chunk in after.missing_chunks()) == 6
    in_fp32, in_bf16 = pixels_of(before), pixels_of(after)
    assert in_fp32.keys() == in_bf16.keys()
    for row_id, pixels in in_fp32.items():
        assert not torch.equal(in_bf16[row_id], pixels)
        assert (in_bf16[row_id] - pixels).abs().mean() < 0.02


def pixels_of(round_: Round) -> dict[str, torch.Tensor]:
    """Return a round's images by their ids, in [0, 1]."""
    folder = round_.plan.folder
    rows = folder.read_table(folder.files(round_.directory, "images", suffix=".parquet")).to_pylist()
    images = {row["id"]: Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows}
    return {
        name: torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) / 255 for name, image in images.items()
    }


def test_a_resumed_job_draws_nothing_twice_and_gives_the_same_bits(
    finished: Drawn, model: ModelConfig, tmp_path: Path
) -> None:
    killed = Drawn(RunFolder(str(tmp_path / "run")), model)
    killed.fit(stop_at=3, save_to=str(tmp_path / "checkpoint"))  # in the middle of the second round
    # Images of the third round may be there already: the start that was killed came further than its last checkpoint.
    killed.fit(start_from=str(tmp_path / "checkpoint"), stop_at=5, save_to=str(tmp_path / "lost"))
    killed.fit(start_from=str(tmp_path / "checkpoint"))
    assert killed.images == 18
    assert_same_bits(adapter(killed.job), adapter(finished.job))


def test_the_old_adapter_follows_by_the_shares_of_the_recipe(model: ModelConfig, tmp_path: Path) -> None:
    drawn = Drawn(RunFolder(str(tmp_path)), model, old_share=0.5, old_share_per_round=0.3)
    trainer = drawn.fit(stop_at=2, save_to=str(tmp_path / "checkpoint"))
    new = trainer._whole_weights()
    start = {name: torch.zeros_like(weight) for name, weight in new.items() if "lora_B" in name}
    for name, zero in start.items():
        torch.testing.assert_close(trainer._old[name], torch.lerp(zero, new[name], 0.7))
    assert [NftConfig(old_share=0.5, old_share_per_round=0.3).share_after(number) for number in (1, 2, 3)] == [
        0.3,
        0.5,
        0.5,
    ]


def test_equal_scores_are_counted_and_an_error_where_all_groups_have_them(model: ModelConfig, tmp_path: Path) -> None:
    def some(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        return [0.1 * place if prompt == "two apples" else 0.5 for place, prompt in enumerate(prompts)]

    drawn = Drawn(RunFolder(str(tmp_path / "some")), model, some, prompts_per_round=3, rounds=1)
    drawn.fit()
    summary = drawn.plan.folder.read_json(drawn.plan.of(1).directory, "round.json")
    assert (summary["groups"], summary["equal_groups"]) == (3, 2)

    equal = Drawn(RunFolder(str(tmp_path / "equal")), model, lambda images, _: [0.5] * len(images))
    with pytest.raises(TrainingError, match=r"round 1 of expert counting: all 2 groups .* raise experts.nft"):
        equal.fit()


def test_a_trainer_learns_that_no_images_will_come(model: ModelConfig, tmp_path: Path) -> None:
    drawn = Drawn(RunFolder(str(tmp_path)), model)
    drawn.plan.stop("the judge is ill")
    with pytest.raises(TrainingError, match="images of expert counting could not be drawn: the judge is ill"):
        NftTrainer(drawn.job).step()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nft": {"images_per_prompt": 1}}, "greater than or equal to 2"),
        ({"nft": {}, "dpo": {}}, "dpo must be left out with nft"),
        ({"nft": {}, "zero_stage": 3}, "zero_stage must be at most 2 with nft"),
    ],
)
def test_what_cannot_be_fitted_in_rounds_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ExpertsConfig.model_validate(settings)


def test_who_waits_long_for_images_says_for_which(
    finished: Drawn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    round_ = finished.plan.of(2)
    drawn = iter([False, False, True, True, True])
    monkeypatch.setattr("selma_ray.experts.expert_rounds._TOLD_AFTER_S", 0.0)
    monkeypatch.setattr(Round, "missing_chunks", lambda self: [0, 1])
    monkeypatch.setattr(Round, "is_drawn", lambda self, chunk: next(drawn))
    ExpertRounds(finished.job, writes=False).wait_for_images(round_)
    assert "expert counting has waited 0 s for images of round 2: 2 of 2 chunks are still to be drawn" in caplog.text
