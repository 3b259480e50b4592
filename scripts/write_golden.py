"""Write the golden figures of the tests.

    python scripts/write_golden.py bytes    # what a sequence of every family takes, walked over the lane table
    python scripts/write_golden.py smollm2  # what transformers gives for SmolLM2 in float32 (minutes)
    python scripts/write_golden.py gemma    # the same for Gemma 3 270M

Needs the project's test dependencies. A commit that changes the figures must say why they change.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"
BEST = 32
"""Logits kept of each row after the long prompt."""


def write_bytes() -> None:
    """Write what a sequence of every variant takes in the arena."""
    from harness.families import VARIANTS, config_of
    from harness.walked_bytes import GEOMETRIES, walked_bytes

    rows = []
    for variant in VARIANTS:
        config = config_of(variant)
        figures = {f"{store}, {size}": walked_bytes(config.kv_spec(size, store)) for store, size in GEOMETRIES}
        rows.append(f" {json.dumps(variant)}: {json.dumps(figures)}")
    path = TESTS / "cache" / "golden_walked_bytes.json"
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


class Oracle:
    """One GGUF file as transformers reads it, in float32."""

    def __init__(self, path: Path) -> None:
        import transformers

        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        self.version = transformers.__version__
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()

    def answer(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Return `count` greedy tokens of `generate`, and how far apart the two best logits of each are."""
        from harness.golden import digest

        result = self.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=count, min_new_tokens=count, eos_token_id=None, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.cat(result.logits).float().topk(2).values
        return {
            "prompt": digest(prompt),
            "tokens": result.sequences[0, len(prompt) :].tolist(),
            "margins": _rounded(best[:, 0] - best[:, 1]),
        }

    def scores(self, prompt: list[int]) -> dict[str, Any]:
        """Return the log-probability of every token but the first, and of the best token of every row."""
        from harness.golden import digest

        hidden = self.model.model(torch.tensor([prompt])).last_hidden_state[0]
        rows = torch.cat([torch.log_softmax(self.model.lm_head(part).double(), -1) for part in hidden.split(64)])
        chosen = rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        return {"prompt": digest(prompt), "logprobs": _rounded(chosen), "best": _rounded(rows.max(-1).values)}

    def long_answer(self, prompt: list[int], count: int, chunk: int) -> dict[str, Any]:
        """Return `count` greedy tokens after a prompt that is read in chunks, with the best logits of each row."""
        from harness.golden import digest
        from harness.transformers_cache import continued

        cache, tokens, rows = None, [], []
        for part in torch.tensor(prompt).split(chunk):
            logits, cache = continued(self.model, part[None], cache, logits_to_keep=1)
        for _ in range(count):
            rows.append(logits[0, -1].float())
            tokens.append(int(rows[-1].argmax()))
            logits, cache = continued(self.model, torch.tensor([[tokens[-1]]]), cache)
        best = torch.stack(rows).topk(BEST)
        return {
            "prompt": digest(prompt),
            "tokens": tokens,
            "best_tokens": best.indices.tolist(),
            "best_logits": [_rounded(row) for row in best.values],
            "logsumexp": _rounded(torch.stack(rows).double().logsumexp(-1)),
        }


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


@torch.inference_mode()
def write_model(name: str) -> None:
    """Write what transformers gives for one real model."""
    from harness import real_prompts
    from harness.gemma import gemma_gguf
    from harness.golden import FOLDER, fingerprint
    from kvloom.models.checkpoint import open_checkpoint
    from kvloom.models.pull import pull

    path = gemma_gguf() if name == "gemma" else Path(pull(name))
    oracle, checkpoint = Oracle(path), open_checkpoint(str(path))
    tokenizer, state = checkpoint.tokenizer(), oracle.model.state_dict()
    texts = [*real_prompts.TOKENIZED, *real_prompts.WHITE_SPACE]
    found: dict[str, Any] = {
        "source": f"transformers {oracle.version} in float32, on the weights of {path.name}",
        "tokenizer": [
            {"ids": (ids := oracle.tokenizer(text)["input_ids"]), "text": oracle.tokenizer.decode(ids),
             "plain": oracle.tokenizer.decode(ids, skip_special_tokens=True)} for text in texts
        ],
        "roles": [oracle.tokenizer.bos_token_id, oracle.tokenizer.eos_token_id],
        "weights": {
            weight.hf.format(i=layer): fingerprint(state[weight.hf.format(i=layer)])
            for _, layer, weight in checkpoint.family.expected(checkpoint.config)
        },
        "answers": {
            key: oracle.answer(ids, real_prompts.NEW_TOKENS) for key, ids in real_prompts.prompts(tokenizer).items()
        },
        "scores": oracle.scores(tokenizer.encode(real_prompts.LICENSE)[: real_prompts.SCORED_TOKENS]),
        "echoed": [oracle.scores(tokenizer.encode(text)) for text in real_prompts.ECHOED],
    }  # fmt: skip
    if oracle.tokenizer.chat_template:
        chat = oracle.tokenizer.apply_chat_template(real_prompts.CHAT, tokenize=False, add_generation_prompt=True)
        found["chat"] = {"text": chat, "ids": oracle.tokenizer(chat, add_special_tokens=False)["input_ids"]}
    if name == "gemma":
        found["long"] = oracle.long_answer(
            real_prompts.long_prompt(tokenizer), real_prompts.LONG_NEW, real_prompts.LONG_CHUNK
        )
    FOLDER.mkdir(exist_ok=True)
    rows = [f" {json.dumps(key)}: {_lines(value)}" for key, value in found.items()]
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def _lines(value: Any) -> str:
    """Return JSON of which every entry of a list or object is one line."""
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()) + "\n }"
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
    return json.dumps(value)


def main() -> None:
    """Write what the argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bytes", "smollm2", "gemma"])
    what = parser.parse_args().what
    sys.path.insert(0, str(TESTS))
    if what == "bytes":
        write_bytes()
    else:
        write_model(what)


if __name__ == "__main__":
    main()
