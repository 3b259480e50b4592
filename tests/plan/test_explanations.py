"""Explanations: the numbers in them, worked out by hand for models whose shape is known."""

import pytest

from kvloom.errors import InvalidInputError
from kvloom.plan.explain import TOPICS, explain
from kvloom.plan.question import Question
from kvloom.spec.catalogue import catalogue_spec
from kvloom.spec.hardware import find_device


def ask(model, prompt=1000, output=24, device="h100", **facts):
    """Return a question about a catalogue model."""
    return Question(catalogue_spec(model), find_device(device), prompt, output, **facts)


def figures(topic, asked):
    """Return the values of an explanation's figures."""
    return {name: figure.value for name, figure in explain(asked, topic).figures.items()}


def test_without_a_cache_n_steps_from_one_token_project_half_n_squared_tokens():
    found = figures("generation", ask("llama-2-7b", 1, 99))
    assert found["projected_without_cache"] == 99 * 100 // 2
    assert found["projected_with_cache"] == 99


def test_operations_with_a_cache_are_the_prompt_once_and_one_token_a_step():
    found = figures("generation", ask("llama-2-7b", 1, 1))
    assert found["flops_with_cache"] == found["flops_without_cache"]


def test_a_contiguous_cache_reserves_the_longest_request_and_blocks_only_what_is_used():
    found = figures("preallocation", ask("llama-2-7b", 1000, 24))
    assert found["reserved"] == 4096 * 524_288
    assert (found["used"], found["paged"]) == (1024 * 524_288,) * 2
    assert found["requests_paged"] == pytest.approx(4 * found["requests_contiguous"], rel=0.1)


def test_a_request_that_does_not_end_with_a_block_wastes_its_rest_in_every_lane():
    found = figures("preallocation", ask("llama-2-7b", 1000, 1))
    assert found["paged"] - found["used"] == (63 * 16 - 1001) * 524_288


def test_projections_of_llama_2_7b_and_its_variants():
    found = figures("projections", ask("llama-2-7b"))
    square = 4096 * 4096
    assert found["params_mha_model"] == 4 * square
    assert found["params_mqa"] == 2 * square + 2 * 4096 * 128
    assert found["params_gqa_8"] == 2 * square + 2 * 4096 * 1024
    assert found["params_mla"] == 4096 * 32 * 192 + 4096 * 576 + 512 * 32 * 256 + square


def test_the_score_matrix_is_n_squared_a_head():
    found = figures("scores", ask("llama-2-7b", 4096, 24))
    assert (found["score_matrix_head"], found["score_matrix_layer"]) == (4096 * 4096 * 4, 32 * 4096 * 4096 * 4)
    assert found["score_tile"] == 32 * 2048 * 128 * 4


def test_the_windows_of_mistral_reach_131_thousand_tokens():
    assert figures("reach", ask("mistral-7b-v0.1"))["reach_of_windows"] == 32 * 4095


def test_one_layer_without_a_window_ends_the_question_of_reach():
    text = explain(ask("gemma-3-270m"), "reach")
    assert any("Layer 5 reads everything" in line for line in text.lines)
    assert text.rows[4][2] == f"{5 * 511:,}"


def test_a_model_without_windows_reaches_everything_at_once():
    assert any("No layer has a window" in line for line in explain(ask("llama-3-8b"), "reach").lines)


def test_the_ridge_is_peak_over_bandwidth():
    found = figures("intensity", ask("llama-3-8b", users=4))
    assert found["ridge"] == pytest.approx(989.4 / 3.35)
    assert found["intensity"] == pytest.approx(4, rel=0.15)


def test_short_contexts_let_decode_become_bound_by_arithmetic_and_long_ones_never():
    assert figures("intensity", ask("llama-3-8b", 64, 1))["compute_bound_batch"] > 256
    assert "compute_bound_batch" not in figures("intensity", ask("llama-3-8b", 8000, 1))


def test_an_unknown_speed_is_said_and_not_guessed():
    text = explain(ask("smollm2", device="cpu:8GiB"), "intensity")
    assert any("not known" in line for line in text.lines)
    assert "ridge" not in text.figures


def test_a_block_of_one_head_holds_keys_and_values():
    found = figures("layouts", ask("llama-3-8b"))
    assert (found["key_bytes"], found["block_bytes"]) == (256, 16 * 2 * 256)


@pytest.mark.parametrize("topic", list(TOPICS))
@pytest.mark.parametrize("model", ["smollm2", "deepseek-v2", "gemma-3n-e4b", "qwen3-next-80b-a3b", "gpt-oss-20b"])
def test_every_topic_explains_every_kind_of_model(topic, model):
    text = explain(ask(model), topic)
    assert text.lines
    assert all(len(row) == len(text.header) for row in text.rows)


@pytest.mark.parametrize("topic", ["preallocation", "projections", "scores", "reach", "layouts"])
def test_a_model_without_attention_has_nothing_to_explain(topic):
    with pytest.raises(InvalidInputError, match="does not apply"):
        explain(ask("mamba-130m"), topic)


def test_an_unknown_topic_names_the_nearest():
    with pytest.raises(InvalidInputError, match="did you mean 'intensity'"):
        explain(ask("smollm2"), "intensty")
