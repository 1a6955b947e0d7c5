"""prefix.py: names and the index."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.engine.prefix import PrefixIndex, extend_names


def names_of(tokens, block_size=4, salt=b""):
    names = []
    extend_names(names, np.array(tokens, np.int32), block_size, salt)
    return names


def test_invariant_1_chains_differ_from_the_first_difference_on():
    tokens = list(range(16))
    changed = [*tokens[:6], 99, *tokens[7:]]
    first, second = names_of(tokens), names_of(changed)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False, False]


def test_invariant_1_tenants_share_no_name():
    tokens = list(range(16))
    assert not set(names_of(tokens, salt=b"one")) & set(names_of(tokens, salt=b"two"))


def test_equal_blocks_at_other_places_have_other_names():
    assert len(set(names_of([7] * 16))) == 4


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 40))
def test_names_do_not_depend_on_how_the_tokens_came(tokens, cut):
    names = names_of(tokens[:cut])
    extend_names(names, np.array(tokens, np.int32), 4, b"")
    assert names == names_of(tokens)
    assert len(names) == len(tokens) // 4


def test_invariant_2_a_name_and_a_block_belong_together_once():
    index = PrefixIndex()
    assert index.add(b"a", 1)
    assert not index.add(b"a", 2)
    assert not index.add(b"b", 1)
    index.check()
    index.forget(1)
    assert index.find(b"a") is None
    assert index.add(b"b", 1)
    index.check()


def test_invariant_3_the_oldest_is_the_one_disowned_longest_ago():
    index = PrefixIndex()
    with pytest.raises(KeyError):
        index.oldest()
    for block, name in enumerate((b"a", b"b", b"c")):
        index.add(name, block)
        index.disown(block)
    index.own(0)
    index.disown(0)
    assert index.oldest() == 1
    assert len(index) == 3
