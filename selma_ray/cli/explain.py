"""What a recipe may say, told by the code that reads it: the keys with their types, bounds, defaults and meanings."""

import types
import typing
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selma_ray.cli.keys import find_key, section_of
from selma_ray.config import StrictModel, is_placement
from selma_ray.run.recipe import Recipe

__all__ = ["explain", "keys_by_section"]

_BOUNDS = {
    Ge: ("at least", "ge"),
    Gt: ("above", "gt"),
    Le: ("at most", "le"),
    Lt: ("below", "lt"),
    MinLen: ("length at least", "min_length"),
    MaxLen: ("length at most", "max_length"),
}


def explain(key: str) -> None:
    """Print what a key of a recipe means, and the keys below it; raises ConfigError for one that there is not."""
    console = Console(highlight=False, soft_wrap=True)
    field, section = find_key(key)
    if field is not None:
        console.print(f"[bold]{escape(key)}[/bold]: {escape(_type_words(field.annotation))}{escape(_bounds(field))}")
        if section is None:
            console.print(f"default: {escape(_default(field))}")
        console.print(escape(field.description or ""))
    if section is not None:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
        for heading in ("key", "default", "meaning"):
            table.add_column(heading)
        for name, each in section.model_fields.items():
            default = "" if section_of(each.annotation) else _default(each)
            meaning = (each.description or "").partition(". ")[0].partition("; ")[0]
            table.add_row(*map(escape, (f"{key}.{name}".lstrip("."), default, " ".join(meaning.split()))))
        console.print(table, soft_wrap=False)


def keys_by_section(
    section: type[StrictModel] = Recipe, above: str = ""
) -> Iterator[tuple[str, list[tuple[str, str, str, str, bool]]]]:
    """Yield every section's name, the recipe's is empty, with its keys: name, type, default, meaning, whether it places work."""
    rows = []
    below: list[tuple[str, type[StrictModel]]] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            below.append((f"{above}{name}", inner))
        words = _type_words(field.annotation) + _bounds(field)
        default = "" if inner is not None else _default(field)
        rows.append((f"{above}{name}", words, default, field.description or "", is_placement(field)))
    yield above.removesuffix("."), rows
    for name, inner in below:
        yield from keys_by_section(inner, f"{name}.")


def _type_words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_words, arguments))
    if origin is typing.Annotated:
        return _type_words(arguments[0])
    if origin in (tuple, list):
        return f"list of {_type_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_words(arguments[1])} by name"
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "anything"
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return "section"
    return {"str": "text", "bool": "true | false", "float": "number", "int": "whole number"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _bounds(field: FieldInfo) -> str:
    words = [
        f"{word} {getattr(bound, name)}"
        for bound in field.metadata
        for kind, (word, name) in _BOUNDS.items()
        if isinstance(bound, kind)
    ]
    return f", {', '.join(words)}" if words else ""


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "none: it must be given"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
