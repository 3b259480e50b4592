"""The tiny model, and one server around it for the tests that leave it as it was."""

import pytest

from harness.serving import make_llm, make_model, running


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of the tiny model."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_server(tiny_folder):
    """A server with default settings, for tests that leave it as it was."""
    with running(make_llm(tiny_folder)) as server:
        yield server
