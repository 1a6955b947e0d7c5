import random

import pytest
import torch

from headrace.kernels.prefill_work import (
    make_prefill_work,
    plan_prefill,
    plan_prefill_reference,
)

pytestmark = pytest.mark.gpu


def plan(chunk_lens, context_lens, tile_tokens, device, first_row=0, table_rows=None, room=0):
    """Return what the device listed and the reference; unlisted tiles stay as poisoned."""
    starts = torch.tensor([first_row, *chunk_lens]).cumsum(0).to(torch.int32).to(device)
    context = torch.tensor(context_lens, dtype=torch.int32, device=device)
    if table_rows is not None:
        table_rows = torch.tensor(table_rows, dtype=torch.int32, device=device)
    work = make_prefill_work(sum(chunk_lens) + room, len(chunk_lens), tile_tokens, device)
    work.tiles.fill_(-7)
    plan_prefill(work, starts, context, table_rows)
    num_tiles = int(work.num_tiles)
    assert (work.tiles[num_tiles:] == -7).all()
    listed = [tuple(tile) for tile in work.tiles[:num_tiles].tolist()]
    return listed, plan_prefill_reference(starts, context, tile_tokens, table_rows)


def test_longest_tiles_come_first_and_empty_chunks_have_none(device):
    listed, expected = plan([5, 0, 3], [5, 99, 10], 4, device, first_row=2, table_rows=[8, -1, 3])
    assert listed == [(7, 3, 7, 3), (6, 1, 4, 8), (2, 4, 0, 8)]
    assert listed == expected


def test_tiles_of_equal_end_keep_the_order_of_their_chunks(device):
    listed, expected = plan([4, 4, 8, 4], [4, 4, 8, 4], 4, device)
    assert listed == [(12, 4, 4, 2), (0, 4, 0, 0), (4, 4, 0, 1), (8, 4, 0, 2), (16, 4, 0, 3)]
    assert listed == expected


def test_no_chunk_at_all_lists_nothing(device):
    assert plan([0, 0, 0], [5, 0, 2], 4, device, first_row=9, room=30) == ([], [])


def test_a_long_chunk_is_placed_by_many_programs(device):
    listed, expected = plan([700, 1], [700, 2], 2, device)
    assert len(listed) == 351
    assert listed == expected


def test_more_chunks_than_are_compared_at_a_time(device):
    lens = [3 if index in (0, 2, 63, 64, 69) else 0 for index in range(70)]
    listed, expected = plan(lens, [length + 4 for length in lens], 2, device)
    assert listed == expected


@pytest.mark.parametrize("round_number", range(12))
def test_every_row_is_in_one_tile_for_random_steps(round_number, device):
    seed = random.SystemRandom().randrange(2**31)
    print(f"random.Random({seed})")
    draw = random.Random(seed)
    num_chunks = draw.randint(1, 12)
    lens = [draw.choice([0, 1, draw.randint(2, 40)]) for _ in range(num_chunks)]
    context = [length + draw.choice([0, draw.randint(1, 60)]) for length in lens]
    rows = draw.sample(range(50), num_chunks)
    tile_tokens = draw.choice([1, 3, 8, 42, 64])
    first_row = draw.randint(0, 9)
    listed, expected = plan(lens, context, tile_tokens, device, first_row, rows, draw.randint(0, 9))
    assert listed == expected
    covered = sorted(row for first, num, _, _ in listed for row in range(first, first + num))
    assert covered == list(range(first_row, first_row + sum(lens)))
    ends = [position + num for _, num, position, _ in listed]
    assert ends == sorted(ends, reverse=True)


def test_bad_arguments_are_told_apart(device):
    work = make_prefill_work(8, 2, 4, device)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    for args, text in (
        ((starts[:2], starts[:2]), r"cu_q_lens must have shape \[3\]; found \[2\]: "),
        ((starts, starts.long()[:2]), r"context_lens must be torch.int32; found"),
        ((starts, starts[:2], starts), r"table_rows must have shape \[2\]; found \[3\]: "),
    ):
        with pytest.raises(ValueError, match=text):
            plan_prefill(work, *args)
    with pytest.raises(ValueError, match=r"num_chunks >= 1 .*; found 8, 0 and 4: "):
        make_prefill_work(8, 0, 4, device)
