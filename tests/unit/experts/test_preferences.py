import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from selma_ray.config import validate
from selma_ray.errors import ConfigError, TrainingError
from selma_ray.experts.cache import skill_cache
from selma_ray.experts.config import DpoConfig, ExpertsConfig
from selma_ray.experts.job import ExpertJob
from selma_ray.experts.preferences import preference_loss, preference_pairs
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder
from tests.unit.experts.fitting import BASE, adapter, assert_same_bits, encoded_job, fit
from tests.unit.experts.rendered_images import write_failed_image, write_images, write_scored_images

SCORES = {
    "a cat": (0.2, 0.9, 0.5),
    "a dog": (1.0, 0.5),
    "an owl": (0.75, 0.0),
    "a bee": (0.5, 0.25),
    "a fox": (0.5, 0.5),
}
BETA = 2000.0
DPO = BASE.model_copy(
    update={"dpo": DpoConfig(beta=BETA), "learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"}
)


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


@pytest.fixture(scope="module")
def make_job(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = RunFolder(str(tmp_path_factory.mktemp("run")))
    write_scored_images(folder, "counting", SCORES)
    return lambda **changes: encoded_job(folder, model, "counting", DPO.model_copy(update=changes))


def row(row_id: str, prompt: str, score: float | None, split: str = "rejected", error: str | None = None) -> dict:
    return {"id": row_id, "prompt": prompt, "score": score, "split": split, "error": error}


def test_the_best_image_of_a_prompt_is_paired_with_its_worst() -> None:
    rows = [
        row("3", "cat", 0.9, "train"), row("1", "cat", 0.1), row("2", "cat", 0.5),
        row("4", "dog", 0.2), row("5", "dog", 0.8, "train"), row("6", "dog", 0.2),
    ]  # fmt: skip
    assert preference_pairs(rows) == [("3", "1"), ("5", "4")]
    assert preference_pairs(reversed(rows)) == [("3", "1"), ("5", "4")]


def test_what_says_no_preference_makes_no_pair() -> None:
    rows = [
        row("1", "equal", 0.5, "train"), row("2", "equal", 0.5),
        row("3", "none chosen", 0.1), row("4", "none chosen", 0.2),
        row("5", "one failed", 0.5, "train"), row("6", "one failed", None, error="out of memory"),
        row("7", "one unjudged", 0.5, "train"), row("8", "one unjudged", None),
    ]  # fmt: skip
    assert preference_pairs(rows) == []


def test_the_loss_is_that_of_its_formula() -> None:
    errors, base = [0.50, 0.30, 0.70, 0.20], [0.51, 0.30, 0.69, 0.25]
    margins = [(base[n] - errors[n]) - (base[2 + n] - errors[2 + n]) for n in range(2)]
    expected = sum(-math.log(1 / (1 + math.exp(-BETA / 2 * margin))) for margin in margins) / 2
    loss, preferred = preference_loss(torch.tensor(errors), torch.tensor(base), BETA)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert preferred.item() == 0.5


def squared_error(unet: Any, example: Any, seed: int, scale: float) -> torch.Tensor:
    """The error of predicting the noise of one example (2006.11239, equation 14), computed without the family's code."""
    draw = torch.Generator().manual_seed(seed)
    latents = (example["latent_mean"] + example["latent_std"] * torch.randn(1, 4, 16, 16, generator=draw)[0]) * scale
    noise = torch.randn(1, 4, 16, 16, generator=draw)[0]
    timestep = torch.randint(1000, (1,), generator=draw)
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[timestep]
    noisy = kept.sqrt().float() * latents + (1 - kept).sqrt().float() * noise
    prediction = unet(noisy[None], timestep, encoder_hidden_states=example["text_NTD"][None]).sample[0]
    return (prediction - noise).square().mean()


@pytest.mark.usefixtures("process_group")
def test_a_step_s_loss_compares_the_fitted_denoiser_with_the_base_on_both_images(
    make_job: Any, model: ModelConfig
) -> None:
    from selma_ray.experts.examples import EncodedExamples
    from selma_ray.order import batch_positions
    from selma_ray.records import seed_of

    job = make_job()
    trainer = fit(job, stop_at=3, save_to=job.folder.path("unused"))
    adapted, base = trainer._engine.module, open_family(model).load_denoiser().eval()
    examples, seed = EncodedExamples(job.folder, job.caches), seed_of(0, expert="counting")
    batch = examples.batch(batch_positions(len(examples), 4, 3, seed))
    losses = []
    for place in range(4):
        chosen, rejected = ({name: tensor[at] for name, tensor in batch.items()} for at in (place, 4 + place))
        with torch.no_grad():
            ours, theirs = (
                [
                    squared_error(unet, each, seed_of(seed, step=3, place=place), 0.18215).double()
                    for each in (chosen, rejected)
                ]
                for unet in (adapted, base)
            )
        inside = BETA / 2 * ((theirs[0] - ours[0]) - (theirs[1] - ours[1]))
        losses.append(torch.log1p(torch.exp(-inside)))
    expected = torch.stack(losses).mean().item()
    assert expected != pytest.approx(math.log(2), rel=1e-2)
    assert trainer.step() == pytest.approx(expected, rel=2e-2)


@pytest.mark.usefixtures("process_group")
def test_fitting_comes_to_prefer_the_chosen_images(model: ModelConfig, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write_opposite_pairs(folder, "cache/key/counting", count=4)
    config = DPO.model_copy(update={"steps": 16, "learning_rate": 3e-3})
    job = ExpertJob("counting", folder, ("cache/key/counting",), ("key",), model, config, seed=0)
    fit(job)
    curve = folder.read_json(job.directory, "curve.json")
    assert curve[0]["loss"] == pytest.approx(math.log(2), rel=1e-5), "at the start the denoiser is the base"
    assert curve[0]["preferred"] == 0
    assert sum(row["preferred"] for row in curve[-8:]) / 8 > 0.9
    assert sum(row["loss"] for row in curve[-8:]) / 8 < 0.3
    assert folder.read_json(job.directory, "result.json")["examples"] == 4


def write_opposite_pairs(folder: RunFolder, directory: str, count: int) -> None:
    """Write a cache of pairs whose chosen latents are positive and whose rejected ones are negative."""
    pairs = [(f"chosen-{n}", f"rejected-{n}") for n in range(count)]
    signs = torch.tensor([1.0, -1.0] * count)[:, None, None, None]
    text_NTD = torch.randn(count, 77, 32, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    tensors = {
        "latent_mean": (8 * signs).expand(-1, 4, 16, 16).contiguous(),
        "latent_std": torch.zeros(2 * count, 4, 16, 16),
        "text_NTD": text_NTD.contiguous(),
    }
    ids = json.dumps([row_id for pair in pairs for row_id in pair])
    folder.write_bytes(save(tensors, {"ids": ids}), directory, "0.safetensors")
    folder.write_json(
        {"shards": [f"{directory}/0.safetensors"], "ids": json.loads(ids), "pairs": pairs}, directory, "index.json"
    )


@pytest.mark.usefixtures("process_group")
def test_a_resumed_fit_gives_the_bits_of_one_that_was_not_stopped(make_job: Any, tmp_path: Path) -> None:
    job = make_job()
    fit(job)
    weights, curve = adapter(job), job.folder.read_json(job.directory, "curve.json")
    fit(job, stop_at=3, save_to=str(tmp_path))
    fit(job, start_from=str(tmp_path))
    assert_same_bits(adapter(job), weights)
    assert job.folder.read_json(job.directory, "curve.json") == curve


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("change", [{"zero_stage": 0}, {"zero_stage": 3}, {"micro_batch_size": 2}])
def test_zero_stages_and_accumulation_do_not_change_the_result(make_job: Any, change: Any) -> None:
    job = make_job()
    fit(job)
    weights = adapter(job)
    other = make_job(**change)
    fit(other)
    for name, tensor in adapter(other).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("process_group")
def test_bf16_and_dropped_captions_fit_too(make_job: Any) -> None:
    job = make_job(precision="bf16", caption_dropout=0.5, gradient_checkpointing=True, steps=3)
    fit(job)
    assert all(torch.isfinite(tensor).all() for tensor in adapter(job).values())
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter(job).items() if "lora_B" in name)


def test_a_cache_of_pairs_holds_both_images_of_each_and_nothing_else(model: ModelConfig, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write_scored_images(folder, "counting", SCORES)
    cache = skill_cache(folder, "counting", model, in_pairs=True)
    assert dict(cache.pairs) == {
        "a cat-1": "a cat-0",
        "a dog-0": "a dog-1",
        "an owl-0": "an owl-1",
        "a bee-0": "a bee-1",
    }
    assert set(cache.ids) == {row_id for pair in cache.pairs for row_id in pair}
    assert cache.key != skill_cache(folder, "counting", model).key


def test_images_without_preferences_are_refused(model: ModelConfig, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write_images(folder, "counting", 2)
    write_failed_image(folder, "counting")
    with pytest.raises(
        TrainingError, match=r"skill counting has no prompt whose images differ in score, of 3; raise images.per_p"
    ):
        skill_cache(folder, "counting", model, in_pairs=True)


CHOICE = {"judge": "miniature"}


@pytest.mark.parametrize(
    ("images", "data"),
    [
        ({"per_prompt": 2}, {}),
        ({"selection": CHOICE}, {}),
        ({"per_prompt": 2, "selection": CHOICE}, {"images": "ground_truth"}),
    ],
)
def test_a_recipe_that_makes_no_pairs_is_refused(images: Any, data: Any) -> None:
    whole = {"run_dir": "runs/x", "skills": ["coco"], "experts": {"dpo": {}}, "images": images, "data": data}
    with pytest.raises(
        ConfigError, match=r"experts.dpo needs scored images to make pairs of: .* got images.selection="
    ) as error:
        validate(Recipe, whole, "recipe.yaml")
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_snr_gamma must be left out with dpo, got 5"):
        validate(ExpertsConfig, {"dpo": {}, "min_snr_gamma": 5}, "recipe.yaml")
    with pytest.raises(ConfigError, match=r"dpo\.beta"):
        validate(ExpertsConfig, {"dpo": {"beta": 0}}, "recipe.yaml")
