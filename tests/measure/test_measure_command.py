"""`kvloom measure` from the command line: the table, the file, Ctrl-C, and the planner's recommendation."""

import json
import shlex
import signal
from pathlib import Path

import pytest

from kvloom.cli import main
from kvloom.measure import session as sessions
from kvloom.measure.policies import registered_methods, registered_stores
from kvloom.spec.policy import PolicySpec


@pytest.fixture
def measure(capsys, folder, text, tmp_path):
    """Return a function that runs the command on the tiny model and returns (exit code, output, errors)."""
    (tmp_path / "text.txt").write_text(text)

    def run(*arguments):
        command = ["measure", str(folder), "--text", str(tmp_path / "text.txt"), "--dtype", "float32", "--windows", "3",
                   "--context", "80", "--output", "8", "--kv-cache-memory-bytes", "4MiB", *arguments]  # fmt: skip
        code = main.run(command)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def file(tmp_path):
    return tmp_path / "results.json"


def test_the_table_has_a_line_for_each_policy_with_the_full_cache_as_the_measure(measure):
    code, out, _ = measure("--kv-policy", "tova(budget=20)", "--kv-policy", "streaming(sinks=2,window=18)")
    assert code == 0
    lines = [line.split() for line in out.splitlines() if "%" in line]
    assert {line[0] for line in lines[-3:]} == {"full", "tova(budget=20)", "streaming(sinks=2,window=18)"}
    full = next(line for line in lines if line[0] == "full")
    assert full[1:4] == ["+0.00%", "+0.00%", "+0.00%"]
    assert "100%" in full


def test_without_a_file_the_results_are_one_line_of_json(measure):
    code, out, _ = measure("--kv-policy", "tova(budget=20)", "--json")
    data = json.loads(out)
    assert (code, out.count("\n"), data["schema"]) == (0, 1, "kvloom.measure/1")
    assert [(entry["policy"], entry["windows"]) for entry in data["results"]] == [("full", 3), ("tova(budget=20)", 3)]


def test_a_plan_shows_what_was_measured(measure, file, folder, capsys):
    measure("--kv-policy", "tova(budget=20)", "--json", str(file))
    command = ["plan", str(folder), "--prompt", "72", "--output", "8", "--kv-policy", "tova(budget=20)", "--dtype",
               "float32", "--measured", str(file), "--json"]  # fmt: skip
    assert main.run(command) == 0
    plan = json.loads(capsys.readouterr().out)
    entry = json.loads(file.read_text())["results"][1]
    assert plan["speed"]["loss_measured"]["value"] == entry["loss"]
    assert plan["memory"]["kv_measured"] == {
        "value": entry["kv_peak_bytes"], "unit": "bytes", "label": "measured",
        "note": "at most, of one request of 80 tokens",
    }  # fmt: skip
    assert not any("measurements are of" in warning for warning in plan["warnings"])


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(measure, file, monkeypatch):
    original, runs = sessions.forced_scores, []

    def interrupted(*arguments):
        runs.append(str(arguments[2]))
        if len(runs) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(sessions, "forced_scores", interrupted)
    policies = ("--kv-policy", "tova(budget=20)", "--kv-policy", "keydiff(budget=20)", "--json", str(file))
    code, out, err = measure(*policies)
    assert (code, runs) == (main.INTERRUPTED, ["full", "tova(budget=20)", "keydiff(budget=20)"])
    assert f"the same command continues from {file}" in err
    assert "tova(budget=20)" in out and "keydiff(budget=20)" not in out
    assert [entry["policy"] for entry in json.loads(file.read_text())["results"]] == ["full", "tova(budget=20)"]
    before = json.loads(file.read_text())["results"]
    code, out, _ = measure(*policies)
    assert (code, runs[3:]) == (0, ["full", "keydiff(budget=20)"])
    after = json.loads(file.read_text())["results"]
    assert [entry["by_window"] for entry in after[:2]] == [entry["by_window"] for entry in before]
    assert after[2]["policy"] == "keydiff(budget=20)"


def test_all_policies_are_every_registered_method_that_can_run(measure, file):
    code, _, err = measure("--all-policies", "--keep", "0.6", "--windows", "1", "--cost-runs", "0", "--json", str(file))
    assert code == 0
    measured = [PolicySpec.parse(entry["policy"]) for entry in json.loads(file.read_text())["results"]]
    said = [line for line in err.splitlines() if line.startswith("left out ")]
    left_out = [line.split(":")[0].removeprefix("left out ") for line in said]
    assert len(measured) + len(left_out) == 1 + len(list(registered_methods())) + len(list(registered_stores()))
    assert "int8" in map(str, measured)
    assert {"full", "h2o", "snapkv", "tova", "streaming", "expected"} <= {spec.selector.name for spec in measured}
    assert "duo" in left_out


def test_the_default_policies_are_few_and_hold_a_floor(measure, file):
    code, _, _ = measure("--windows", "1", "--cost-runs", "1", "--json", str(file))
    found = {entry["policy"] for entry in json.loads(file.read_text())["results"]}
    assert code == 0
    assert len(found) <= 16
    assert {"random(keep=0.5,sinks=4)", "random(keep=0.25,sinks=4)", "full"} <= found


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", "nowhere.txt"], "cannot read --text nowhere.txt"),
        (["--context", "300"], "the model's length is 256"),
        (["--keep", "2"], "--keep is 2.0"),
        (["--output", "1"], "--output is 1"),
        (["--kv-policy", "snpkv(budget=3)"], "'snapkv'"),
        (["--context", "5"], "leaves no prompt"),
        (["--context", "9000"], "give a longer --text"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(measure, arguments, words):
    code, out, err = measure(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_policy_that_is_named_and_cannot_run_is_refused(measure):
    code, out, err = measure("--kv-policy", "expected(budget=3)")
    assert (code, out) == (2, "")
    assert "budget 3 of expected is below its sinks of 4 tokens" in err


def test_every_command_on_the_page_parses():
    page = (Path(__file__).parents[2] / "docs" / "measure.md").read_text(encoding="utf-8")
    block = page.split("```")[1]
    commands = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("kvloom ")]
    assert {name for name, *_ in commands} == {"measure", "plan"}
    for name, *arguments in commands:
        main.cli.commands[name].make_context(name, arguments)


def test_a_file_of_another_run_is_left_alone(measure, file, tmp_path):
    measure("--kv-policy", "tova(budget=20)", "--json", str(file))
    before = file.read_bytes()
    (tmp_path / "text.txt").write_text("another text " * 99)
    code, _, err = measure("--kv-policy", "tova(budget=20)", "--json", str(file))
    assert (code, file.read_bytes()) == (2, before)
    assert "results of another run (texts_sha256" in err
