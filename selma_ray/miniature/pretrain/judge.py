"""Training of the judge: all facts of a scene at once, and a handful of questions about it, half of them to be denied.

Shapes: N images, Q questions an image, T tokens a question, D objects.
"""

import itertools
import logging
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from selma_ray.miniature.judge import JudgeModel, MiniatureJudge, MiniatureJudgeConfig, tokenize_questions
from selma_ray.miniature.pretrain.augment import augment
from selma_ray.miniature.pretrain.autoencoder import images_to_tensor
from selma_ray.miniature.pretrain.dataset import NO_COLOUR, SceneArrays, load_dataset
from selma_ray.miniature.pretrain.progress import Budget, Meter, load_checkpoint, save_checkpoint, train_precision
from selma_ray.miniature.pretrain.question_bank import QuestionBank

__all__ = ["NUM_TEST_SCENES", "RowSource", "build_judge_tokenizer", "train_judge"]

logger = logging.getLogger(__name__)

NUM_TEST_SCENES = 4000  # the last scenes of the dataset, never trained on
_PEAK_RATE = 2e-3
_BATCH = 64
_QUESTIONS = 24


def build_judge_tokenizer(questions: list[str]) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer that knows every word of the questions."""
    words = sorted(set(itertools.chain.from_iterable(question.lower().strip("?").split() for question in questions)))
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "?", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    backend.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def train_judge(work_dir: Path, budget: Budget, device: str, seed: int) -> None:
    """Fit the judge, calibrate it on held-out scenes and save its folder."""
    scenes = load_dataset(work_dir / "data")
    bank = QuestionBank()
    tokenizer = build_judge_tokenizer(bank.texts)
    bank_tokens, bank_slots = tokenize_questions(tokenizer, bank.texts)[:, :12], torch.tensor(bank.slots)
    model = JudgeModel(MiniatureJudgeConfig(vocab_size=len(tokenizer))).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    path = work_dir / "judge.pt"
    saved = load_checkpoint(path)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        budget.resume(saved)
    roundtrips = np.load(work_dir / "roundtrips.npy", mmap_mode="r")
    row_source = RowSource(scenes, len(roundtrips))
    meter, rng = Meter("judge", budget), np.random.default_rng(seed + budget.step)
    while budget.progress < 1:
        rows = row_source.draw(_BATCH, rng)
        pixels = augment(scenes.images[rows], rows, roundtrips, rng).to(device)
        asked, answers = bank.draw(scenes, rows, _QUESTIONS, rng)
        budget.set_rate(optimizer, _PEAK_RATE)
        with train_precision(device):
            states = model.encode_images(pixels)
            facts = model.read_facts(states)
            different, places = asked.unique(return_inverse=True)
            questions, pointers = model.encode_questions(bank_tokens[different].to(device))
            logits = model.answer_encoded(states, questions[places], pointers[places])
        slots = bank_slots[different].flatten().to(device)
        point_loss = functional.cross_entropy(pointers.float().flatten(0, 1), slots)
        fact_loss = _dense_loss(facts, scenes, rows, device)
        answer_loss = functional.cross_entropy(logits.float().flatten(0, 1), answers.flatten().to(device))
        optimizer.zero_grad()
        (fact_loss + answer_loss + point_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        budget.step += 1
        right = (logits.argmax(-1).cpu() == answers).float().mean().item()
        meter.add(_BATCH, facts=fact_loss.item(), answers=answer_loss.item(), right=right)
        if budget.step % 250 == 0:
            _save(path, model, optimizer, budget)
    _save(path, model, optimizer, budget)
    judge = MiniatureJudge(model, tokenizer)
    model.config.temperature = _fit_temperature(judge, bank, scenes, bank_tokens, rng)
    judge.save_pretrained(work_dir / "judge")
    logger.info("judge: saved, temperature %.3f", model.config.temperature)


class RowSource:
    """Draws training scenes: half of them with what the mix makes rare, and two fifths that have a round trip."""

    def __init__(self, scenes: SceneArrays, num_roundtrips: int) -> None:
        usable = len(scenes) - NUM_TEST_SCENES
        settings, counts = np.asarray(scenes.settings[:usable]), np.asarray(scenes.counts[:usable])
        rare = (settings[:, 1] > 0) | (settings[:, 0] > 0) | (counts.max(axis=1) > 2)
        early = np.arange(usable) < num_roundtrips
        everything = np.ones(usable, bool)
        self.pools = [np.flatnonzero(kind & place) for kind in (rare, everything) for place in (early, everything)]

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Return `size` row numbers."""
        kinds = rng.choice(len(self.pools), size=size, p=(0.2, 0.3, 0.2, 0.3))
        return np.array([self.pools[kind][rng.integers(len(self.pools[kind]))] for kind in kinds])


def _save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, budget: Budget) -> None:
    save_checkpoint(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **budget.state()})


def _dense_loss(facts: dict[str, torch.Tensor], scenes: SceneArrays, rows: np.ndarray, device: str) -> torch.Tensor:
    """Sum the losses on every fact; colours and centres count where the object is present."""
    counts = torch.from_numpy(scenes.counts[rows].astype(np.int64)).to(device)
    colours = torch.from_numpy(scenes.colours[rows].astype(np.int64)).to(device)
    centres = torch.from_numpy(scenes.centres[rows].astype(np.float32)).to(device)
    settings = torch.from_numpy(scenes.settings[rows].astype(np.int64)).to(device)
    present = counts > 0
    count_losses = functional.cross_entropy(facts["count"].float().flatten(0, 1), counts.flatten(), reduction="none")
    flat = present.flatten()
    loss = count_losses[flat].mean() + 2 * count_losses[~flat].mean()
    assert (colours[present] != NO_COLOUR).all()
    loss = loss + functional.cross_entropy(facts["colour"].float()[present], colours[present])
    loss = loss + 4 * functional.smooth_l1_loss(facts["centre"].float()[present], centres[present], beta=0.1)
    loss = loss + 0.5 * functional.cross_entropy(facts["background"].float(), settings[:, 0])
    return loss + 0.5 * functional.cross_entropy(facts["style"].float(), settings[:, 1])


@torch.inference_mode()
def _fit_temperature(
    judge: MiniatureJudge, bank: QuestionBank, scenes: SceneArrays, bank_tokens: torch.Tensor, rng: np.random.Generator
) -> float:
    """Return the temperature under which answers about held-out scenes are likeliest."""
    judge.model.eval()
    device = judge.model.device
    all_logits, all_answers = [], []
    for start in range(len(scenes) - NUM_TEST_SCENES, len(scenes) - NUM_TEST_SCENES // 2, 100):
        rows = np.arange(start, start + 100)
        states = judge.model.encode_images(images_to_tensor(scenes.images[rows]).to(device))
        asked, answers = bank.draw(scenes, rows, _QUESTIONS, rng)
        all_logits.append(judge.model(states, bank_tokens[asked].to(device)).float().cpu().flatten(0, 1))
        all_answers.append(answers.flatten())
    logits, answers = torch.cat(all_logits), torch.cat(all_answers)
    candidates = [0.5 * 1.05**step for step in range(40)]
    losses = [functional.cross_entropy(logits / candidate, answers).item() for candidate in candidates]
    return round(candidates[int(np.argmin(losses))], 4)
