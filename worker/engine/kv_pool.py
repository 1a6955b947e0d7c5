"""The paged KV pool's bookkeeping: which block is whose. The tensors are the runner's.

    free --allocate--> owned --release, unnamed--> free
                       owned --release, named----> cached --acquire--> owned
                                                   cached --allocate (evicts the oldest)--> owned

A block is `block_size` consecutive tokens' keys and values over all layers. A sequence's table
lists its blocks in order. A full block may be named (see prefix.py); the next sequence that begins
with the same tokens shares it. Several answers to one prompt share its full blocks in the same way
and recompute what is left of the last one, so there is no block to copy on write.

Invariants, all asserted by `check()`:
 1. Every block is in exactly one of free, owned, cached.
 2. A cached block has no owner and a name; a free block has neither.
 3. A block with two owners is named, hence full, and is never written again.
 4. The owners counted are those in the tables: one for each table that a block stands in.
 5. `allocate` gives all it was asked for or changes nothing.
 6. What is evicted is the cached block unused for longest.

 7. `num_shared` is the number of blocks with two owners or more.

Called by: scheduler.py, sharing.py, forecast.py (sizes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from headrace.worker.engine.prefix import PrefixIndex


class KVPool:
    """All blocks of one engine; tables belong to the sequences and are passed in."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"KV pool of {num_blocks} blocks of {block_size} tokens asked; both must be at "
                "least 1: give the worker more memory for KV or set num_blocks"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_shared = 0  # blocks with two owners or more
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks
        self._index = PrefixIndex()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._index)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._index)

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Give blocks with one owner each, evicting cached ones; None if there are too few."""
        if num_blocks > self.num_available:
            return None
        return [self._take_one() for _ in range(num_blocks)]

    def _take_one(self) -> int:
        if not self._free:
            evicted = self._index.oldest()
            self._index.forget(evicted)
            self._free.append(evicted)
        block = self._free.pop()
        self._num_owners[block] = 1
        return block

    def match(self, names: Sequence[bytes]) -> int:
        """Return how many leading names have a block, owned or cached."""
        return len(self.find(names))

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Return the blocks of the leading names that have one, owned or cached."""
        blocks: list[int] = []
        for name in names:
            if (block := self._index.find(name)) is None:
                break
            blocks.append(block)
        return blocks

    def count_owners(self, blocks: Iterable[int]) -> list[int]:
        """Return how many tables each block stands in."""
        num_owners = self._num_owners
        return [num_owners[block] for block in blocks]

    def acquire(self, names: Sequence[bytes]) -> list[int]:
        """Become an owner of the blocks with these names, all of which `match` has found."""
        table: list[int] = []
        for name in names:
            block = self._index.find(name)
            assert block is not None, "acquire() of a name that match() did not find"
            self._index.own(block)
            self._num_owners[block] += 1
            self.num_shared += self._num_owners[block] == 2
            table.append(block)
        return table

    def name(self, block: int, name: bytes) -> None:
        """Offer a full owned block to later sequences; a name already taken stays as it is."""
        assert self._num_owners[block] > 0
        self._index.add(name, block)

    def release(self, table: Sequence[int]) -> None:
        """Give up one ownership of each block of a table."""
        # The last block first: a chain is of use only from its start, so its end is evicted first.
        for block in reversed(table):
            self._disown(block)

    def discard(self, table: Sequence[int]) -> list[int]:
        """Release blocks whose content is bad; return those now free, to be overwritten.

        A block that another sequence still reads keeps its name: that sequence fails by the same
        content and the last one discards it.
        """
        sole = [block for block in table if self._num_owners[block] == 1]
        for block in sole:
            self._index.forget(block)
        self.release(table)
        return sole

    def _disown(self, block: int) -> None:
        assert self._num_owners[block] > 0, f"block {block} released more often than owned"
        self._num_owners[block] -= 1
        if self._num_owners[block]:
            self.num_shared -= self._num_owners[block] == 1
            return
        if self._index.name_of(block) is None:
            self._free.append(block)
        else:
            self._index.disown(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the invariants against the tables of all sequences that hold any block."""
        free, cached = set(self._free), self._index.unowned
        owned = {block for block, owners in enumerate(self._num_owners) if owners}
        assert len(free) == len(self._free)
        assert len(free) + len(owned) + len(cached) == self.num_blocks  # 1
        assert free | owned | cached == set(range(self.num_blocks))  # 1
        named = {block for block in range(self.num_blocks) if self._index.name_of(block)}
        assert cached <= named  # 2
        assert not free & named  # 2
        shared = {block for block, owners in enumerate(self._num_owners) if owners > 1}
        assert shared <= named  # 3
        assert self.num_shared == len(shared)  # 7
        counted = Counter(block for table in tables for block in table)
        assert dict(counted) == {block: self._num_owners[block] for block in owned}  # 4
        self._index.check()
