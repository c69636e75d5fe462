from pathlib import Path

import pyarrow as pa
import pytest

from selma_ray.images.config import ImagesConfig
from selma_ray.images.plan import PLAN_SCHEMA, PlanImages
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.records import PROMPT_SCHEMA


@pytest.fixture
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


def prompts(*texts: str, split: str = "train") -> pa.Table:
    rows = [
        {"id": text, "skill": "one", "index": index, "prompt": text, "split": split} for index, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


def test_each_image_of_a_prompt_has_its_own_id_and_seed(model: ModelConfig) -> None:
    planned = PlanImages(ImagesConfig(per_prompt=3), model, 0)(prompts("a cat", "a dog"))
    assert planned.schema == PLAN_SCHEMA
    assert planned["prompt"].to_pylist() == ["a cat"] * 3 + ["a dog"] * 3
    assert planned["image_index"].to_pylist() == [0, 1, 2] * 2
    assert len(set(planned["id"].to_pylist())) == len(set(planned["seed"].to_pylist())) == 6


def test_ids_and_seeds_do_not_depend_on_the_block(model: ModelConfig) -> None:
    plan = PlanImages(ImagesConfig(), model, 0)
    together = plan(prompts("a cat", "a dog")).to_pylist()
    assert plan(prompts("a dog")).to_pylist() == [row for row in together if row["prompt"] == "a dog"]


def test_ids_depend_on_all_that_the_image_depends_on(model: ModelConfig) -> None:
    def ids(config: ImagesConfig, model: ModelConfig, seed: int = 0) -> str:
        return PlanImages(config, model, seed)(prompts("a cat"))["id"][0].as_py()

    variants = [
        ids(ImagesConfig(), model),
        ids(ImagesConfig(), model, seed=1),
        ids(ImagesConfig(sampling=SamplingConfig(steps=20)), model),
        ids(ImagesConfig(sampling=SamplingConfig(guidance_scale=2)), model),
        ids(ImagesConfig(), model.model_copy(update={"dtype": "bf16"})),
        ids(ImagesConfig(), ModelConfig(name="owner/model", revision="one")),
        ids(ImagesConfig(), ModelConfig(name="owner/model", revision="two")),
    ]
    assert len(set(variants)) == len(variants)
    assert ids(ImagesConfig(batch_size=3, max_renderers=4), model) == variants[0]


def test_only_training_prompts_are_rendered(model: ModelConfig) -> None:
    assert PlanImages(ImagesConfig(), model, 0)(prompts("a cat", split="dev")).num_rows == 0


def test_finished_images_are_left_out(model: ModelConfig) -> None:
    config = ImagesConfig(per_prompt=2)
    first, second = PlanImages(config, model, 0)(prompts("a cat"))["id"].to_pylist()
    assert PlanImages(config, model, 0, {first})(prompts("a cat"))["id"].to_pylist() == [second]
