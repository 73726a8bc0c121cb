"""YAML from checkpoints, parsed with limits and without building anything.

Upstream's files name classes to construct (``!new:package.Class``), functions to call (``!apply:``) and other
values (``!ref <key>``). Here a tag stays a string beside its value: ``Tagged``. Duplicate keys, aliases that
multiply, and deep nesting are refused, as in ``strict_json``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ming_rt.errors import ConfigError

_MAX_BYTES = 64 << 10  # the real files have 3 kB
_MAX_NODES = 10_000  # with every alias counted as what it stands for
_MAX_DEPTH = 24
_REFERENCE = re.compile(r"<([\w-]+)>")


@dataclass(frozen=True)
class Tagged:
    """A value with a tag: ``kind`` is "new", "name", "apply", "ref" or what else stood before a colon."""

    kind: str
    path: str  # the class or function, as written
    value: Any


class _Loader(yaml.SafeLoader):
    """The safe loader, stricter about mappings and depth."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ConfigError(f"nested deeper than {_MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: found the key {key!r:.80}, expected text"
                )
            if key in result:
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: key {key!r:.80} appears more than once"
                )
            result[key] = self.construct_object(value_node, deep=True)
        return result


def _tagged(loader: _Loader, suffix: str, node: yaml.Node) -> Tagged:
    value: Any
    if isinstance(node, yaml.MappingNode):
        value = loader.construct_mapping(node, deep=True)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_scalar(node)
    kind, _, path = suffix.partition(":")
    return Tagged(kind, path, value)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_multi_constructor("!", _tagged)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
# YAML 1.2, which upstream reads, takes 1e-06 for a number; 1.1 does not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(data: bytes, where: str) -> dict[str, Any]:
    """Parses a file whose top is a mapping; ``!ref <key>`` becomes that key's value, if that is a plain one.

    Raises ConfigError, with ``where`` as the source, for anything out of bounds.
    """
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{where}: {len(data)} bytes of YAML, expected at most {_MAX_BYTES}")
    try:
        loader = _Loader(data.decode("utf-8"))
        try:
            node = loader.get_single_node()
            _measure(node)
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except ConfigError as problem:
        raise ConfigError(f"{where}: {problem}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as problem:
        line = " ".join(str(problem).split())
        raise ConfigError(f"{where}: not valid YAML ({line:.200})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping, found {type(value).__name__}")
    return {key: _resolve(item, value) for key, item in value.items()}


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads and parses one file, never more than the largest allowed."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: file not found") from None
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read ({problem.strerror or problem})") from None
    return parse_yaml(data, path.name)


def _measure(root: yaml.Node | None) -> None:
    """Refuses what would be large or deep once every alias is written out."""
    waiting = [(root, 1)]
    for _ in range(_MAX_NODES):
        if not waiting:
            return
        node, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ConfigError(f"nested deeper than {_MAX_DEPTH} levels")
        if isinstance(node, yaml.CollectionNode):
            pairs = isinstance(node, yaml.MappingNode)
            inner = [each for pair in node.value for each in pair] if pairs else node.value
            waiting += [(each, depth + 1) for each in inner]
    if waiting:
        raise ConfigError(f"more than {_MAX_NODES} values")


def _resolve(value: Any, top: dict[str, Any]) -> Any:
    """The value with references to plain values of ``top`` followed; others stay what they are."""
    if isinstance(value, dict):
        return {key: _resolve(item, top) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, top) for item in value]
    if not isinstance(value, Tagged):
        return value
    if value.kind == "ref" and isinstance(value.value, str) and (match := _REFERENCE.fullmatch(value.value)):
        found = top.get(match[1])
        return found if isinstance(found, (str, int, float)) else value
    return Tagged(value.kind, value.path, _resolve(value.value, top))
