"""Small randomly initialised judges in their real classes and folder formats."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

from selma_ray.miniature.judge import JudgeModel, MiniatureJudge, MiniatureJudgeConfig

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
    model = JudgeModel(MiniatureJudgeConfig(vocab_size=len(vocabulary), width=32, stem_width=16, num_heads=2))
    MiniatureJudge(
        model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    ).save_pretrained(folder)
    return folder


def save_tiny_blip(folder: Path) -> Path:
    """Write a BLIP that answers questions in words."""
    tokenizer = _bert_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(2)
    config = BlipConfig(
        text_config={**sizes, **special, "vocab_size": len(tokenizer), "encoder_hidden_size": 32},
        vision_config={**sizes, "image_size": 64, "patch_size": 16, "initializer_range": 0.5},
    )
    model = BlipForQuestionAnswering(config)
    with torch.no_grad():  # larger weights, so that answers differ from image to image
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def save_tiny_idefics3(folder: Path) -> Path:
    """Write a vision-language model that vLLM runs without torchvision; it knows a few words."""
    special = [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
    ]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = [*WORDS, "yes", "no", "Yes", "No", "Please", "answer", "or", ".", "USER", "ASSISTANT", ":", "2", "3"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=special[4:],
    )  # fmt: skip
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        text_config={
            **sizes, "model_type": "llama", "vocab_size": len(vocabulary), "num_key_value_heads": 2,
            "max_position_embeddings": 512, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
        },
        image_token_id=vocabulary["<image>"], scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():  # larger weights, so that answers differ from image to image
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        model.lm_head.weight.normal_(std=0.05)  # and yes and no stay among the likely words
    model.save_pretrained(folder)
    template = (
        "{% for message in messages %}USER : {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %} ASSISTANT :{% endif %}"
    )
    edge = {"longest_edge": 32}
    images = Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(folder)
    return folder


def _bert_tokenizer(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "yes", "no", *letters]
    (folder / "words.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "words.txt"), model_max_length=40)
