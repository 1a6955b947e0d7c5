"""Incremental text: the pieces add up wherever the borders are, and hold nothing they must not."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headrace.worker.text import OutputText, StopMatcher


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level, one token a byte: every border that can be is there."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def pieces(tokenizer, ids, stops=()):
    output = OutputText(tokenizer, stops)
    found = []
    for at, token in enumerate(ids):
        found.append(output.feed(token, is_last=at == len(ids) - 1))
        if output.is_stopped:
            break
    return found, output.is_stopped


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_pieces_add_up_to_the_text_and_none_holds_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text).ids
    found, _ = pieces(tokenizer, ids)
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


def test_an_unfinished_character_at_the_end_is_dropped(tokenizer):
    ids = tokenizer.encode("ab世").ids
    found, _ = pieces(tokenizer, ids[:-1])
    assert found == ["a", "b", "", ""]


def test_bytes_that_no_token_can_finish_become_replacement_characters(tokenizer):
    start = tokenizer.encode("世").ids[0]
    found, _ = pieces(tokenizer, [start, start, *tokenizer.encode("x").ids])
    assert "".join(found) == "\ufffd\ufffdx"


def test_a_nul_becomes_a_replacement_character(tokenizer):
    found, _ = pieces(tokenizer, tokenizer.encode("a\0b").ids)
    assert found == ["a", "\ufffd", "b"]


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_a_stop_string_is_found_wherever_the_borders_are(text, stops, seed):
    """The oracle sees the whole text: everything before the stop that is complete first."""
    cut = random.Random(seed)
    matcher, given_out, at = StopMatcher(stops), "", 0
    while at < len(text) and not matcher.is_matched:
        size = cut.randint(1, 3)
        given_out += matcher.feed(text[at : at + size])
        assert text.startswith(given_out)
        at += size
    seen = text[:at]
    found = [seen.find(stop) for stop in stops if stop in seen]
    assert matcher.is_matched == bool(found)
    if found:
        assert given_out == seen[: min(found)]
    else:
        assert given_out + matcher.release() == seen


def test_text_that_may_begin_a_stop_string_waits_and_is_released_at_the_end(tokenizer):
    found, stopped = pieces(tokenizer, tokenizer.encode("wo wor").ids, ["world"])
    assert not stopped
    assert found == ["", "", "wo ", "", "", "wor"]


def test_a_stop_string_and_what_follows_it_is_in_no_piece(tokenizer):
    found, stopped = pieces(tokenizer, tokenizer.encode("hello world, again").ids, ["world"])
    assert stopped
    assert "".join(found) == "hello "


def test_invariant_4_feeding_the_same_ids_again_goes_on_with_the_same_pieces(tokenizer):
    ids = tokenizer.encode("eins 世界 zwei drei").ids
    whole, _ = pieces(tokenizer, ids, ["drei"])
    for cut in range(len(ids)):
        again = OutputText(tokenizer, ["drei"])
        for token in ids[:cut]:
            again.feed(token, is_last=False)
        rest = [again.feed(t, is_last=i == len(ids) - cut - 1) for i, t in enumerate(ids[cut:])]
        assert rest[: len(whole) - cut] == whole[cut:]
