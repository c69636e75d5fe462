from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from selma_ray.cluster import cards
from selma_ray.errors import ConfigError
from selma_ray.run.demands import SERVE
from selma_ray.run.host_memory import check_host, host_weights
from selma_ray.run.memory import Need, check_cards, check_memory, memory_needs
from selma_ray.run.recipe import Recipe, load_recipe
from selma_ray.run.stages import STAGES

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"
ALL = [*STAGES, SERVE]
# What the recipes themselves say that they need.
SAID_GB = {
    "sdxl": 48,
    "sd14": 48,
    "sd2": 48,
    "sd35": 48,
    "flux": 80,
    "workstation": 24,
    "paper_sdxl": 48,
    "zimage": 48,
    "flux2_klein": 48,
    "qwen_image": 80,
    "sana": 48,
}


def recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", ["run_dir=/nowhere", *overrides])


def needs(found: list[Need]) -> dict[tuple[str, str], Need]:
    return {(need.stage, need.what): need for need in found}


@pytest.mark.parametrize(("name", "gpu_gb"), SAID_GB.items())
def test_every_large_recipe_fits_the_card_that_it_asks_for(name: str, gpu_gb: float) -> None:
    check_memory(recipe(name), ALL, gpu_gb * 1e9)


@pytest.mark.parametrize(
    ("name", "overrides", "gpu_gb", "line"),
    [
        ("sdxl", [], 24, r"train: an expert's worker needs .*activations .*; set experts.gradient_checkpointing=true$"),
        (
            "sdxl",
            ["experts.gradient_checkpointing=true"],
            16,
            r"generate: the language model needs .*; name a smaller model in prompts.llm.name, or split it",
        ),
        ("flux", [], 24, r"generate: a renderer needs .*; take a smaller model or a larger GPU$"),
        ("flux", [], 32, r"generate: a renderer needs .*; set model.card.offload=model$"),
        (
            "flux",
            ["model.card.offload=model", "experts.gradient_checkpointing=false"],
            24.0,
            r"train: an expert's worker .*; set experts.gradient_checkpointing=true experts.micro_batch_size=1 experts.base_weights=nf4$",
        ),
        ("flux", ["serving.experts=true"], 80, r"serve: a generator .*; set serving.experts=false$"),
    ],
)
def test_what_cannot_fit_is_one_line_with_the_keys_that_make_it_fit(
    name: str, overrides: list[str], gpu_gb: float, line: str
) -> None:
    stages = ["train"] if "train:" in line and name == "flux" else ALL
    with pytest.raises(ConfigError, match=line):
        check_memory(recipe(name, *overrides), stages, gpu_gb * 1e9)


def test_the_remedy_that_is_named_helps() -> None:
    check_memory(recipe("sdxl", "experts.gradient_checkpointing=true"), ["train"], 24e9)


def test_quantised_and_offloaded_weights_are_counted_as_what_they_take() -> None:
    whole = needs(memory_needs(recipe("flux"), ["generate", "train"]))
    changed = ["experts.base_weights=nf4", "model.card.offload=model"]
    small = needs(memory_needs(recipe("flux", *changed), ["generate", "train"]))
    worker, renderer = ("train", "an expert's worker"), ("generate", "a renderer")
    assert whole[worker].parts["weights"] == pytest.approx(2 * 11.92e9, rel=0.01)
    assert small[worker].parts["weights"] == pytest.approx(0.5625 * 11.7e9, rel=0.1)
    assert whole[renderer].parts["weights"] == pytest.approx(2 * 16.87e9, rel=0.01)
    assert small[renderer].parts["weights"] == pytest.approx(2 * 11.9e9, rel=0.01)


def test_the_paper_s_autoencoder_decodes_in_half_the_memory_of_the_one_that_overflows() -> None:
    fixed = needs(memory_needs(recipe("sdxl"), ["generate"]))["generate", "a renderer"].parts["drawing"]
    overflowing = needs(memory_needs(recipe("sdxl", "model.vae=null"), ["generate"]))["generate", "a renderer"]
    assert overflowing.parts["drawing"] > fixed


def test_experts_that_are_fused_share_the_base_alone() -> None:
    bf16 = "experts.precision=bf16"
    apart = needs(memory_needs(recipe("sdxl", bf16), ["train"]))["train", "an expert's worker"].parts
    fused = needs(memory_needs(recipe("sdxl", bf16, "experts.fused=true"), ["train"]))[
        "train", "the experts' worker"
    ].parts
    experts = len(recipe("sdxl").skills)
    assert fused["activations"] == pytest.approx(experts * apart["activations"])
    one = (fused["weights"] - apart["weights"]) / (experts - 1)
    assert 0 < one < 0.1 * apart["weights"]


def test_renderers_of_rounds_are_counted_with_the_images_of_a_call() -> None:
    rounds = [
        "experts.nft={gpus_per_renderer: 1, prompts_per_call: 2, images_per_prompt: 8}",
        "model.card.vae_slicing=true",
    ]
    drawn = needs(memory_needs(recipe("sdxl", *rounds), ["train"]))["train", "a renderer"]
    unguided = ["images.batch_size=16", "images.sampling.guidance_scale=1"]
    generated = needs(memory_needs(recipe("sdxl", *unguided), ["generate"]))["generate", "a renderer"]
    assert drawn.parts["drawing"] == pytest.approx(generated.parts["drawing"])
    learning = needs(memory_needs(recipe("sdxl", *rounds), ["train"]))["train", "an expert's worker"].parts
    plain = needs(memory_needs(recipe("sdxl"), ["train"]))["train", "an expert's worker"].parts
    assert learning["gradients and optimiser"] > plain["gradients and optimiser"]
    with pytest.raises(ConfigError, match=r"train: a renderer needs .*; set .*experts.nft.prompts_per_call=1"):
        check_memory(
            recipe("sdxl", *rounds, "experts.nft.images_per_prompt=4", "experts.nft.prompts_per_call=400"),
            ["train"],
            80e9,
        )


