"""Packing: the bytes of a matrix as the CPU kernels pack it, by compute dtype.

A matrix lies in panels of 32 outputs, a panel in rows of a few inputs of each. Inputs are cut into as many slices of
equally many rows as keep the activations of a slice within 1536 bytes. Padding to whole panels and slices counts.
"""

from dataclasses import dataclass

PANEL_OUTPUTS = 32
SLICE_BYTES = 1536

FLOAT_BYTES = 4
"""Biases, norms, and the scales and sums of 8-bit weights."""

QUANTIZATIONS = ("int8", "int4", "w8a8")
"""Values of `--quantization`. int8: int8 weights with a scale per row, activations as they are; int4: int4 weights with
a scale and an offset for every 32 inputs of a row, the vocabulary's in int8; w8a8: int8 weights and activations, the
vocabulary's in the dtype of the model."""


@dataclass(frozen=True)
class Matrix:
    """Shape of a weight matrix of a layer; a `gated` one holds gate and up, whose outputs alternate."""

    outputs: int
    inputs: int
    gated: bool = False
    bias: bool = False

    @property
    def num_params(self) -> int:
        """Weights, without the bias."""
        return self.outputs * self.inputs

    @property
    def panels(self) -> int:
        """Panels of 32 outputs; of a gated one 16 of each half."""
        share = 2 if self.gated else 1
        return -(-(self.outputs // share) // (PANEL_OUTPUTS // share))


@dataclass(frozen=True)
class Packing:
    """A compute dtype: `bits` of a weight, scales of its group included.

    `row_inputs` inputs of an output lie side by side and are multiplied by activations of `activation_bytes` each. Each
    output has `scale_bytes` beside its weights, and `sum_bytes` that follow from them.
    """

    bits: int
    row_inputs: int
    activation_bytes: int
    scale_bytes: int = 0
    sum_bytes: int = 0

    def held_bytes(self, matrix: Matrix) -> int:
        """Return the bytes in memory: panels and their padding, scales, sums and bias."""
        rows = -(-matrix.inputs // self.row_inputs)
        slices = -(-matrix.inputs * self.activation_bytes // SLICE_BYTES)
        inputs = slices * -(-rows // slices) * self.row_inputs
        beside = self.scale_bytes + self.sum_bytes + (FLOAT_BYTES if matrix.bias else 0)
        return matrix.panels * PANEL_OUTPUTS * (inputs * self.bits // 8 + beside)

    def read_bytes(self, matrix: Matrix) -> float:
        """Return the fewest bytes that a product reads: the weights and their scales, without padding."""
        return matrix.num_params * self.bits / 8 + matrix.outputs * self.scale_bytes


PACKINGS = {
    "fp32": Packing(32, 1, 4), "bf16": Packing(16, 2, 2), "fp16": Packing(16, 1, 4),
    "int8": Packing(8, 4, 2, FLOAT_BYTES), "int8_fp32": Packing(8, 4, 4, FLOAT_BYTES),
    "w8a8": Packing(8, 4, 1, FLOAT_BYTES, FLOAT_BYTES), "int4": Packing(5, 32, 2), "int4_fp32": Packing(5, 32, 4),
}  # fmt: skip
"""By the names of the kernels' products. A group of 32 weights in int4 has a scale and an offset of 16 bits each."""


def products_of(native: str, quantization: str | None) -> tuple[str, str]:
    """Return the product of a model's layers, and that of its vocabulary: embedding and output head.

    `native` is the store of its dtype. Weights in int8 and int4 multiply in bfloat16 where that is the dtype, else in
    float32.
    """
    wide = "" if native == "bf16" else "_fp32"
    return {
        None: (native, native),
        "int8": (f"int8{wide}", f"int8{wide}"),
        "int4": (f"int4{wide}", f"int8{wide}"),
        "w8a8": ("w8a8", native),
    }[quantization]
