"""Every key of a recipe is told: by its docstring, with its type, bounds and default."""

from collections.abc import Iterator

import pytest

from selma_ray.cli import commands as cli
from selma_ray.cli.keys import section_of
from selma_ray.config import StrictModel
from selma_ray.run.recipe import Recipe


def keys(section: type[StrictModel] = Recipe, above: str = "", depth: int = 0) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{above}{name}"
        below = section_of(field.annotation)
        if below is not None and depth < 4:
            yield from keys(below, f"{above}{name}.", depth + 1)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["explain", *words]) == 0
    return capsys.readouterr().out


def test_a_key_is_told_with_its_type_bounds_default_and_unit(capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, "serving.request_timeout_s")
    assert "serving.request_timeout_s: number, above 0" in told
    assert "default: 120" in told
    assert "Seconds after which a request is answered 504" in told
    assert "image_metadata: true | false" in shown(capsys, "serving.image_metadata")
    assert "bf16 | " in shown(capsys, "model.dtype")
    assert "default: null" in shown(capsys, "model.revision")


def test_a_section_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert "experts.lora.rank" in shown(capsys, "experts.lora")
    assert {"prompts", "images", "experts", "merging", "evaluation", "serving"} <= set(shown(capsys).split())


@pytest.mark.parametrize("key", [*keys()])
def test_every_key_has_a_meaning(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, key).splitlines()
    assert lines[0].startswith(f"{key}: ")
    assert any(len(line.split()) > 1 for line in lines[1:] if not line.startswith("default: "))
    assert "<class" not in lines[0]
    assert "typing." not in lines[0]


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("experts.lora.rnak", "experts.lora.rnak is no key of a recipe; did you mean experts.lora.rank; `selma explain experts.lora`"),
        ("nothing.at.all", "nothing.at.all is no key of a recipe; `selma explain` lists them"),
        ("seed.more", "seed.more is no key of a recipe; `selma explain seed` lists them"),
    ],
)  # fmt: skip
def test_a_key_that_is_none_is_one_line(key: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", key]) == 2
    assert capsys.readouterr().err.startswith(f"selma: {line}")
