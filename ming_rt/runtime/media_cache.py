"""Encoder results kept for prompts that repeat their media, such as the turns of one conversation."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ming_rt.models.omni import Content, Encode


class MediaCache:
    """Least recently used encoder results by the exact content of what was encoded, bounded in bytes.

    The model calls it around its encoders (``ming_rt.models.omni.Memo``).
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self._bytes = 0
        self._items: OrderedDict[bytes, list[torch.Tensor]] = OrderedDict()

    def __call__(self, items: Sequence[Content], encode: Encode) -> list[list[torch.Tensor]]:
        """The features of ``items``, those not known by one call of ``encode``."""
        keys = [_digest(item) for item in items]
        found = {key: self._items[key] for key in keys if key in self._items}
        self.hits += sum(key in found for key in keys)
        for key in found:
            self._items.move_to_end(key)
        missing = [i for i, key in enumerate(keys) if key not in found]
        if missing:
            for index, feats in zip(missing, encode(missing), strict=True):
                found[keys[index]] = feats
                self._keep(keys[index], feats)
        return [found[key] for key in keys]

    def _keep(self, key: bytes, feats: list[torch.Tensor]) -> None:
        size = _nbytes(feats)
        if size > self.max_bytes or key in self._items:
            return
        # A part of a bigger result would keep all of it alive.
        self._items[key] = [f.clone() for f in feats]
        self._bytes += size
        while self._bytes > self.max_bytes:
            _key, old = self._items.popitem(last=False)
            self._bytes -= _nbytes(old)


def _nbytes(feats: list[torch.Tensor]) -> int:
    return sum(f.nbytes for f in feats)


def _digest(parts: Content) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{len(part)}:{part}".encode())
        else:
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part))
    return digest.digest()
