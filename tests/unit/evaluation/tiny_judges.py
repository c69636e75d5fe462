"""Small randomly initialised judges in their real classes and folder formats."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizer,
    PreTrainedTokenizerFast,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

from selma_ray.miniature.judge import JudgeConfig, JudgeModel, MiniatureJudge

WORDS = ["is", "are", "there", "a", "an", "the", "two", "red", "blue", "green", "apple", "cup", "car", "picture", "?"]


def save_tiny_vilt(folder: Path) -> Path:
    """Write a ViLT that answers "yes", "no" or "2"."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]))
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=5 + len(WORDS) + len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=64, patch_size=16, id2label={0: "yes", 1: "no", 2: "2"}, label2id={"yes": 0, "no": 1, "2": 2},
    )  # fmt: skip
    ViltForQuestionAnswering(config).save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "words.txt"), model_max_length=40)
    ViltProcessor(ViltImageProcessor(size={"shortest_edge": 64}), tokenizer).save_pretrained(folder)
    return folder


def save_tiny_miniature_judge(folder: Path) -> Path:
    """Write the miniature's judge with small random weights."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    torch.manual_seed(1)
    model = JudgeModel(JudgeConfig(vocab_size=len(vocabulary), width=32, stem_width=16, num_heads=2))
    MiniatureJudge(
        model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    ).save_pretrained(folder)
    return folder
