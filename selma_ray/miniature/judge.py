"""The miniature's judge: a visual question answerer that encodes an image once and answers many questions about it.

It answers "Is the banana blue?" with yes or no and "How many bananas are there?" with a number. One learned query an
object gathers what the image shows of that object, and a question points at the two slots that it is about.

Shapes: N images, Q questions an image, T tokens a question, S slots of an image, D features, A answers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from selma_ray.errors import JudgeError

__all__ = ["ANSWERS", "JudgeModel", "MiniatureJudge", "MiniatureJudgeConfig", "images_to_pixels", "tokenize_questions"]

ANSWERS: tuple[str, ...] = ("no", "yes", "0", "1", "2", "3", "4")
MAX_QUESTION_TOKENS = 16


class MiniatureJudgeConfig(PreTrainedConfig):
    """Sizes of the judge and the temperature that calibrates its answers."""

    model_type = "selma_miniature_judge"

    def __init__(
        self,
        vocab_size: int = 128,
        width: int = 96,
        stem_width: int = 48,
        num_heads: int = 4,
        question_layers: int = 2,
        num_objects: int = 12,
        num_colours: int = 8,
        num_backgrounds: int = 6,
        num_styles: int = 4,
        image_size: int = 64,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.width = width
        self.stem_width = stem_width
        self.num_heads = num_heads
        self.question_layers = question_layers
        self.num_objects = num_objects
        self.num_colours = num_colours
        self.num_backgrounds = num_backgrounds
        self.num_styles = num_styles
        self.image_size = image_size
        self.temperature = temperature


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, features_NCHW: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        return functional.relu(features_NCHW + self.body(features_NCHW))


class _Attention(nn.Module):
    """A transformer layer: queries read a memory (themselves when none is given), then a feed-forward net."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self,
        queries_NQD: torch.Tensor,
        memory_NSD: torch.Tensor | None = None,
        keep_NS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return queries of the same shape; `keep_NS` is false where the memory is padding."""
        normed_NQD = self.norm(queries_NQD)
        key, value = (
            self._split(part) for part in self.to_kv(normed_NQD if memory_NSD is None else memory_NSD).chunk(2, -1)
        )
        mask = None if keep_NS is None else keep_NS[:, None, None, :]
        seen = functional.scaled_dot_product_attention(self._split(self.to_q(normed_NQD)), key, value, attn_mask=mask)
        queries_NQD = queries_NQD + self.to_out(seen.transpose(1, 2).flatten(2))
        return queries_NQD + self.feed(queries_NQD)

    def _split(self, states_NTD: torch.Tensor) -> torch.Tensor:
        return states_NTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class JudgeModel(PreTrainedModel):
    """Encodes images once and answers questions about them."""

    config_class = MiniatureJudgeConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MiniatureJudgeConfig) -> None:
        super().__init__(config)
        width, stem = config.width, config.stem_width
        self.trunk = nn.Sequential(
            nn.Conv2d(3, stem, 6, stride=4, padding=1),
            nn.BatchNorm2d(stem),
            nn.ReLU(),
            _Residual(stem),
            nn.Conv2d(stem, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _Residual(width),
            _Residual(width),
        )
        num_cells = (config.image_size // 8) ** 2
        self.cell_places = nn.Parameter(torch.randn(num_cells, width) * 0.02)
        self.object_queries = nn.Parameter(torch.randn(config.num_objects + 2, width) * 0.3)
        self.gather = nn.ModuleList([_Attention(width, config.num_heads) for _ in range(2)])
        self.fact_heads = nn.ModuleDict(
            {
                "count": nn.Linear(width, 5),
                "colour": nn.Linear(width, config.num_colours),
                "centre": nn.Linear(width, 2),
                "background": nn.Linear(width, config.num_backgrounds),
                "style": nn.Linear(width, config.num_styles),
            }
        )
        self.words = nn.Embedding(config.vocab_size, width)
        self.word_places = nn.Parameter(torch.randn(MAX_QUESTION_TOKENS, width) * 0.1)
        self.read = nn.ModuleList([_Attention(width, config.num_heads) for _ in range(config.question_layers)])
        self.num_slots = config.num_objects + 2
        self.point = nn.Linear(width, 2 * self.num_slots)
        num_facts = 5 + config.num_colours + 2 + config.num_backgrounds + config.num_styles
        self.ask = nn.Linear(width, 2 * width)
        self.look = nn.Linear(2 * (width + num_facts), 2 * width)
        self.answer_head = nn.Sequential(
            nn.LayerNorm(6 * width), nn.Linear(6 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, len(ANSWERS))
        )
        self.post_init()

    def encode_images(self, pixel_values_NCHW: torch.Tensor) -> torch.Tensor:
        """Encode images in [-1, 1] into states [N, S, D], a slot an object, one for the background, one for the style."""
        map_NSD = self.trunk(pixel_values_NCHW).flatten(2).transpose(1, 2) + self.cell_places
        slots_NSD = self.object_queries.expand(len(map_NSD), -1, -1)
        for block in self.gather:
            slots_NSD = block(slots_NSD, map_NSD)
        return slots_NSD

    def read_facts(self, image_states_NSD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits of the dense facts that training supervises: by object, of the background, of the style."""
        count = self.config.num_objects
        objects_NOD = image_states_NSD[:, :count]
        sources = {"background": image_states_NSD[:, count], "style": image_states_NSD[:, count + 1]}
        return {name: head(sources.get(name, objects_NOD)) for name, head in self.fact_heads.items()}

    def encode_questions(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return question states [B, D] and logits [B, 2, S] of the two slots that each question is about."""
        keep_BT = tokens_BT != 0
        keep_BT[:, 0] = True
        states_BTD = self.words(tokens_BT) + self.word_places[: tokens_BT.shape[1]]
        for block in self.read:
            states_BTD = block(states_BTD, None, keep_BT)
        question_BD = states_BTD[:, 0]
        return question_BD, self.point(question_BD).unflatten(-1, (2, self.num_slots))

    def answer_encoded(
        self, image_states_NSD: torch.Tensor, question_NQD: torch.Tensor, pointers_NQ2S: torch.Tensor
    ) -> torch.Tensor:
        """Return answer logits [N, Q, A] for encoded questions about each image."""
        slots_NSF = torch.cat([image_states_NSD, self._tabulate_facts(image_states_NSD)], dim=-1)
        looked = torch.einsum("nqps,nsf->nqpf", pointers_NQ2S.softmax(-1), slots_NSF).flatten(2)
        seen, asked = self.look(looked), self.ask(question_NQD)
        return self.answer_head(torch.cat([seen, asked, seen * asked], dim=-1))

    def forward(self, image_states_NSD: torch.Tensor, tokens_NQT: torch.Tensor) -> torch.Tensor:
        """Return answer logits [N, Q, A] for Q tokenized questions about each image; token 0 is padding."""
        question_BD, pointers_B2S = self.encode_questions(tokens_NQT.flatten(0, 1))
        shape = tokens_NQT.shape[:2]
        return self.answer_encoded(image_states_NSD, question_BD.unflatten(0, shape), pointers_B2S.unflatten(0, shape))

    def _tabulate_facts(self, image_states_NSD: torch.Tensor) -> torch.Tensor:
        """Lay the probabilities of all facts out by slot; answers learn from them, they do not learn from answers."""
        facts = self.read_facts(image_states_NSD.detach())
        by_object = [facts["count"].softmax(-1), facts["colour"].softmax(-1), facts["centre"]]
        objects = torch.cat(by_object, dim=-1)
        of_image = torch.cat([facts["background"].softmax(-1), facts["style"].softmax(-1)], dim=-1)
        rows = functional.pad(objects, (0, of_image.shape[-1], 0, 2))
        columns = functional.pad(of_image, (objects.shape[-1], 0))
        is_setting = torch.arange(self.num_slots, device=rows.device) >= self.config.num_objects
        return (rows + columns[:, None] * is_setting[:, None]).detach()


class MiniatureJudge:
    """The judge with its tokenizer: PIL images and question strings in, calibrated probabilities out."""

    def __init__(self, model: JudgeModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MiniatureJudge":
        """Open a judge's folder.

        Raises:
            JudgeError: when the folder holds no judge.
        """
        if not (Path(folder) / "config.json").exists():
            raise JudgeError(f"judge: {folder} holds no config.json; give the folder of a saved judge")
        model = JudgeModel.from_pretrained(folder, dtype=torch.float32)
        return cls(model, PreTrainedTokenizerFast.from_pretrained(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model (safetensors) and the tokenizer into a folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Encode images into states [N, S, D], to be asked as often as you like."""
        pixels = images_to_pixels(images, self.model.config.image_size)
        return self.model.encode_images(pixels.to(self.model.device))

    @torch.inference_mode()
    def answer(self, image_states_NSD: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Return, for each image, probabilities [Q, A] of `ANSWERS` for each of its questions."""
        most = max((len(asked) for asked in questions), default=0)
        if most == 0:
            return [torch.zeros(0, len(ANSWERS)) for _ in questions]
        tokens_NQT = torch.zeros(len(questions), most, MAX_QUESTION_TOKENS, dtype=torch.long)
        for row, asked in enumerate(questions):
            if asked:
                tokens_NQT[row, : len(asked)] = tokenize_questions(self.tokenizer, asked)
        logits = self.model(image_states_NSD, tokens_NQT.to(image_states_NSD.device)).float()
        probabilities = (logits / self.model.config.temperature).softmax(-1).cpu()
        return [probabilities[row, : len(asked)] for row, asked in enumerate(questions)]

    def probability_yes(self, image_states_NSD: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return, for each image, P(yes) against P(no) of each of its yes/no questions."""
        answers = self.answer(image_states_NSD, questions)
        return [(scores[:, 1] / (scores[:, 0] + scores[:, 1])).tolist() for scores in answers]


def tokenize_questions(tokenizer: PreTrainedTokenizerFast, questions: Sequence[str]) -> torch.Tensor:
    """Return tokens [Q, T], padded with zeros."""
    encoded = tokenizer(
        list(questions), padding="max_length", max_length=MAX_QUESTION_TOKENS, truncation=True, return_tensors="pt"
    )
    return cast(torch.Tensor, encoded["input_ids"])


def images_to_pixels(images: Sequence[Image.Image], image_size: int = 64) -> torch.Tensor:
    """Turn PIL images into floats in [-1, 1] of shape [N, C, H, W], resizing those of another size."""
    arrays = []
    for image in images:
        image = image.convert("RGB")
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BOX)
        arrays.append(np.asarray(image))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
