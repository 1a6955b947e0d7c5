"""What launchers check of tensors and tables before they hand pointers to a kernel.

A kernel given a wrong shape reads or writes someone else's memory in silence, so each launcher
checks shape, dtype, device and strides of all its tensors. The checks read no tensor's values
(that would stop the host until the device is idle, and cannot be captured in a graph): that a slot
or a block id lies within the cache is the KV pool's promise.

Invariants:
1. A failed check raises ValueError in three parts: what was asked, what was found, what to do.
2. A passed check costs attribute comparisons only; texts are made on failure.

Called by the launchers of this folder; what they check of the KV cache is in cache_checks.py.
"""

import torch

from headrace.kernels.triton_seam import is_interpreted

#: What activations, weights and caches may be.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Head dims that the attention kernels are tiled, tested and compiled for.
HEAD_DIMS = (64, 96, 128, 256)

#: Rows up to which a linear layer is the reading of its weights, and its kernels are built.
MAX_LINEAR_ROWS = 256

#: What the same launch may do to the rows before the product.
LINEAR_PROLOGUES = ("none", "rms_norm", "silu_mul")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ValueError unless the tensor is exactly as told, and contiguous."""
    _check_kind(name, tensor, shape, dtype, device)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous; found strides {list(tensor.stride())} "
            f"for shape {list(tensor.shape)}: pass {name}.contiguous()"
        )


def check_strided(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ValueError unless the tensor is as told and dense in its last dimension."""
    _check_kind(name, tensor, shape, dtype, device)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must be dense in its last dimension; found strides {list(tensor.stride())} "
            f"for shape {list(tensor.shape)}: keep that dimension innermost in memory"
        )


def _check_kind(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
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


def check_table(
    name: str,
    table: torch.Tensor,  # one value (or row of `width` values) a slot, with any stride of slots
    dtype: torch.dtype,
    num_slots: int,
    device: torch.device,
    width: int | None = None,
) -> None:
    """Raise ValueError unless a kernel can look slots up in this table by its first stride."""
    shape = (num_slots,) if width is None else (num_slots, width)
    if tuple(table.shape) != shape or table.dtype != dtype or table.device != device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {device}, one row a slot; found "
            f"{table.dtype} {list(table.shape)} on {table.device}: pass the engine's own table"
        )
    if width is not None and width > 1 and table.stride(1) != 1:
        raise ValueError(
            f"the values of a slot must lie side by side in {name}; found strides "
            f"{list(table.stride())}: make it a slice of columns, not of every other one"
        )


def check_rows(rows: torch.Tensor, num_rows: int, device: torch.device) -> None:
    """Raise ValueError unless rows names a slot for each row: [num_rows] int32, -1 = padding."""
    check_tensor("rows", rows, (num_rows,), torch.int32, device)


def check_logits(logits: torch.Tensor) -> None:
    """Raise ValueError unless logits are fp32 rows over some vocabulary, the rows at any stride."""
    if logits.dim() == 2 and logits.shape[1] > 0 and logits.stride(1) == 1:
        # A slice of the first columns is as good as a whole: only a row's own values must be dense.
        check_leading("logits", logits[:, :0].contiguous(), 2, (torch.float32,))
        return
    raise ValueError(
        "logits must be [num_rows, vocab] with dense rows and a vocabulary to draw from; found "
        f"shape {list(logits.shape)}, strides {list(logits.stride())}: pass the lm_head's output"
    )


def check_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    prologue: str,
    norm_weight: torch.Tensor | None,
) -> None:
    """Raise ValueError unless a narrow linear layer and what stands before it fit together."""
    if prologue not in LINEAR_PROLOGUES:
        raise ValueError(
            f"prologue must be one of {', '.join(LINEAR_PROLOGUES)}; found {prologue!r}: take one"
        )
    check_leading("weight", weight, 2)
    n, k = weight.shape
    if x.dim() != 2 or x.shape[0] > MAX_LINEAR_ROWS:
        raise ValueError(
            f"x must have 2 dimensions and at most {MAX_LINEAR_ROWS} rows; found {list(x.shape)}: "
            "use torch.mm for more rows"
        )
    normed = prologue == "rms_norm"
    shape = (x.shape[0], 2 * k if prologue == "silu_mul" else k)
    check_tensor("x", x, shape, torch.float32 if normed else weight.dtype, weight.device)
    if normed != (norm_weight is not None):
        raise ValueError(
            f"norm_weight must be given with rms_norm and only then; found prologue {prologue!r} "
            f"and {'a' if norm_weight is not None else 'no'} norm_weight: pass both or neither"
        )
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (k,), weight.dtype, weight.device)
    if bias is not None:
        check_tensor("bias", bias, (n,), weight.dtype, weight.device)


def check_linear_target(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Raise ValueError unless a linear layer's result fits where it goes."""
    shape = (x.shape[0], weight.shape[0])
    if residual is not None:
        if out is not None:
            raise ValueError(
                "either out or residual must be given; found both: the residual is the output"
            )
        check_tensor("residual", residual, shape, torch.float32, weight.device)
    if out is not None:
        dtype = torch.float32 if out.dtype == torch.float32 else weight.dtype
        check_tensor("out", out, shape, dtype, weight.device)
