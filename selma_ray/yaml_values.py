"""YAML as people mean it: numbers and truths of its version 1.2 alone, and every key once."""

import re
from typing import Any

from yaml import MappingNode, SafeLoader, ScalarNode, YAMLError

__all__ = ["DuplicateKeyError", "YAMLError", "read_flow_value", "read_mapping", "read_scalar"]

_NULL, _BOOL, _INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "merge"))


class DuplicateKeyError(YAMLError):
    """A mapping sets a key twice."""


class _Loader(SafeLoader):
    """YAML's core schema, version 1.2: 010 is 10, 1e-4 is a number, 10:30, yes, no and dates are texts."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, ScalarNode) and key_node.tag != _MERGE:
                key, line = (key_node.tag, key_node.value), key_node.start_mark.line + 1
                if key in seen:
                    raise DuplicateKeyError(f"{key_node.value} is set twice, in lines {seen[key]} and {line}")
                seen[key] = line
        return node

    def construct_integer(self, node: ScalarNode) -> int:
        digits = self.construct_scalar(node)
        return int(digits, 0) if digits.lower().startswith(("0x", "0o")) else int(digits)


_Loader.yaml_implicit_resolvers = {}  # none of version 1.1's
_Loader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<$"), ["<"])
_Loader.add_constructor(_INT, _Loader.construct_integer)


def read_mapping(text: str) -> Any:
    """Return the value of a YAML document; raises DuplicateKeyError where it sets a key twice, YAMLError for what is no YAML."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_flow_value(text: str) -> Any:
    """Return a list, mapping or quoted text; raises YAMLError where the text is not that and nothing else."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None or text[node.end_mark.index :].strip():
            raise YAMLError(f"{text!r} goes on after its value")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def read_scalar(text: str) -> Any:
    """Return the number, true, false or null that a text is as a whole, or the text."""
    loader = _Loader("")
    try:
        return loader.construct_document(ScalarNode(loader.resolve(ScalarNode, text, (True, False)), text))
    finally:
        loader.dispose()
