"""kv_pool.py: each numbered invariant, and all of them after random operations."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.worker.engine.kv_pool import KVPool


def test_invariant_1_every_block_is_in_exactly_one_place():
    pool = KVPool(4, 8)
    table = pool.allocate(3)
    pool.name(table[0], b"a")
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.release(table)
    assert (pool.num_free, pool.num_cached) == (3, 1)
    pool.check([])
    pool._free.append(pool._free[0])
    with pytest.raises(AssertionError):
        pool.check([])


def test_invariant_2_a_released_block_is_cached_only_if_it_is_named():
    pool = KVPool(3, 8)
    named, unnamed = pool.allocate(2)
    pool.name(named, b"a")
    pool.release([named, unnamed])
    assert pool.match([b"a"]) == 1
    assert pool.acquire([b"a"]) == [named]
    pool.check([[named]])
    pool.release([named])
    pool._index._name_of.pop(named)
    with pytest.raises(AssertionError):
        pool.check([])


def test_invariant_3_only_named_blocks_get_a_second_owner():
    pool = KVPool(3, 8)
    first = pool.allocate(2)
    pool.name(first[0], b"a")
    second = pool.acquire([b"a"])
    assert second == first[:1]
    pool.check([first, second])
    pool._index.forget(first[0])
    with pytest.raises(AssertionError):
        pool.check([first, second])


def test_invariant_4_owners_are_those_in_the_tables():
    pool = KVPool(3, 8)
    table = pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check([])
    with pytest.raises(AssertionError):
        pool.check([table, table])
    pool.release(table)
    with pytest.raises(AssertionError):
        pool.release(table)


def test_invariant_5_an_allocation_that_does_not_fit_changes_nothing():
    pool = KVPool(4, 8)
    table = pool.allocate(1)
    pool.name(table[0], b"a")
    pool.release(table)
    assert pool.allocate(5) is None
    assert (pool.num_free, pool.num_cached) == (3, 1)
    assert pool.match([b"a"]) == 1
    assert len(pool.allocate(4)) == 4
    assert pool.match([b"a"]) == 0


def test_invariant_6_the_block_unused_for_longest_is_evicted_first():
    pool = KVPool(3, 8)
    tables = [pool.allocate(1) for _ in range(3)]
    for table, name in zip(tables, (b"a", b"b", b"c"), strict=True):
        pool.name(table[0], name)
        pool.release(table)
    pool.release(pool.acquire([b"a"]))  # used again: now b is the oldest
    pool.allocate(1)
    assert [pool.match([name]) for name in (b"a", b"b", b"c")] == [1, 0, 1]


def test_invariant_7_shared_blocks_are_counted_from_their_second_owner_to_the_last_but_one():
    pool = KVPool(3, 8)
    table = pool.allocate(2)
    pool.name(table[0], b"a")
    others = [pool.acquire([b"a"]) for _ in range(2)]
    assert (pool.num_shared, pool.count_owners(table)) == (1, [3, 1])
    pool.release(table)
    assert pool.num_shared == 1
    pool.release(others.pop())
    assert pool.num_shared == 0
    pool.check(others)
    pool.num_shared = 1
    with pytest.raises(AssertionError):
        pool.check(others)


def test_the_end_of_a_chain_is_evicted_before_its_start():
    pool = KVPool(3, 8)
    table = pool.allocate(3)
    for block, name in zip(table, (b"a", b"b", b"c"), strict=True):
        pool.name(block, name)
    pool.release(table)
    pool.allocate(1)
    assert pool.match([b"a", b"b", b"c"]) == 2


def test_a_name_that_is_taken_stays_where_it_is():
    pool = KVPool(3, 8)
    first, second = pool.allocate(2)
    pool.name(first, b"a")
    pool.name(second, b"a")
    pool.release([first, second])
    assert (pool.num_free, pool.num_cached) == (2, 1)
    assert pool.acquire([b"a"]) == [first]


def test_discarded_blocks_are_never_found_again_unless_another_owner_has_them():
    pool = KVPool(4, 8)
    table = pool.allocate(3)
    pool.name(table[0], b"a")
    pool.name(table[1], b"b")
    other = pool.acquire([b"a"])
    assert pool.discard(table) == table[1:]
    assert pool.match([b"a", b"b"]) == 1
    pool.check([other])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 64), (8, 0), (-1, 64)])
def test_a_pool_without_room_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="at least 1"):
        KVPool(num_blocks, block_size)


class PoolMachine(RuleBasedStateMachine):
    """Sequences that share names, in any order of operations."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks):
        self.pool = KVPool(num_blocks, 4)
        self.tables = []

    @rule(count=st.integers(0, 6), prefix=st.sampled_from("xyz"))
    def begin(self, count, prefix):
        names = [f"{prefix}{i}".encode() for i in range(count)]
        table = self.pool.acquire(names[: self.pool.match(names)])
        more = self.pool.allocate(count - len(table))
        if more is None:
            self.pool.release(table)
            return
        table += more
        for block, name in zip(table, names, strict=True):
            self.pool.name(block, name)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), is_bad=st.booleans())
    def end(self, data, is_bad):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        if is_bad:
            for block in self.pool.discard(table):
                assert all(block not in other for other in self.tables)
        else:
            self.pool.release(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(0, 3))
    def grow(self, data, count):
        is_there = count <= self.pool.num_available
        more = self.pool.allocate(count)
        assert (more is not None) == is_there
        data.draw(st.sampled_from(self.tables)).extend(more or [])

    @invariant()
    def holds(self):
        if hasattr(self, "pool"):
            self.pool.check(self.tables)


TestPoolMachine = PoolMachine.TestCase
