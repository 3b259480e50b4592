"""Mixtures of experts: the definition and the kernels equal transformers, and no result depends on the batch."""

import pytest
import torch

from kvloom.errors import InvalidInputError
from kvloom.kernels import cpu
from kvloom.models import mlp
from mixtures import HIDDEN, MIXTURES, WIDE, Mixture, mixture_of
from products import received, stored

COUNTS = (1, 3, 17, 150)


def packed(mixture: Mixture, product: str) -> cpu.Experts:
    """Return the mixture with all of its experts packed for `product`."""
    weights, experts = mixture.weights, mixture.experts
    rows = [weights["router"]] + ([weights["shared_router"]] if experts.shared_gate else [])
    biases = {name: weights.get(f"experts_{name}_bias") for name in ("gate", "up", "down")}
    pairs = []
    for e in range(experts.count):
        gate, up, down = (weights[f"experts_{name}"][e] for name in ("gate", "up", "down"))
        bias = None if biases["gate"] is None else torch.cat((biases["gate"][e], biases["up"][e]))
        down_bias = None if biases["down"] is None else biases["down"][e].contiguous()
        gate_up = cpu.PackedWeight(torch.cat((gate, up)), product, gated=True, bias=bias)
        pairs.append((gate_up, cpu.PackedWeight(down.contiguous(), product, bias=down_bias)))
    shared = None
    if experts.shared_size:
        gate_up = torch.cat((weights["shared_gate"], weights["shared_up"]))
        shared = (
            cpu.PackedWeight(gate_up, product, gated=True),
            cpu.PackedWeight(weights["shared_down"], product),
        )
    routing = cpu.Routing(
        experts.per_token, experts.sigmoid, experts.normalise, experts.scale, experts.groups, experts.kept_groups,
        experts.group_best, weights.get("router_selection_bias"), experts.jitter, experts.scale_input,
    )  # fmt: skip
    router = cpu.PackedWeight(torch.cat(rows), "fp32", bias=weights.get("router_bias"))
    return cpu.Experts(router, pairs, routing, clamp=experts.clamp, shared=shared)


