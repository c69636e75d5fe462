import itertools
import random
from typing import Any

import numpy as np
import pytest

from selma_ray.miniature.scenes import BACKGROUNDS, STYLES, Group, Scene, place_objects, render_scene
from selma_ray.miniature.sprites import COLOURS, NATURAL_COLOUR, OBJECTS, render_sprite


def test_sprites_differ_in_shape() -> None:
    shapes = {name: np.asarray(render_sprite(name, "red", 20))[..., 3] > 128 for name in OBJECTS}
    assert len(shapes) >= 12
    for first, second in itertools.combinations(OBJECTS, 2):
        overlap = (shapes[first] & shapes[second]).sum() / (shapes[first] | shapes[second]).sum()
        assert overlap < 0.85, (first, second)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_takes_every_colour(name: Any) -> None:
    pictures = [np.asarray(render_sprite(name, colour, 26)).astype(int) for colour in COLOURS]
    for first, second in itertools.combinations(pictures, 2):
        assert (np.abs(first - second).sum(-1) > 60).sum() > 40
    assert NATURAL_COLOUR[name] in COLOURS


def test_settings_look_different_and_equal_seeds_equal() -> None:
    group = (Group("car", "blue", 1),)
    images = [
        np.asarray(render_scene(Scene(group, None, background, style), random.Random(1))).astype(int)
        for background in BACKGROUNDS
        for style in STYLES
    ]
    assert all(image.shape == (64, 64, 3) for image in images)
    for first, second in itertools.combinations(images, 2):
        assert np.abs(first - second).mean() > 2
    again = render_scene(Scene(group, None, BACKGROUNDS[0], STYLES[0]), random.Random(1))
    assert (np.asarray(again) == images[0]).all()


@pytest.mark.parametrize("relation", ["left_of", "right_of", "above", "below"])
def test_relations_hold_for_every_object(relation: Any) -> None:
    scene = Scene((Group("car", "red", 2), Group("tree", "green", 1)), relation)
    spots = place_objects(scene, random.Random(0))
    cars = [spot for spot in spots if spot.group.object == "car"]
    trees = [spot for spot in spots if spot.group.object == "tree"]
    axis = (lambda spot: spot.x) if relation in ("left_of", "right_of") else (lambda spot: spot.y)
    for car, tree in itertools.product(cars, trees):
        assert (axis(car) < axis(tree)) == (relation in ("left_of", "above"))
