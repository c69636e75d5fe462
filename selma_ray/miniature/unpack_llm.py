"""`python -m selma_ray.miniature.unpack_llm GGUF FOLDER`: a quantized GGUF file becomes a Hugging Face folder in bfloat16, on the CPU."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

__all__ = ["unpack"]


def unpack(source: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder."""
    disable_progress_bar()
    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    model = AutoModelForCausalLM.from_pretrained(
        **location, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    unpack(*map(Path, sys.argv[1:]))
