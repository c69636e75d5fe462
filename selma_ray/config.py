"""Strict configuration: frozen models, YAML files, `key.path=value` overrides, and errors that name the remedy.

A field either decides results (its identity) or places work: `num_cpus: Placement[float]` says the second, at the field and nowhere
else. What refuses another recipe, keys caches and shares work is derived from it by `identity`.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from selma_ray.errors import ConfigError
from selma_ray.json_lines import ENCODING
from selma_ray.yaml_values import DuplicateKeyError, YAMLError, read_flow_value, read_mapping, read_scalar

__all__ = [
    "Placement",
    "StrictModel",
    "apply_overrides",
    "first_difference",
    "identity",
    "is_placement",
    "read_yaml",
    "set_values",
    "validate",
]

_PLACES_WORK = "places work"
_Value = TypeVar("_Value")

Placement = Annotated[_Value, _PLACES_WORK]
"""The type of a field that says where, how fast or how safely a run works, not what comes out of it."""

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys and numbers that are none; the docstring under a field documents it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is meant: pydantic would read them as 1 and 0."""
        if _has_truth_for_number(cls.model_fields[str(info.field_name)].annotation, value):
            raise ValueError("should be a number")
        return value


def identity(value: Any) -> Any:
    """Return what of a configuration decides results, as plain JSON values: everything but its Placement fields."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {name: identity(getattr(value, name)) for name, field in fields.items() if not is_placement(field)}
    if isinstance(value, Mapping):
        return {str(key): identity(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(each) for each in value]
    return value


def is_placement(field: FieldInfo) -> bool:
    """Tell whether a field only says where, how fast or how safely a run works."""
    return _PLACES_WORK in field.metadata


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Return the first key path at which two identities differ, and the value that each has there; None where they are equal."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        nested = (
            first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            for name in sorted(before.keys() | now.keys())
        )
        return next(filter(None, nested), None)
    return None if before == now else (key, before, now)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from `path`; raises ConfigError where it is missing, malformed or no mapping."""
    try:
        content = read_mapping(path.read_text(encoding=ENCODING))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a YAML file") from None
    except DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error}; keep one") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}")
    return content


def apply_overrides(
    mapping: Mapping[str, Any], overrides: Sequence[str], model_class: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Return a copy of `mapping` in which each `key.path=value` is set.

    A field of `model_class` that holds a text takes the value as it stands; where it may be null, `null` and nothing are null. Every
    other value is a list or mapping in YAML's brackets, a quoted text, or a number, true, false, null or a text as a whole.
    """
    values = {}
    for override in overrides:
        key_path, separator, text = override.partition("=")
        key_path = key_path.strip()
        if not separator or not key_path:
            raise ConfigError(f"an override must read key.path=value, got {override!r}")
        try:
            values[key_path] = _override_value(text, _annotations_at(model_class, key_path.split(".")))
        except YAMLError:
            raise ConfigError(f"{key_path} must be set to a YAML value, got {text!r}; quote it") from None
    return set_values(mapping, values)


def set_values(mapping: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `mapping` in which the value of each key.path is set, in their order."""
    result = _copied(mapping)
    for key_path, value in values.items():
        *parents, leaf = key_path.split(".")
        node = result
        for depth, key in enumerate(parents):
            if node.get(key) is None:  # a section that is off
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                raise ConfigError(f"{'.'.join(parents[: depth + 1])} is a single value, so {key_path} cannot be set")
        node[leaf] = value
    return result


def validate(model_class: type[Model], mapping: Mapping[str, Any], source: str) -> Model:
    """Validate `mapping` as `model_class`; raises ConfigError with one line that explains the first fault."""
    try:
        return model_class.model_validate(mapping)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigError(f"{source}: {_explained(model_class, faults[0])}{more}") from None


def _override_value(text: str, annotations: set[Any]) -> Any:
    if annotations & {str, Path} or (annotations and all(map(_is_text_or_null, annotations))):
        return None if type(None) in annotations and text in ("", "null", "~") else text
    return read_flow_value(text) if text.lstrip()[:1] in ("[", "{", '"', "'") else read_scalar(text.strip())


def _is_text_or_null(annotation: Any) -> bool:
    if typing.get_origin(annotation) is Literal:
        return all(isinstance(each, str) for each in typing.get_args(annotation))
    return annotation is type(None)


def _annotations_at(annotation: Any, keys: Sequence[str]) -> set[Any]:
    """Return the types, without unions, that a value at a path of keys may have; none where the path leads nowhere."""
    if not keys:
        return set(_alternatives(annotation))
    found: set[Any] = set()
    for each in _alternatives(annotation):
        if isinstance(each, type) and issubclass(each, BaseModel) and keys[0] in each.model_fields:
            found |= _annotations_at(each.model_fields[keys[0]].annotation, keys[1:])
        elif typing.get_origin(each) is dict:
            found |= _annotations_at(typing.get_args(each)[1], keys[1:])
    return found


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types that a union stands for, or the type itself."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for each in typing.get_args(annotation):
            yield from _alternatives(each)
    else:
        yield annotation


def _has_truth_for_number(annotation: Any, value: Any) -> bool:
    kinds = set(_alternatives(annotation))
    if isinstance(value, bool):
        return any(map(_is_number, kinds)) and bool not in kinds
    if isinstance(value, (list, tuple)):
        inner = [each for kind in kinds if typing.get_origin(kind) in (list, tuple) for each in typing.get_args(kind)]
        return any(_has_truth_for_number(each, item) for each in inner if each is not ... for item in value)
    if isinstance(value, Mapping):
        inner = [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) in (dict, Mapping)]
        return any(_has_truth_for_number(each, item) for each in inner for item in value.values())
    return False


def _is_number(kind: Any) -> bool:
    values = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return kind in (int, float) or any(type(value) in (int, float) for value in values)


def _copied(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}


def _explained(model_class: type[BaseModel], fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location) or "the whole"
    value = repr(fault.get("input"))
    value = value if len(value) <= 80 else value[:77] + "..."
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model_class, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"{key} is not a known key; {remedy}"
    if fault["type"] == "missing":
        return f"{key} is required; set it"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if fault["type"] == "value_error" and isinstance(
        fault.get("input"), Mapping
    ):  # said of a section, about keys in it
        of_key = message.partition(" ")[0] in _fields_at(model_class, location)
        return ".".join([*location, message]) if of_key else f"{key} {message}"
    return f"{key} {message[:1].lower()}{message[1:]}, got {value}"


def _fields_at(model_class: type[BaseModel], location: Sequence[str]) -> list[str]:
    for key in location:
        field = model_class.model_fields.get(key)
        nested = _nested_model(field.annotation) if field else None
        if nested is None:
            break
        model_class = nested
    return list(model_class.model_fields)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, map(_nested_model, typing.get_args(annotation))), None)
    return None
