"""Typed errors of ming_rt: every failure a user can cause or must handle derives from ``MingError``."""

from __future__ import annotations

import numbers
from collections.abc import Sequence


def shown(value: object, most: int = 60) -> str:
    """A value somebody gave, for an error message: one short line without addresses, whatever it is.

    Numbers and texts are written out; anything else is named by its type, for its own repr may be endless,
    nested beyond the recursion limit, or fail.
    """
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        text = repr(value[: most + 1])
    elif value is None or isinstance(value, numbers.Number):
        text = repr(value)
    else:
        text = type(value).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


class MingError(Exception):
    """Base class of every error ming_rt raises on purpose."""


class InvalidRequestError(MingError, ValueError):
    """A request field is wrong; the message names the field, what was found and what is expected."""


class InvalidMediaError(InvalidRequestError):
    """An image, audio or video input is malformed, too large or of an unusable shape."""


class UnsupportedError(InvalidRequestError):
    """The request is well formed, but this model generation, build or device cannot serve it."""


class ConfigError(MingError, ValueError):
    """A checkpoint's config.json or preprocessor_config.json is missing, malformed or out of range."""


class TokenizerError(MingError, ValueError):
    """A checkpoint's tokenizer files are missing or malformed."""


class WeightsError(MingError, ValueError):
    """A checkpoint's tensors are missing, unexpected or malformed.

    ``problems`` holds one sentence per tensor or file; the message lists them all (the first 50).
    """

    SHOWN = 50

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems[: self.SHOWN]
        if len(self.problems) > len(lines):
            lines.append(f"... and {len(self.problems) - len(lines)} more")
        if len(lines) == 1:
            super().__init__(lines[0])
        else:
            super().__init__(f"{len(self.problems)} problems:\n  " + "\n  ".join(lines))


class EngineError(MingError, RuntimeError):
    """The engine failed while serving a request that was itself valid."""


class EngineClosedError(EngineError):
    """The engine was closed before or while the request ran."""


class CapacityError(EngineError):
    """The request needs more memory (KV pages, batch slots) than the engine has in total."""
