"""Settings for all tests, and the real models that several rooms use."""

import pytest
from hypothesis import settings

# Timing never decides a test, and a failure found once is found again by everybody.
settings.register_profile("kvloom", deadline=None, derandomize=True, print_blob=True)
# `pytest --hypothesis-profile=explore` looks at other examples each time, and at more of them.
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("kvloom")


@pytest.fixture(scope="session")
def smollm2_path():
    """Path of the catalogue's model, fetched on first use."""
    from kvloom.models.pull import pull

    return pull("smollm2")


@pytest.fixture(scope="session")
def gemma_path():
    """Path of Gemma 3 270M, fetched on first use."""
    from harness.gemma import gemma_gguf

    return gemma_gguf()


def _oracle(path):
    """Return the model in a GGUF file as transformers reads it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_path):
    """SmolLM2 as transformers reads it, in float32 (about 20 seconds, once a run)."""
    return _oracle(smollm2_path)


@pytest.fixture(scope="session")
def gemma_oracle(gemma_path):
    """Gemma 3 270M as transformers reads it, in float32 (about a minute, once a run)."""
    return _oracle(gemma_path)
