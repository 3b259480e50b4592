"""What a packed weight keeps of a weight, and what its product makes of activations, by the definitions."""

import torch

from kvloom.kernels import reference_dense

EXACT_SIDES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def stored(weight: torch.Tensor, product: str) -> torch.Tensor:
    """The weight as the product keeps it, in float32."""
    if product in EXACT_SIDES:
        return weight.to(EXACT_SIDES[product]).float()
    if product.startswith("int4"):
        codes, scale, offset = reference_dense.quantize_groups(weight)
        scale, offset = (v.repeat_interleave(32, 1)[:, : weight.shape[1]] for v in (scale, offset))
        return codes.float() * scale + offset
    codes, scale = reference_dense.quantize_rows(weight)
    return codes.float() * scale[:, None]


def received(x: torch.Tensor, product: str) -> torch.Tensor:
    """The activations as the product multiplies them, in float32."""
    if product == "w8a8":
        codes, scale = reference_dense.quantize_rows(x)
        return codes.float() * scale[:, None]
    return x.bfloat16().float() if product in ("bf16", "int8", "int4") else x
