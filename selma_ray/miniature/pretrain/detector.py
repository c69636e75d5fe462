"""Training of the second judge, the detector: scenes of a seed of their own, empty ones, dark ones and crowded ones among them.

Shapes: N images, O objects, h x w cells, B placed objects of a batch.
"""

import logging
import random
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from selma_ray.miniature.detector import CELL_PX, DetectorModel, MiniatureDetector, MiniatureDetectorConfig
from selma_ray.miniature.pretrain.augment import augment
from selma_ray.miniature.pretrain.autoencoder import images_to_tensor
from selma_ray.miniature.pretrain.dataset import SceneArrays, load_dataset, scene_rng
from selma_ray.miniature.pretrain.judge import NUM_TEST_SCENES, RowSource
from selma_ray.miniature.pretrain.mixture import sample_web_scene
from selma_ray.miniature.pretrain.progress import Budget, Meter, load_checkpoint, save_checkpoint, train_precision
from selma_ray.miniature.scenes import BACKGROUNDS, STYLES, Group, Scene, Spot, paint_scene, place_objects
from selma_ray.miniature.sprites import COLOURS, OBJECTS

__all__ = ["train_detector"]

logger = logging.getLogger(__name__)

_PEAK_RATE = 2e-3
_BATCH = 64
_HARD = 8  # scenes of a batch that are empty, dark or crowded
_BLUR_CELLS = 0.7
_DARK = (0.05, 0.6)  # brightness of dark scenes
_INVISIBLE = 0.12  # brightness below which nothing counts as shown
_Labels = tuple[list[Spot], int, int]  # what is placed, the background's and the style's places


def train_detector(work_dir: Path, budget: Budget, device: str, seed: int) -> None:
    """Fit the detector, calibrate its peaks on held-out scenes and save its folder; `seed` is that of the data too."""
    scenes = load_dataset(work_dir / "data")
    model = DetectorModel(MiniatureDetectorConfig()).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    path = work_dir / "detector.pt"
    saved = load_checkpoint(path)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        budget.resume(saved)
    roundtrips = np.load(work_dir / "roundtrips.npy", mmap_mode="r")
    source, rng = RowSource(scenes, len(roundtrips)), np.random.default_rng(seed + budget.step)
    meter = Meter("detector", budget)
    while budget.progress < 1:
        rows = source.draw(_BATCH - _HARD, rng)
        hard = [_hard_scene(random.Random(int(rng.integers(2**31)))) for _ in range(_HARD)]
        drawn = augment(scenes.images[rows], rows, roundtrips, rng)
        pixels = torch.cat([drawn, images_to_tensor(np.stack([image for image, _ in hard]))])
        labels = [_labels(scenes, seed, int(row)) for row in rows] + [each for _, each in hard]
        budget.set_rate(optimizer, _PEAK_RATE)
        with train_precision(device):
            outputs = model(pixels.to(device, memory_format=torch.channels_last))
        losses = _losses(outputs, labels)
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        budget.step += 1
        meter.add(_BATCH, **{name: loss.item() for name, loss in losses.items()})
        if budget.step % 100 == 0:
            _save(path, model, optimizer, budget)
    _save(path, model, optimizer, budget)
    model.config.temperature = _fit_temperature(model, scenes)
    MiniatureDetector(model).model.save_pretrained(work_dir / "detector")
    logger.info("detector: saved, temperature %.3f", model.config.temperature)


def _save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, budget: Budget) -> None:
    save_checkpoint(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **budget.state()})


def _labels(scenes: SceneArrays, seed: int, row: int) -> _Labels:
    """Return what a scene of the dataset shows and where: it is sampled and placed again, from its own random numbers."""
    rng = scene_rng(seed, row)
    scene, _ = sample_web_scene(rng)
    background, style = scenes.settings[row].tolist()
    return place_objects(scene, rng), background, style


