"""The tokenizer and the text encoder, fitted to tell a scene's facts from its caption and frozen from then on.

CLIP's text encoder reaches Stable Diffusion trained and frozen as well; a denoiser that need not teach its text encoder
to read learns shapes many times sooner.

Shapes: N captions, T tokens, D features, Q queries (one an object, one for the background, one for the style).
"""

import json
import logging
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from selma_ray.miniature.captions import write_caption
from selma_ray.miniature.facts import COUNT_WORDS, RELATION_PHRASES
from selma_ray.miniature.pretrain.dataset import NO_COLOUR
from selma_ray.miniature.pretrain.progress import Budget, Meter, load_checkpoint, save_checkpoint, train_precision
from selma_ray.miniature.scenes import BACKGROUNDS, INVERSE, RELATIONS, STYLES, Group, Scene
from selma_ray.miniature.skills import SKILLS, any_colour, is_test_caption, sample_scene
from selma_ray.miniature.sprites import COLOURS, OBJECTS

__all__ = ["MAX_TOKENS", "SceneProbe", "load_tokenizer", "train_text_encoder"]

logger = logging.getLogger(__name__)

MAX_TOKENS = 64
_SHORT_TOKENS = 24
_VOCABULARY = 512
_PEAK_RATE = 1.5e-3
_BATCH = 64
_COLOUR_PLACE = {name: place for place, name in enumerate(COLOURS)}


def _build_tokenizer(folder: Path, seed: int) -> CLIPTokenizer:
    """Train a BPE on captions of the world, so that most words are one token, and save it as a CLIPTokenizer."""
    rng = random.Random(seed)
    captions = [write_caption(sample_scene(SKILLS[i % 5], rng), rng, long=i % 3 == 0) for i in range(20000)]
    captions += [*COUNT_WORDS.values(), *(phrase for phrases in RELATION_PHRASES.values() for phrase in phrases)]
    blank = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = blank.backend_tokenizer.normalizer  # pyright: ignore[reportAttributeAccessIssue]
    trained.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=_VOCABULARY,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Open the tokenizer that `build_tokenizer` saved."""
    return CLIPTokenizer.from_pretrained(folder)


def _new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make an untrained text encoder of about 0.9 million parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class SceneProbe(nn.Module):
    """Reads a scene's facts from token states: one learned query an object, two for background and style."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries_QD = nn.Parameter(torch.randn(len(OBJECTS) + 2, width) * 0.5)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.count = nn.Linear(width, 5)
        self.colour = nn.Linear(width, NO_COLOUR + 1)
        self.place = nn.Linear(width, len(RELATIONS) + 1)
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.style = nn.Linear(width, len(STYLES))

    def forward(self, states_NTD: torch.Tensor) -> list[torch.Tensor]:
        """Return logits of counts, colours and places by object, of the background and of the style."""
        queries_NQD = self.queries_QD.expand(len(states_NTD), -1, -1)
        read_NQD = self.norm(queries_NQD + self.attention(queries_NQD, states_NTD, states_NTD)[0])
        objects = read_NQD[:, : len(OBJECTS)]
        return [
            self.count(objects),
            self.colour(objects),
            self.place(objects),
            self.background(read_NQD[:, -2]),
            self.style(read_NQD[:, -1]),
        ]


def _label_scene(scene: Scene) -> list[list[int] | int]:
    """Return the classes that `SceneProbe` tells apart, in its order."""
    counts, colours, places = [0] * len(OBJECTS), [NO_COLOUR] * len(OBJECTS), [len(RELATIONS)] * len(OBJECTS)
    relations = (scene.relation, INVERSE[scene.relation]) if scene.relation else (None, None)
    for group, relation in zip(scene.groups, relations, strict=False):
        column = OBJECTS.index(group.object)
        counts[column], colours[column] = group.count, _COLOUR_PLACE[group.colour]
        if relation is not None:
            places[column] = RELATIONS.index(relation)
    return [counts, colours, places, BACKGROUNDS.index(scene.background), STYLES.index(scene.style)]


