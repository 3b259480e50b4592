"""Serving: the command line that serves a question, and every reason why kvloom cannot serve it yet.

A plan also covers devices, architectures and stores that do not run. A command is printed only where it runs.
"""

import shlex
from pathlib import Path

from kvloom.plan.memory import Memory
from kvloom.plan.question import DEFAULT_BLOCK_SIZE, DEFAULT_CHUNK, Question
from kvloom.spec.catalogue import catalogue_entry, find_in_catalogue
from kvloom.spec.conflicts import conflicts
from kvloom.spec.encoding import encoding_refusals
from kvloom.spec.footprint import replay_tokens
from kvloom.spec.format import store_format
from kvloom.spec.policy import FULL
from kvloom.spec.store import SLAB_BYTES

SERVED_NAMES = frozenset({"smollm2"})
"""Names under which `kvloom serve` fetches a model itself; other names are those of the hub."""

SERVED_DTYPES = ("bfloat16", "float16", "float32")


def serve_refusals(asked: Question) -> list[str]:
    """Return every reason why `kvloom serve` of this version cannot serve `asked`; [] when it can."""
    model, reasons = asked.model, []
    if not model.exact:
        reasons.append("the model is hypothetical")
    elif model.decoder is None:
        reasons.append(f"architecture {model.family!r} does not run yet")
    reasons += model.refused
    if asked.dtype not in SERVED_DTYPES:
        reasons.append(f"--dtype {asked.dtype} does not run yet; one of {', '.join(SERVED_DTYPES)} does")
    if asked.quantization is not None and asked.packed.obstacles:
        reasons += [f"--quantization {asked.quantization} does not run: {why}" for why in asked.packed.obstacles]
    if asked.devices > 1:
        reasons.append("tensor parallelism does not run yet")
    if asked.device.kind != "cpu":
        reasons.append(f"models run on CPUs, not yet on {asked.device.name}")
    if model.max_position is not None and asked.context > model.max_position:
        reasons.append(f"the model was made for {model.max_position} tokens; {asked.context} are asked")
    return [*reasons, *policy_refusals(asked)]


def policy_refusals(asked: Question) -> list[str]:
    """Return every reason why the engine cannot run the cache policy of `asked` on its model."""
    policy, model, reasons = asked.policy, asked.model, []
    reasons += encoding_refusals(policy, asked.whole_kv)
    if not policy.evicts or not model.kv_layers:
        return reasons
    name = policy.selector.name
    reasons += conflicts(policy)
    if policy.needs.weighs and model.decoder is not None:
        reasons += [f"{name} scores by softmax(q.k), and scores of this model have {term}"
                    for term in model.decoder.score_terms]
    if any(kv.source is not None for kv in model.layer_kv):
        reasons.append("layers share the lanes of other layers, from which nothing can be evicted")
    first = policy.layers_skipped
    if all(kv.window is not None or index < first for index, kv in enumerate(model.layer_kv)):
        reasons.append("every layer has a window or is skipped, so there is nothing to evict")
    limits = policy.method.lane_limits
    if limits is not None and asked.whole_kv is not None and limits(dict(policy.selector.args), asked.whole_kv) is None:
        reasons.append(f"{name} needs a pattern of this model's heads, e.g. {name}(pattern=heads.json)")
    budget = policy.tokens_kept(asked.prompt)
    if budget is not None and budget < asked.prompt and policy.tokens_protected(budget) > budget:
        reasons.append(f"{policy.tokens_protected(budget)} tokens are protected but the budget is {budget}")
    again = replay_tokens(policy, asked.prompt)
    if model.max_position is not None and asked.prompt + again > model.max_position:
        longest = f"the model was made for {model.max_position}"
        reasons.append(f"{name} feeds up to {again} tokens after the prompt; {longest}")
    return reasons


def served_name(model: str) -> str:
    """Return the name that `kvloom serve` takes for the MODEL of a plan: a path, or a Hugging Face id."""
    path = Path(model).expanduser()
    if path.is_file() and path.name == "config.json":
        return str(path.parent)
    name = find_in_catalogue(model)
    if path.exists() or name is None or "/" in model or model in SERVED_NAMES:
        return model
    ids = catalogue_entry(name)["ids"]
    return str(ids[0]) if ids else model


def arena_bytes(asked: Question) -> int:
    """Return the `--kv-cache-memory-bytes` for all users of `asked`: whole slabs, and one more for each block size."""
    kv = asked.whole_kv
    sizes = set() if kv is None else {group.block_bytes for group in kv.groups}
    if kv is not None and asked.policy.store is not None:
        name = asked.policy.store.name
        sizes |= {store_format(name).block_bytes(kv.block_size, x.k_width, x.v_width) for x in kv.sets}
    return (-(-Memory(asked).kv_bytes(asked) // SLAB_BYTES) + max(1, len(sizes))) * SLAB_BYTES


def serve_command(asked: Question, model: str) -> str:
    """Return the command line that serves `asked`; only of use where `serve_refusals` is empty."""
    parts = ["kvloom", "serve", shlex.quote(served_name(model)), "--max-model-len", str(asked.context),
             "--max-num-seqs", str(asked.users), "--dtype", asked.dtype,
             "--kv-cache-memory-bytes", str(arena_bytes(asked))]
    if asked.quantization is not None:
        parts += ["--quantization", asked.quantization]
    if asked.policy != FULL:
        parts += ["--kv-policy", shlex.quote(str(asked.policy))]
    if asked.block_size != DEFAULT_BLOCK_SIZE:
        parts += ["--block-size", str(asked.block_size)]
    if asked.chunk != DEFAULT_CHUNK:
        parts += ["--max-num-batched-tokens", str(asked.chunk)]
    return " ".join(parts)
