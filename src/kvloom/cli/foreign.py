"""Flags of other servers that kvloom does not have, and what to give in their place."""

from collections.abc import Iterable

_MEMORY = "the KV cache lies in the machine's memory; give its size by --kv-cache-memory-bytes"
_STORE = "K and V are stored by --kv-cache-dtype, or by the policy of a request, such as snapkv(budget=1024)+int8"
_SLOTS = "the KV of a conversation is not written to disk; the prefix cache keeps it while the server runs"

FOREIGN = {
    "--gpu-memory-utilization": _MEMORY,
    "--device-memory-utilization": _MEMORY,
    "--mem-fraction-static": _MEMORY,
    "--kv-cache-dtype-skip-layers": _STORE,
    "--kv-bits": _STORE,
    "--kv-group-size": _STORE,
    "-ctk": _STORE,
    "-ctv": _STORE,
    "--cache-type-k": _STORE,
    "--cache-type-v": _STORE,
    "--max-kv-size": "bound what a request holds by a policy: --kv-policy 'streaming(window=TOKENS)'",
    "--slot-save-path": _SLOTS,
    "--trust-remote-code": "code from a checkpoint is never run",
    "--tensor-parallel-size": "a server runs one model in one process",
}
"""Flag of vLLM, SGLang, llama.cpp or mlx -> why kvloom lacks it and what to use."""


def foreign_flag(arguments: Iterable[str]) -> str | None:
    """Return the message for the first of `arguments` that is a flag of `FOREIGN`, None when there is none."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in FOREIGN:
            return f"kvloom has no {name}: {FOREIGN[name]}"
    return None
