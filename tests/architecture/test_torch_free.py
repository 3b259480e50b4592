"""What must start in a fraction of a second never imports torch."""

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


def loaded_by(name: str) -> list[str]:
    """Return the heavy packages that a fresh interpreter has loaded after importing `name`."""
    program = f"import sys, {name}; print(*[heavy for heavy in {HEAVY!r} if heavy in sys.modules])"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_torch_free_modules_load_nothing_heavy(modules):
    loaded = {module.name: loaded_by(module.name) for module in modules if torch_free(module.name)}
    assert {name: heavy for name, heavy in loaded.items() if heavy} == {}


def test_the_check_itself_sees_torch():
    assert "torch" in loaded_by("torch")
