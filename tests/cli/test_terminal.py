"""What the terminal decides: the width of tables, and the words that a shell completes."""

import pytest

from kvloom.cli.table import table

HEADER = ("memory", "", "how known", "")
ROWS = [
    ("KV of all users", "10 GiB = 10.74 GB", "exact", "prompts in flight at their peak, others as they are left"),
    ("weights", "14.96 GiB = 16.06 GB", "assumed", "parameters of the config times their width"),
]


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes standard output a terminal of so many columns."""

    def set_columns(columns):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "24")

    return set_columns


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_table_on_a_terminal_is_no_wider_and_loses_no_word(terminal, columns):
    whole = list(table(HEADER, ROWS))
    assert max(map(len, whole)) > 100
    terminal(columns)
    folded = list(table(HEADER, ROWS, indent=2))
    assert max(map(len, folded)) <= columns
    assert sorted(" ".join(folded).split()) == sorted(" ".join(whole).split())


def test_a_table_that_fits_or_that_is_piped_has_one_line_a_row(terminal):
    piped = list(table(HEADER, ROWS))
    terminal(200)
    assert list(table(HEADER, ROWS)) == piped and len(piped) == 3


def test_columns_are_never_folded_below_their_least_width(terminal):
    terminal(10)
    lines = list(table(("a", "b"), [("x" * 30, "y" * 5)]))
    assert lines[1] == "x" * 12 + "  yyyyy" and len(lines) == 4


def complete(kvloom_process, words):
    """Return the words that bash offers in place of the last of `words`."""
    asked = {"_KVLOOM_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = kvloom_process(**asked)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_the_shell_completes_commands_flags_and_choices(kvloom_process):
    assert complete(kvloom_process, ["kvloom", "me"]) == ["measure", "methods"]
    assert complete(kvloom_process, ["kvloom", "plan", "--max-n"]) == ["--max-num-batched-tokens"]
    assert complete(kvloom_process, ["kvloom", "generate", "--backend", "e"]) == ["eager"]


def test_the_script_for_a_shell_is_printed(kvloom_process):
    done = kvloom_process(_KVLOOM_COMPLETE="zsh_source")
    assert "#compdef kvloom" in done.stdout
