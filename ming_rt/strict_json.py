"""JSON from checkpoints and requests, parsed with limits and read with types.

The standard parser accepts duplicate keys (the last wins), NaN and arbitrarily deep nesting; in a file
that somebody else wrote each of these is damage or an attack. ``Fields`` reads an object key by key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ming_rt.errors import ConfigError, MingError

_T = TypeVar("_T")
REQUIRED: Any = object()

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def parse_json(
    data: bytes,
    where: str,
    *,
    max_bytes: int = 8 << 20,
    max_depth: int = 32,
    error: type[MingError] = ConfigError,
) -> Any:
    """Parses UTF-8 JSON; ``where`` names the source in the ``error`` raised for anything out of bounds."""
    if len(data) > max_bytes:
        raise error(f"{where}: {len(data)} bytes of JSON, expected at most {max_bytes}")
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise error(f"{where}: JSON nested deeper than {max_depth} levels")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(f"{where}: key {twice!r:.200} appears more than once")
        return result

    def constant(text: str) -> NoReturn:
        raise error(f"{where}: {text} is not a number JSON allows")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except MingError:
        raise
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON ({problem})") from None


def load_json(
    path: Path,
    *,
    max_bytes: int = 8 << 20,
    max_depth: int = 32,
    error: type[MingError] = ConfigError,
) -> Any:
    """Reads and parses one JSON file, never more than ``max_bytes`` of it."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise error(f"{path}: file not found") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    if len(data) > max_bytes:
        raise error(f"{path}: more than {max_bytes} bytes of JSON")
    return parse_json(data, path.name, max_bytes=max_bytes, max_depth=max_depth, error=error)


def _show(value: object) -> str:
    """A found value for an error message, never longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """Typed, bounded reads from one JSON object; remembers which keys were read.

    Every method raises ConfigError naming the key, what was found and what is expected. Null counts as
    absent: a key with a default takes it, a required key is an error.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, found {_show(data)}")
        self.data, self.where, self.read = data, where, set[str]()

    def name(self, key: str) -> str:
        """Full name of a key, for messages."""
        return f"{self.where}.{key}" if self.where else key

    def fail(self, key: str, expected: str) -> ConfigError:
        """The error for a key: what was found and what is expected."""
        found = _show(self.data[key]) if key in self.data else "no such key"
        return ConfigError(f"{self.name(key)}: found {found}, expected {expected}")

    def get(self, key: str, default: _T, expected: str) -> Any | _T:
        """The value of any type; the default where it is absent or null."""
        self.read.add(key)
        value = self.data.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise self.fail(key, expected)
        return default

    def integer(self, key: str, default: Any = REQUIRED, *, lo: int = 1, hi: int = 1 << 20) -> Any:
        """A whole number from ``lo`` to ``hi``; true and false are none."""
        expected = f"an integer from {lo} to {hi}"
        value = self.get(key, default, expected)
        if value is not default and (type(value) is not int or not lo <= value <= hi):
            raise self.fail(key, expected)
        return value

    def number(self, key: str, default: Any = REQUIRED, *, hi: float, zero: bool = False) -> Any:
        """A positive (or, with ``zero``, non-negative) number up to ``hi``."""
        expected = f"a number {'from' if zero else 'above'} 0 to {hi:g}"
        value = self.get(key, default, expected)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 <= value <= hi or (value == 0 and not zero):
            raise self.fail(key, expected)
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self.get(key, default, "true or false")
        if type(value) is not bool:
            raise self.fail(key, "true or false")
        return value

    def choice(self, key: str, allowed: Iterable[Any], default: Any = REQUIRED) -> Any:
        """One of ``allowed``; the type has to match too (1 is not true)."""
        allowed = tuple(allowed)
        expected = " or ".join(_show(value) for value in allowed)
        value = self.get(key, default, expected)
        if value is not default and not any(type(value) is type(a) and value == a for a in allowed):
            raise self.fail(key, expected)
        return value

    def numbers(self, key: str, count: int, default: Any, *, lo: float, hi: float) -> tuple[float, ...]:
        """A list of ``count`` finite numbers from ``lo`` to ``hi``."""
        value = self.get(key, default, f"{count} numbers")
        good = isinstance(value, (list, tuple)) and len(value) == count
        good = good and all(type(v) in (int, float) and lo <= v <= hi for v in value)
        if not good:
            raise self.fail(key, f"{count} numbers from {lo:g} to {hi:g}")
        return tuple(float(v) for v in value)

    def section(self, key: str) -> Fields | None:
        """A nested object, or None where the key is absent or null."""
        value = self.get(key, None, "an object")
        return None if value is None else Fields(value, self.name(key))

    def absent(self, key: str) -> None:
        """Refuses a key whose meaning this runtime does not implement."""
        if self.get(key, None, "") is not None:
            raise self.fail(key, "no such key: it asks for a feature that is not supported")

    def required_section(self, key: str) -> Fields:
        """The object under ``key``, which has to be there."""
        return self.section(key) or Fields(self.data.get(key), self.name(key))

    def ignored(self, unused: Container[str] = ()) -> tuple[str, ...]:
        """Names of the keys that were neither read nor are listed in ``unused``."""
        return tuple(sorted(self.name(k) for k in self.data if k not in self.read and k not in unused))
