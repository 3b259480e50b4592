"""Modules that must start in a fraction of a second do not import torch."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "tokenizers", "gguf", "safetensors", "huggingface_hub")
TORCH_FREE = (
    "kvloom",
    "kvloom.spec",
    "kvloom.plan",
    "kvloom.cache.arena",
    "kvloom.cache.lanes",
    "kvloom.cache.prefix",
    "kvloom.engine.scheduler",
    "kvloom.engine.request",
    "kvloom.engine.params",
    "kvloom.cli",
)
"""Modules, and packages with all that is in them; `kvloom` is only the package's own file."""


def torch_free(name: str) -> bool:
    """Whether the module called `name` is on the list."""
    return any(name == entry or (entry != "kvloom" and name.startswith(entry + ".")) for entry in TORCH_FREE)


PROGRAM = """
import importlib, sys
loaded = set()
for name in sys.argv[2:]:
    importlib.import_module(name)
    found = {heavy for heavy in sys.argv[1].split(",") if heavy in sys.modules}
    if found - loaded:
        print(name, *sorted(found - loaded))
    loaded |= found
"""


def loaded_by(*names: str) -> list[str]:
    """Return a line for each of `names`, imported in turn by one fresh interpreter, that first loads a heavy package.

    What any of them loads alone it has also loaded here, so no line means that each of them is light.
    """
    command = [sys.executable, "-c", PROGRAM, ",".join(HEAVY), *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_torch_free_modules_load_nothing_heavy(modules):
    names = [module.name for module in modules if torch_free(module.name)]
    assert len(names) > len(TORCH_FREE)
    assert loaded_by(*names) == []


def test_the_check_itself_sees_torch():
    assert loaded_by("json", "torch") == ["torch torch"]
