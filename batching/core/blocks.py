"""The KV cache as numbers: reference-counted blocks, a prefix cache, and one free list.

A block is an index into the worker's KV pages. It is in exactly one of two states: owned
(reference count > 0) or free. A free block may still hold registered content: then it serves
prefix hits until it is allocated again, so the free list *is* the LRU. The list is intrusive
(two arrays of neighbours and a sentinel), hence a hit in its middle unlinks in O(1).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

Parent = int | bytes  # content id of the block before; for a first block the request's salt
Key = tuple[Parent, tuple[int, ...]]


class IntegrityError(AssertionError):
    """The scheduler's or pool's bookkeeping contradicts itself; the message names what."""


class BlockPool:
    """Owner of all blocks. Sequences hold block numbers only in tables that it fills and empties.

    A full block's content is named by a *content id*, unique for the life of the pool. The cache
    maps (content id of the parent block, tokens of this block) to the block, so equality of keys
    compares the tokens themselves and the identity of everything before them: a hash collision
    cannot serve foreign KV, and nothing depends on the process's hash seed. A parent outlives its
    children in the free list because tables are released tail first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free = num_blocks
        self.cached = 0  # free blocks that still hold content
        self._refs = [0] * num_blocks
        self._keys: list[Key | None] = [None] * num_blocks
        self._content = [0] * num_blocks
        self._cached: dict[Key, int] = {}
        self._next_content = 1
        # Index num_blocks is the sentinel: its successor is allocated next, its predecessor last.
        self._successor = [*range(1, num_blocks + 1), 0]
        self._predecessor = [num_blocks, *range(num_blocks)]

    def allocate(self, count: int) -> list[int]:
        """Take the `count` least recently used free blocks; what they cached is forgotten.

        Raises:
            IntegrityError: fewer than `count` blocks are free (the caller checks `free`).
        """
        if count > self.free:
            raise IntegrityError(f"allocate({count}) with {self.free} blocks free")
        taken = []
        sentinel = self.num_blocks
        block = self._successor[sentinel]
        for _ in range(count):
            taken.append(block)
            key = self._keys[block]
            if key is not None:
                del self._cached[key]
                self._keys[block] = None
                self.cached -= 1
            self._refs[block] = 1
            block = self._successor[block]
        # One splice for the whole slice, instead of an unlink per block.
        self._successor[sentinel] = block
        self._predecessor[block] = sentinel
        self.free -= count
        return taken

    def lookup(self, tokens: list[int], salt: bytes, limit: int) -> tuple[list[int], Parent]:
        """The longest cached chain of at most `limit` full blocks that starts `tokens`.

        Returns the blocks, unacquired, and the content id of the last (the salt if none).
        """
        size = self.block_size
        parent: Parent = salt
        found: list[int] = []
        for begin in range(0, limit * size, size):
            block = self._cached.get((parent, tuple(tokens[begin : begin + size])))
            if block is None:
                break
            found.append(block)
            parent = self._content[block]
        return found, parent

    def unowned(self, blocks: Seq[int]) -> int:
        """How many of `blocks` are free now, that is, how many `acquire` would take."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def acquire(self, blocks: Seq[int]) -> None:
        """Add an owner to each block; free ones leave the free list and keep their content."""
        for block in blocks:
            if self._refs[block] == 0:
                before, after = self._predecessor[block], self._successor[block]
                self._successor[before] = after
                self._predecessor[after] = before
                self.free -= 1
                self.cached -= 1  # nothing else of a free block can be found
            self._refs[block] += 1

    def release(self, table: list[int]) -> None:
        """Give up one ownership of each block and empty the table (so a second call is nothing).

        Blocks without registered content are of no use to anyone and go to the front.
        """
        while table:
            block = table.pop()
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            sentinel = self.num_blocks
            if self._keys[block] is None:
                before, after = sentinel, self._successor[sentinel]
            else:
                before, after = self._predecessor[sentinel], sentinel
                self.cached += 1
            self._successor[before] = self._predecessor[after] = block
            self._predecessor[block] = before
            self._successor[block] = after
            self.free += 1

    def register(self, block: int, parent: Parent, tokens: Seq[int]) -> int:
        """Offer a full block's content for sharing. Returns its content id.

        If the same content is cached in another block, that one stays the one served.
        """
        key = (parent, tuple(tokens))
        cached = self._cached.get(key)
        if cached is not None:
            return self._content[cached]
        self._cached[key] = block
        self._keys[block] = key
        self._content[block] = self._next_content
        self._next_content += 1
        return self._content[block]

    def check(self, tables: Seq[Seq[int]]) -> None:
        """Verify every invariant against the tables of all owners. O(blocks).

        Raises:
            IntegrityError: naming the first contradiction found.
        """
        owners = [0] * self.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise IntegrityError(f"a block appears twice in the table {list(table)}")
            for block in table:
                owners[block] += 1
        if owners != self._refs:
            wrong = next(b for b in range(self.num_blocks) if owners[b] != self._refs[b])
            raise IntegrityError(
                f"block {wrong}: {owners[wrong]} owners, reference count {self._refs[wrong]}"
            )
        listed = self._walk_free_list()
        if sorted(listed) != [b for b in range(self.num_blocks) if owners[b] == 0]:
            raise IntegrityError("the free list is not the set of blocks without an owner")
        if len(listed) != self.free:
            raise IntegrityError(f"{len(listed)} blocks listed free, {self.free} counted")
        if self.cached != sum(self._keys[block] is not None for block in listed):
            raise IntegrityError(f"{self.cached} free blocks are counted as cached")
        if {b: k for k, b in self._cached.items()} != {
            b: k for b, k in enumerate(self._keys) if k is not None
        }:
            raise IntegrityError("the prefix cache and the blocks' keys disagree")

    def _walk_free_list(self) -> list[int]:
        listed: list[int] = []
        block = self.num_blocks
        while True:
            after = self._successor[block]
            if self._predecessor[after] != block:
                raise IntegrityError(f"the free list is broken between {block} and {after}")
            if after == self.num_blocks:
                return listed
            if len(listed) == self.num_blocks:
                raise IntegrityError("the free list has a cycle")
            listed.append(after)
            block = after
