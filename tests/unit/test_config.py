import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, BeforeValidator, Field

from selma_ray.config import (
    Placement,
    StrictModel,
    apply_overrides,
    first_difference,
    identity,
    read_yaml,
    set_values,
    validate,
)
from selma_ray.errors import ConfigError
from selma_ray.experts.config import ExpertsConfig
from selma_ray.images.config import ImagesConfig
from selma_ray.run.recipe import Recipe


class Inner(StrictModel):
    learning_rate: float = Field(default=1e-3, gt=0)


class Outer(StrictModel):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"experts": {"batch_size": 3, "workers_per_expert": 2}},
            "r.yaml: experts.batch_size must divide by workers_per_expert, got 3 and 2",
        ),
        (
            {"rounds": 2, "experts": {"nft": {}}},
            "r.yaml: rounds must be 1 with experts.nft, whose experts draw rounds of their own, got 2",
        ),
    ],
)
def test_a_rule_of_several_keys_is_said_of_the_key_and_shows_no_whole_section(settings: Any, line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(Recipe, {"run_dir": "runs/a", "skills": ["miniature/counting"], **settings}, source="r.yaml")
    assert str(refusal.value) == line


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


class Setting(StrictModel):
    name: str = "a"


class Fields(StrictModel):
    text: str = ""
    maybe: str | None = None
    path: Path | None = None
    placed: Placement[str] = ""
    word: Literal["auto", "1"] = "auto"
    count: int = 0
    chance: float = 0.0
    kind: Literal[0, 1, 2] = 0
    flag: bool = False
    flag_or_count: bool | int = 0
    several: tuple[float, ...] = ()
    listed: list[int | None] | None = None
    by_name: dict[str, float] | None = None
    texts: dict[str, str] = Field(default_factory=dict)
    setting: Annotated[Setting, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)] = (
        Setting()
    )
    inner: Inner | None = None
    anything: dict[str, Any] = Field(default_factory=dict)


def overridden(*overrides: str) -> Fields:
    return validate(Fields, apply_overrides({}, overrides, Fields), "r.yaml")


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["cartoon #3, text", "a: b", "- a", "[a", "{a", "'a'", '"a"', "010", "1e-4", "no", "true", "2024-01-01", "a=b", " a ", "!a", "&a", "%"]
)  # fmt: skip


