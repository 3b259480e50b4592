"""The published byte table of well-known models, to the byte."""

import pytest

from kvloom.spec.catalogue import catalogue_spec
from kvloom.spec.hypothetical import Hypothesis
from kvloom.spec.policy import PolicySpec
from kvloom.units import GIB, KIB

TABLE = [
    ("llama-2-7b", 524_288, 2_147_483_648),
    ("llama-2-13b", 819_200, 3_355_443_200),
    ("llama-2-70b", 327_680, 1_342_177_280),
    ("llama-3-8b", 131_072, 536_870_912),
    ("mistral-7b", 131_072, 536_870_912),
    ("mixtral-8x7b", 131_072, 536_870_912),
    ("llama-3-70b", 327_680, 1_342_177_280),
    ("llama-3.1-405b", 516_096, 2_113_929_216),
    ("llama-3.2-1b", 32_768, 134_217_728),
    ("qwen2.5-7b", 57_344, 234_881_024),
    ("qwen2.5-0.5b", 12_288, 50_331_648),
    ("qwen3-8b", 147_456, 603_979_776),
    ("qwen3-0.6b", 114_688, 469_762_048),
    ("smollm2-135m", 23_040, 94_371_840),
    ("smollm2-1.7b", 196_608, 805_306_368),
    ("deepseek-67b", 389_120, 1_593_835_520),
    ("deepseek-v2", 69_120, 283_115_520),
    ("deepseek-v3", 70_272, 287_834_112),
]
AT_131072 = {
    "llama-2-7b": 64 * GIB, "llama-2-13b": 100 * GIB, "llama-2-70b": 40 * GIB, "llama-3-8b": 16 * GIB,
    "llama-3.1-405b": 63 * GIB, "llama-3.2-1b": 4 * GIB, "qwen2.5-7b": 7 * GIB, "qwen2.5-0.5b": 1536 * 2**20,
    "qwen3-8b": 18 * GIB, "qwen3-0.6b": 14 * GIB, "smollm2-1.7b": 24 * GIB, "deepseek-67b": 47_500 * GIB // 1000,
    "deepseek-v2": 9_059_696_640, "deepseek-v3": 9_210_691_584,
}  # fmt: skip


@pytest.mark.parametrize("name, per_token, at_4096", TABLE)
def test_bytes_per_token_and_of_4096_tokens_are_those_of_the_table(name, per_token, at_4096):
    kv = catalogue_spec(name).kv_spec(16, "bf16")
    assert (kv.bytes_per_token, kv.request_bytes(4096)) == (per_token, at_4096)


@pytest.mark.parametrize("name, expected", AT_131072.items())
def test_bytes_of_131072_tokens_are_those_of_the_table(name, expected):
    assert catalogue_spec(name).kv_spec(16, "bf16").request_bytes(131_072) == expected


def test_llama_2_70b_with_one_kv_head_per_query_head_would_need_ten_gibibytes():
    kv = Hypothesis(layers=80, heads=64, head_dim=128).build().kv_spec(16, "bf16")
    assert (kv.bytes_per_token, kv.request_bytes(4096), kv.request_bytes(131_072)) == (2_621_440, 10 * GIB, 320 * GIB)


def test_thirty_two_users_of_llama_2_70b_at_4096_tokens_need_42_95_gigabytes():
    assert 32 * catalogue_spec("llama-2-70b").kv_spec(16, "bf16").request_bytes(4096) == 42_949_672_960


def test_the_smaller_llama_2_has_the_larger_cache_because_it_shares_no_heads():
    small, large = (catalogue_spec(n).kv_spec(16, "bf16").request_bytes(4096) for n in ("llama-2-7b", "llama-2-70b"))
    assert (small, large) == (2 * GIB, 1280 * 2**20)


def test_llama_3_8b_needs_131_megabytes_per_thousand_tokens():
    assert catalogue_spec("llama-3-8b").kv_spec(1, "bf16").request_bytes(1000) == 131_072_000


def test_the_93_percent_of_deepseek_v2_compare_six_bits_with_a_grouped_model_of_95_layers():
    latent = sum(kv.k_width for kv in catalogue_spec("deepseek-v2").layer_kv)
    grouped = sum(kv.num_lanes * (kv.k_width + kv.v_width) for kv in catalogue_spec("deepseek-67b").layer_kv)
    assert (latent, grouped) == (34_560, 194_560)
    assert round(1 - latent * 6 / (grouped * 16), 4) == 0.9334
    assert round(1 - latent / grouped, 3) == 0.822
    assert round(128 * 2 * 128 / 576, 1) == 56.9


@pytest.mark.parametrize(
    "store, bits",
    [("kivi2", 3.0), ("kivi4", 5.0), ("int4", 4.125), ("fp8", 8.25), ("bf16", 16.0), ("int8", 8.25), ("k8v4", 6.1875)],
)
def test_bits_per_element_count_the_scales(store, bits):
    from kvloom.spec.format import bits_per_element

    assert bits_per_element(store, 128) == bits


def test_sliding_layers_stop_growing_at_their_window():
    kv = catalogue_spec("gemma-3-270m").kv_spec(16, "bf16")
    full, local = 3, 15
    assert kv.bytes_per_token == 18 * KIB
    tokens = 32_768
    windowed = (-(-(511 + 1 - 1) // 16) + 1) * 16 * KIB
    assert kv.request_bytes(tokens) == full * tokens * KIB + local * windowed


def test_shared_layers_of_gemma_3n_are_counted_once():
    spec = catalogue_spec("gemma-3n-e4b")
    assert len({layer.source for layer in spec.layers} - {None}) == 2
    assert spec.kv_spec(16, "bf16").num_lanes == 20 * 2


def test_yoco_keeps_one_global_cache():
    spec = Hypothesis(layers=8, heads=8, kv_heads=2, head_dim=64, window=32, yoco=True).build()
    assert [layer.source for layer in spec.layers] == [None] * 5 + [4] * 3
    assert [layer.window for layer in spec.layers] == [32] * 4 + [None] * 4


def test_cross_layer_sharing_divides_the_bytes():
    alone = Hypothesis(layers=8, heads=8, head_dim=64).build().kv_spec(16, "bf16").bytes_per_token
    shared = Hypothesis(layers=8, heads=8, head_dim=64, share_kv=2).build().kv_spec(16, "bf16").bytes_per_token
    assert shared == alone // 2


def test_recurrent_layers_cost_the_same_at_every_length():
    spec = catalogue_spec("qwen3-next-80b-a3b")
    assert len(spec.kv_layers) == 12
    assert spec.state_bytes == 36 * 4 * (32 * 128 * 128 + 8192 * 4)


def test_a_policy_that_says_nothing_costs_what_the_allocator_admits():
    from kvloom.spec.footprint import request_footprint

    kv = catalogue_spec("gemma-3-270m").kv_spec(16, "bf16")
    assert request_footprint(kv, PolicySpec(), 1000, 24, 512).peak.high == kv.request_bytes(1024, 512)