def _hard_scene(rng: random.Random) -> tuple[np.ndarray, _Labels]:
    """Draw a scene that the mix does not have: nothing in it, too dark, or one object more than fits the layouts."""
    background, style = rng.choice(BACKGROUNDS), rng.choice(STYLES)
    kind = rng.choice(("empty", "dark", "crowded"))
    spots: list[Spot] = []
    if kind == "crowded":
        group = Group(rng.choice(OBJECTS), rng.choice(list(COLOURS)), 5)
        centres = ((0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8))
        spots = [Spot(group, 64 * x + rng.uniform(-2, 2), 64 * y + rng.uniform(-2, 2), 20) for x, y in centres]
        spots = rng.sample(spots, rng.randint(1, 5))  # fewer of them stand where no layout has them
    elif kind == "dark":
        scene, _ = sample_web_scene(rng)
        spots, background, style = place_objects(scene, rng), scene.background, scene.style
    scene = Scene((), None, background, style)
    image = np.asarray(paint_scene(scene, spots, rng))
    if kind == "dark":
        brightness = rng.uniform(*_DARK)
        image = (image * brightness).astype(np.uint8)
        spots = spots if brightness > _INVISIBLE else []
    return image, (spots, BACKGROUNDS.index(background), STYLES.index(style))


def _losses(outputs: tuple[torch.Tensor, ...], labels: list[_Labels]) -> dict[str, torch.Tensor]:
    """Return CenterNet's focal loss of the centres, and cross entropies of colours where there are centres, and of the setting."""
    heat_NOhw, colour_NChw, backgrounds, styles = (each.float() for each in outputs)
    target_NOhw = torch.zeros_like(heat_NOhw)
    side = heat_NOhw.shape[-1]
    cells = torch.arange(side) + 0.5
    places, colours = [], []
    for row, (spots, _, _) in enumerate(labels):
        for spot in spots:
            x, y = spot.x / CELL_PX, spot.y / CELL_PX
            distance = (cells[None, :] - x) ** 2 + (cells[:, None] - y) ** 2
            blob = torch.exp(-distance / (2 * _BLUR_CELLS**2))
            o = OBJECTS.index(spot.group.object)
            target_NOhw[row, o] = torch.maximum(target_NOhw[row, o], blob)
            h, w = (min(side - 1, max(0, int(value))) for value in (y, x))
            target_NOhw[row, o, h, w] = 1
            places.append((row, h, w))
            colours.append(list(COLOURS).index(spot.group.colour))
    row_B, h_B, w_B = torch.tensor(places).T
    settings = torch.tensor([[background, style] for _, background, style in labels])
    return {
        "centres": _focal(heat_NOhw, target_NOhw) / len(places),
        "colours": functional.cross_entropy(colour_NChw[row_B, :, h_B, w_B], torch.tensor(colours)),
        "setting": functional.cross_entropy(backgrounds, settings[:, 0]) + functional.cross_entropy(styles, settings[:, 1]),
    }  # fmt: skip


def _focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the summed focal loss of CenterNet (1904.07850, equation 1), alpha 2 and beta 4."""
    chance = logits.sigmoid()
    centre = -((1 - chance) ** 2) * functional.logsigmoid(logits)
    other = -((1 - target) ** 4) * chance**2 * functional.logsigmoid(-logits)
    return torch.where(target == 1, centre, other).sum()


@torch.inference_mode()
def _fit_temperature(model: DetectorModel, scenes: SceneArrays) -> float:
    """Return the temperature under which the true counts of held-out scenes are likeliest."""
    detector = MiniatureDetector(model)
    from PIL import Image

    rows = range(len(scenes) - NUM_TEST_SCENES, len(scenes) - NUM_TEST_SCENES + 600)
    images = [Image.fromarray(scenes.images[row]) for row in rows]
    best, best_loss = 1.0, float("inf")
    for candidate in (0.05 * 1.15**step for step in range(24)):
        model.config.temperature = candidate
        found = [each for start in range(0, len(images), 100) for each in detector.detect(images[start : start + 100])]
        chances = [
            each.counts(o)[scenes.counts[row, o]] for row, each in zip(rows, found, strict=True) for o in range(12)
        ]
        loss = -float(np.log(np.clip(chances, 1e-6, 1)).mean())
        if loss < best_loss:
            best, best_loss = candidate, loss
    return round(best, 4)
