"""Page pool: reference counts, content index, eviction order, invariants."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ming_rt.runtime.kv_cache import KVCache, OutOfPagesError, PagePool, chain_key


def keys(count: int, salt: int = 0) -> list[bytes]:
    chain = [b""]
    for i in range(count):
        chain.append(chain_key(chain[-1], np.full(4, i + salt), np.zeros((3, 4)), np.zeros(4)))
    return chain[1:]


def filled(pool: PagePool, chain: list[bytes]) -> list[int]:
    pages = pool.allocate(len(chain))
    for page, key in zip(pages, chain, strict=True):
        pool.publish(page, key)
    return pages


def test_storage_layout():
    kv = KVCache(layers=3, pages=5, page_size=4, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16)
    assert len(kv.k) == len(kv.v) == 3
    assert kv.k[0].shape == kv.v[2].shape == (5, 2, 4, 8)
    assert KVCache.bytes_per_token(3, 2, 8, torch.bfloat16) == 2 * 3 * 2 * 8 * 2


def test_allocation_is_all_or_none():
    pool = PagePool(4, 4)
    pages = pool.allocate(3)
    with pytest.raises(OutOfPagesError, match="expected 2 free KV pages, got 1 of 4"):
        pool.allocate(2)
    assert pool.available == 1
    pool.release(pages)
    assert pool.available == 4
    pool.check(holders=[])


def test_prefix_is_shared_and_outlives_its_owner():
    pool, chain = PagePool(8, 4), keys(3)
    pages = filled(pool, chain)
    assert pool.lookup(chain[:2]) == pages[:2]
    pool.check(holders=[pages, pages[:2]])
    pool.release(pages)
    assert (pool.used, pool.idle) == (2, 1)
    assert pool.lookup([*chain, *keys(1, salt=9)]) == pages
    pool.check(holders=[pages[:2], pages])
    pool.release(pages)
    pool.release(pages[:2])
    pool.check(holders=[])
    assert pool.idle == 3


def test_eviction_takes_the_oldest_sequence_from_its_tail():
    pool, old, new = PagePool(6, 4), keys(3), keys(3, salt=50)
    a, b = filled(pool, old), filled(pool, new)
    pool.release(a)
    pool.release(b)
    taken = pool.allocate(2)
    assert taken == [a[2], a[1]]
    assert pool.lookup(old) == [a[0]]
    assert pool.lookup(new) == b
    pool.check(holders=[taken, [a[0]], b])


def test_first_page_of_a_content_wins():
    pool, chain = PagePool(4, 4), keys(1)
    first, second = filled(pool, chain), filled(pool, chain)
    pool.release(second)
    assert pool.idle == 0, "a duplicate has nothing to be found by"
    pool.release(first)
    assert pool.idle == 1
    pool.release(pool.allocate(4))  # evicts what is idle
    pool.check(holders=[])
    assert pool.lookup(chain) == []


@pytest.mark.parametrize("misuse", ["release", "publish"])
def test_unreferenced_pages_are_refused(misuse):
    pool = PagePool(2, 4)
    with pytest.raises(ValueError, match="referenced page"):
        pool.release([0]) if misuse == "release" else pool.publish(0, b"k")


@pytest.mark.parametrize(
    "change",
    ["parent", "ids", "positions", "modality", "media_rows", "media_value", "no_media", "media_dtype"],
)
def test_every_part_of_the_content_is_in_the_key(change):
    def key(**changes):
        parts = {
            "parent": b"p",
            "ids": np.arange(4),
            "positions": np.arange(12).reshape(3, 4),
            "modality": np.array([0, 1, 1, 0]),
            "media_rows": np.array([1, 2]),
            "media_feats": torch.ones(2, 3),
            **changes,
        }
        return chain_key(*parts.values())

    other = {
        "parent": {"parent": b"q"},
        "ids": {"ids": np.array([0, 1, 2, 4])},
        "positions": {"positions": np.arange(1, 13).reshape(3, 4)},
        "modality": {"modality": np.array([0, 1, 2, 0])},
        "media_rows": {"media_rows": np.array([1, 3])},
        "media_value": {"media_feats": torch.full((2, 3), np.nextafter(np.float32(1), np.float32(2)).item())},
        "no_media": {"media_rows": None, "media_feats": None},
        "media_dtype": {"media_feats": torch.ones(2, 3, dtype=torch.bfloat16)},
    }[change]
    assert key() == key()
    assert key() != key(**other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._empty.append(pool._empty[0]),
        lambda pool: pool._refs.__setitem__(0, 3),
        lambda pool: pool._idle.__setitem__(1, None),
        lambda pool: pool._page_of.__setitem__(b"x", 2),
    ],
)
def test_check_finds_damage(damage):
    pool = PagePool(4, 4)
    held = pool.allocate(2)
    pool.check(holders=[held])
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check(holders=[held])


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_every_invariant(seed):
    rnd = random.Random(seed)
    pool = PagePool(rnd.randint(3, 20), 4)
    chains = [keys(rnd.randint(1, 6), salt=100 * rnd.randint(0, 2)) for _ in range(6)]
    held: list[list[int]] = []
    for _ in range(300):
        if held and rnd.random() < 0.5:
            pool.release(held.pop(rnd.randrange(len(held))))
        else:
            chain = rnd.choice(chains)
            pages = pool.lookup(chain)
            if len(chain) - len(pages) > pool.available:
                pool.release(pages)
                continue
            new = pool.allocate(len(chain) - len(pages))
            for page, key in zip(new, chain[len(pages) :], strict=True):
                if rnd.random() < 0.8:
                    pool.publish(page, key)
            held.append(pages + new)
        pool.check(held)
    for pages in held:
        pool.release(pages)
    pool.check(holders=[])
    assert pool.available == pool.num_pages
