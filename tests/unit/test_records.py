import datasets
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.records import IMAGE_SCHEMA, content_id, seed_of


def test_an_id_depends_on_names_and_values_but_not_on_order() -> None:
    assert content_id(a=1, b="x") == content_id(b="x", a=1)
    assert len({content_id(a=1, b="x"), content_id(a=2, b="x"), content_id(a=1, c="x"), content_id(a="1", b="x")}) == 4


@given(st.integers(0, 2**40), st.text())
def test_seeds_fit_every_generator_and_repeat(base_seed: int, prompt: str) -> None:
    seed = seed_of(base_seed, prompt=prompt)
    assert 0 <= seed < 2**31
    assert seed == seed_of(base_seed, prompt=prompt)


def test_the_image_schema_opens_as_images() -> None:
    features = datasets.Features.from_arrow_schema(IMAGE_SCHEMA)
    assert isinstance(features["image"], datasets.Image)
    assert features["guidance_scale"] == datasets.Value("float32")
    assert pa.schema(features.arrow_schema).names == IMAGE_SCHEMA.names
