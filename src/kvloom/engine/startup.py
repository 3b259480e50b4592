"""Figures of an engine at its start, with the planner's names and formulas."""

from typing import Any

from kvloom.engine.llm import LLM
from kvloom.plan.question import Question
from kvloom.plan.startup import start_figures
from kvloom.spec.hardware import find_device
from kvloom.spec.shape import model_spec


def engine_figures(llm: LLM) -> dict[str, Any]:
    """Return weights, arena, blocks, what fits and the whole process of a loaded engine, in bytes and tokens."""
    model, cache = llm.engine.runner.model, llm.engine.cache
    output = llm.max_model_len // 8
    asked = Question(
        model_spec(model.config, llm.model, llm.dtype, weight_bytes=model.num_bytes, source="the loaded model"),
        find_device("cpu"),
        llm.max_model_len - output,
        output,
        llm.config.max_num_seqs,
        llm.config.stored_policy,
        llm.dtype,
        block_size=cache.spec.block_size,
        chunk=llm.config.max_num_batched_tokens,
    )
    assert asked.whole_kv == cache.spec, "the planner and the allocator disagree about this model's lanes"
    return start_figures(asked, cache.arena.num_bytes)