def test_renderers_of_rounds_keep_the_weights_that_experts_are_folded_into() -> None:
    rounds = ["experts.nft={gpus_per_renderer: 1}"]
    kept = "weights that an expert is folded into"
    parts = needs(memory_needs(recipe("sdxl", *rounds), ["train"]))["train", "a renderer"].parts
    assert 0 < parts[kept] < parts["weights"]
    offloaded = memory_needs(recipe("sdxl", *rounds, "model.card.offload=model"), ["train"])
    assert kept not in needs(offloaded)["train", "a renderer"].parts, "they wait in the host's memory"


def test_a_student_is_counted_with_its_teachers() -> None:
    distil = ["merging.method=distil", "merging.distil={num_gpus: 1, prompts_per_skill: 4, states_per_image: 4}"]
    student = needs(memory_needs(recipe("sdxl", *distil), ["merge"]))["merge", "the student"].parts
    guided = needs(memory_needs(recipe("sdxl", *distil, "merging.distil.guidance_scale=4"), ["merge"]))[
        "merge", "the student"
    ].parts
    assert guided["a step"] == pytest.approx(2 * student["a step"]), "learning is the largest part of it"
    ranked = needs(memory_needs(recipe("sdxl", *distil, "merging.distil.rank=4"), ["merge"]))[
        "merge", "the student"
    ].parts
    assert ranked["student and optimiser"] < student["student and optimiser"]
    assert student["experts"] > 0
    with pytest.raises(ConfigError, match=r"merge: the student needs .*; set merging.distil.states_per_image=1"):
        check_memory(recipe("sdxl", *distil), ["merge"], 48e9)


def test_the_miniature_on_the_cpu_takes_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_needs(recipe("demo"), ALL) == []
    monkeypatch.setattr("selma_ray.run.memory.smallest_gpu_bytes", lambda config: pytest.fail("nobody is asked"))
    check_cards(recipe("demo"), ALL)


def merged_run(folder: Path, name: str) -> str:
    """Return a folder that holds the recipe of a run."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe(name).as_yaml())
    return str(folder)


def served(name: str, *overrides: str) -> Need:
    return needs(memory_needs(recipe(name, *overrides), [SERVE]))[SERVE, "a generator"]


def test_loras_of_others_are_counted_from_their_files(tmp_path: Path) -> None:
    rank, module = 64, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {
        f"unet.{module}.lora_A.weight": torch.zeros(rank, 640),
        f"unet.{module}.lora_B.weight": torch.zeros(640, rank),
    }
    save_file(state, tmp_path / "style.safetensors")
    alone = served("sdxl", "serving.experts=false")
    with_adapter = served("sdxl", "serving.experts=false", f"serving.adapters.style={tmp_path / 'style.safetensors'}")
    base = served("sdxl", "serving.experts=true").parts["base and experts"]
    assert "adapters" not in alone.parts
    assert with_adapter.parts["adapters"] == 2 * 2 * 640 * rank
    assert 0.5 * base < with_adapter.parts["base and experts"] < base, "the base model alone"


def test_runs_that_are_served_together_share_a_card_or_have_one_each(tmp_path: Path) -> None:
    other = f"serving.models.other={merged_run(tmp_path / 'other', 'flux')}"
    whole = served("sdxl", "serving.num_gpus=1", other)
    assert whole.parts["weights"] == served("flux").parts["weights"], "the largest of them must fit"
    shared = needs(memory_needs(recipe("sdxl", "serving.num_gpus=0.5", other), [SERVE]))
    both = shared[SERVE, "2 generators on one GPU"].parts["weights"]
    assert both == pytest.approx(served("sdxl").parts["weights"] + served("flux").parts["weights"])
    with pytest.raises(ConfigError, match=r"^serve: 2 generators on one GPU needs? .*; set "):
        check_memory(recipe("sdxl", "serving.num_gpus=0.5", other), [SERVE], 48e9)


def test_weights_that_the_nodes_memory_cannot_hold_are_refused(tmp_path: Path) -> None:
    alone = recipe("demo")
    both = recipe("demo", f"serving.models.other={merged_run(tmp_path / 'other', 'demo')}")
    assert host_weights(both) == 2 * host_weights(alone) > 0
    check_host(both, host_weights(both))
    with pytest.raises(
        ConfigError, match=r"^serve: the weights of 2 generators take .* leave runs out of serving\.models"
    ):
        check_host(both, host_weights(both) - 1)


def test_the_miniature_fits_any_card() -> None:
    check_memory(recipe("gpu_demo"), ALL, 8e9)


def test_a_card_s_memory_may_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"train: an expert's worker needs"):
        check_cards(recipe("sdxl", "cluster.gpu_memory_gb=24", "cluster.logical_gpus=true"), ["train"])
    check_cards(recipe("sdxl", "cluster.logical_gpus=true"), ["train"])


@pytest.mark.parametrize(
    ("answer", "expected"), [("echo 24564; echo 81559", [24564.0, 81559.0]), ("exit 9", []), ("echo No devices", [])]
)
def test_a_machine_s_cards_are_those_that_nvidia_s_tool_lists(
    answer: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "_ASK", ("sh", "-c", answer))
    assert cards.gpu_memories_mib() == expected


def test_a_machine_without_the_tool_has_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_ASK", ("no-such-tool-anywhere",))
    assert cards.gpu_memories_mib() == []
