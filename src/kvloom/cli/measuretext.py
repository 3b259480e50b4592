"""Measured policies on the terminal: one line each, the least loss first."""

from collections.abc import Sequence
from typing import Any

from kvloom.cli.table import table
from kvloom.units import format_bytes

HEADER = ("policy", "loss", "95 %", "KL, nats", "95 %", "same token", "KV at end", "of full", "peak", "TTFT", "TPOT")


def results_text(results: Sequence[dict[str, Any]], model: str, machine: str) -> str:
    """Return the results of one context as a table, with what its columns mean."""
    if not results:
        return "nothing was measured\n"
    first = results[0]
    full = next((entry.get("kv_bytes") for entry in results if entry["policy"] == "full"), None)
    rows = [_row(entry, full) for entry in sorted(results, key=lambda entry: (entry["loss"], entry["kl"]))]
    counts = sorted({entry["windows"] for entry in results})
    windows = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    lines = [
        f"{model}, {windows} windows of {first['context']} tokens, the last {first['output']} scored; {machine}",
        "loss: perplexity against that of the full cache; intervals: bootstrap over windows; bytes, times: one request",
        "times: median of the runs alone, and their least and most",
        "",
        *table(HEADER, rows, right=True),
    ]
    return "\n".join(lines) + "\n"


def _row(entry: dict[str, Any], full: int | None) -> tuple[str, ...]:
    held, peak = entry.get("kv_bytes"), entry.get("kv_peak_bytes")
    return (
        entry["policy"],
        f"{entry['loss']:+.2%}",
        f"{entry['loss_low']:+.2%} {entry['loss_high']:+.2%}",
        f"{entry['kl']:.4f}",
        f"{entry['kl_low']:.4f} {entry['kl_high']:.4f}",
        f"{entry['agreement']:.1%}",
        "-" if held is None else format_bytes(held),
        "-" if held is None or not full else f"{held / full:.0%}",
        "-" if peak is None else format_bytes(peak),
        _milliseconds(entry, "ttft_s"),
        _milliseconds(entry, "tpot_s"),
    )


def _milliseconds(entry: dict[str, Any], name: str) -> str:
    """Return the median, and the least and most of several runs in parentheses."""
    if entry.get(name) is None:
        return "-"
    middle, low, high = (1000 * entry[key] for key in (name, f"{name}_min", f"{name}_max"))
    spread = f" ({low:,.1f} to {high:,.1f})" if high > low else ""
    return f"{middle:,.1f} ms{spread}"
