"""The linter and the type checker agree with the code."""

import subprocess
import sys


def check(root, *command):
    """Run a checker in the checkout; its complaints become the failure's message."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing(root):
    check(root, "ruff", "check", "--no-cache", ".")


def test_mypy_finds_nothing_under_strict_rules(root):
    check(root, "mypy")  # with its cache in the checkout, which makes every run but the first one fast
