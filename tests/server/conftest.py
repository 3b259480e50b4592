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


@pytest.fixture(scope="session")
def calling_server(tmp_path_factory):
    """A server whose model has a template that teaches calls in few characters, for tests that leave it as it was."""
    template = (
        "{% if tools %}<tool_call>{{ tools | length }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with running(make_llm(make_model(tmp_path_factory.mktemp("tools"), template=template))) as server:
        yield server
