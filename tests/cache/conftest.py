"""Small tensors: more than one thread only costs time."""

from collections.abc import Iterator

import pytest

from harness.threads import threads


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run the tests of this folder on one thread."""
    with threads(1):
        yield
