"""Settings for the tests of the engine, and the real models in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.threads import threads
from kvloom.engine.llm import LLM


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: more than one thread only costs time."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Real models are worth a second thread."""
    with threads(2):
        yield


@pytest.fixture(scope="package")
def smollm2(smollm2_path: Path) -> LLM:
    """SmolLM2 in float32 on the kernels of the CPU."""
    return LLM(smollm2_path, dtype="float32", backend="cpu", max_num_seqs=32, kv_cache_memory_bytes=1 << 30)


@pytest.fixture(scope="package")
def gemma(gemma_path: Path) -> LLM:
    """Gemma 3 270M in float32 on the kernels of the CPU."""
    return LLM(gemma_path, dtype="float32", backend="cpu", max_num_seqs=32, kv_cache_memory_bytes=1 << 30)
