"""The tiny model, a text for it, and engines around it."""

import pytest
import torch

from harness.serving import make_model
from kvloom import LLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folder of a tiny random Llama with a vocabulary of bytes, made for 256 tokens."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text():
    """A text of 4,000 bytes that never repeats for long."""
    generator = torch.Generator().manual_seed(0)
    return "".join(chr(97 + int(c)) for c in torch.randint(0, 26, (4000,), generator=generator))


@pytest.fixture(scope="module")
def llm(folder):
    """The model in float32, without a prefix cache."""
    return LLM(str(folder), dtype="float32", kv_cache_memory_bytes=8 << 20, enable_prefix_caching=False)
