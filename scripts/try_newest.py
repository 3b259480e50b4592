#!/usr/bin/env python3
"""Run the tests on the newest release of every dependency, and say what differs from constraints.txt and what broke.

    scripts/try_newest.py [--write] [pytest arguments]

Creates an environment in a temporary folder, installs the checkout with its test extra and no constraints, and runs
pytest there on a copy of the checkout. A deprecation warning that a third party raises in kvloom's own modules or in
the tests fails the run. Exits with pytest's status. With `--write` and no failure, the installed versions replace
constraints.txt. Needs access to the package index and about 3 GB of disk.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "__pycache__", ".*_cache", ".hypothesis")
OWN = frozenset({"kvloom", "pip", "setuptools", "triton"})
"""Not pinned: kvloom itself, what makes the environment, and a package whose version torch decides."""


def versions(lines: str) -> dict[str, str]:
    """Return name -> version of the lines `name==version` of a freeze or of a constraints file, local parts dropped."""
    found = {}
    for line in lines.splitlines():
        pinned = re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)(\+\S+)?", line.strip())
        if pinned:
            found[re.sub(r"[-_.]+", "-", pinned[1]).lower()] = pinned[2]
    return {name: version for name, version in found.items() if name not in OWN}


def main() -> int:
    """Run as the module's docstring says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the versions in constraints.txt if nothing broke")
    options, pytest_arguments = parser.parse_known_args()
    constraints = ROOT / "constraints.txt"
    with tempfile.TemporaryDirectory() as folder:
        tree, python = Path(folder) / "kvloom", Path(folder) / "env" / "bin" / "python"
        shutil.copytree(ROOT, tree, ignore=IGNORED)
        subprocess.run([sys.executable, "-m", "venv", str(Path(folder) / "env")], check=True)
        subprocess.run([python, "-m", "pip", "install", "--upgrade", f"{tree}[test]"], check=True)
        frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
        newest, pinned = versions(frozen), versions(constraints.read_text(encoding="utf-8"))
        for name in sorted(newest.keys() | pinned.keys()):
            if newest.get(name) != pinned.get(name):
                print(f"{name}: {pinned.get(name, 'absent')} -> {newest.get(name, 'absent')}", flush=True)
        strict = [f"-Werror::{kind}" for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")]
        status = subprocess.run([python, "-m", "pytest", *strict, *pytest_arguments], cwd=tree, check=False).returncode
    if status == 0 and options.write:
        head = [line for line in constraints.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        pins = [f"{name}=={version}" for name, version in sorted(newest.items())]
        constraints.write_text("\n".join([*head, *pins, ""]), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