def mixed(experts: cpu.Experts, x: torch.Tensor) -> torch.Tensor:
    return experts.add(x, torch.zeros_like(x))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_definition_is_the_mixture_of_transformers(name: str) -> None:
    mixture = mixture_of(name)
    for count in COUNTS:
        x = torch.randn(count, HIDDEN)
        found = mlp.experts(x, mixture.weights, "", mixture.config)
        torch.testing.assert_close(found, mixture.expected(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_kernels_give_the_mixture_of_transformers(isa: str, name: str) -> None:
    mixture = mixture_of(name)
    experts = packed(mixture, "fp32")
    for count in COUNTS:
        x = torch.randn(count, HIDDEN)
        torch.testing.assert_close(mixed(experts, x), mixture.expected(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("product", list(cpu.PRODUCTS))
def test_every_product_multiplies_the_experts_as_it_keeps_them(isa: str, product: str) -> None:
    mixture = mixture_of("mixtral")
    rounded = dict(mixture.weights)
    for name in ("experts_gate", "experts_up", "experts_down"):
        rounded[name] = torch.stack([stored(each, product) for each in rounded[name]])
    experts, chosen = packed(mixture, product), mixture.experts
    for count in COUNTS:
        x = torch.randn(count, HIDDEN)
        share, index = mlp.route(x, mixture.weights, "", chosen)
        want = torch.zeros_like(x)
        for t in range(count):
            row = received(x[t : t + 1], product)
            for weight, e in zip(share[t], index[t], strict=True):
                gate, up = (row @ rounded[f"experts_{part}"][e].T for part in ("gate", "up"))
                inner = received(torch.nn.functional.silu(gate) * up, product)
                want[t] += weight * (inner @ rounded["experts_down"][e].T)[0]
        # One unit of an int8 code of the inner activations may fall on the other side.
        tolerance = 2e-2 if product == "w8a8" else 6e-3 if product in ("bf16", "int8", "int4") else 1e-4
        torch.testing.assert_close(mixed(experts, x), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("product", list(cpu.PRODUCTS))
def test_a_token_gets_the_same_bits_alone_and_in_any_batch(isa: str, product: str) -> None:
    experts = packed(mixture_of("deepseek_v3"), product)
    x = torch.randn(150, HIDDEN)
    full = mixed(experts, x)
    for count in (1, 5, 16, 40):
        assert torch.equal(mixed(experts, x[:count].contiguous()), full[:count])
    assert torch.equal(mixed(experts, x[149:].contiguous()), full[149:])


@pytest.mark.parametrize("product", ["bf16", "int8", "w8a8", "int4"])
def test_scores_multiply_what_experts_read_in_rounded_products_too(product: str) -> None:
    mixture, x = mixture_of("llama4"), torch.randn(40, HIDDEN)
    experts, expected = packed(mixture, product), mixture.expected(x)
    for count in (1, 40):
        found = mixed(experts, x[:count].contiguous())
        assert (found - expected[:count]).norm() < 0.2 * expected[:count].norm()


def test_the_mixture_is_added_to_what_is_there() -> None:
    experts = packed(mixture_of("qwen3_moe"), "fp32")
    x, before = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN)
    torch.testing.assert_close(experts.add(x, before.clone()), before + mixed(experts, x), atol=1e-5, rtol=1e-5)


def test_only_the_chosen_experts_are_read_and_each_once() -> None:
    mixture = mixture_of("qwen2_moe")
    experts = packed(mixture, "fp32")
    x = torch.randn(30, HIDDEN)
    _, index = mlp.route(x, mixture.weights, "", mixture.experts)
    mixed(experts, x[:1].contiguous())
    assert experts.experts_read == 4
    of_one, shared = 3 * WIDE * HIDDEN * 4, 3 * 80 * HIDDEN * 4
    assert experts.read_bytes == 4 * of_one + shared
    mixed(experts, x)
    distinct = len(set(index.flatten().tolist()))
    assert experts.experts_read == 4 + distinct
    assert experts.read_bytes == (4 + distinct) * of_one + 2 * shared


def test_a_router_of_equal_logits_takes_the_first_experts() -> None:
    mixture = mixture_of("mixtral")
    mixture.weights["router"].zero_()
    experts = packed(mixture, "fp32")
    x = torch.randn(2, HIDDEN)
    want = sum(0.5 * mlp._expert(x, mixture.weights, "", e, mixture.config, mixture.experts) for e in (0, 1))
    torch.testing.assert_close(mixed(experts, x), want, atol=1e-4, rtol=1e-4)


def test_weights_that_do_not_fit_together_are_refused() -> None:
    weight = torch.randn(96, HIDDEN)
    pair = (cpu.PackedWeight(weight, "fp32", gated=True), cpu.PackedWeight(torch.randn(HIDDEN, 48), "fp32"))
    router = cpu.PackedWeight(torch.randn(2, HIDDEN), "fp32")
    with pytest.raises(InvalidInputError, match="a row for each expert"):
        cpu.Experts(router, [pair], cpu.Routing(1))
    with pytest.raises(InvalidInputError, match="as many experts as it takes"):
        cpu.Experts(router, [pair, pair], cpu.Routing(3))
    other = (cpu.PackedWeight(weight, "bf16", gated=True), cpu.PackedWeight(torch.randn(HIDDEN, 48), "bf16"))
    with pytest.raises(InvalidInputError, match="one product"):
        cpu.Experts(router, [pair, other], cpu.Routing(1))


def mxfp4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random codes [rows, columns / 32, 16] and exponents [rows, columns / 32] that keep sums in reach."""
    codes = torch.randint(256, (rows, columns // 32, 16), dtype=torch.uint8)
    return codes, torch.randint(118, 127, (rows, columns // 32), dtype=torch.uint8)


def decoded(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(codes[None], exponents[None], dtype=torch.float32)[0].T.contiguous()


@pytest.mark.parametrize("product", list(cpu.MXFP4_PRODUCTS))
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (70, 1632)])
def test_mxfp4_multiplies_what_transformers_unpacks(isa: str, product: str, rows: int, columns: int) -> None:
    codes, exponents = mxfp4(rows, columns)
    bias = torch.randn(rows)
    weight = cpu.PackedWeight.of_mxfp4(codes, exponents, product, bias=bias)
    for tokens in (1, 2, 7, 13, 100):
        x = torch.randn(tokens, columns)
        seen = x.bfloat16().float() if product == "mxfp4" else x
        want = torch.nn.functional.linear(seen, decoded(codes, exponents), bias)
        torch.testing.assert_close(cpu.linear(x, weight), want, atol=1e-4, rtol=1e-4)


def test_every_code_under_every_exponent_is_kept_as_it_is(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(255, 16, 16).contiguous()
    exponents = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()
    weight = cpu.PackedWeight.of_mxfp4(codes, exponents, "mxfp4_fp32")
    found = torch.stack([weight.row(i) for i in range(255)])
    assert torch.equal(found, decoded(codes, exponents))
    one_hot = torch.zeros(12, 512)
    one_hot[:, 5] = 1.0
    assert torch.equal(cpu.linear(one_hot, weight), decoded(codes, exponents)[:, 5].expand(12, 255))


def test_an_mxfp4_weight_takes_four_bits_and_a_quarter() -> None:
    assert cpu.PackedWeight.of_mxfp4(*mxfp4(64, 576), "mxfp4").num_bytes == 64 * 576 * 17 // 32


def test_gate_and_up_in_mxfp4_lie_side_by_side(isa: str) -> None:
    codes, exponents = mxfp4(80, 64)
    weight = cpu.PackedWeight.of_mxfp4(codes, exponents, "mxfp4_fp32", gated=True)
    x = torch.randn(5, 64)
    gate, up = (x @ decoded(codes, exponents).T).chunk(2, dim=1)
    want = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(cpu.linear(x, weight, activation="silu"), want, atol=1e-4, rtol=1e-4)
