import pytest
import torch

from headrace.kernels.decode_merge import TOLERANCE, merge_splits, merge_splits_reference
from headrace.kernels.decode_work import DecodeWork, plan_decode

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sequence_in_many_shares_is_merged_and_no_other(dtype, device, assert_close):
    # A unit is 16 positions, a share 2 units: row 0 fills a share, row 2 half of the next.
    work = DecodeWork.allocate(4, (3, 1, 96), device, num_shares=24, overhead=0, min_share=1)
    plan_decode(work, torch.tensor([32, 0, 16, 39 * 16], dtype=torch.int32, device=device))
    assert int(work.totals[0]) == 2
    work.partial.fill_(float("nan"))
    work.partial_lse.fill_(float("nan"))
    # Row 3 begins in share 1, behind row 2, and goes on in the first slots of the next ones.
    slots = [3, *range(4, 42, 2)]
    work.partial[slots] = torch.randn(len(slots), 3, 96, device=device)
    work.partial_lse[slots] = torch.randn(len(slots), 3, device=device) * 5
    out = torch.full((4, 3, 96), float("nan"), dtype=dtype, device=device)
    merge_splits(work, out)
    expected = merge_splits_reference(work.partial[slots], work.partial_lse[slots])
    assert_close(out[3], expected.to(dtype), TOLERANCE)
    assert out[:3].isnan().all()


def test_the_reference_is_a_softmax_over_all_positions(device):
    scores, values = torch.randn(40, device=device), torch.randn(40, 8, device=device)
    parts = [slice(0, 7), slice(7, 30), slice(30, 40)]
    means = torch.stack([torch.softmax(scores[part], 0) @ values[part] for part in parts])
    sums = torch.stack([torch.logsumexp(scores[part], 0) for part in parts]) / 0.6931471805599453
    merged = merge_splits_reference(means[:, None], sums[:, None])[0]
    torch.testing.assert_close(merged, torch.softmax(scores, 0) @ values)
