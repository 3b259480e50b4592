"""Row-wise operations: norm with residual, gate, arg max."""

import torch

import kvloom.kernels.cpu._ext as _ext
from kvloom.errors import InvalidInputError
from kvloom.kernels.cpu.elements import ACTIVATION, contiguous, element_of, pointer
from kvloom.kernels.cpu.threads import follow_torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x [..., D] / rms(x) * weight [D] (float32) in the dtype of `x`.

    With `residual` (same shape and dtype): first residual += x, in place, and the new residual is normed.
    """
    contiguous(x, "x")
    contiguous(weight, "weight", torch.float32)
    if weight.shape != x.shape[-1:]:
        raise InvalidInputError(f"weight has shape {tuple(weight.shape)}; expected {tuple(x.shape[-1:])}")
    if residual is not None and contiguous(residual, "residual", x.dtype).shape != x.shape:
        raise InvalidInputError(f"residual has shape {tuple(residual.shape)}; expected {tuple(x.shape)}")
    out = torch.empty_like(x)
    width = x.shape[-1]
    follow_torch()
    _ext.rms_norm(
        x.data_ptr(), pointer(residual), weight.data_ptr(), out.data_ptr(), element_of(x, "x"), x.numel() // width,
        width, eps,
    )  # fmt: skip
    return out


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return the LayerNorm of x [..., D] with weight [D] and bias [D] or None, all in float32."""
    contiguous(x, "x", torch.float32)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and contiguous(vector, name, torch.float32).shape != x.shape[-1:]:
            raise InvalidInputError(f"{name} has shape {tuple(vector.shape)}; expected {tuple(x.shape[-1:])}")
    out = torch.empty_like(x)
    width = x.shape[-1]
    follow_torch()
    _ext.layer_norm(
        x.data_ptr(), weight.data_ptr(), pointer(bias), out.data_ptr(), x.numel() // width, width, eps
    )  # fmt: skip
    return out


def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up, both [..., D]; `activation` is "silu", "gelu_tanh", "gelu" or "relu2"."""
    contiguous(gate, "gate")
    if contiguous(up, "up", gate.dtype).shape != gate.shape:
        raise InvalidInputError(f"up has shape {tuple(up.shape)}; expected {tuple(gate.shape)}")
    out = torch.empty_like(gate)
    width = gate.shape[-1]
    follow_torch()
    _ext.gate(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), element_of(gate, "gate"), gate.numel() // width, width,
        ACTIVATION[activation],
    )  # fmt: skip
    return out


def argmax(x: torch.Tensor) -> torch.Tensor:
    """Return the first index of the largest value of each row of x [R, N] float32, as [R] int32."""
    contiguous(x, "x", torch.float32)
    out = torch.empty(x.shape[0], dtype=torch.int32)
    follow_torch()
    _ext.argmax(x.data_ptr(), x.shape[0], x.shape[1], out.data_ptr())
    return out
