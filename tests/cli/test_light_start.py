"""Help starts at once, and an engine without what only others need; nothing heavy is loaded to parse arguments."""

import gc
import subprocess
import sys

import pytest

from kvloom.errors import InvalidInputError

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "rich", "yaml", "jinja2", "huggingface_hub")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["collect-env", "--help"], ["generate", "--oops"]]
)
def test_help_and_usage_errors_load_nothing_heavy(arguments):
    program = (
        "import sys; from kvloom.cli.main import run; code = run(sys.argv[1:]);"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_an_engine_starts_without_what_reads_gguf_files_and_draws_bars():
    program = (
        "import sys, kvloom.engine.llm, kvloom.models.tokenizer, kvloom.models.compiled;"
        "print([name for name in ('gguf', 'yaml', 'rich', 'jinja2', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_collections_rest_while_an_engine_is_loaded_and_go_on_afterwards(llm, kvloom, monkeypatch):
    seen = []
    monkeypatch.setattr(llm, "__init__", lambda self, model, **engine: seen.append(gc.isenabled()) or fail())
    frozen = gc.get_freeze_count()

    def fail():
        raise InvalidInputError("no")

    assert kvloom("generate", "Hello")[0] == InvalidInputError.exit_code
    assert (seen, gc.isenabled(), gc.get_freeze_count()) == ([False], True, frozen)
