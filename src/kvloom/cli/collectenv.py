"""`kvloom collect-env`: facts about the machine and the installation for a bug report."""

import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import kvloom
from kvloom.cli.answer import write, write_json
from kvloom.cli.command import Command, Flag
from kvloom.errors import InvalidInputError
from kvloom.units import KIB, format_bytes

PACKAGES = ("torch", "numpy", "safetensors", "gguf", "tokenizers", "transformers", "huggingface_hub", "jinja2", "click")
"""Distributions whose versions are reported."""

CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
"""Instruction sets, by the names of the operating system's kernel, that decide the speed of the CPU kernels."""

SETTINGS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "CUDA_VISIBLE_DEVICES",
    "XDG_CACHE_HOME",
)  # fmt: skip
"""Environment variables that have an effect, beside those that begin with KVLOOM_."""


def run(as_json: bool) -> None:
    """Print the facts, as lines or as JSON."""
    facts = collect()
    if as_json:
        write_json(facts)
        return
    for section, values in facts.items():
        write(f"{section}\n")
        for name, value in values.items():
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            write(f"  {name}: {format_bytes(value) if name.endswith('_bytes') else shown}\n")


def collect() -> dict[str, dict[str, Any]]:
    """Return all facts by section; a fact that this machine does not provide is None."""
    return {
        "versions": _versions(),
        "system": {"platform": platform.platform(), "python": sys.version.split()[0], "executable": sys.executable},
        "cpu": _cpu(),
        "memory": _memory(),
        "torch": _torch(),
        "kernels": _kernels(),
        "models": _models(),
        "environment": _environment(),
    }


def _environment() -> dict[str, Any]:
    """Return the environment variables that have an effect; of secrets only that they are set."""
    names = [name for name in sorted(os.environ) if name in SETTINGS or name.startswith("KVLOOM_")]
    return {name: "(set)" if name.endswith(("_KEY", "_TOKEN")) else os.environ[name] for name in names}


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"kvloom": kvloom.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu() -> dict[str, Any]:
    """Return name, usable cores and relevant instruction sets, from the first processor that the kernel lists."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = _fields(Path("/proc/cpuinfo"))
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "features": [feature for feature in CPU_FEATURES if feature in flags],
    }


def _memory() -> dict[str, Any]:
    """Return total and available bytes of main memory."""
    facts = _fields(Path("/proc/meminfo"))

    def in_bytes(name: str) -> int | None:
        return int(facts[name].split()[0]) * KIB if name in facts else None

    return {"total_bytes": in_bytes("MemTotal"), "available_bytes": in_bytes("MemAvailable")}


def _fields(path: Path) -> dict[str, str]:
    """Return the `name: value` lines of a file of the kernel, the first of each name; nothing where it is absent."""
    found: dict[str, str] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found


def _torch() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
    }


def _kernels() -> dict[str, Any]:
    """Return which kernels compute on the CPU: the compiled ones and their instruction set, else torch."""
    if importlib.util.find_spec("kvloom.kernels.cpu._ext") is None:
        return {"cpu": "torch (no compiled kernels)"}
    from kvloom.kernels import cpu

    available, threads = cpu.available_isas(), cpu.num_threads()
    return {"cpu": "compiled", "isa": cpu.isa(), "isas_available": available, "threads": threads}


def _models() -> dict[str, Any]:
    """Return the cache folder and the models of the catalogue that are in it."""
    from kvloom.models.pull import cache_dir, pulled

    try:
        folder = str(cache_dir())
    except InvalidInputError as error:
        folder = f"none: {error}"
    return {"cache_dir": folder, "pulled": pulled()}


collect_env = Command(
    "collect-env",
    callback=run,
    short_help="Describe this machine and installation.",
    help="Describe this machine and installation, for a bug report. Nothing is sent anywhere.",
    params=[Flag(["--json", "as_json"], is_flag=True, help="Print one line of JSON.")],
)
