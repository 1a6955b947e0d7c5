"""Names of full blocks, and the index that finds a block by its name.

The name of a block is a hash of the block before it and of its own tokens, so it stands for all the
tokens up to its end; equal names mean equal keys and values. The chain starts from the tenant's
salt: without it one tenant could tell from the time to the first token what another has asked.
The hash is BLAKE2b with 128 bits, because tokens are chosen by clients: with a weaker one a client
could make two prompts collide and read another's context.

Invariants:
 1. Two chains differ from the first block on in which salt or tokens differ.
 2. A name stands for at most one block, and a block has at most one name.
 3. `oldest` is the unowned block that was used longest ago.

Called by: kv_pool.py (index), scheduler.py (names).
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import numpy as np

#: bytes of a block's name; collisions are out of reach up to 2^64 blocks.
NAME_BYTES = 16


def extend_names(
    names: list[bytes],  # of the leading full blocks, extended in place
    tokens: np.ndarray,  # [num_known] int32
    block_size: int,
    salt: bytes,
) -> None:
    """Append the names of all full blocks of `tokens` that have none yet."""
    num_full = len(tokens) // block_size
    if len(names) >= num_full:
        return
    before = names[-1] if names else blake2b(salt, digest_size=NAME_BYTES).digest()
    for start in range(len(names) * block_size, num_full * block_size, block_size):
        block = tokens[start : start + block_size].astype("<i4", copy=False).tobytes()
        before = blake2b(before + block, digest_size=NAME_BYTES).digest()
        names.append(before)


class PrefixIndex:
    """Which block holds which name, and which of the named blocks nobody owns, oldest first."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._unowned: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._unowned)

    @property
    def unowned(self) -> frozenset[int]:
        return frozenset(self._unowned)

    def find(self, name: bytes) -> int | None:
        """Return the block with this name."""
        return self._block_of.get(name)

    def name_of(self, block: int) -> bytes | None:
        return self._name_of.get(block)

    def add(self, name: bytes, block: int) -> bool:
        """Name a block, unless the name is taken or the block has one; say whether it was done."""
        if name in self._block_of or block in self._name_of:
            return False
        self._block_of[name] = block
        self._name_of[block] = name
        return True

    def forget(self, block: int) -> None:
        """Take the name from a block; it is no longer found and no longer evictable."""
        name = self._name_of.pop(block, None)
        if name is not None:
            del self._block_of[name]
        self._unowned.pop(block, None)

    def disown(self, block: int) -> None:
        """Mark a named block as owned by nobody, and as the one used last."""
        self._unowned[block] = None
        self._unowned.move_to_end(block)

    def own(self, block: int) -> None:
        """Mark a block as owned again."""
        self._unowned.pop(block, None)

    def oldest(self) -> int:
        """Return the unowned block to evict next; KeyError when there is none."""
        if not self._unowned:
            raise KeyError("no cached block to evict")
        return next(iter(self._unowned))

    def check(self) -> None:
        """Assert invariant 2."""
        assert {block: name for name, block in self._block_of.items()} == self._name_of
        assert self._unowned.keys() <= self._name_of.keys()
