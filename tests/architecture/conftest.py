"""Fixtures of the architecture tests: the files and modules of this checkout."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
TEXT = {".py", ".md", ".toml", ".cpp", ".cc", ".h", ".hpp", ".cu", ".txt", ".yaml", ".yml", ".sh", ".html", ".js"}
FOLDERS = ("src", "tests", "docs", "benchmarks", ".ci")
FILES = ("README.md", "CHANGELOG.md", "pyproject.toml", "CMakeLists.txt")


@dataclass(frozen=True)
class Module:
    """One Python file of the package: its dotted name, path and syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """First part of the name below `kvloom`; the package itself is the room `kvloom`."""
        parts = self.name.split(".")
        return "cli" if parts[1:] == ["__main__"] else parts[min(1, len(parts) - 1)]


def read_modules() -> tuple[Module, ...]:
    """Return every module of the package."""
    modules = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(modules)


@pytest.fixture(scope="session")
def root() -> Path:
    """Folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def modules() -> tuple[Module, ...]:
    """All modules of the package."""
    return read_modules()


@pytest.fixture(scope="session")
def texts(root: Path) -> tuple[Path, ...]:
    """Every text file that the project keeps in its known places."""
    found = [root / name for name in FILES]
    for folder in (root / name for name in FOLDERS):
        found += [path for path in folder.rglob("*") if path.suffix in TEXT or path.parent.name == ".ci"]
    ignored = {"__pycache__", "venv"}
    return tuple(path for path in found if path.is_file() and not ignored & set(path.parts))
