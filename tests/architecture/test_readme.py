"""The commands in README.md exist, and continuous integration runs the same ones."""

import re
import shlex
import subprocess

import click
import pytest

from kvloom.cli.main import cli

BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


@pytest.fixture
def blocks(root):
    """(mark, language, text) of every fenced block."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    return [(found["mark"], found["language"], found["text"].strip()) for found in BLOCK.finditer(readme)]


def marked(blocks, mark):
    """Return the one block with this mark."""
    [text] = [text for found, _, text in blocks if found == mark]
    return text


def test_the_readme_is_at_most_150_lines_long(root):
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_one_command_makes_an_environment_and_gets_an_answer(blocks):
    command = marked(blocks, "command: run")
    assert "\n" not in command
    assert "venv" in command and "pip install" in command and "kvloom generate" in command


def test_continuous_integration_runs_the_test_command_word_for_word(root, blocks):
    shown = subprocess.run([str(root / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True)
    command = marked(blocks, "command: test")
    assert "\n" not in command and command.split(" && ")[-1].startswith("pytest")
    assert shown.stdout.strip() == command


def test_every_kvloom_command_in_the_readme_parses(blocks):
    lines = [line for _, language, text in blocks if language == "bash" for line in text.splitlines()]
    found = [part for line in lines for part in re.split(r"[|;]|&&", line) if part.strip().startswith("kvloom ")]
    assert found
    for text in found:
        name, *arguments = shlex.split(text, comments=True)[1:]
        cli.commands[name].make_context(name, arguments, resilient_parsing=False)


def test_examples_of_eviction_have_prompts_above_their_budget(root, blocks):
    lines = [line for _, language, text in blocks if language == "bash" for line in text.splitlines()]
    found = [line for line in lines if "kvloom generate" in line and "budget=" in line]
    assert found
    for line in found:
        budget = int(re.search(r"budget=(\d+)", line)[1])
        file = re.match(r"cat (\S+) \| kvloom .* -(?: |$)", line)
        prompt = (root / file[1]).read_text(encoding="utf-8") if file else shlex.split(line, comments=True)[-1]
        assert len(prompt.split()) > budget, line  # every word is at least a token


def test_every_file_that_the_documentation_links_to_exists(root):
    broken = []
    for page in [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(root)}: {target}")
    assert broken == []


def test_a_flag_that_does_not_exist_would_not_parse():
    with pytest.raises(click.UsageError):
        cli.commands["generate"].make_context("generate", ["--no-such-flag", "x"])
