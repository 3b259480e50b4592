"""SIGTERM ends every command from its first moment on, also where the kernel would drop it, as for PID 1."""

import os
import pwd
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import kvloom
from kvloom.errors import InvalidInputError
from kvloom.models.cache_dir import cache_dir
from kvloom.models.pull import pull, pulled
from kvloom.plan.probe import load_probe, probe_path

CAUGHT = 1 << (signal.SIGTERM - 1)


def ignored():
    """Give the process what PID 1 has: a SIGTERM without a handler does nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def has_handler(pid):
    """Return whether the process catches SIGTERM by now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return any(line.startswith("SigCgt:") and int(line.split()[1], 16) & CAUGHT for line in lines)


@contextmanager
def full_pipe():
    """Yield the end of a pipe that takes nothing more, so that a command with an error cannot end before its signal."""
    read, write = os.pipe()
    try:
        os.set_blocking(write, False)
        with suppress(BlockingIOError):
            while True:
                os.write(write, bytes(1))
        os.set_blocking(write, True)
        yield write
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("command", ["serve", "pull", "generate", "measure", "plan", "chat"])
def test_a_command_ends_at_sigterm_while_it_still_starts(command, tmp_path):
    arguments = [sys.executable, "-m", "kvloom", command, str(tmp_path / "none")]
    with (
        full_pipe() as full,
        subprocess.Popen(
            arguments, preexec_fn=ignored, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=full
        ) as process,
    ):
        while not has_handler(process.pid):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143


def test_a_command_ends_though_its_main_thread_does_not_come_back():
    program = (
        "import threading, kvloom.cli.termination as t; t.end_on_sigterm(); print('ready', flush=True)\n"
        "while True:\n    try: threading.Event().wait()\n    except BaseException: pass"
    )
    with subprocess.Popen([sys.executable, "-c", program], preexec_fn=ignored, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143


def test_sigterm_has_a_handler_before_typing_is_loaded():
    """Which takes as long as all the rest until then; PID 1 loses a signal that comes before its handler."""
    root = str(Path(kvloom.__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {root!r}); import kvloom.__main__; print('typing' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_command_that_sigterm_ended_writes_what_it_said_and_leaves_at_once():
    program = (
        "import atexit, sys, types\n"
        "def run():\n    print('said')\n    sys.exit(143)\n"
        "sys.modules['kvloom.cli.main'] = types.SimpleNamespace(main=run)\n"
        "atexit.register(print, 'late')\n"
        "from kvloom.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "said\n")


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the system does not know and who has no home, as in many containers."""

    def unknown(*_):
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "KVLOOM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert os.path.expanduser("~") == "~"


def test_without_a_home_only_fetching_needs_a_cache_folder_and_says_which_variable_names_it(homeless):
    assert pulled() == [] and load_probe() is None
    for ask in (cache_dir, lambda: pull("smollm2")):
        with pytest.raises(InvalidInputError, match="KVLOOM_CACHE"):
            ask()
    with pytest.raises(InvalidInputError, match="XDG_CACHE_HOME"):
        probe_path()


def test_without_a_home_a_gguf_file_is_read(smollm2_path, homeless):
    from kvloom.models.gguf_file import GGUFFile
    from kvloom.models.gguf_tokenizer import tokenizer_of_gguf

    assert tokenizer_of_gguf(GGUFFile(smollm2_path)).get_vocab_size() == 49152
