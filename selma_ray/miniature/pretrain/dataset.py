"""Renders the training scenes once, into memory-mapped arrays under the work folder.

Arrays of a dataset folder, N scenes:
    images      uint8 [N, 64, 64, 3]
    counts      uint8 [N, 12]     how many of each object
    colours     uint8 [N, 12]     place in COLOURS, NO_COLOUR where the object is absent
    centres     float16 [N, 12, 2]  mean x and y of a group in [0, 1], 0 where absent
    settings    uint8 [N, 2]      place in BACKGROUNDS and in STYLES
    captions.json                 N lists of CAPTIONS_PER_SCENE captions as the model is trained on
"""

import json
import logging
import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from selma_ray.miniature.pretrain.mixture import Looseness, sample_web_scene, write_web_caption
from selma_ray.miniature.scenes import BACKGROUNDS, IMAGE_SIZE_PX, STYLES, Scene, paint_scene, place_objects
from selma_ray.miniature.sprites import COLOURS, OBJECTS

__all__ = [
    "NO_COLOUR",
    "SceneArrays",
    "blank_arrays",
    "build_dataset",
    "describe_scene",
    "load_captions",
    "load_dataset",
    "rewrite_captions",
    "scene_rng",
]

logger = logging.getLogger(__name__)

NO_COLOUR = len(COLOURS)
CAPTIONS_PER_SCENE = 3
_CHUNK = 500
_COLOUR_PLACE = {name: place for place, name in enumerate(COLOURS)}


@dataclass
class SceneArrays:
    """Rendered scenes and what they show, see the module's legend."""

    images: np.ndarray
    counts: np.ndarray
    colours: np.ndarray
    centres: np.ndarray
    settings: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def _shapes(num_scenes: int) -> dict[str, tuple[tuple[int, ...], str]]:
    num_objects = len(OBJECTS)
    return {
        "images": ((num_scenes, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), "uint8"),
        "counts": ((num_scenes, num_objects), "uint8"),
        "colours": ((num_scenes, num_objects), "uint8"),
        "centres": ((num_scenes, num_objects, 2), "float16"),
        "settings": ((num_scenes, 2), "uint8"),
    }


def build_dataset(folder: Path, num_scenes: int, seed: int, workers: int) -> None:
    """Render `num_scenes` scenes of the mix into `folder`; a finished folder is left as it is."""
    if (folder / "captions.json").exists():
        logger.info("data: %s is there already", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in _shapes(num_scenes).items()
    }
    captions: list[list[str]] = []
    jobs = [(seed, start, min(start + _CHUNK, num_scenes)) for start in range(0, num_scenes, _CHUNK)]
    with multiprocessing.Pool(workers) as pool:
        for (_, start, stop), (chunk, chunk_captions) in zip(jobs, pool.imap(_render_chunk, jobs), strict=True):
            for name, array in arrays.items():
                array[start:stop] = getattr(chunk, name)
            captions.extend(chunk_captions)
            if stop % 10000 == 0:
                logger.info("data: %d of %d scenes", stop, num_scenes)
    for array in arrays.values():
        array.flush()
    partial = folder / "captions.json.partial"
    partial.write_text(json.dumps(captions))
    partial.replace(folder / "captions.json")


def load_dataset(folder: Path) -> SceneArrays:
    """Open a dataset folder's arrays without reading them into memory."""
    return SceneArrays(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _shapes(0)})


def load_captions(folder: Path) -> list[list[str]]:
    """Read a dataset folder's training captions."""
    return json.loads((folder / "captions.json").read_text())


def rewrite_captions(num_scenes: int, seed: int, looseness: Looseness) -> list[list[str]]:
    """Write other captions for the scenes that `build_dataset` rendered with `seed`."""
    captions = []
    for index in range(num_scenes):
        scene, long = sample_web_scene(scene_rng(seed, index))
        rng = random.Random(f"{seed} {index} {looseness}")
        captions.append(
            [write_web_caption(scene, rng, long=long, looseness=looseness) for _ in range(CAPTIONS_PER_SCENE)]
        )
    return captions


def describe_scene(scene: Scene, arrays: SceneArrays, row: int, rng: random.Random) -> None:
    """Render one scene into a row of the arrays."""
    spots = place_objects(scene, rng)
    arrays.images[row] = np.asarray(paint_scene(scene, spots, rng))
    arrays.settings[row] = BACKGROUNDS.index(scene.background), STYLES.index(scene.style)
    for group in scene.groups:
        column = OBJECTS.index(group.object)
        arrays.counts[row, column] = group.count
        arrays.colours[row, column] = _COLOUR_PLACE[group.colour]
        centres = [(spot.x, spot.y) for spot in spots if spot.group is group]
        arrays.centres[row, column] = np.mean(centres, axis=0) / IMAGE_SIZE_PX


def blank_arrays(num_scenes: int) -> SceneArrays:
    """Make arrays for scenes yet to be described."""
    arrays = SceneArrays(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in _shapes(num_scenes).items()})
    arrays.colours[:] = NO_COLOUR
    return arrays


def _render_chunk(job: tuple[int, int, int]) -> tuple[SceneArrays, list[list[str]]]:
    seed, start, stop = job
    arrays, captions = blank_arrays(stop - start), []
    for row, index in enumerate(range(start, stop)):
        rng = scene_rng(seed, index)
        scene, long = sample_web_scene(rng)
        describe_scene(scene, arrays, row, rng)
        captions.append([write_web_caption(scene, rng, long=long) for _ in range(CAPTIONS_PER_SCENE)])
    return arrays, captions


def scene_rng(seed: int, index: int) -> random.Random:
    """Return the random numbers of one scene of a dataset."""
    return random.Random(f"{seed} {index}")
