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
