"""Pipelines with random weights, made on the device in the precision they are used in: speed and memory do not depend on weights.

The configurations are the published ones; the tiny ones have the same classes and far smaller numbers.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu_parts.device import fp32_products
from selma_ray.experts.config import ExpertsConfig
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.parts import DTYPES
from selma_ray.models.placing import place_pipeline
from selma_ray.models.published import write_configuration
from selma_ray.run.recipe import load_recipe

__all__ = ["FAMILIES", "Subject", "as_diffusers_has_it", "random_part", "random_pipeline", "subject"]

_RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"
_ROUNDS = 3
_LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}

_TINY_CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_TINY_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
_TINY_VAE = {
    "block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4, "sample_size": 64
}  # fmt: skip


@dataclass(frozen=True)
class _Size:
    """What of a family is measured, and with which numbers in place of the published ones."""

    recipe: str
    steps: int
    batch_size: int
    tiny: Mapping[str, Mapping[str, Any]]


FAMILIES: Mapping[str, _Size] = {
    "sdxl": _Size(
        "sdxl", 20, 4,
        {
            "unet": {
                "sample_size": 8, "block_out_channels": [16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8,
                "transformer_layers_per_block": [1, 1, 1], "attention_head_dim": [2, 2, 2], "cross_attention_dim": 32,
                "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16,
            },
            "vae": _TINY_VAE, "text_encoder": _TINY_CLIP, "text_encoder_2": _TINY_CLIP,
        },
    ),
    "sd3": _Size(
        "sd35", 20, 4,
        {
            "transformer": {
                "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
                "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32,
                "pos_embed_max_size": 16, "dual_attention_layers": [0],
            },
            "vae": _TINY_VAE, "text_encoder": _TINY_CLIP, "text_encoder_2": _TINY_CLIP, "text_encoder_3": _TINY_T5,
        },
    ),
    "flux": _Size(
        "flux", 8, 2,
        {
            "transformer": {
                "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
                "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": [4, 4, 8],
            },
            "vae": _TINY_VAE, "text_encoder": _TINY_CLIP, "text_encoder_2": _TINY_T5,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A family as it is measured: configurations in a folder without weights, and what its recipe says, for fewer steps."""

    family: str
    model: ModelConfig
    sampling: SamplingConfig
    experts: ExpertsConfig
    batch_size: int
    rounds: int
    """Turns that ways to do the same take, after one that warms up."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of rendering."""
        return DTYPES[self.model.dtype]


def subject(family: str, folder: Path, device: torch.device, *, tiny: bool) -> Subject:
    """Write a family's configurations into a new folder and return what is measured of it.

    On the CPU, fp16 becomes bf16 in training, where recipes allow it for GPUs alone.
    """
    size = FAMILIES[family]
    recipe = load_recipe(_RECIPES / f"{size.recipe}.yaml")
    folder.mkdir(parents=True)
    write_configuration(recipe.model.name, folder)
    cuda = device.type == "cuda"
    experts = recipe.experts.model_copy(
        update={
            "batch_size": recipe.experts.micro_batch_size,  # a step of one pass: gradients of more are added up in the same memory
            "precision": recipe.experts.precision if cuda else "bf16",
            "gpus_per_worker": 1 if cuda else 0,
            "steps": 10_000,
        }
    )
    steps, rounds, sampling = size.steps, _ROUNDS, recipe.images.sampling
    if tiny:
        _shrink(folder, size.tiny)
        steps, rounds, sampling = 2, 1, sampling.model_copy(update={"width_px": 32, "height_px": 32})
        experts = experts.model_copy(update={"lora": experts.lora.model_copy(update={"rank": 4, "alpha": 4})})
    return Subject(
        family,
        ModelConfig(name=str(folder), dtype=recipe.model.dtype),
        sampling.model_copy(update={"steps": steps}),
        experts,
        size.batch_size,
        rounds,
    )


@contextmanager
def as_diffusers_has_it(pipeline: Any, subject: Subject) -> Iterator[None]:
    """Take back what `place_pipeline` sets, whose device the pipeline is on."""
    device = pipeline._execution_device
    pipeline.vae.disable_slicing()
    try:
        with fp32_products("highest"):
            yield
    finally:
        place_pipeline(pipeline, subject.model, device)


def random_pipeline(subject: Subject, device: torch.device) -> Any:
    """Return the whole pipeline on a device, every part with random weights, as diffusers has it."""
    torch.manual_seed(0)
    folder = Path(subject.model.name)
    index = json.loads((folder / "model_index.json").read_text())
    pipeline_class = getattr(diffusers, index.pop("_class_name"))
    parts = {name: random_part(folder, name, subject.dtype, device) for name in index}
    tokenizers = {
        name.replace("text_encoder", "tokenizer"): _letters() for name in index if name.startswith("text_encoder")
    }
    pipeline = pipeline_class(**parts, **tokenizers)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def random_part(folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return one part of a pipeline with random weights, made on the device."""
    library, class_name = json.loads((folder / "model_index.json").read_text())[name]
    part_class = getattr(_LIBRARIES[library], class_name)
    if name == "scheduler":
        return part_class.from_pretrained(folder, subfolder=name)
    with _made_on(device, dtype):
        if library == "transformers":
            config = part_class.config_class.from_pretrained(folder, subfolder=name)
            part = part_class(config)
        else:
            part = part_class.from_config(part_class.load_config(folder, subfolder=name))
    return part.to(device, dtype).eval()


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _shrink(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    for part, numbers in changes.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(numbers)))


def _letters() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few letters: what a text encoder takes time for is its length, which is padded."""
    pieces = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz ."]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=2)),
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77,
    )  # fmt: skip
