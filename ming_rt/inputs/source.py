"""Where the bytes of a media input come from: a path, raw bytes or a base64 data URL."""

from __future__ import annotations

import base64
import binascii
import numbers
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ming_rt.errors import InvalidMediaError, InvalidRequestError, UnsupportedError, shown
from ming_rt.inputs.limits import Limits

_SHOWN = 120  # characters of a path in a message
_LARGEST = 1 << 40  # of a number in the options of a medium


def resolve(obj: object, kind: str, limits: Limits) -> Path | bytes | None:
    """The file or the bytes that ``obj`` names; None if it is neither a path, bytes nor a data URL.

    Args:
        obj: path (also as ``file://`` URL), bytes, or ``data:<kind>/...;base64,...``.
        kind: "image", "audio" or "video".

    Raises:
        InvalidMediaError: no such file, a malformed or too long data URL.
        UnsupportedError: an http(s) URL; nothing is ever fetched from the network.
    """
    if isinstance(obj, (bytes, bytearray, memoryview)):
        return bytes(obj)
    if isinstance(obj, os.PathLike):
        obj = os.fspath(obj)
    if not isinstance(obj, str):
        return None
    if obj.startswith("data:"):
        return _data_url(obj, kind, limits)
    if obj[:8].lower().startswith(("http://", "https://")):
        raise UnsupportedError(f"{kind}: found a web address, expected a path, bytes or a data URL")
    path = obj.removeprefix("file://")
    try:
        if os.path.isfile(path) or (kind == "video" and os.path.isdir(path)):
            return Path(path)
    except ValueError:  # a zero byte in the path
        pass
    raise InvalidMediaError(f"{kind}: no file {shown(path, _SHOWN)}")


def _data_url(url: str, kind: str, limits: Limits) -> bytes:
    head, found, payload = url.partition("base64,")
    if not found or not head.startswith(f"data:{kind}/"):
        raise InvalidMediaError(f"{kind}: found another data URL, expected data:{kind}/...;base64,...")
    if len(payload) > limits.max_base64_bytes:
        raise InvalidMediaError(
            f"{kind}: found {len(payload)} base64 characters, expected at most {limits.max_base64_bytes}"
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidMediaError(f"{kind}: the data URL is not valid base64") from error


def as_numpy(obj: object, kind: str) -> object:
    """A torch tensor as numpy array (bfloat16 as float32); anything else as it is.

    Raises InvalidMediaError for a tensor without plain data (sparse, meta, quantised).
    """
    if not isinstance(obj, torch.Tensor):
        return obj
    try:
        return (obj.float() if obj.dtype == torch.bfloat16 else obj).detach().cpu().numpy()
    except (TypeError, RuntimeError) as error:
        raise InvalidMediaError(
            f"{kind}: found a {obj.dtype} tensor on {obj.device} ({obj.layout}), expected dense data"
        ) from error


def check_options(options: Mapping[str, Any], known: Collection[str], kind: str) -> None:
    """Refuses option names that nothing would read. Raises InvalidRequestError."""
    if unknown := sorted(
        key[:60] if isinstance(key, str) else shown(key) for key in set(options) - set(known)
    ):
        raise InvalidRequestError(
            f"{kind}: unknown option {', '.join(unknown)}; expected {', '.join(sorted(known))}"
        )


def number(options: Mapping[str, Any], key: str, default: float | None = None) -> float | None:
    """The positive number under ``key``, at most 2^40, or the default. Raises InvalidRequestError."""
    value = options.get(key)
    if value is None:
        return default
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not 0 < value <= _LARGEST:
        raise InvalidRequestError(
            f"{key}: found {shown(value)}, expected a positive number of at most {_LARGEST}"
        )
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def integer(options: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """The positive whole number under ``key``, or the default. Raises InvalidRequestError."""
    value = number(options, key, default)
    if value is not None and value != int(value):
        raise InvalidRequestError(f"{key}: found {shown(value)}, expected a whole number")
    return None if value is None else int(value)
