"""Packed linear layers and row operations equal their definitions, on every instruction set."""

import numpy as np
import pytest
import torch

from kvloom.errors import InvalidInputError
from kvloom.kernels import cpu, reference, reference_dense
from products import received, stored


@pytest.mark.parametrize("product", list(cpu.PRODUCTS))
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (70, 101), (33, 1601)])
def test_linear_equals_its_definition_at_every_number_of_rows(isa: str, product: str, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    bias = torch.randn(rows)
    packed = cpu.PackedWeight(weight, product, bias=bias)
    for tokens in (1, 2, 7, 13, 100):
        x = torch.randn(tokens, columns)
        want = reference_dense.linear(received(x, product), stored(weight, product), bias)
        torch.testing.assert_close(cpu.linear(x, packed), want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 3), (70, 101), (40, 511), (33, 1601)])
def test_products_of_int8_codes_are_exact_integers(isa: str, rows: int, columns: int) -> None:
    generator = np.random.default_rng(columns)
    codes = generator.integers(-128, 128, (rows, columns), dtype=np.int8)
    x = generator.integers(-127, 128, (13, columns), dtype=np.int8)
    if columns < 512:  # the largest sums; wider ones would exceed the 24 bits of a float
        codes[0], x[1] = -128, -127
    x[:, 0] = 127  # so the scale of each row is 1
    packed = cpu.PackedWeight(torch.from_numpy(codes), "w8a8", scale=torch.ones(rows))
    want = x.astype(np.int64) @ codes.astype(np.int64).T
    for tokens in (1, 2, 3, 8, 13):
        got = cpu.linear(torch.from_numpy(x[:tokens].astype(np.float32)), packed)
        assert np.array_equal(got.numpy(), want[:tokens])


@pytest.mark.parametrize("product", list(cpu.PRODUCTS))
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(isa: str, product: str) -> None:
    packed = cpu.PackedWeight(torch.randn(70, 1601), product)
    x = torch.randn(100, 1601)
    full = cpu.linear(x, packed)
    for tokens in (1, 5, 30):
        assert torch.equal(cpu.linear(x[:tokens], packed), full[:tokens])


@pytest.mark.parametrize("product", ["fp32", "int4_fp32"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu2"])
def test_a_gated_weight_gives_activation_of_gate_times_up(isa: str, activation: str, product: str) -> None:
    weight, bias, x = torch.randn(2 * 40, 64) / 8, torch.randn(80), torch.randn(5, 64)
    packed = cpu.PackedWeight(weight, product, gated=True, bias=bias)
    half = reference_dense.linear(x, stored(weight, product), bias)
    want = reference_dense.gate(half[:, :40], half[:, 40:], activation)
    torch.testing.assert_close(cpu.linear(x, packed, activation=activation), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("product", ["fp32", "int4_fp32"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu2"])
def test_an_activation_of_an_ungated_weight_is_that_of_its_product(isa: str, activation: str, product: str) -> None:
    weight, bias, x = torch.randn(70, 64) / 8, torch.randn(70), torch.randn(5, 64)
    packed = cpu.PackedWeight(weight, product, bias=bias)
    inner = reference_dense.linear(x, stored(weight, product), bias)
    want = reference_dense.gate(inner, torch.ones_like(inner), activation)
    torch.testing.assert_close(cpu.linear(x, packed, activation=activation), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("product", ["fp32", "int4_fp32"])
def test_add_accumulates_into_the_residual(isa: str, product: str) -> None:
    weight, x, residual = torch.randn(40, 64), torch.randn(14, 64), torch.randn(14, 40)
    want = residual + x @ stored(weight, product).T
    cpu.linear(x, cpu.PackedWeight(weight, product), out=residual, add=True)
    torch.testing.assert_close(residual, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("product", list(cpu.PRODUCTS))
def test_a_packed_row_reads_back_as_the_product_keeps_it(isa: str, product: str) -> None:
    weight = torch.randn(40, 65)
    packed = cpu.PackedWeight(weight, product)
    torch.testing.assert_close(packed.row(37), stored(weight, product)[37], atol=0, rtol=1e-6)


def test_given_codes_and_scales_are_kept_as_they_are(isa: str) -> None:
    codes = torch.randint(-127, 128, (33, 50), dtype=torch.int8)
    scale = torch.rand(33)
    assert torch.equal(cpu.PackedWeight(codes, "int8", scale=scale).row(32), codes[32].float() * scale[32])


@pytest.mark.parametrize("levels", [2, 3, 6, 8, 11, 16])
def test_weights_on_a_few_equidistant_values_stay_what_they_are_in_int4(isa: str, levels: int) -> None:
    step, low = torch.rand(40, 3) + 0.1, torch.randn(40, 3)
    code = torch.randint(levels, (40, 3, 32))
    code[:, :, 7], code[:, :, 20] = 0, levels - 1
    weight = (code * step[..., None] + low[..., None]).flatten(1).bfloat16()
    packed = cpu.PackedWeight(weight, "int4")
    found = torch.stack([packed.row(i) for i in range(40)])
    tolerance = (0.01 * step + 0.004 * weight.view(40, 3, 32).float().abs().amax(-1)).repeat_interleave(32, 1)
    assert ((found - weight.float()).abs() < tolerance).all()


def test_groups_that_are_constant_or_zero_are_exact_in_int4(isa: str) -> None:
    weight = torch.zeros(3, 70)
    weight[1], weight[2, 32:64] = 0.5, -3.0
    packed = cpu.PackedWeight(weight, "int4")
    assert torch.equal(torch.stack([packed.row(i) for i in range(3)]), weight)


def test_an_int4_weight_takes_five_bits_a_weight() -> None:
    assert cpu.PackedWeight(torch.randn(64, 576), "int4").num_bytes == 64 * 576 * 5 // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_adds_the_residual_first(isa: str, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 50).to(dtype), torch.randn(5, 50).to(dtype), torch.rand(50)
    total = (x.float() + residual.float()).to(dtype)
    out = cpu.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out, reference.rms_norm(total, weight, 1e-5), atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("width", [3, 16, 50])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_equals_torch_far_from_zero_too(isa: str, width: int, biased: bool) -> None:
    x, weight, bias = torch.randn(5, width) + 30, torch.randn(width), torch.randn(width) if biased else None
    want = torch.nn.functional.layer_norm(
        x.double(), (width,), weight.double(), None if bias is None else bias.double(), 1e-5
    )
    torch.testing.assert_close(cpu.layer_norm(x, weight, bias, 1e-5), want.float(), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu2"])
def test_gate_equals_its_definition_far_into_both_tails(isa: str, activation: str) -> None:
    gate, up = torch.linspace(-200, 200, 3 * 33).view(3, 33), torch.randn(3, 33)
    want = reference_dense.gate(gate, up, activation)
    torch.testing.assert_close(cpu.gate(gate, up, activation), want, atol=1e-5, rtol=1e-5)


def test_argmax_returns_the_first_of_equals(isa: str) -> None:
    x = torch.zeros(3, 101)
    x[0, 100] = x[1, 40] = x[1, 77] = 1.0
    assert cpu.argmax(x).tolist() == [100, 40, 0]


def test_every_instruction_set_of_this_processor_can_be_forced(isa: str) -> None:
    assert cpu.isa() == isa


def test_a_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"expected \[T, 64\]"):
        cpu.linear(torch.randn(2, 65), cpu.PackedWeight(torch.randn(3, 64), "fp32"))
