"""The keys of a recipe, found in the configs that read them: for those who ask what one means, and for a shell that completes it."""

import difflib
import typing
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from selma_ray.config import StrictModel
from selma_ray.errors import ConfigError
from selma_ray.run.recipe import Recipe

__all__ = ["choices_of", "find_key", "next_keys", "section_of"]


def find_key(key: str) -> tuple[FieldInfo | None, type[StrictModel] | None]:
    """Return the field that a key names, none for the whole recipe, and the section below it, if there is one.

    Raises ConfigError, with the nearest key, for one that there is not.
    """
    field: FieldInfo | None = None
    section: type[StrictModel] | None = Recipe
    parts = key.split(".") if key else []
    for depth, part in enumerate(parts):
        known = section.model_fields if section else {}
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            meant = f"did you mean {'.'.join([*parts[:depth], *near])}; " if near else ""
            command = f"selma explain {'.'.join(parts[:depth])}".strip()
            raise ConfigError(f"{key} is no key of a recipe; {meant}`{command}` lists them")
        field = known[part]
        section = section_of(field.annotation)
    return field, section


def section_of(annotation: Any) -> type[StrictModel] | None:
    """Return the section that stands in a field's type, the first where there are several."""
    return next(_sections(annotation), None)


def next_keys(begun: str) -> list[str]:
    """Return the keys that go on from what is typed, one level deep; a section, which ends in a dot, is opened where it is the only one."""
    above, dot, rest = begun.rpartition(".")
    try:
        _, section = find_key(above)
    except ConfigError:
        return []
    found = []
    for name, field in section.model_fields.items() if section else ():
        if name.startswith(rest):
            found.append(f"{above}{dot}{name}" + ("." if section_of(field.annotation) else ""))
    return next_keys(found[0]) if len(found) == 1 and found[0].endswith(".") else found


def choices_of(key: str) -> list[str]:
    """Return the values that a key allows, where they can be counted: names, and true and false; else nothing."""
    try:
        field, _ = find_key(key)
    except ConfigError:
        return []
    return list(dict.fromkeys(_choices(field.annotation))) if field else []


def _choices(annotation: Any) -> Iterator[str]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        yield from map(str, arguments)
    elif annotation is bool:
        yield from ("true", "false")
    elif annotation is type(None):
        yield "null"
    elif typing.get_origin(annotation) not in (tuple, list, dict):
        for argument in arguments:
            yield from _choices(argument)


def _sections(annotation: Any) -> Iterator[type[StrictModel]]:
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)
