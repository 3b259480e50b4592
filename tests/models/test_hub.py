"""Models of the hub come from its cache, or the error says what to do; nothing here needs a network."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from harness import tiny
from kvloom.errors import DownloadError, ModelNotFoundError, UnsupportedError
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.hub import FILES, download_model, is_hub_id

COMMIT = "0" * 40


@pytest.fixture
def answering(monkeypatch):
    """Stand in for a hub that can be reached."""
    monkeypatch.setattr("kvloom.models.hub.hub_answers", lambda *_: True)


def run(code, **environment):
    """Run Python in a process of its own; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def home(tmp_path):
    """A HF_HOME whose cache holds the tiny model `someone/tiny`."""
    repository = tmp_path / "home" / "hub" / "models--someone--tiny"
    tiny.save_tiny(repository / "snapshots" / COMMIT, "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "home"


def test_a_model_in_the_hub_s_cache_opens_offline(home):
    code = (
        "import torch; from kvloom.models.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint('someone/tiny'); print(len(list(checkpoint.tensors(torch.float32))))"
    )
    assert run(code, HF_HOME=str(home), HF_HUB_OFFLINE="1") == "21\n"


def test_a_model_that_is_not_there_offline_says_what_to_do(home):
    code = (
        "from kvloom.errors import DownloadError; from kvloom.models.checkpoint import open_checkpoint\n"
        "try: open_checkpoint('someone/else')\nexcept DownloadError as error: print(error)"
    )
    said = run(code, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert "'someone/else' is not in the local cache" in said
    assert "HF_HUB_OFFLINE" in said


@pytest.mark.parametrize("model, found", [("someone/tiny", True), ("someone/else", False)])
def test_a_hub_out_of_reach_is_asked_once_in_silence_and_the_cache_is_used(home, model, found):
    code = (
        "from kvloom.errors import DownloadError; from kvloom.models.hub import download_model\n"
        f"try: print(download_model({model!r}, None).name)\n"
        "except DownloadError as error: print('reached' in str(error))"
    )
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | away, capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == (COMMIT if found else "True", "")


def response(status):
    """Return as much of an answer of the hub as its errors look at."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.RepositoryNotFoundError("no", response=response(404)), ModelNotFoundError, "HF_TOKEN"),
        (errors.RevisionNotFoundError("no", response=response(404)), ModelNotFoundError, "revision 'v1'"),
        (errors.GatedRepoError("no", response=response(403)), DownloadError, "accept its terms"),
        (errors.RemoteEntryNotFoundError("no", response=response(404)), ModelNotFoundError, r"no config\.json"),
        (errors.HfHubHTTPError("Server error", response=response(500)), DownloadError, "Server error"),
        (OSError("No space left on device"), DownloadError, "No space left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.usefixtures("answering")
def test_errors_of_the_hub_become_ours(monkeypatch, error, kind, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(kind, match=message):
        download_model("someone/model", "v1")


@pytest.mark.usefixtures("answering")
def test_an_unknown_architecture_is_refused_before_its_weights_are_fetched(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(UnsupportedError, match="MambaForCausalLM"):
        open_checkpoint("someone/model")


@pytest.mark.usefixtures("answering")
def test_only_data_is_fetched(monkeypatch, tmp_path):
    asked = {}
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **given: asked.update(given) or str(tmp_path))
    assert download_model("someone/model", "v1") == tmp_path
    assert (asked["revision"], asked["allow_patterns"]) == ("v1", list(FILES))
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pth", "*")) for pattern in FILES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("smollm2", False),
        ("a/b/c", False),
        ("../b", False),
        ("a/..", False),
        ("a b/c", False),
    ],
)
def test_an_id_of_the_hub_is_owner_and_name(name, expected):
    assert is_hub_id(name) == expected
