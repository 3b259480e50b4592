"""Wrong usage is one line that says what to do, and exit code 2."""

import pytest

from kvloom import errors
from kvloom.cli import main


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["genrate"], "Did you mean 'generate'?"),
        (["generate", "--temprature", "1", "x"], "Did you mean '--temperature'?"),
        (["generate", "--max-tokens", "many", "x"], "'many' is not a count"),
        (["generate", "--kv-cache-memory-bytes", "lots", "x"], "'lots' is not a size"),
        (["generate", "--max-tokens", "1.5", "x"], "'1.5' is 1.5; a count is a whole number"),
        (["generate", "--kv-cache-memory-bytes", "100.5", "x"], "'100.5' is not a size"),
        (["generate", "--threads", "two", "x"], "'two' is not a valid integer"),
        (["generate", "--logit-bias", "[1]", "x"], "is not a JSON object"),
        (["generate", "--temperature", "-1", "x"], "temperature is -1.0; it must be from 0 to 100"),
        (["generate", "a", "b", "c"], "expected [MODEL] PROMPT, got 3 arguments"),
        (["generate", "--logprobs", "2", "x"], "only with --json"),
        (["generate", "--raw", "--system", "s", "x"], "which --raw skips"),
        (["generate", "--model", "a", "b", "x"], "MODEL is 'b' and --model is 'a'"),
        (["generate", "\udcff"], "the prompt is not valid UTF-8"),
        (["generate", "--hf-overrides", "[1]", "x"], "'[1]' is not a JSON object"),
        (["serve", "--gpu-memory-utilization", "0.9"], "give its size by --kv-cache-memory-bytes"),
        (["serve", "--kv-cache-dtype=int4"], "is not one of 'auto', 'int8', 'fp8_e4m3', 'fp8', 'int8_per_"),
        (["serve", "-ctk", "q8_0"], "kvloom has no -ctk"),
        (["serve", "--max-kv-size", "512"], "--kv-policy 'streaming(window=TOKENS)'"),
        (["serve", "--slot-save-path", "/tmp"], "the prefix cache keeps it"),
        (["serve", "--device", "cuda"], "'cuda' is not one of"),
        (["serve", "--no-enable-chunked-prefill"], "raise --max-num-batched-tokens"),
        (["serve", "--allow-kv-policies", "all", "--allow-kv-policies", "snapkv"], "all and none stand alone"),
        (["pull"], "Missing argument 'NAME'"),
    ],
)
def test_wrong_usage_is_one_line_with_exit_code_2(kvloom, llm, arguments, expected):
    code, out, err = kvloom(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert expected in err
    assert llm.last is None


def test_no_command_shows_the_help_with_exit_code_2(kvloom):
    code, _, err = kvloom()
    assert code == 2
    assert "Commands:" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidInputError("bad\nprompt"), 2),
        (errors.ModelNotFoundError("no model"), 3),
        (errors.CheckpointError("truncated"), 4),
        (errors.UnsupportedError("x", ["a", "b"]), 5),
        (errors.DoesNotFitError("too big"), 6),
        (errors.DownloadError("offline"), 7),
        (errors.ChatTemplateError("loops"), 8),
        (errors.MethodError("NaN"), 9),
        (KeyboardInterrupt(), 130),
        (RuntimeError("our bug"), 70),
        (EOFError("our bug"), 70),
    ],
)
def test_each_error_has_its_exit_code_and_at_most_one_line(kvloom, llm, monkeypatch, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(llm, "__init__", fail)
    got, out, err = kvloom("generate", "x")
    assert (got, out) == (code, "")
    assert err == "" if code == 130 else err.startswith("error: ") and err.count("\n") == 1


def test_an_unexpected_error_shows_its_traceback_only_when_debugging(kvloom, llm, monkeypatch):
    monkeypatch.setattr(llm, "stats", lambda self: 1 / 0)
    assert "Traceback" not in kvloom("generate", "--stats", "x")[2]
    monkeypatch.setenv("KVLOOM_DEBUG", "1")
    assert "Traceback" in kvloom("generate", "--stats", "x")[2]


def test_a_reader_that_left_ends_the_program_quietly(kvloom_process):
    import os
    import subprocess
    import sys

    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "kvloom", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (main.BROKEN_PIPE, "")


def test_a_full_disk_behind_the_output_is_the_system_s_error_and_no_bug():
    import subprocess
    import sys

    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "kvloom", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == main.UNWRITTEN
    assert done.stderr == "error: cannot write the output: No space left on device; make room, or write elsewhere\n"


def test_a_closed_output_is_written_nowhere():
    import subprocess
    import sys

    done = subprocess.run(
        ["sh", "-c", '"$0" -m kvloom --version >&-', sys.executable], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_cannot_be_written_is_named(kvloom, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "nowhere" / "memory.png"
    code, _, err = kvloom("plan", "smollm2", "--plot", str(path))
    assert (code, err) == (main.UNWRITTEN, f"error: cannot use {path}: No such file or directory; give another path\n")
