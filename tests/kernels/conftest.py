"""What the kernel tests share: the device, fresh random numbers, and a poisoned paged cache."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one, else the CPU, where Triton's interpreter runs the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def fresh_randomness() -> None:
    """Seed torch anew for each test; pytest shows the seed when the test fails."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: dict) -> None:
    """Compare by the kernel's own tolerance for the dtype; NaN on either side fails."""
    assert actual.dtype == expected.dtype
    bound = tolerance[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=bound, rtol=bound)


@pytest.fixture(name="assert_close")
def assert_close_fixture() -> Callable[..., None]:
    return assert_close


def assert_same_fp8(found: tuple, expected: tuple) -> None:
    """Compare (codes, scales) of one quantisation, made by two kernels.

    Each kernel sums in the order of its own layout, so a last place of what is quantised may
    differ, and a code by a step. A quantisation that rounds otherwise is off by twice the bound.
    """
    torch.testing.assert_close(found[1], expected[1], rtol=0.01, atol=0)
    values, wanted = (codes.float() * scale for codes, scale in (found, expected))
    assert (values - wanted).norm() <= 0.02 * wanted.norm()


@pytest.fixture(name="assert_same_fp8")
def assert_same_fp8_fixture() -> Callable[..., None]:
    return assert_same_fp8


@dataclass
class PagedCache:
    """KV of some sequences in scattered blocks; every slot that holds no token is NaN."""

    k: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v: torch.Tensor
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32, -1 where a sequence has no block
    context_lens: torch.Tensor  # [num_seqs] int32
    dense_k: list[torch.Tensor]  # a sequence: [context_len, num_kv_heads, head_dim]
    dense_v: list[torch.Tensor]

    def drop_blocks_behind(self, window: int, num_new: list[int]) -> None:
        """Give back blocks that the oldest of num_new last tokens of a sequence cannot see."""
        block_size = self.k.shape[1]
        for seq, context_len in enumerate(self.context_lens.tolist()):
            first_seen = max(0, context_len - num_new[seq] - window + 1)
            for index in range(first_seen // block_size):
                block = int(self.block_tables[seq, index])
                self.k[block] = self.v[block] = float("nan")
                self.block_tables[seq, index] = -1


@pytest.fixture
def make_cache(device: torch.device) -> Callable[..., PagedCache]:
    def make(
        context_lens: list[int],
        head_dim: int,
        dtype: torch.dtype,
        num_kv_heads: int = 2,
        block_size: int = 16,
    ) -> PagedCache:
        counts = [-(-length // block_size) for length in context_lens]
        num_blocks = sum(counts) + 2
        free = torch.randperm(num_blocks).tolist()
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        k = torch.full(shape, float("nan"), dtype=dtype, device=device)
        v = k.clone()
        tables = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32, device=device)
        dense: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for seq, (length, count) in enumerate(zip(context_lens, counts, strict=True)):
            blocks = [free.pop() for _ in range(count)]
            tables[seq, :count] = torch.tensor(blocks, dtype=torch.int32)
            slots = [blocks[i // block_size] * block_size + i % block_size for i in range(length)]
            for cache, rows in zip((k, v), dense, strict=True):
                rows.append(torch.randn(length, num_kv_heads, head_dim, device=device).to(dtype))
                cache.view(-1, num_kv_heads, head_dim)[slots] = rows[-1]
        lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
        return PagedCache(k, v, tables, lens, *dense)

    return make
