import itertools
import random

import pytest
import torch

from headrace.kernels.decode_work import DecodeWork, plan_decode, plan_decode_reference

pytestmark = pytest.mark.gpu
HEADS = (2, 1, 64)


def planned_items(work: DecodeWork, num_live: int) -> list[tuple[int, int, int, int]]:
    """Read the device's list back as the attention kernel reads it."""
    quota, unit, items = int(work.totals[0]), work.unit, []
    sequences = work.sequences[:num_live].tolist()
    for share, (first_item, end_item) in enumerate(work.share_spans.tolist()):
        for row, start, first, context_len, *_ in sequences[first_item:end_item]:
            origin = first // unit * unit
            begin = max(origin + (share * quota - start) * unit, first)
            end = min(origin + ((share + 1) * quota - start) * unit, context_len)
            items.append((share, row, begin, end))
    return items


def plan(lens, device, window=None, **numbers):
    work = DecodeWork.allocate(len(lens) + 3, HEADS, device, window, **numbers)
    for buffer in (work.sequences, work.share_spans, work.totals):
        buffer.fill_(-77)
    context_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    plan_decode(work, context_lens, torch.arange(len(lens), device=device).int() + 50)
    return work, planned_items(work, sum(length > 0 for length in lens))


def draw_lens(draw: random.Random) -> list[int]:
    longest = draw.choice([3, 70, 500, 100_000])
    lens = [draw.randint(1, longest) for _ in range(draw.randint(1, 40))]
    return [0 if draw.random() < 0.2 else length for length in lens]


@pytest.mark.parametrize("seed", range(12))
def test_invariant_1_every_seen_position_is_in_exactly_one_share(seed, device):
    draw = random.Random(seed)
    lens, window = draw_lens(draw), draw.choice([None, None, 1, 33, 400])
    numbers = {
        "num_shares": draw.choice([1, 2, 7, 20]),
        "unit": draw.choice([16, 64]),
        "overhead": draw.randint(0, 3),
        "min_share": draw.choice([1, 4]),
    }
    work, items = plan(lens, device, window, **numbers)
    seen = {row: [] for row, length in enumerate(lens) if length > 0}
    for _, row, begin, end in items:
        assert begin < end
        seen[row].append((begin, end))
    for row, ranges in seen.items():
        assert ranges[0][0] == max(lens[row] - (window or 1 << 30), 0)
        assert ranges[-1][1] == lens[row]
        assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    assert items == plan_decode_reference(lens, work)


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_equal(seed, device):
    lens = [length for length in draw_lens(random.Random(seed)) if length > 0]
    work, items = plan(lens, device, num_shares=8, overhead=0, min_share=1)
    units = sum(-(-length // work.unit) for length in lens)
    for share in range(8):
        positions = sum(end - begin for at, _, begin, end in items if at == share)
        assert positions <= -(-units // 8) * work.unit


def test_invariant_2_the_same_lengths_make_the_same_list(device):
    lens = draw_lens(random.Random(5))
    first, _ = plan(lens, device, num_shares=7)
    second, _ = plan(lens, device, num_shares=7)
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.share_spans, second.share_spans)


@pytest.mark.parametrize("seed", range(5))
def test_invariant_3_a_share_has_two_partial_results_at_most(seed, device):
    draw = random.Random(seed)
    _, items = plan(draw_lens(draw), device, num_shares=draw.choice([3, 40]), min_share=1)
    num_splits = {row: sum(item[1] == row for item in items) for _, row, _, _ in items}
    first_share = {row: share for share, row, _, _ in reversed(items)}
    slots = [
        2 * share + (share == first_share[row]) for share, row, _, _ in items if num_splits[row] > 1
    ]
    assert len(slots) == len(set(slots))


def test_a_short_step_is_not_cut_to_crumbs(device):
    _, items = plan([100], device, num_shares=66, unit=16, min_share=4)
    assert [(begin, end) for _, _, begin, end in items] == [(0, 64), (64, 100)]


def test_a_step_of_padding_is_an_empty_list(device):
    work, items = plan([0, 0, 0], device)
    assert items == []
    assert work.totals.tolist() == [work.min_share, 0, 3]


def test_rows_of_tables_and_padding_rows_stand_in_the_list(device):
    work, _ = plan([9, 0, 0, 5, 0], device)
    rows = work.sequences[:5].tolist()
    assert [fields[0] for fields in rows] == [0, 3, 1, 2, 4]
    assert [fields[4] for fields in rows[:2]] == [50, 53]
    assert (work.sequences[5:] == -77).all()
    plan_decode(work, torch.tensor([9, 7], dtype=torch.int32, device=device))
    assert work.sequences[:2, 4].tolist() == [0, 1]


def test_bad_arguments_are_told_apart(device):
    work = DecodeWork.allocate(2, HEADS, device)
    with pytest.raises(ValueError, match=r"at most 2 rows, .*; found 3: allocate"):
        plan_decode(work, torch.ones(3, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"context_lens must be torch.int32; found"):
        plan_decode(work, torch.ones(2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"must be at least 1 and overhead .*; found 0, "):
        DecodeWork.allocate(0, HEADS, device)
    with pytest.raises(ValueError, match=r"window must be at least 1 .*; found 0: "):
        DecodeWork.allocate(1, HEADS, device, 0)
