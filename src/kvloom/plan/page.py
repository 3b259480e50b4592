"""The computed parts of the planner's page: `python -m kvloom.plan.page PAGE.md` rewrites them.

A part lies between `<!-- computed: NAME -->` and `<!-- end -->`; a test compares it with the output of this module.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from kvloom.plan.explain import TOPICS
from kvloom.spec.catalogue import catalogue_names, catalogue_spec
from kvloom.spec.config_json import understood
from kvloom.spec.format import bits_per_element, runs, store_format, store_names
from kvloom.spec.hardware import DEVICES, DeviceSpec
from kvloom.spec.hypothetical import Hypothesis
from kvloom.spec.model import ModelSpec
from kvloom.units import GIB, format_bytes

_TABLE = (
    "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b", "llama-3.2-1b",
    "mistral-7b", "mixtral-8x7b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "smollm2-135m",
    "smollm2-1.7b", "gemma-3-270m", "gemma-3n-e4b", "gpt-oss-20b", "deepseek-67b", "deepseek-v2", "deepseek-v3",
)  # fmt: skip


def both(num_bytes: int) -> str:
    """Return `1.342 GB = 1.25 GiB`."""
    return f"{num_bytes / 1e9:.4g} GB = {num_bytes / GIB:.4g} GiB"


def byte_table() -> str:
    """Return the bytes of well-known models per token and for whole requests, as Markdown."""
    lines = ["| model | layers, attention | bytes per token | 4,096 tokens | 131,072 tokens |", "|---|---|---|---|---|"]
    imagined = Hypothesis(layers=80, heads=64, head_dim=128).build("llama-2-70b, were it MHA")
    for spec in [*map(catalogue_spec, _TABLE), imagined]:
        kv = spec.kv_spec(16, "bf16")
        lines.append(
            f"| {spec.name} | {spec.num_layers}, {spec.attention_kind} | {kv.bytes_per_token:,} = "
            f"{format_bytes(kv.bytes_per_token)} | {both(kv.request_bytes(4096))} | {both(kv.request_bytes(131_072))} |"
        )
    return "\n".join(lines)


def _request(name: str, tokens: int) -> int:
    return catalogue_spec(name).kv_spec(1, "bf16").request_bytes(tokens)


def claims() -> str:
    """Return computed values of figures that are often quoted wrongly."""
    seventy, seven = _request("llama-2-70b", 4096), _request("llama-2-7b", 4096)
    latent = catalogue_spec("deepseek-v2").kv_spec(1, "bf16").bytes_per_token
    grouped = catalogue_spec("deepseek-67b").kv_spec(1, "bf16").bytes_per_token
    mixtral = catalogue_spec("mixtral-8x7b").kv_spec(1, "bf16").bytes_per_token
    return "\n".join([
        f"- Llama-2-70B at 4,096 tokens needs {both(seventy)}, and {both(32 * seventy)} for 32 users: 8 KV heads, "
        "not 64.",
        f"- Llama-2-7B at 4,096 tokens needs {both(seven)}: {seven / seventy:.1f} times the 70B's, because each of "
        "its 32 "
        "query heads has a KV head of its own.",
        f"- Mixtral-8x7B costs {mixtral:,} bytes = {format_bytes(mixtral)} a token, as a dense model of its attention "
        "does: experts have no keys and values.",
        f"- Llama-3-8B needs {_request('llama-3-8b', 1000) / 1e6:.1f} MB for 1,000 tokens.",
        f"- DeepSeek-V2 keeps {latent:,} bytes = {format_bytes(latent)} a token in 16 bit: (512 + 64) x 60 x 2.",
        f"- Its \"93.3 % smaller\" cache is 1 - {latent // 2:,} x 6 bit / ({grouped // 2:,} x 16 bit) = "
        f"{1 - latent * 6 / (grouped * 16):.2%}: the baseline is DeepSeek-67B with 8 KV heads and 95 layers, and 6-bit "
        f"storage is counted in. At equal precision it is {1 - latent / grouped:.1%}. Against heads of its own (128 of "
        f"128) the latent is {128 * 2 * 128 / 576:.1f} times smaller.",
    ])  # fmt: skip


def stores() -> str:
    """Return the storage formats with their bits per number at two head sizes."""
    lines = ["| store | bits a number, head 64 | head 128 | newest tokens in 16 bit | runs |", "|---|---|---|---|---|"]
    for name in store_names():
        wide = f"{bits_per_element(name, 64):.4g} | {bits_per_element(name, 128):.4g}"
        lines.append(f"| {name} | {wide} | {store_format(name).residual} | {'yes' if runs(name) else 'planned only'} |")
    return "\n".join(lines)


def devices() -> str:
    """Return the device table with sources and dates."""
    lines = ["| device | memory | bandwidth | 16-bit peak | source | read on |", "|---|---|---|---|---|---|"]
    for name, device in DEVICES.items():
        lines.append(
            f"| {name} | {format_bytes(device.memory_bytes or 0)} | {(device.bandwidth or 0) / 1e9:,.0f} GB/s | "
            f"{_peak(device)} | {device.source} | {device.as_of} |"
        )
    return "\n".join(lines)


def _peak(device: DeviceSpec) -> str:
    peak = device.peak("bfloat16")
    return "not known" if peak is None else f"{peak / 1e12:,.0f} TFLOP/s"


def catalogue() -> str:
    """Return the catalogue with weights, attention and source."""
    lines = ["| name | weights | attention | windows | source |", "|---|---|---|---|---|"]
    for spec in map(catalogue_spec, catalogue_names()):
        source = spec.source.split(": ", 1)[1]
        lines.append(f"| {spec.name} | {spec.num_params:,} | {spec.attention_kind} | {_windows(spec)} | {source} |")
    return "\n".join(lines)


def _windows(spec: ModelSpec) -> str:
    found = [layer.window for layer in spec.layers if layer.window is not None]
    return f"{len(found)} of {spec.num_layers} layers, {found[0]}" if found else "-"


def names() -> str:
    """Return the architectures that the planner supports, and its topics."""
    return (
        f"Architectures (`model_type`): {', '.join(f'`{name}`' for name in understood())}.\n\n"
        f"Topics of `--explain`: {', '.join(f'`{name}`' for name in TOPICS)}."
    )


PARTS: dict[str, Callable[[], str]] = {
    "byte-table": byte_table, "claims": claims, "stores": stores, "devices": devices, "catalogue": catalogue,
    "names": names,
}  # fmt: skip

_PART = re.compile(r"(<!-- computed: ([a-z-]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Return `text` with every computed part rewritten; raises `KeyError` for a part of unknown name."""
    return _PART.sub(lambda found: found[1] + PARTS[found[2]]() + found[3], text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
