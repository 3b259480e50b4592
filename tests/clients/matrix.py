"""Other people's clients against a running server; see README.md in this folder."""

import argparse
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

PYTHON = (
    "openai_client", "anthropic_client", "langchain_client", "litellm_client", "llm_client", "lm_eval_client",
    "guidellm_client",
)  # fmt: skip
NODE = Path(__file__).parent / "node"


def python_checks():
    """Yield (name, check or None) of every client in Python; None where it is not installed."""
    for name in PYTHON:
        try:
            checks = importlib.import_module(name).CHECKS
        except ModuleNotFoundError as error:
            yield f"{name}: {error.name}", None
            continue
        for check in checks:
            yield f"{name}.{check.__name__}", check


def node_checks(base_url, model):
    """Yield (name, outcome) of every client in JavaScript, one line each; nothing where they are not installed."""
    if shutil.which("node") is None or not (NODE / "node_modules").is_dir():
        print("node: skipped, run npm install in the folder node")
        return
    for script in sorted(NODE.glob("*_client.mjs")):
        done = subprocess.run(["node", str(script), base_url, model], capture_output=True, text=True, timeout=600)
        yield from ((f"node {script.stem}", line) for line in done.stdout.splitlines())
        if done.returncode:
            yield f"node {script.stem}", f"FAILED, {done.stderr[-2000:]}"


def main():
    """Run every client that is installed; the status is 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    failed = False
    for name, check in python_checks():
        if check is None:
            print(f"{name} is not installed: skipped")
            continue
        try:
            print(f"{name}: ok, {check(arguments.base_url, arguments.model)!r}", flush=True)
        except Exception as error:
            failed = True
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
    for name, outcome in node_checks(arguments.base_url, arguments.model):
        failed |= "FAILED" in outcome
        print(f"{name} {outcome}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
