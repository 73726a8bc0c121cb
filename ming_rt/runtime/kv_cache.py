"""Paged key/value storage and the pool that hands out its pages and shares prompt prefixes.

A *page* holds the keys and values of ``page_size`` consecutive tokens of one sequence, in every layer.
The pool counts references, remembers finished pages by the content that produced them, and evicts the
least recently used unreferenced one when it runs out of empty pages.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ming_rt.errors import CapacityError, EngineError
from ming_rt.runtime.transfer import CPU


class KVCache:
    """Keys and values of all layers: ``k[l]`` and ``v[l]`` are ``[pages, kv_heads, page_size, head_dim]``.

    On the CPU memory is reserved, not touched: the operating system commits a page when it is first written.
    Raises ``CapacityError`` where it cannot even be reserved.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        shape = (pages, num_kv_heads, page_size, head_dim)
        self.page_size = page_size
        # A recorded decode step runs once before there is a token: what it reads should be numbers.
        make = torch.empty if device.type == "cpu" else torch.zeros
        try:
            self.k, self.v = (
                [make(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
            )
        except RuntimeError as error:
            size = pages * page_size * self.bytes_per_token(layers, num_kv_heads, head_dim, dtype)
            raise CapacityError(f"the KV cache of {size} bytes does not fit into the memory") from error

    @staticmethod
    def bytes_per_token(layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes one cached token takes over all layers, keys and values together."""
        return 2 * layers * num_kv_heads * head_dim * dtype.itemsize


class OutOfPagesError(EngineError):
    """More pages were asked for than are empty or evictable."""


def chain_key(
    parent: bytes,
    ids: np.ndarray,
    positions: np.ndarray,
    modality: np.ndarray,
    media_rows: np.ndarray | None = None,
    media_feats: torch.Tensor | None = None,
) -> bytes:
    """Content key of one full page whose preceding pages have the key ``parent`` (``b""`` for the first).

    The keys and values of a token depend on everything before it, so the key chains over: token ids
    i64 ``[page]``, rotary positions i32 ``[3, page]``, router choice u8 ``[page]``, and the embeddings that
    replace placeholder tokens (``media_rows`` within the page, ``media_feats`` ``[rows, hidden]``). Equal
    keys therefore mean equal page contents; the digest has 128 bits.
    """
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(np.ascontiguousarray(ids, np.int64))
    digest.update(np.ascontiguousarray(positions, np.int32))
    digest.update(np.ascontiguousarray(modality, np.uint8))
    if media_rows is not None and media_feats is not None and len(media_rows):
        digest.update(np.ascontiguousarray(media_rows, np.int64))
        digest.update(media_feats.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()


class PagePool:
    """Owner of ``num_pages`` page numbers: reference counts, content index, least-recently-used eviction.

    Every page is in exactly one state: *empty* (no content), *used* (referenced by one or more sequences) or
    *idle* (unreferenced, content kept for reuse until evicted).
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"PagePool: expected sizes of at least 1, got {num_pages} x {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._empty = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._refs = [0] * num_pages
        self._key: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Pages that ``allocate`` can hand out now (empty or evictable)."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages referenced by at least one sequence."""
        return self.num_pages - self.available

    @property
    def idle(self) -> int:
        """Unreferenced pages whose content can still be reused."""
        return len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages of undefined content, all or none.

        Raises:
            OutOfPagesError: fewer are available.
        """
        if count > self.available:
            raise OutOfPagesError(f"expected {count} free KV pages, got {self.available} of {self.num_pages}")
        pages = []
        for _ in range(count):
            if self._empty:
                page = self._empty.pop()
            else:
                page, _none = self._idle.popitem(last=False)
                self._forget(page)
            self._refs[page] = 1
            pages.append(page)
        return pages

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Reference and return the pages of the longest known prefix of ``keys`` (read lazily)."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            if self._refs[page] == 0:
                del self._idle[page]
            self._refs[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Make a completely written, referenced page findable; the first page of a content wins."""
        if self._refs[page] < 1:
            raise ValueError(f"publish: expected a referenced page, got page {page}")
        if self._key[page] is None and key not in self._page_of:
            self._key[page] = key
            self._page_of[key] = page

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page of a sequence, given in sequence order.

        The tail is parked first, so eviction shortens a cached prefix from its end and never cuts its head.
        """
        for page in reversed(pages):
            if self._refs[page] < 1:
                raise ValueError(f"release: expected a referenced page, got page {page}")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if self._key[page] is None:
                    self._empty.append(page)
                else:
                    self._idle[page] = None

    def _forget(self, page: int) -> None:
        key = self._key[page]
        if key is not None:
            del self._page_of[key]
            self._key[page] = None

    def check(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Verify every invariant; ``AssertionError`` names the first one broken.

        ``holders``: the page lists of all live sequences; when given, reference counts must match exactly.
        """
        empty, idle = set(self._empty), set(self._idle)
        problems = []
        if len(empty) != len(self._empty):
            problems.append("a page is in the empty list twice")
        for page in range(self.num_pages):
            states = (page in empty) + (page in idle) + (self._refs[page] > 0)
            if states != 1 or self._refs[page] < 0:
                problems.append(f"page {page} is in {states} states with {self._refs[page]} references")
            if page in empty and self._key[page] is not None:
                problems.append(f"empty page {page} still has a content key")
            if page in idle and self._key[page] is None:
                problems.append(f"idle page {page} has no content key")
        if {k: p for p, k in enumerate(self._key) if k is not None} != self._page_of:
            problems.append("the content index and the page keys differ")
        if holders is not None:
            counts = [0] * self.num_pages
            for pages in holders:
                for page in pages:
                    counts[page] += 1
            problems += [
                f"page {page} has {have} references, {want} sequences hold it"
                for page, (have, want) in enumerate(zip(self._refs, counts, strict=True))
                if have != want
            ]
        if problems:
            raise AssertionError("; ".join(problems[:5]))
