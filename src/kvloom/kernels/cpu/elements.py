"""Element codes shared with the extension, and the checks before every raw pointer."""

import torch

import kvloom.kernels.cpu._ext as _ext
from kvloom.errors import InvalidInputError
from kvloom.registry import Registry

ELEMENT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""Code of each dtype in the extension."""

STORE_ELEMENT: Registry[int] = Registry("store of the CPU kernels")
for _name, _code in _ext.stores.items():
    STORE_ELEMENT.register(_name, _code)

ACTIVATION = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu2": 3}
"""Code of each activation."""

XIELU = 4
"""Code of the activation of a plain MLP that has parameters."""

CLAMPED_GATE = 8
"""Code of the gate that experts with a clamp have."""


def element_of(x: torch.Tensor, name: str) -> int:
    """Return the code of a float tensor's dtype; raises InvalidInputError for others and for other devices."""
    code = ELEMENT.get(x.dtype)
    if code is None or code == 3 or x.device.type != "cpu":
        raise InvalidInputError(f"{name} is {x.dtype} on {x.device}; expected float32, bfloat16 or float16 on the CPU")
    return code


def contiguous(x: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return `x` if it is contiguous on the CPU (and of `dtype`); raises InvalidInputError otherwise."""
    if x.device.type != "cpu" or not x.is_contiguous() or (dtype is not None and x.dtype != dtype):
        raise InvalidInputError(
            f"{name} is {x.dtype}, {tuple(x.shape)}, strides {x.stride()} on {x.device}; expected a contiguous "
            f"{dtype or 'tensor'} on the CPU"
        )
    return x


def token_stride(x: torch.Tensor, name: str) -> int:
    """Return elements between tokens of x [T, heads, width], whose heads lie side by side; raises InvalidInputError."""
    if x.dim() != 3 or x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
        shape = f"shape {tuple(x.shape)} and strides {x.stride()}"
        raise InvalidInputError(f"{name} has {shape}; heads must be side by side")
    return x.stride(0)


def pointer(x: torch.Tensor | None) -> int:
    """Return the address of a tensor's first element, 0 for None."""
    return 0 if x is None else x.data_ptr()
