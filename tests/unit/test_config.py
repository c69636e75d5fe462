from pathlib import Path

import pytest
from pydantic import Field

from selma_ray.config import (
    Placement,
    StrictModel,
    apply_overrides,
    first_difference,
    identity,
    read_yaml,
    validate,
)
from selma_ray.errors import ConfigError
from selma_ray.experts.config import ExpertsConfig
from selma_ray.images.config import ImagesConfig


class Inner(StrictModel):
    learning_rate: float = Field(default=1e-3, gt=0)


class Outer(StrictModel):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None


def test_a_typo_is_answered_with_the_nearest_key() -> None:
    with pytest.raises(
        ConfigError, match=r"r\.yaml: inner\.learning_rte is not a known key; did you mean 'learning_rate'\?"
    ):
        validate(Outer, {"name": "x", "inner": {"learning_rte": 1}}, "r.yaml")


def test_a_typo_in_an_optional_section_is_answered_too() -> None:
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        validate(Outer, {"name": "x", "maybe": {"learning_rat": 1}}, "r.yaml")


def test_a_broken_rule_names_key_rule_and_value() -> None:
    with pytest.raises(ConfigError, match=r"inner\.learning_rate should be greater than 0, got -1"):
        validate(Outer, {"name": "x", "inner": {"learning_rate": -1}}, "r.yaml")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="name is required"):
        validate(Outer, {}, "r.yaml")


def test_several_faults_are_counted_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)") as caught:
        validate(Outer, {"inner": {"learning_rate": 0}}, "r.yaml")
    assert "\n" not in str(caught.value)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert validate(Outer, {"name": "x", "inner": {"learning_rate": "1e-4"}}, "r.yaml").inner.learning_rate == 1e-4


def test_overrides_set_nested_keys_and_leave_the_source_alone() -> None:
    source = {"inner": {"learning_rate": 1.0}}
    assert apply_overrides(source, ["inner.learning_rate=2", "name=[a, b]"]) == {
        "inner": {"learning_rate": 2},
        "name": ["a", "b"],
    }
    assert source == {"inner": {"learning_rate": 1.0}}


@pytest.mark.parametrize("override", ["name", "=3", "name.deeper=1", "inner=[1"])
def test_an_override_that_cannot_be_set_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        apply_overrides({"name": "x"}, [override])


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.yaml").write_text("a: [")
    for name in ("list.yaml", "broken.yaml", "missing.yaml"):
        with pytest.raises(ConfigError) as caught:
            read_yaml(tmp_path / name)
        assert "\n" not in str(caught.value)


class Placed(StrictModel):
    steps: int = 3
    num_cpus: Placement[float] = 1.0


class Whole(StrictModel):
    name: str = "a"
    folder: Placement[str | None] = None
    inner: Placed | None = Placed()
    several: dict[str, Placed] = Field(default_factory=dict)


def test_identity_leaves_out_where_work_is_placed() -> None:
    outer = Whole(folder="x", inner=Placed(num_cpus=4), several={"b": Placed(steps=5, num_cpus=2)})
    assert identity(outer) == {"name": "a", "inner": {"steps": 3}, "several": {"b": {"steps": 5}}}
    assert identity(Whole(inner=None)) == {"name": "a", "inner": None, "several": {}}


def test_the_first_difference_of_two_identities_is_named_by_its_key() -> None:
    assert first_difference(identity(Whole(folder="x")), identity(Whole(folder="y"))) is None
    assert first_difference(identity(Whole()), identity(Whole(inner=Placed(steps=4)))) == ("inner.steps", 3, 4)


def test_what_a_run_may_change_is_said_at_the_fields() -> None:
    all_fields = set(ImagesConfig.model_fields)
    assert all_fields - identity(ImagesConfig()).keys() == {
        "license", "min_renderers", "max_renderers", "num_cpus", "num_gpus", "max_attempts", "max_failed_fraction",
    }  # fmt: skip
    assert "checkpoint_every_steps" not in identity(ExpertsConfig())
