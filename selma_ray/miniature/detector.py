"""The miniature's second judge: a detector whose findings are counted and compared by rule, as GenEval does (2310.11513).

It shares nothing with the first judge but the world: no question is embedded and no answer learnt. Heat maps say where each kind of object
has its centre (CenterNet, 1904.07850), every cell says in which colour; what is asked about is computed from the peaks.

Shapes: N images, C channels, H x W pixels, h x w cells of 4 x 4 pixels, O objects, K peaks of an object.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from selma_ray.errors import JudgeError
from selma_ray.miniature.judge import images_to_pixels
from selma_ray.miniature.question_texts import QuestionKey
from selma_ray.miniature.scenes import RELATIONS

__all__ = ["CELL_PX", "MODEL_TYPE", "Detections", "DetectorModel", "MiniatureDetector", "MiniatureDetectorConfig"]

MODEL_TYPE = "selma_miniature_detector"
CELL_PX = 4
_PEAKS = 6  # of one kind of object; a scene has four at the most, one too many has five
_NEIGHBOURS = 5  # cells on a side, of which only the highest is a peak: equal objects are five cells apart or more
_LEANING_CELLS = (
    0.5  # how far two centres must differ for a direction to be about three times as likely as its opposite
)
_MOST = 4


class MiniatureDetectorConfig(PreTrainedConfig):
    """Sizes of the detector and the temperature that calibrates its peaks."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        width: int = 64,
        dilations: Sequence[int] = (1, 2, 4, 2, 1, 1),
        num_objects: int = 12,
        num_colours: int = 8,
        num_backgrounds: int = 6,
        num_styles: int = 4,
        image_size: int = 64,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.dilations = list(dilations)
        self.num_objects = num_objects
        self.num_colours = num_colours
        self.num_backgrounds = num_backgrounds
        self.num_styles = num_styles
        self.image_size = image_size
        self.temperature = temperature


def _layer(width: int, dilation: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


class DetectorModel(PreTrainedModel):
    """Says for each cell which objects have their centre there and in which colour, and for the image how it is set and drawn."""

    config_class = MiniatureDetectorConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MiniatureDetectorConfig) -> None:
        super().__init__(config)
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 8, stride=CELL_PX, padding=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.trunk = nn.Sequential(*(_layer(width, dilation) for dilation in config.dilations))
        self.heat = nn.Conv2d(width, config.num_objects, 1)
        self.colour = nn.Conv2d(width, config.num_colours, 1)
        self.setting = nn.Linear(2 * width, config.num_backgrounds + config.num_styles)
        self.post_init()
        nn.init.constant_(self.heat.bias, -4.0)  # most cells have no centre

    def forward(self, pixel_values_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits of centres (NOhw), colours (NChw), backgrounds and styles (NC each) of images in [-1, 1]."""
        features_NChw = self.trunk(self.stem(pixel_values_NCHW))
        pooled = torch.cat([features_NChw.mean((2, 3)), features_NChw.amax((2, 3))], dim=1)
        backgrounds, styles = self.setting(pooled).split([self.config.num_backgrounds, self.config.num_styles], dim=1)
        return self.heat(features_NChw), self.colour(features_NChw), backgrounds, styles


@dataclass(frozen=True)
class Detections:
    """What was found in one image, and what follows from it."""

    peaks: np.ndarray
    """Probability that each candidate is an object, falling (OK)."""
    places: np.ndarray
    """x and y of each candidate, in cells (OK2)."""
    colours: np.ndarray
    """Probabilities of its colours (OKC)."""
    backgrounds: np.ndarray
    styles: np.ndarray

    def counts(self, o: int) -> np.ndarray:
        """Return the probabilities of 0, 1, … objects of a kind: its candidates are there or not, each on its own."""
        chances = np.ones(1)
        for peak in self.peaks[o]:
            chances = np.convolve(chances, [1 - peak, peak])
        return chances

    def probability(self, key: QuestionKey) -> float:
        """Return P(yes) of a question by its key."""
        kind, *about = key
        match kind:
            case "whole":
                return 1 - float(self.counts(about[0])[0])
            case "count":
                return float(self.counts(about[0])[about[1]])
            case "color":
                return self.probability(("whole", about[0])) * self._of_colour(*about)
            case "spatial":
                return self._relation(*about)
            case "background":
                return float(self.backgrounds[about[0]])
            case _:
                return float(self.styles[about[0]])

    def number(self, o: int) -> int:
        """Return the likeliest number of objects of a kind, at most 4."""
        return min(_MOST, int(self.counts(o).argmax()))

    def _of_colour(self, o: int, colour: int) -> float:
        """Return the probability that objects of a kind have a colour: the least of those that are there, else the likeliest one's."""
        there = max(1, int((self.peaks[o] > 0.5).sum()))
        return float(self.colours[o, :there, colour].min())

    def _relation(self, o: int, p: int, relation: int) -> float:
        both = self.probability(("whole", o)) * self.probability(("whole", p))
        (across, down) = self._centre(o) - self._centre(p)
        leanings = {"left_of": -across, "right_of": across, "above": -down, "below": down}
        logits = np.array([leanings[name] for name in RELATIONS]) / _LEANING_CELLS
        chances = np.exp(logits - logits.max())
        return both * float(chances[relation] / chances.sum())

    def _centre(self, o: int) -> np.ndarray:
        weights_K = np.where(self.peaks[o] > 0.5, self.peaks[o], 0)
        weights_K = weights_K if weights_K.any() else self.peaks[o] + 1e-9
        return (weights_K[:, None] * self.places[o]).sum(0) / weights_K.sum()


class MiniatureDetector:
    """The detector as a judge: PIL images in, what follows about them out."""

    def __init__(self, model: DetectorModel) -> None:
        self.model = model.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MiniatureDetector":
        """Open a detector's folder; raises JudgeError where it holds none."""
        if not (Path(folder) / "config.json").exists():
            raise JudgeError(f"judge: {folder} holds no config.json; give the folder of a saved judge")
        return cls(DetectorModel.from_pretrained(folder, dtype=torch.float32))

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """Return what each image shows."""
        config = self.model.config
        pixels = images_to_pixels(images, config.image_size).to(self.model.device)
        heat, colour, backgrounds, styles = (each.float().cpu() for each in self.model(pixels))
        logits_NOK, cells_NOK = _peaks(heat)
        width = heat.shape[-1]
        places_NOK2 = torch.stack([cells_NOK % width, cells_NOK // width], dim=-1).numpy()
        flat_NCP = colour.softmax(1).flatten(2)
        peaks_NOK = (logits_NOK / config.temperature).sigmoid().numpy()
        backgrounds, styles = backgrounds.softmax(-1).numpy(), styles.softmax(-1).numpy()
        return [
            Detections(
                peaks_NOK[row], places_NOK2[row], flat_NCP[row].T[cells_NOK[row]].numpy(), backgrounds[row], styles[row]
            )
            for row in range(len(images))
        ]


def _peaks(heat_NOhw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and cells (NOK) of the highest cells that are the highest of their neighbourhood."""
    highest = functional.max_pool2d(heat_NOhw, _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2)
    alone = torch.where(heat_NOhw == highest, heat_NOhw, torch.full_like(heat_NOhw, -30.0))
    return alone.flatten(2).topk(_PEAKS, dim=2)
