"""What MkDocs puts into the pages that are made: of recipes, their keys, commands and the service's API, and of notebooks."""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from selma_ray.cli.commands import build_parser
from selma_ray.cli.explain import keys_by_section
from selma_ray.run.published import about, published_recipes

_TEST = re.compile(r"\[(?P<words>[^\]]+)\]\((?:\.\./)+tests/\S+ \"(?P<test>\w+)\"\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add a page for each notebook, which lies beside it to be downloaded."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            page = file.src_uri.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, page, content=notebook_page(Path(config.docs_dir, file.src_uri))))
    return files


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: its text as it stands, its code in blocks, and a link to the file."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text.replace(".ipynb)", ".md)"))
    parts.insert(1, f"[Download the notebook]({path.name}); a test runs it from its first cell to its last.")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page asks for by `<!-- generated: NAME -->`; tests, which the site does not have, are named."""
    markdown = _TEST.sub(lambda found: f"<abbr title={found['test']}>{found['words']}</abbr>", markdown)
    for name, make in _GENERATORS.items():
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def recipes() -> str:
    """Return a table of the published recipes and studies."""
    return _table(("name", "what it is"), [(f"`{name}`", about(path)) for name, path in published_recipes().items()])


def keys() -> str:
    """Return a table of keys for each section of a recipe."""
    parts = []
    for section, rows in keys_by_section():
        parts.append(f"## {section or 'The recipe'}\n")
        cells = [
            (f"`{key}`" + (" *place*" if places else ""), words, f"`{default}`" if default else "", meaning)
            for key, words, default, meaning, places in rows
        ]
        parts.append(_table(("key", "type", "default", "meaning"), cells) + "\n")
    return "\n".join(parts)


def commands() -> str:
    """Return each command with its help."""
    return "\n".join(
        f"## selma {name}\n\n```text\n{parser.format_help().strip()}\n```\n" for name, parser in _leaves(build_parser())
    )


def api() -> str:
    """Return the service's routes with their parameters."""
    from selma_ray.serving.api import build_app
    from selma_ray.serving.backend import Backend
    from selma_ray.serving.config import ServingConfig
    from selma_ray.serving.served import ModelNames

    names = ModelNames("merged", base=True, experts=("counting",))
    schema = build_app(cast(Backend, None), ServingConfig(), names, ()).openapi()
    parts = []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"## {method.upper()} {path}\n\n{operation.get('description', '')}\n")
            body = _body_of(operation, schema)
            if body:
                rows = [
                    (
                        f"`{name}`",
                        "required" if name in body.get("required", ()) else "",
                        _words(field),
                        field.get("description", ""),
                    )
                    for name, field in body["properties"].items()
                ]
                parts.append(_table(("parameter", "", "type", "meaning"), rows) + "\n")
    return "\n".join(parts)


_GENERATORS: dict[str, Callable[[], str]] = {"recipes": recipes, "keys": keys, "commands": commands, "api": api}


def _body_of(operation: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    contents = operation.get("requestBody", {}).get("content", {})
    for content in contents.values():
        reference = content["schema"].get("$ref", "")
        return schema["components"]["schemas"][reference.rpartition("/")[2]] if reference else content["schema"]
    return None


def _words(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(map(_words, field["anyOf"])))
    bounds = [
        f"{word} {field[name]}"
        for name, word in (
            ("minimum", "at least"),
            ("maximum", "at most"),
            ("maxLength", "length at most"),
            ("maxItems", "items at most"),
        )
        if name in field
    ]
    kind = (
        " | ".join(map(str, field["enum"]))
        if "enum" in field
        else field.get("type", field.get("$ref", "any").rpartition("/")[2])
    )
    return ", ".join([kind, *bounds])


def _leaves(parser: argparse.ArgumentParser, above: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the commands that have no commands below them."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield above.strip(), parser
    for action in nested:
        for name, below in action.choices.items():
            yield from _leaves(below, f"{above} {name}")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
