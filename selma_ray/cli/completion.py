"""What a shell offers when Tab is pressed: commands, flags, recipes, skills, and keys with their values. Loads neither torch nor Ray."""

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

from selma_ray.run.published import published_recipes

__all__ = ["complete", "complete_key", "complete_override", "complete_published", "complete_recipe", "complete_skill"]

_STUDY_MARK = "\narms:"
_RECIPE_SUFFIXES = ("yaml", "yml")


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and end the process; does nothing for any other caller."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    for action in _actions(parser):
        if completer := _COMPLETERS.get(action.dest):
            action.completer = completer  # type: ignore[attr-defined]  # argcomplete looks for it there
    argcomplete.autocomplete(parser, always_complete_options=False)


def complete_recipe(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the published recipes that a command takes, studies for `study`, both for `plan`, and files."""
    command = parsed_args.command
    names = list(published_recipes()) if command == "plan" else _published(studies=command == "study")
    return [*names, *_files(prefix)]


def complete_published(prefix: str, parsed_args: argparse.Namespace, action: argparse.Action, **_: Any) -> list[str]:
    """Return all published recipes, those that are no studies for `selma init --extends`; nothing for the name it is to give."""
    if parsed_args.command != "init":
        return list(published_recipes())
    return [] if action.dest == "name" else _published(studies=False)


def complete_override(prefix: str, **_told: Any) -> list[str]:
    """Return `key=` for keys of a recipe that begin so, sections with a dot after them, or after `key=` the values that it allows."""
    from selma_ray.cli.keys import choices_of, next_keys

    key, equals, _ = prefix.partition("=")
    if equals:
        return [f"{key}={value}" for value in choices_of(key)]
    return [name if name.endswith(".") else f"{name}=" for name in next_keys(key)]


def complete_key(prefix: str, **_: Any) -> list[str]:
    """Return the keys of a recipe that begin so, one level deep."""
    from selma_ray.cli.keys import next_keys

    return [name.removesuffix(".") for name in next_keys(prefix)]


def complete_skill(prefix: str, **_: Any) -> list[str]:
    """Return the packaged skills, and skill files."""
    from selma_ray.skills import packaged_skills

    return [*packaged_skills(), *_files(prefix)]


def _published(*, studies: bool) -> list[str]:
    """Return the names of the studies, or of all other recipes; no YAML is parsed for that."""
    paths = published_recipes()
    return [name for name, path in paths.items() if (_STUDY_MARK in path.read_text(encoding="utf-8")) == studies]


def _files(prefix: str) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return list(FilesCompleter(allowednames=_RECIPE_SUFFIXES)(prefix))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of all commands below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


_COMPLETERS: dict[str, Callable[..., list[str]]] = {
    "recipe": complete_recipe,
    "name": complete_published,
    "extends": complete_published,
    "overrides": complete_override,
    "key": complete_key,
    "skill": complete_skill,
}
