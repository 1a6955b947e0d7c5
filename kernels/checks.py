"""What every launcher checks before it hands pointers to a kernel.

A kernel given a wrong shape reads or writes someone else's memory in silence, so each launcher
checks shape, dtype, device and contiguity of all its tensors. The checks read no tensor's values
(that would stop the host until the device is idle, and cannot be captured in a graph): that a slot
or a block id lies within the cache is the KV pool's promise.

Invariants:
1. A failed check raises ValueError in three parts: what was asked, what was found, what to do.
2. A passed check costs attribute comparisons only; texts are made on failure.

Called by the launchers of this folder.
"""

import torch

from headrace.kernels.triton_seam import is_interpreted

#: What activations, weights and caches may be.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Head dims that the attention kernels are tiled, tested and compiled for.
HEAD_DIMS = (64, 96, 128, 256)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ValueError unless the tensor is exactly as told, and contiguous."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must have shape {list(shape)}; found {list(tensor.shape)}: "
            "pass the shapes of the docstring, which follow from the first argument"
        )
    if tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype}; found {tensor.dtype}: convert it before the launch"
        )
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on {device}, where the first argument is; found {tensor.device}: "
            "move it before the launch"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous; found strides {list(tensor.stride())} "
            f"for shape {list(tensor.shape)}: pass {name}.contiguous()"
        )


def check_leading(
    name: str,
    tensor: torch.Tensor,  # the launcher's first argument, which sets shapes, dtype and device
    num_dims: int,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> None:
    """Raise ValueError unless a kernel can run on this tensor at all."""
    if tensor.dim() != num_dims:
        raise ValueError(
            f"{name} must have {num_dims} dimensions; found shape {list(tensor.shape)}: "
            "pass the shape of the docstring"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, dtypes))}; found {tensor.dtype}: "
            "convert it before the launch"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous; found strides {list(tensor.stride())} "
            f"for shape {list(tensor.shape)}: pass {name}.contiguous()"
        )
    if tensor.device.type == "cpu" and not is_interpreted():
        raise ValueError(
            f"{name} must be on a GPU; found it on the CPU: call the reference beside the kernel, "
            "or set TRITON_INTERPRET=1 before Triton is imported"
        )


def check_cache(
    q_name: str,
    q_shape: tuple[int, int],  # (num_q_heads, head_dim)
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ValueError unless both caches are alike and fit the query heads."""
    num_q_heads, head_dim = q_shape
    if k_cache.dim() != 4 or k_cache.shape[3] != head_dim:
        raise ValueError(
            f"k_cache must be [num_blocks, block_size, num_kv_heads, {head_dim}] as {q_name} has "
            f"head_dim {head_dim}; found {list(k_cache.shape)}: allocate it for this model"
        )
    if k_cache.shape[2] == 0 or num_q_heads % k_cache.shape[2] != 0:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads; found {num_q_heads} and "
            f"{k_cache.shape[2]}: pass the cache of this layer's model"
        )
    check_tensor("k_cache", k_cache, tuple(k_cache.shape), dtype, device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), dtype, device)


def check_attention(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
) -> None:
    """Raise ValueError for what the attention kernels are not built for."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"attention kernels are built for head_dim in {list(HEAD_DIMS)}; found {head_dim}: "
            "run this model on the references"
        )
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(
            f"block_size must be a power of two and at least 16; found {block_size}: "
            "set the KV pool's block size to 16, 32, 64 or 128"
        )
    if num_q_heads // num_kv_heads > 64:
        raise ValueError(
            "at most 64 query heads may share a KV head; found "
            f"{num_q_heads} query and {num_kv_heads} KV heads: run this model on the references"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"window must be at least 1 (the token itself) or None; found {window}: "
            "pass None for full attention"
        )