def _probe_loss(logits: list[torch.Tensor], labels: list[torch.Tensor]) -> torch.Tensor:
    """Sum the cross entropies; objects that are present weigh as much as the many that are absent."""
    present = labels[0].flatten() > 0
    total = logits[0].new_zeros(())
    for scores, label in zip(logits, labels, strict=True):
        losses = functional.cross_entropy(scores.flatten(0, -2).float(), label.flatten(), reduction="none")
        by_object = label.dim() == 2
        total = total + (losses[present].mean() + losses[~present].mean() if by_object else losses.mean())
    return total


def _sample_labelled_captions(
    tokenizer: CLIPTokenizer, rng: random.Random, size: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Write clean captions of scenes and return their tokens [N, T] and labels; T is small in most batches."""
    short = rng.random() < 0.7
    captions: list[str] = []
    labels: list[list[list[int] | int]] = []
    while len(captions) < size:
        skill = rng.choice(SKILLS)
        scene = sample_scene(skill, rng)
        if rng.random() < 0.5:  # colours beyond what the skills use
            groups = tuple(Group(group.object, any_colour(group.object, rng), group.count) for group in scene.groups)
            scene = Scene(groups, scene.relation, scene.background, scene.style)
        caption = write_caption(scene, rng, long=not short and rng.random() < 0.6)
        if not is_test_caption(caption):
            captions.append(caption)
            labels.append(_label_scene(scene))
    length = _SHORT_TOKENS if short else MAX_TOKENS
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, [torch.tensor(column) for column in zip(*labels, strict=True)]


def train_text_encoder(work_dir: Path, budget: Budget, device: str, seed: int) -> None:
    """Fit the text encoder with a `SceneProbe` on clean captions and save it."""
    tokenizer = _build_tokenizer(work_dir / "tokenizer", seed)
    model, probe = _new_text_encoder(tokenizer).to(device), SceneProbe(128).to(device)
    both = nn.ModuleList([model, probe])
    optimizer = torch.optim.AdamW(both.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    path = work_dir / "text_encoder.pt"
    saved = load_checkpoint(path)
    if saved:
        both.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        budget.resume(saved)
    meter, rng = Meter("text encoder", budget), random.Random(f"{seed} {budget.step}")
    while budget.progress < 1:
        tokens, labels = _sample_labelled_captions(tokenizer, rng, _BATCH)
        budget.set_rate(optimizer, _PEAK_RATE)
        with train_precision(device):
            logits = probe(model(tokens.to(device)).last_hidden_state)
        loss = _probe_loss(logits, [label.to(device) for label in labels])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        budget.step += 1
        meter.add(_BATCH, loss=loss.item())
        if budget.step % 1000 == 0:
            _save(path, both, optimizer, budget)
    _save(path, both, optimizer, budget)
    model.save_pretrained(work_dir / "text_encoder")
    logger.info("text encoder: whole captions read right: %.4f", _measure_reading(model, probe, tokenizer, rng))


def _save(path: Path, both: nn.Module, optimizer: torch.optim.Optimizer, budget: Budget) -> None:
    save_checkpoint(path, {"model": both.state_dict(), "optimizer": optimizer.state_dict(), **budget.state()})


@torch.inference_mode()
def _measure_reading(model: CLIPTextModel, probe: SceneProbe, tokenizer: CLIPTokenizer, rng: random.Random) -> float:
    """Return the share of fresh captions of which every fact is read right."""
    right = []
    for _ in range(10):
        tokens, labels = _sample_labelled_captions(tokenizer, rng, 100)
        device = next(model.parameters()).device
        logits = probe(model(tokens.to(device)).last_hidden_state)
        hits = [(s.argmax(-1).cpu() == label).flatten(1).all(1) if label.dim() == 2 else s.argmax(-1).cpu() == label
                for s, label in zip(logits, labels, strict=True)]  # fmt: skip
        right.append(torch.stack(hits).all(0).float().mean().item())
    return sum(right) / len(right)