@given(TEXTS)
def test_a_field_that_holds_a_text_takes_an_override_as_it_stands(text: str) -> None:
    assert overridden(f"text={text}").text == text
    assert overridden(f"placed={text}").placed == text
    assert overridden(f"texts.a={text}").texts == {"a": text}
    assert overridden(f"setting.name={text}").setting.name == text
    assert overridden(f"maybe={text}").maybe == (None if text in ("", "null", "~") else text)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("count=010", "count", 10),
        ("count=0x10", "count", 16),
        ("count=1_000", "count", 1000),
        ("count= 3 ", "count", 3),
        ("chance=1e-4", "chance", 1e-4),
        ("chance=.5", "chance", 0.5),
        ("flag=yes", "flag", True),
        ("flag=false", "flag", False),
        ("flag_or_count=true", "flag_or_count", True),
        ("word=1", "word", "1"),
        ("kind=2", "kind", 2),
        ("several=[1, 2.5]", "several", (1.0, 2.5)),
        ("listed=[1, null]", "listed", [1, None]),
        ("listed=null", "listed", None),
        ("by_name={a: 1}", "by_name", {"a": 1.0}),
        ("by_name.a=2", "by_name", {"a": 2.0}),
        ("setting=x", "setting", Setting(name="x")),
        ("setting={name: 'x # y'}", "setting", Setting(name="x # y")),
        ("inner={learning_rate: 1e-4}", "inner", Inner(learning_rate=1e-4)),
        ("anything.a=010", "anything", {"a": 10}),
        ("anything.a=10:30", "anything", {"a": "10:30"}),
        ("anything.a=no", "anything", {"a": "no"}),
        ("anything.a=x #3", "anything", {"a": "x #3"}),
        ("anything.a='010'", "anything", {"a": "010"}),
        ("path=/a #b", "path", Path("/a #b")),
    ],
)
def test_overrides_of_every_kind_of_field(override: str, field: str, value: Any) -> None:
    found = getattr(overridden(override), field)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "override", ["count=3 # three", "several=[1] # one", "several=[1] 2", "by_name={a: 1, a: 2}", "chance=1 000"]
)
def test_nothing_of_an_override_is_dropped(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        overridden(override)
    assert "\n" not in str(caught.value)


NO_NUMBERS = [True, False, float("inf"), float("-inf"), float("nan"), ".inf", "nan", "Infinity", "1e999"]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize(
    "place", ["count", "chance", "kind", "several", "listed", "by_name", "inner.learning_rate", "setting.name"]
)
def test_what_is_no_finite_number_is_refused(value: Any, place: str) -> None:
    if place == "setting.name" and isinstance(value, str):
        return
    wrapped = {"several": [1, value], "listed": [value], "by_name": {"a": value}}.get(place, value)
    with pytest.raises(ConfigError, match=place) as caught:
        validate(Fields, set_values({}, {place: wrapped}), "r.yaml")
    assert "\n" not in str(caught.value)


def numbers_of(model: type[BaseModel], path: str = "") -> list[str]:
    """Return the key paths of a recipe's plain numbers."""
    found = []
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            found += numbers_of(nested, f"{path}{name}.")
        elif nested in (int, float, int | None, float | None):
            found.append(f"{path}{name}")
    return found


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "true"])
def test_every_number_of_a_recipe_is_finite(text: str) -> None:
    whole = {"run_dir": "x", "skills": ["coco"]}
    keys = numbers_of(Recipe)
    assert len(keys) > 60
    for key in keys:
        with pytest.raises(ConfigError, match=re.escape(key)):
            validate(Recipe, apply_overrides(whole, [f"{key}={text}"], Recipe), "r.yaml")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "'a'", '"b"', "c", "1", "'1'"]), max_size=5), st.integers(0, 3), st.booleans()
)
def test_a_key_that_is_set_twice_is_refused_at_every_depth(
    tmp_path: Path, keys: list[str], depth: int, is_flow: bool
) -> None:
    path = tmp_path / "r.yaml"
    indent = "  " * depth
    parents = "".join(f"{'  ' * level}level{level}:\n" for level in range(depth))
    body = (
        f"{indent}flow: {{{', '.join(f'{key}: 0' for key in keys)}}}\n"
        if is_flow
        else "".join(f"{indent}{key}: 0\n" for key in keys)
    )
    path.write_text(f"{parents}{body}" or "x: 1\n")
    meant = [key if key == "'1'" else key.strip("'\"") for key in keys]
    if len(set(meant)) == len(meant):
        if body:
            read_yaml(path)
        return
    with pytest.raises(ConfigError, match=r"r\.yaml: .* is set twice, in lines \d+ and \d+; keep one") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_the_lines_of_a_second_section_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("experts:\n  steps: 3\nseed: 1\nexperts:\n  steps: 4\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: experts is set twice, in lines 1 and 4; keep one"):
        read_yaml(path)


def test_merged_keys_may_be_set_again(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *a, y: 3}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}, "c": {"x": 1, "y": 3}}


def test_a_file_is_read_as_it_looks(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(
        "\ufeffa: 010\nb: 1e-4\nc: no\nd: 2024-01-01\ne: 10:30\nf: true\ng: ~\nh:\ni: 0x1F\nj: '010'\nk: .inf\n".encode()
    )
    assert read_yaml(path) == {
        "a": 10, "b": 1e-4, "c": "no", "d": "2024-01-01", "e": "10:30", "f": True, "g": None, "h": None, "i": 31, "j": "010",
        "k": float("inf"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_a_resolved_recipe_is_read_as_it_was(text: str) -> None:
    recipe = validate(
        Recipe, {"run_dir": "x", "skills": ["coco"], "images": {"sampling": {"negative_prompt": text}}}, "r.yaml"
    )
    assert validate(Recipe, yaml.safe_load(recipe.as_yaml()), "r.yaml") == recipe


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
