"""The page on adding a method: its code is run as it stands, as a module and as an installed package."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvloom.cli.main import cli
from kvloom.errors import InvalidInputError
from kvloom.policies.plugins import load_file

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
ENTRY_POINT = next(code for language, code in BLOCKS if language == "toml")

RUN = """
from harness.small_engine import prompt_of, run, small_engine
from harness.tiny_engine import greedy
from kvloom.policies.reading import read_policy
import torch
engine = small_engine()
request = engine.add(prompt_of(80), greedy(4), kv_policy=read_policy("valuenorm(budget=20,sinks=3)"))
engine.step()
row, cache = request.sequences[0].row, engine.cache
for lane in range(6):
    assert cache.lanes.positions_of(row, lane)[:3].tolist() == [0, 1, 2] and cache.lanes.held[row, lane] == 20
run(engine, [request], cache.check_invariants)
"""


@pytest.fixture
def python(tmp_path):
    """Return a function that runs code in a process of its own which finds the page's module."""
    (tmp_path / "kvloom_valuenorm.py").write_text(PYTHON[0])

    def call(code):
        paths = [str(tmp_path), str(PAGE.parents[1] / "tests"), *filter(None, sys.path)]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_the_code_of_the_page_runs_in_order_and_its_method_frees_blocks(python):
    assert python("\n".join(PYTHON[1:]) + RUN) == ""


def test_an_installed_package_adds_its_method_by_entry_point(python, tmp_path):
    info = tmp_path / "kvloom_valuenorm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvloom-valuenorm\nVersion: 1.0\n")
    group, value = re.search(r'entry-points\."(.*)"\]\n(\w+ = ".*")', ENTRY_POINT).groups()
    (info / "entry_points.txt").write_text(f"[{group}]\n{value.replace(chr(34), '')}\n")
    listed = python("from kvloom.cli.main import run; assert run(['methods']) == 0")
    assert re.search(r"^  valuenorm +keeps tokens of large values", listed, re.MULTILINE)
    python("from kvloom.policies.policy import Policy; Policy.parse('valuenorm(budget=9)+adaptive')")


def test_a_package_that_fails_to_load_is_named(python, tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvloom.policies]\nx = no_such_module_anywhere\n")
    said = python("from kvloom.cli.main import run; import sys; sys.stderr = sys.stdout; print(run(['methods']))")
    assert "the policy 'x' of broken" in said and "uninstall broken" in said and said.endswith("2\n")


COMMANDS = re.search(r"<!-- commands: plugin -->\n```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture
def kvloom(tmp_path):
    """Return a function that runs `kvloom` in a folder that holds the page's module, which Python does not find."""
    (tmp_path / "kvloom_valuenorm.py").write_text(PYTHON[0])

    def call(*words):
        command = [sys.executable, "-m", "kvloom", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return call


def test_the_page_s_commands_list_and_plan_a_method_from_its_file(kvloom):
    listing, planning, *others = [shlex.split(line)[1:] for line in COMMANDS.splitlines()]
    assert re.search(r"^  valuenorm +keeps tokens of large values", kvloom(*listing).stdout, re.MULTILINE)
    done = kvloom(*planning, "--context", "1000", "--json")
    assert json.loads(done.stdout)["question"]["kv_policy"] == "valuenorm(budget=256)", done.stderr
    assert [words[:3] for words in others] == [
        ["generate", "--plugin", "kvloom_valuenorm.py"],
        ["serve", "--plugin", "kvloom_valuenorm.py"],
    ]


def test_every_command_that_takes_policies_takes_plug_ins():
    commands = dict(cli.leaves())
    takes = {name for name, command in commands.items() if "kv-policy" in command.flags}
    assert takes and {name for name, command in commands.items() if "plugin" in command.flags} == takes | {"methods"}


FAILING = [
    ("import no_such_module_anywhere", "broken.py cannot be loaded: ModuleNotFoundError: No module named"),
    ("this is no Python", "broken.py cannot be loaded: SyntaxError"),
    (None, "is not a file; give a Python file"),
]


@pytest.mark.parametrize("code, words", FAILING)
def test_a_plug_in_that_cannot_be_loaded_is_named(tmp_path, code, words):
    if code is not None:
        (tmp_path / "broken.py").write_text(code)
    with pytest.raises(InvalidInputError) as caught:
        load_file(tmp_path / "broken.py")
    assert "the plug-in " in str(caught.value) and words in str(caught.value)
    assert "kvloom_plugin_broken" not in sys.modules


def test_a_plug_in_that_is_given_twice_is_run_once(tmp_path):
    (tmp_path / "counted.py").write_text("with open(__file__ + '.runs', 'a') as file:\n    file.write('once')\n")
    (tmp_path / "inner").mkdir()
    load_file(tmp_path / "counted.py")
    load_file(tmp_path / "inner" / ".." / "counted.py")
    assert (tmp_path / "counted.py.runs").read_text() == "once"
    del sys.modules["kvloom_plugin_counted"]
