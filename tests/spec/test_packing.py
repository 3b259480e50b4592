"""Bytes of packed matrices, against the kernels' own."""

import pytest

from kvloom.spec.packing import PACKINGS, QUANTIZATIONS, Matrix, products_of
from kvloom.spec.store import NATIVE_STORE

SHAPES = [
    Matrix(96, 32), Matrix(1, 1), Matrix(33, 31), Matrix(64, 800, gated=True, bias=True), Matrix(72, 1540, gated=True),
    Matrix(40, 1537), Matrix(70, 3100, bias=True), Matrix(31, 4608),
]  # fmt: skip


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("matrix", SHAPES, ids=str)
def test_a_matrix_takes_the_bytes_that_the_kernels_say(name, matrix):
    torch = pytest.importorskip("torch")
    pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")
    from kvloom.kernels.cpu import PackedWeight

    bias = torch.ones(matrix.outputs) if matrix.bias else None
    packed = PackedWeight(torch.ones(matrix.outputs, matrix.inputs), name, gated=matrix.gated, bias=bias)
    assert PACKINGS[name].held_bytes(matrix) == packed.num_bytes


def test_every_product_of_the_kernels_is_known():
    pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")
    from kvloom.kernels.cpu import PRODUCTS

    assert set(PACKINGS) == set(PRODUCTS)


@pytest.mark.parametrize(
    "name, held, read", [("bf16", 73_728, 73_728), ("int8", 37_120, 37_120), ("w8a8", 37_376, 37_120),
                         ("int4", 23_040, 23_040)],
)  # fmt: skip
def test_bytes_without_padding_are_those_by_hand(name, held, read):
    matrix = Matrix(64, 576)
    assert (PACKINGS[name].held_bytes(matrix), PACKINGS[name].read_bytes(matrix)) == (held, read)


def test_padding_is_held_but_need_not_be_read():
    assert PACKINGS["int4"].held_bytes(Matrix(1, 1)) == 32 * 20
    assert PACKINGS["int4"].read_bytes(Matrix(8, 1)) == 5


@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
@pytest.mark.parametrize("native", NATIVE_STORE.values())
def test_weights_alone_in_few_bits_leave_activations_as_wide_as_they_are(native, quantization):
    layers, vocabulary = (PACKINGS[name] for name in products_of(native, quantization))
    wide = PACKINGS[native].activation_bytes
    assert layers.activation_bytes == (1 if quantization == "w8a8" else wide)
    assert vocabulary.activation_bytes == wide
