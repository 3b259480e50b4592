"""Divergence of bfloat16 and of each backend from transformers in float32, on real texts.

Windows of Moby Dick and of State of the Union addresses in turn: a prompt, then tokens that are given; kvloom takes
each through its decode path, transformers reads the whole window at once with `sdpa` attention. Against transformers in
float32: share of tokens with the same most likely token, KL in nats a token and its largest mean over a window,
relative difference of perplexity with a 95 % interval bootstrapped over windows. transformers in bfloat16 is measured
for comparison: another engine's rounding in the same number format. It may keep the weights of a GGUF file packed,
those of a folder not. The last line is one JSON object.

    python benchmarks/dtype_agreement.py [--model FILE.gguf or FOLDER] [--windows 32] [--context 256] [--tokens 64]
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from policies_texts import MOBY_DICK, SOTU, text

from kvloom import LLM
from kvloom.measure.forced import Reference, Score, forced_scores
from kvloom.measure.interval import bootstrap_interval
from kvloom.measure.window import Window, windows_of
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.pull import pull
from kvloom.spec.policy import FULL


@torch.inference_mode()
def logprobs(path: Path, dtype: torch.dtype, windows: Sequence[Window]) -> Iterator[Reference]:
    """Yield transformers' log-probabilities for the tokens after each window's prompt, the first one left out."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    where = (path, None) if path.is_dir() else (path.parent, path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where[0], gguf_file=where[1], dtype=dtype, attn_implementation="sdpa"
    ).eval()
    for index, window in enumerate(windows):
        ids = torch.tensor([[*window.prompt, *window.follow[:-1]]])
        rows = model(ids, logits_to_keep=len(window.follow) - 1).logits[0].float().log_softmax(-1)
        yield {(index, step): row for step, row in enumerate(rows, 1)}


def score(own: Reference, reference: Reference, windows: Sequence[Window]) -> Score:
    """Return the means over one window, as `forced_scores` does for kvloom."""
    rows = []
    for (index, step), row in own.items():
        full = reference[index, step]
        kl = max(0.0, float((full.exp() * (full - row)).sum()))
        rows.append((-float(row[windows[index].follow[step]]), kl, float(full.argmax() == row.argmax())))
    nll, kl, agreement = (statistics.fmean(column) for column in zip(*rows, strict=True))
    return Score(nll, kl, agreement, evicted=0)


def main() -> None:
    """Print a line for each dtype of each engine, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    path = asked.model or Path(pull("smollm2"))
    tokenizer = open_checkpoint(str(path)).tokenizer()
    texts = [tokenizer.encode(text(member)[:800_000], add_special_tokens=False) for member in (MOBY_DICK, SOTU)]
    windows = windows_of(texts, asked.context, asked.tokens + 1, asked.windows, tokenizer.encode(""))
    parts = list(logprobs(path, torch.float32, windows))
    reference = {key: row for part in parts for key, row in part.items()}
    base = [score(part, reference, windows).nll for part in parts]
    rows = []

    def report(name: str, scores: Sequence[Score]) -> None:
        more = [own.nll - full for own, full in zip(scores, base, strict=True)]
        low, high = bootstrap_interval(more)
        kl = [own.kl for own in scores]
        row = {
            "engine": name, "agreement": statistics.fmean(own.agreement for own in scores),
            "kl": statistics.fmean(kl), "kl_most": max(kl),
            "loss": math.expm1(statistics.fmean(more)), "loss_low": math.expm1(low), "loss_high": math.expm1(high),
        }  # fmt: skip
        rows.append(row)
        print(f"{name:24} same token {row['agreement']:.2%}  KL {row['kl']:.2e} (most {row['kl_most']:.2e})  loss "
              f"{row['loss']:+.3%} ({row['loss_low']:+.3%} to {row['loss_high']:+.3%})", flush=True)  # fmt: skip

    report(
        "transformers bfloat16", [score(part, reference, windows) for part in logprobs(path, torch.bfloat16, windows)]
    )
    for backend in ("cpu", "eager"):
        for dtype in ("float32", "bfloat16"):
            llm = LLM(
                path, dtype=dtype, backend=backend, max_model_len=asked.context + asked.tokens + 2,
                kv_cache_memory_bytes=2 << 30, enable_prefix_caching=False,
            )  # fmt: skip
            scores = forced_scores(llm.engine, windows, FULL, reference)
            assert scores is not None
            report(f"kvloom {dtype} {backend}", scores)
    said = {"windows": len(windows), "context": asked.context, "tokens": asked.tokens, "model": path.name}
    print(json.dumps({"schema_version": 1, "benchmark": "dtype_agreement", **said, "rows": rows}))


if __name__ == "__main__":
    main()
