"""Help starts at once: nothing heavy is loaded to parse arguments."""

import subprocess
import sys

import pytest

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
