"""One engine, one case, one process: the worker of compare.py. Prints one JSON line.

    python benchmarks/peers.py ENGINE CHECKPOINT CASE

ENGINE is kvloom, kvloom-int8, transformers, llama.cpp or vllm; CHECKPOINT a folder with bf16 safetensors (for llama.cpp
a .gguf file of the same weights). CASE is single:N (a 64-token warm-up, then N prompt ids and 65 new tokens) or
uniform (32 requests of 256 + 128 at once). Two threads, greedy, prefix caching off, end of sequence ignored.
"""

import json
import random
import sys
import time
from collections.abc import Callable

THREADS = 2
VOCABULARY = 49000
Ids = list[int]
Stamps = Callable[[list[Ids], list[int]], list[float]]
"""Runs prompts to the given numbers of new tokens at once; returns when each step ended, the first token's first."""


def prompt(length: int, seed: int) -> Ids:
    """Return the same random ids for every engine."""
    numbers = random.Random(seed)
    return [numbers.randrange(5, VOCABULARY) for _ in range(length)]


def kvloom_engine(checkpoint: str, quantization: str | None) -> Stamps:
    """Return kvloom, stepped in process."""
    from kvloom import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        dtype="bfloat16",
        quantization=quantization,
        enable_prefix_caching=False,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=2 << 30,
    )

    def run(prompts: list[Ids], new: list[int]) -> list[float]:
        for ids, count in zip(prompts, new, strict=True):
            llm.engine.add(ids, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        stamps = []
        while llm.engine.has_work:
            llm.engine.step()
            stamps.append(time.perf_counter())
        return stamps

    return run


def transformers_engine(checkpoint: str) -> Stamps:
    """Return transformers with its dynamic cache, one request at a time or a batch of equal lengths."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompts: list[Ids], new: list[int]) -> list[float]:
        ids, cache, stamps = torch.tensor(prompts), DynamicCache(), []
        for _ in range(new[0]):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            stamps.append(time.perf_counter())
        return stamps

    return run


def llama_engine(checkpoint: str) -> Stamps:
    """Return llama.cpp through llama-cpp-python, single requests only."""
    from llama_cpp import Llama

    llm = Llama(
        checkpoint, n_ctx=8192, n_threads=THREADS, n_threads_batch=THREADS, n_ubatch=512, flash_attn=True, verbose=False
    )

    def run(prompts: list[Ids], new: list[int]) -> list[float]:
        stamps = []
        for _, token in zip(range(new[0]), llm.generate(prompts[0], temp=0, reset=True), strict=False):
            stamps.append(time.perf_counter())
            assert token >= 0
        return stamps

    return run


def vllm_engine(checkpoint: str) -> Stamps:
    """Return vLLM's CPU engine, stepped in process."""
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=checkpoint,
            dtype="bfloat16",
            max_num_batched_tokens=8192,
            max_model_len=8192,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    )
    names = iter(range(1 << 30))

    def run(prompts: list[Ids], new: list[int]) -> list[float]:
        for ids, count in zip(prompts, new, strict=True):
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            engine.add_request(str(next(names)), {"prompt_token_ids": ids}, params)
        stamps = []
        while engine.has_unfinished_requests():
            if engine.step():
                stamps.append(time.perf_counter())
        return stamps

    return run


def measure(run: Stamps, case: str) -> dict[str, float]:
    """Return tokens per second of one case."""
    run([prompt(64, 1)], [8])
    kind, _, length = case.partition(":")
    started = time.perf_counter()
    if kind == "single":
        stamps = run([prompt(int(length), 2)], [65])
        return {"prefill": int(length) / (stamps[0] - started), "decode": 64 / (stamps[-1] - stamps[0])}
    stamps = run([prompt(256, 100 + i) for i in range(32)], [128] * 32)
    return {"output": 32 * 128 / (stamps[-1] - started)}


def main() -> None:
    """Run the case that the arguments name."""
    engine, checkpoint, case = sys.argv[1:]
    makers: dict[str, Callable[[], Stamps]] = {
        "kvloom": lambda: kvloom_engine(checkpoint, None),
        "kvloom-int8": lambda: kvloom_engine(checkpoint, "int8"),
        "transformers": lambda: transformers_engine(checkpoint),
        "llama.cpp": lambda: llama_engine(checkpoint),
        "vllm": lambda: vllm_engine(checkpoint),
    }
    print(json.dumps({"engine": engine, "case": case, **measure(makers[engine](), case)}))


if __name__ == "__main__":
    main()
