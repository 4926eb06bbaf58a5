"""The block pool: ownership, the free list as LRU, exact prefix matches."""

from __future__ import annotations

import sys

import pytest

from batching.core.blocks import BlockPool, IntegrityError


def filled(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Allocate and register full blocks for tokens."""
    size = pool.block_size
    table = pool.allocate(len(tokens) // size)
    parent: int | bytes = salt
    for index, block in enumerate(table):
        parent = pool.register(block, parent, tokens[index * size : (index + 1) * size])
    return table


def test_allocation_takes_every_block_once_and_refuses_more() -> None:
    pool = BlockPool(5, 2)
    table = pool.allocate(3) + pool.allocate(2)
    assert sorted(table) == list(range(5))
    assert pool.free == 0
    with pytest.raises(IntegrityError, match="0 blocks free"):
        pool.allocate(1)
    pool.check([table])


def test_release_empties_the_table_so_twice_is_once() -> None:
    pool = BlockPool(4, 2)
    table = pool.allocate(2)
    pool.release(table)
    pool.release(table)
    assert table == []
    assert pool.free == 4
    pool.check([])


def test_a_released_prefix_is_found_again() -> None:
    pool = BlockPool(6, 2)
    tokens = [1, 2, 3, 4, 5, 6]
    table = filled(pool, tokens)
    original = list(table)
    pool.release(table)
    hits, _ = pool.lookup([1, 2, 3, 4, 9, 9], b"", 3)
    assert hits == original[:2]
    assert pool.unowned(hits) == 2
    pool.acquire(hits)
    assert pool.free == 4
    pool.check([hits])


def test_lookup_stops_at_its_limit() -> None:
    pool = BlockPool(4, 2)
    table = filled(pool, [1, 2, 3, 4])
    assert pool.lookup([1, 2, 3, 4], b"", 1)[0] == table[:1]
    assert pool.lookup([1, 2, 3, 4], b"", 0) == ([], b"")


def test_salts_do_not_share() -> None:
    pool = BlockPool(4, 2)
    filled(pool, [1, 2], salt=b"a")
    assert pool.lookup([1, 2], b"", 1)[0] == []
    assert len(pool.lookup([1, 2], b"a", 1)[0]) == 1


def test_equal_tokens_after_different_prefixes_do_not_match() -> None:
    pool = BlockPool(8, 2)
    first = filled(pool, [1, 2, 7, 7])
    second = filled(pool, [3, 4, 7, 7])
    assert pool.lookup([1, 2, 7, 7], b"", 2)[0] == first
    assert pool.lookup([3, 4, 7, 7], b"", 2)[0] == second
    assert pool.lookup([7, 7], b"", 1)[0] == []


def test_colliding_hashes_are_told_apart() -> None:
    twin = 1 + sys.hash_info.modulus
    assert hash((1, 2)) == hash((twin, 2))
    pool = BlockPool(4, 2)
    filled(pool, [1, 2])
    assert pool.lookup([twin, 2], b"", 1)[0] == []


def test_unregistered_blocks_are_reused_first_then_least_recently_used_tails() -> None:
    pool = BlockPool(6, 2)
    old = filled(pool, [1, 2, 3, 4])
    new = filled(pool, [5, 6])
    plain = pool.allocate(1)
    never = [b for b in range(6) if b not in old + new + plain]
    order = [plain[0], *never, old[1], old[0], new[0]]
    pool.release(old)
    pool.release(new)
    pool.release(plain)
    assert [pool.allocate(1)[0] for _ in range(6)] == order


def test_a_hit_moves_a_block_out_of_the_way_of_eviction() -> None:
    pool = BlockPool(3, 2)
    tables = [filled(pool, [n, n]) for n in range(3)]
    blocks = [table[0] for table in tables]
    for table in tables:
        pool.release(table)
    hits, _ = pool.lookup([0, 0], b"", 1)
    pool.acquire(hits)
    pool.release(hits)
    assert pool.allocate(2) == [blocks[1], blocks[2]]
    assert pool.lookup([0, 0], b"", 1)[0] == [blocks[0]]


def test_reallocation_forgets_what_was_cached() -> None:
    pool = BlockPool(1, 2)
    pool.release(filled(pool, [1, 2]))
    table = pool.allocate(1)
    assert pool.lookup([1, 2], b"", 1)[0] == []
    pool.check([table])


def test_the_same_content_twice_is_served_from_the_first_and_continues_its_chain() -> None:
    pool = BlockPool(4, 2)
    first = filled(pool, [1, 2])
    second = filled(pool, [1, 2, 3, 4])
    assert pool.lookup([1, 2, 3, 4], b"", 2)[0] == [first[0], second[1]]
    pool.check([first, second])


def test_shared_blocks_are_free_only_after_the_last_owner() -> None:
    pool = BlockPool(2, 2)
    table = filled(pool, [1, 2])
    other = list(table)
    pool.acquire(other)
    pool.release(table)
    assert pool.free == 1
    pool.check([other])
    pool.release(other)
    assert pool.free == 2


def test_check_names_what_is_wrong() -> None:
    pool = BlockPool(3, 2)
    table = pool.allocate(2)
    with pytest.raises(IntegrityError, match="0 owners, reference count 1"):
        pool.check([table[:1]])
    with pytest.raises(IntegrityError, match="twice"):
        pool.check([[table[0], table[0]]])
    pool.free += 1
    with pytest.raises(IntegrityError, match="counted"):
        pool.check([table])
