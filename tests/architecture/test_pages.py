"""Pages beside the README: their commands parse, and the Python reference names what there is."""

import inspect
import re
import shlex
from dataclasses import fields

import pytest

import kvloom
import kvloom.errors
from kvloom.cli.main import cli
from kvloom.engine.beam import BeamSearchParams
from kvloom.engine.llm import LLM
from kvloom.engine.output import CompletionOutput, KVUsage, RequestOutput
from kvloom.engine.params import SamplingParams

BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["tutorial", "install", "threads", "troubleshooting"])
def test_every_kvloom_command_of_a_page_parses(root, page):
    text = (root / "docs" / f"{page}.md").read_text(encoding="utf-8")
    lines = [line for block in BASH.findall(text) for line in block.splitlines()]
    commands = [part for line in lines for part in re.split(r"[|;]|&&", line) if part.strip().startswith("kvloom ")]
    assert commands or page in ("threads", "troubleshooting")
    for command in commands:
        name, *arguments = shlex.split(command)[1:]
        cli.commands[name].make_context(name, arguments)


def test_the_python_reference_names_every_option_field_method_and_error(root):
    page = (root / "docs" / "python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", page))))
    wanted = set(inspect.signature(LLM).parameters)
    wanted |= {name for name, value in vars(LLM).items() if inspect.isfunction(value) and not name.startswith("_")}
    for kind in (SamplingParams, BeamSearchParams, RequestOutput, CompletionOutput, KVUsage):
        wanted |= {entry.name for entry in fields(kind)}
    wanted |= {name for name, value in vars(kvloom.errors).items() if inspect.isclass(value) and "Error" in name}
    wanted |= set(kvloom.__all__) - {"__version__"}
    assert wanted - named == set()
