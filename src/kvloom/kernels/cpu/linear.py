"""Linear layers over one resident packed copy of each weight."""

import torch

import kvloom.kernels.cpu._ext as _ext
from kvloom.errors import InvalidInputError
from kvloom.kernels.cpu.elements import ACTIVATION, contiguous, element_of, pointer
from kvloom.kernels.cpu.threads import follow_torch

PRODUCTS = {"fp32": 0, "bf16": 1, "int8": 2, "int8_fp32": 3, "w8a8": 4, "fp16": 5, "int4": 6, "int4_fp32": 7}
"""Compute dtypes of a product: the weight's, and for int8 and int4 ("weight-only") bf16 or float32 activations.
"w8a8" quantises each row of activations at the call. "fp16" has float32 activations. Sums are float32 (int32
in w8a8)."""

MXFP4_PRODUCTS = {"mxfp4": 8, "mxfp4_fp32": 9}
"""The same for weights that are kept in MXFP4 (`PackedWeight.of_mxfp4`): bf16 or float32 activations."""


class PackedWeight:
    """A weight [N, K] in panels of 32 outputs; immutable. `gated` packs [gate; up] rows side by side.

    `weight` is a contiguous float tensor [N, K], or int8 codes with `scale` [N] float32 (symmetric per row). Float
    weights are rounded, or quantised as `product` asks: per row to codes in [-127, 127], or in groups of 32 inputs as
    `reference_dense.quantize_groups` says. `bias` [N] float32.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        product: str,
        *,
        gated: bool = False,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> None:
        if product not in PRODUCTS:
            raise InvalidInputError(f"product {product!r} is unknown; one of {', '.join(PRODUCTS)}")
        contiguous(weight, "weight")
        if weight.dim() != 2 or (weight.dtype == torch.int8) != (scale is not None):
            raise InvalidInputError("a packed weight needs a matrix, and a scale exactly if it holds int8 codes")
        if scale is not None and "8" not in product:
            raise InvalidInputError(f"int8 codes need an int8 product, got {product!r}")
        rows = weight.shape[0]
        for name, vector in (("bias", bias), ("scale", scale)):
            if vector is not None and contiguous(vector, name, torch.float32).shape != (rows,):
                raise InvalidInputError(f"{name} has shape {tuple(vector.shape)}; expected ({rows},)")
        element = 3 if weight.dtype == torch.int8 else element_of(weight, "weight")
        self.product = product
        self.gated = gated
        self.shape = (rows, weight.shape[1])
        follow_torch()
        self.packed = _ext.PackedWeight(
            weight.data_ptr(), element, rows, weight.shape[1], PRODUCTS[product], gated, pointer(scale), pointer(bias)
        )

    @classmethod
    def of_mxfp4(
        cls,
        codes: torch.Tensor,
        exponents: torch.Tensor,
        product: str,
        *,
        gated: bool = False,
        bias: torch.Tensor | None = None,
    ) -> "PackedWeight":
        """Return a weight [N, K] kept in MXFP4: codes [N, K / 32, 16] and exponents [N, K / 32] in uint8.

        The format is that of `models.mxfp4`; `product` is one of `MXFP4_PRODUCTS`. `gated` and `bias` as above.
        """
        if product not in MXFP4_PRODUCTS:
            raise InvalidInputError(f"product {product!r} takes no MXFP4; one of {', '.join(MXFP4_PRODUCTS)}")
        contiguous(codes, "codes", torch.uint8)
        contiguous(exponents, "exponents", torch.uint8)
        if codes.dim() != 3 or codes.shape[2] != 16 or exponents.shape != codes.shape[:2]:
            shapes = f"{tuple(codes.shape)} and {tuple(exponents.shape)}"
            expected = "[N, K / 32, 16] and [N, K / 32]"
            raise InvalidInputError(f"codes and exponents have shapes {shapes}; expected {expected}")
        rows, columns = codes.shape[0], codes.shape[1] * 32
        if bias is not None and contiguous(bias, "bias", torch.float32).shape != (rows,):
            raise InvalidInputError(f"bias has shape {tuple(bias.shape)}; expected ({rows},)")
        weight = cls.__new__(cls)
        weight.product, weight.gated, weight.shape = product, gated, (rows, columns)
        follow_torch()
        weight.packed = _ext.PackedWeight(
            codes.data_ptr(), 0, rows, columns, MXFP4_PRODUCTS[product], gated, exponents.data_ptr(), pointer(bias)
        )
        return weight

    @property
    def num_bytes(self) -> int:
        """Resident bytes, padding, scales and bias included."""
        return self.packed.num_bytes

    def row(self, index: int) -> torch.Tensor:
        """Return row `index` [K] of an ungated weight in float32, with the values that the kernels multiply."""
        if self.gated:
            raise InvalidInputError("rows of a gated weight cannot be read back")
        out = torch.empty(self.shape[1])
        self.packed.read_row(index, out.data_ptr())
        return out


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    out: torch.Tensor | None = None,
    add: bool = False,
    activation: str | None = None,
) -> torch.Tensor:
    """Return x [T, K] times the weight's transpose, [T, N] in the dtype of `x` (or into `out`).

    `add` adds to a float32 `out` instead. A gated weight needs `activation` and gives activation(gate) * up [T, N / 2];
    of another one an `activation` gives activation(x times weight).
    Each output is summed in one order, whatever T and the number of threads.
    """
    element = element_of(x, "x")
    rows, columns = weight.shape
    if x.dim() != 2 or x.shape[1] != columns or x.stride(1) != 1:
        raise InvalidInputError(f"x has shape {tuple(x.shape)} and strides {x.stride()}; expected [T, {columns}]")
    if (weight.gated and activation is None) or (add and (activation is not None or out is None)):
        raise InvalidInputError("a gated weight needs an activation, and add goes with an `out` and no activation")
    width = rows // 2 if weight.gated else rows
    if out is None:
        out = x.new_empty(x.shape[0], width)
    if out.shape != (x.shape[0], width) or out.stride(1) != 1 or (add and out.dtype != torch.float32):
        expected = f"{(x.shape[0], width)}, float32 to add"
        raise InvalidInputError(f"out is {out.dtype} {tuple(out.shape)}; expected {expected}")
    finish = 2 if weight.gated else 4 if activation is not None else 1 if add else 0
    code = ACTIVATION[activation] if activation is not None else 0
    follow_torch()
    _ext.linear(
        weight.packed, x.data_ptr(), element, x.shape[0], x.stride(0), out.data_ptr(), element_of(out, "out"),
        out.stride(0), finish, code,
    )  # fmt: skip
    return out
