"""The command line with the catalogue's model, as a user runs it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.real_model

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module", autouse=True)
def model(smollm2_path):
    """Have the model fetched before a test's clock runs."""
    return smollm2_path


def test_pull_prints_the_path_of_the_file(kvloom):
    code, out, err = kvloom("pull", "smollm2")
    assert (code, err) == (0, "")
    assert os.path.getsize(out.strip()) == 98_362_432


def test_a_question_is_answered_with_its_facts(kvloom_process, kvloom, piped):
    arguments = ["generate", "--dtype", "float32", "--max-tokens", "24", "--seed", "1"]
    text = kvloom_process(*arguments, QUESTION)
    assert (text.returncode, text.stderr) == (0, "")
    assert "Paris" in text.stdout
    piped(QUESTION.encode() + b"\n")
    facts = json.loads(kvloom(*arguments, "--json")[1])
    [answer] = facts["outputs"]
    assert answer["text"] + "\n" == text.stdout
    assert answer["finish_reason"] in ("stop", "length")
    # float32 K and V of 64 elements: a block of 16 tokens of one of the 90 lanes has 16 * 128 * 4 bytes
    blocks = -(-(len(facts["prompt_token_ids"]) + len(answer["token_ids"]) - 1) // 16)
    assert facts["kv"]["bytes_peak"] == 90 * blocks * 16 * 128 * 4
    assert facts["kv"]["evicted_tokens"] == 0


def test_a_piped_conversation_remembers_what_was_said(kvloom, piped):
    piped(f"{QUESTION}\nWhat did I ask about?\n".encode())
    code, out, err = kvloom("chat", "--dtype", "float32", "--max-tokens", "24")
    assert (code, err) == (0, "")
    assert "Paris" in out.splitlines()[0]
    assert "France" in out.split("\n", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--raw", ""], 2, "the prompt is empty"),
        (["--raw", "--max-model-len", "8", "one two three four five six seven eight nine ten"], 2, "--max-model-len"),
        (["no-such-model", "Hello"], 3, "no-such-model"),
        (["--max-model-len", "8K", "--kv-cache-memory-bytes", "16MiB", "Hello"], 6, "--kv-cache-memory-bytes"),
        (["--max-model-len", "1M", "Hello"], 2, "1048576"),
    ],
)
def test_impossible_requests_end_with_their_code_and_one_line(kvloom, arguments, code, expected):
    got, out, err = kvloom("generate", *arguments)
    assert (got, out) == (code, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert expected in err


def test_ctrl_c_ends_a_long_answer_with_130(request):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvloom", "generate", "--ignore-eos", "--max-tokens", "auto", QUESTION],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    request.addfinalizer(process.kill)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (first.strip() != b"", process.returncode, errors) == (True, 130, b"")


def test_a_reader_that_leaves_ends_a_long_answer(request):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvloom", "generate", "--ignore-eos", "--max-tokens", "auto", QUESTION],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    request.addfinalizer(process.kill)
    process.stdout.read(1)
    process.stdout.close()
    with process.stderr:
        assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)


def test_collect_env_names_the_pulled_model_and_the_machine(kvloom):
    facts = json.loads(kvloom("collect-env", "--json")[1])
    assert "smollm2" in facts["models"]["pulled"]
    assert facts["cpu"]["cores"] >= 1
    assert facts["memory"]["total_bytes"] > facts["memory"]["available_bytes"] > 0
    assert facts["versions"]["torch"] is not None
    assert facts["kernels"]["isa"] in facts["kernels"]["isas_available"]
    assert "  pulled: smollm2\n" in kvloom("collect-env")[1]


def test_collect_env_says_of_secrets_only_that_they_are_set(kvloom, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("KVLOOM_API_KEY", "secret")
    _, out, _ = kvloom("collect-env", "--json")
    facts = json.loads(out)["environment"]
    assert (facts["HF_TOKEN"], facts["KVLOOM_API_KEY"]) == ("(set)", "(set)")
    assert "secret" not in out


def test_the_python_example_of_the_readme_runs(request):
    readme = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
    example = re.search(r"<!-- python: example -->\n```python\n(.*?)```", readme, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("KV cache at its peak:") == 2
