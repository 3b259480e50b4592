"""The computed parts of the page of models: `python -m kvloom.models.page PAGE.md` rewrites them.

A part lies between `<!-- computed: NAME -->` and `<!-- end -->`; a test compares it with the output of this module.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import FAMILY_CONFIGS
from kvloom.spec.families.rope import ROPE_KINDS
from kvloom.spec.kernels import unsupported


def families_table() -> str:
    """Return a table of the families, from their registry entries and default configs, as Markdown."""
    lines = ["| family | `architectures` in config.json | positions | norm, MLP | GGUF | CPU kernels |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, family in FAMILY_CONFIGS.items():
        config = family.read({})
        architectures = ", ".join(f"`{entry}`" for entry in family.architectures)
        gguf = f"`{family.gguf_architecture}`" if family.gguf_architecture else "no"
        kernels = "; ".join(unsupported(config, 16)) or "yes"
        lines.append(f"| {name} | {architectures} | {_positions(config)} | {_blocks(config)} | {gguf} | {kernels} |")
    return "\n".join(lines)


def _positions(config: DecoderConfig) -> str:
    found: list[str] = []
    if config.learned_positions:
        found.append("learned")
    if config.slopes:
        found.append("ALiBi")
    ropes = [layer.rope for layer in config.layers]
    if any(ropes):
        found.append("rotary" if config.rotary == config.head_dim else f"rotary, {config.rotary} of {config.head_dim}")
        if not all(ropes):
            found.append("none on some layers")
    if any(layer.window for layer in config.layers):
        found.append("chunks" if any(layer.chunked for layer in config.layers) else "windows")
    if config.sinks:
        found.append("learned sinks")
    return ", ".join(found)


def _blocks(config: DecoderConfig) -> str:
    found = ["RMSNorm" if config.norm == "rms" else "LayerNorm"]
    if config.qk_norm:
        found.append("q and k normed")
    if config.sandwich_norm:
        found.append("around each block" if config.pre_norm else "after each block")
    found.append("experts" if config.experts else "gated" if config.gated else "plain")
    if config.parallel_residual:
        found.append("parallel")
    if config.score_softcap or config.logit_softcap:
        found.append("softcap")
    return ", ".join(found)


_ROPE_NOTES = {
    "default": "as trained",
    "linear": "all positions divided by `factor`",
    "llama3": "long wavelengths stretched, short ones kept",
    "yarn": "a ramp between both, and a temperature on the scores; positions up to `factor` times the original context",
    "dynamic": "the base grows with the length. A request is given the base of prompt + `max_tokens` when it is "
    "admitted, so that its cached keys agree with each other; requests of unlike length share no prefix",
    "longrope": "one list of divisors for short texts, one for long ones. A request begins with the list of its "
    "prompt. Where its text grows past the original context, it is computed again once with the other list, as Phi-3 "
    "is in transformers. A request under a policy or store is given its list by prompt + `max_tokens`. Requests of "
    "unlike lists share no prefix",
}


def rope_table() -> str:
    """Return the kinds of rotary embedding, as Markdown."""
    lines = ["| `rope_type` | what it does |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{kind}` | {_ROPE_NOTES[kind]} |" for kind in ROPE_KINDS)])


COMPUTED: dict[str, Callable[[], str]] = {"families": families_table, "ropes": rope_table}

_PART = re.compile(r"(<!-- computed: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def recomputed(page: str) -> str:
    """Return `page` with every computed part rewritten; raises KeyError for a part of an unknown name."""
    return _PART.sub(lambda found: f"{found[1]}\n{COMPUTED[found['name']]()}\n\n{found[3]}", page)


def main(path: Path) -> None:
    """Rewrite the computed parts of the page at `path`."""
    path.write_text(recomputed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
