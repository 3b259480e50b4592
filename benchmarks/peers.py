"""One engine, one case, one process: the worker of compare.py. Prints one JSON line.

    python benchmarks/peers.py ENGINE CHECKPOINT CASE

ENGINE is kvloom, kvloom-int8, kvloom-int4, kvloom-w8a8, transformers, llama.cpp, vllm or openvino. CHECKPOINT is a
folder with bf16 safetensors; for llama.cpp a .gguf file and for openvino an exported folder of the same weights, in 8
bit for the rows of that kind. CASE is single:N (a 64-token warm-up, then N prompt ids and 65 new tokens: prefill is N
over the time to the first token, decode 64 over the time from it to the last), uniform (32 requests of 256 + 128 at
once) or mixed (32 at once, prompts of 32 to 1,024 and outputs of 16 to 256 tokens, seed 0: 17,727 and 5,001 in all).
Two threads, greedy, prefix caching off, end of sequence ignored; peak_mib is the peak resident memory of the process.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else a second process competes for the two cores
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


def openvino_engine(folder: str) -> Stamps:
    """Return OpenVINO GenAI's continuous batching, stepped in process; KV_PRECISION (environment) is the cache's."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 2, 1024, False
    properties: dict[str, object] = {"INFERENCE_NUM_THREADS": THREADS}
    if precision := os.environ.get("KV_PRECISION"):
        properties["KV_CACHE_PRECISION"] = precision
    pipe = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    names = iter(range(1 << 30))

    def run(prompts: list[Ids], new: list[int]) -> list[float]:
        handles = []
        for ids, count in zip(prompts, new, strict=True):
            config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
            tensor = openvino.Tensor(np.array([ids], dtype=np.int64))
            handles.append(pipe.add_request(next(names), tensor, config))
        stamps = []
        while pipe.has_non_finished_requests():
            pipe.step()
            # A long prompt takes several steps; only those that gave a token count.
            if len(handles) > 1 or handles[0].can_read():
                stamps.append(time.perf_counter())
                if len(handles) == 1:
                    handles[0].read()
        return stamps

    return run


def mixed() -> tuple[list[Ids], list[int]]:
    """Return the prompts and output lengths of the mixed load."""
    numbers = random.Random(0)
    lengths = [(numbers.randint(32, 1024), numbers.randint(16, 256)) for _ in range(32)]
    return [prompt(n, 200 + i) for i, (n, _) in enumerate(lengths)], [new for _, new in lengths]


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(run: Stamps, case: str) -> dict[str, float]:
    """Return tokens per second of one case."""
    run([prompt(64, 1)], [8])
    kind, _, length = case.partition(":")
    started = time.perf_counter()
    if kind == "single":
        stamps = run([prompt(int(length), 2)], [65])
        return {"prefill": int(length) / (stamps[0] - started), "decode": 64 / (stamps[-1] - stamps[0])}
    prompts, new = mixed() if kind == "mixed" else ([prompt(256, 100 + i) for i in range(32)], [128] * 32)
    stamps = run(prompts, new)
    return {"output": sum(new) / (stamps[-1] - started)}


def main() -> None:
    """Run the case that the arguments name."""
    engine, checkpoint, case = sys.argv[1:]
    makers: dict[str, Callable[[], Stamps]] = {
        "kvloom": lambda: kvloom_engine(checkpoint, None),
        "kvloom-int8": lambda: kvloom_engine(checkpoint, "int8"),
        "kvloom-int4": lambda: kvloom_engine(checkpoint, "int4"),
        "kvloom-w8a8": lambda: kvloom_engine(checkpoint, "w8a8"),
        "transformers": lambda: transformers_engine(checkpoint),
        "llama.cpp": lambda: llama_engine(checkpoint),
        "vllm": lambda: vllm_engine(checkpoint),
        "openvino": lambda: openvino_engine(checkpoint),
    }
    figures = measure(makers[engine.partition("@")[0]](), case)
    print(json.dumps({"engine": engine, "case": case, **figures, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
