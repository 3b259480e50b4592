"""One engine, one case, one process: the worker of compare.py. Prints one JSON line.

    python benchmarks/peers.py ENGINE CHECKPOINT CASE

ENGINE is kvloom, kvloom-int8, kvloom-int4, kvloom-w8a8, transformers, llama.cpp, vllm or openvino. CHECKPOINT is a
folder with bf16 safetensors; for llama.cpp a .gguf file and for openvino an exported folder of the same weights, in 8
bit for the rows of that kind. CASE is single:N (a 64-token warm-up, then N prompt ids and 65 new tokens: prefill is N
over the time to the first token, decode 64 over the time from it to the last), uniform (32 requests of 256 + 128 at
once) or mixed (32 at once, prompts of 32 to 1,024 and outputs of 16 to 256 tokens, seed 0: 17,727 and 5,001 in all).
Two threads, greedy, prefix caching off, end of sequence ignored; peak_mib is the peak resident memory of the process.
No figure contains the time of an engine's start (about a minute with vLLM). transformers cannot run mixed: an error.
"""

import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """Return transformers with its default cache, one request at a time or a batch of equal lengths."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers_cache import continued

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompts: list[Ids], new: list[int]) -> list[float]:
        if len({len(ids) for ids in prompts}) > 1 or len(set(new)) > 1:
            raise ValueError("transformers runs requests of one length only: expected single:N or uniform")
        ids, cache, stamps = torch.tensor(prompts), None, []
        for _ in range(new[0]):
            logits, cache = continued(model, ids, cache, logits_to_keep=1)
            ids = logits[:, -1].argmax(-1, keepdim=True)
            stamps.append(time.perf_counter())
        return stamps

    return run


@dataclass
class Sequence:
    """A request as llama_engine runs it: ids to compute, how many are stored, tokens made and how many to make."""

    todo: Ids
    count: int
    made: Ids = field(default_factory=list)
    stored: int = 0


def llama_engine(checkpoint: str, sequences: int, room: int) -> Stamps:
    """Return llama.cpp by its batch interface with a KV stream of `room` tokens for each of so many sequences.

    A step takes one token of every sequence that decodes and fills up with parts of the next prompts. llama.cpp
    computes only neighbouring streams together, so the last sequence moves to the place of one that ends.
    """
    import llama_cpp as api
    import numpy as np

    logging.getLogger("llama-cpp-python").setLevel("ERROR")
    budget = 2048
    model = api.llama_model_load_from_file(checkpoint.encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx, options.n_seq_max, options.kv_unified = sequences * -(-room // 256) * 256, sequences, False
    options.n_batch, options.n_ubatch, options.n_threads, options.n_threads_batch = budget, 512, THREADS, THREADS
    options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = api.llama_init_from_model(model, options)
    if not context:
        raise ValueError(f"llama.cpp cannot run {checkpoint}: expected a .gguf file")
    memory = api.llama_get_memory(context)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(budget, 0, 1)

    def run(prompts: list[Ids], new: list[int]) -> list[float]:
        requests = [Sequence(ids, count) for ids, count in zip(prompts, new, strict=True)]
        running, stamps = list(requests), []  # the place of a sequence in `running` is its stream
        while running:
            free, rows, batch.n_tokens = budget - sum(len(one.todo) == 1 for one in running), [], 0
            for stream, one in enumerate(running):
                prompt_left = len(one.todo) > 1
                part = one.todo[: free if prompt_left else 1]
                free -= len(part) if prompt_left else 0
                one.todo = one.todo[len(part) :]
                for row, token in enumerate(part, batch.n_tokens):
                    batch.token[row], batch.pos[row], batch.logits[row] = token, one.stored, False
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, stream
                    one.stored += 1
                batch.n_tokens += len(part)
                if not one.todo:
                    batch.logits[batch.n_tokens - 1] = True
                    rows.append((stream, batch.n_tokens - 1))
            if status := api.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {status} for {batch.n_tokens} tokens")
            for stream, row in reversed(rows):
                one, logits = running[stream], api.llama_get_logits_ith(context, row)
                one.todo = [int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())]
                one.made += one.todo
                if len(one.made) == one.count:
                    running[stream], last = running[-1], len(running) - 1
                    running.pop()
                    if stream != last:
                        api.llama_memory_seq_cp(memory, last, stream, -1, -1)
                    api.llama_memory_seq_rm(memory, last, -1, -1)
            if rows:
                stamps.append(time.perf_counter())
        assert [len(one.made) for one in requests] == new
        return stamps

    return run


def vllm_engine(checkpoint: str) -> Stamps:
    """Return vLLM's CPU engine, stepped in process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # otherwise a second process competes for the two cores
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
            # A long prompt takes several steps; only steps that returned a token count.
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


def load(case: str) -> tuple[list[Ids], list[int]]:
    """Return the prompts of a case and how many tokens each is to get."""
    kind, _, length = case.partition(":")
    if kind == "single":
        return [prompt(int(length), 2)], [65]
    if kind == "uniform":
        return [prompt(256, 100 + i) for i in range(32)], [128] * 32
    if kind == "mixed":
        return mixed()
    raise ValueError(f"unknown case {case!r}: expected single:N, uniform or mixed")


def measure(run: Stamps, prompts: list[Ids], new: list[int]) -> dict[str, float]:
    """Return tokens per second of one case."""
    run([prompt(64, 1)], [8])
    started = time.perf_counter()
    stamps = run(prompts, new)
    if len(prompts) == 1:
        decode = (new[0] - 1) / (stamps[-1] - stamps[0])
        return {"prefill": len(prompts[0]) / (stamps[0] - started), "decode": decode}
    return {"output": sum(new) / (stamps[-1] - started)}


def main() -> None:
    """Run the case that the arguments name."""
    engine, checkpoint, case = sys.argv[1:]
    prompts, new = load(case)
    room = 8192 if len(prompts) == 1 else max(len(ids) + count for ids, count in zip(prompts, new, strict=True))
    makers: dict[str, Callable[[], Stamps]] = {
        "kvloom": lambda: kvloom_engine(checkpoint, None),
        "kvloom-int8": lambda: kvloom_engine(checkpoint, "int8"),
        "kvloom-int4": lambda: kvloom_engine(checkpoint, "int4"),
        "kvloom-w8a8": lambda: kvloom_engine(checkpoint, "w8a8"),
        "transformers": lambda: transformers_engine(checkpoint),
        "llama.cpp": lambda: llama_engine(checkpoint, len(prompts), room),
        "vllm": lambda: vllm_engine(checkpoint),
        "openvino": lambda: openvino_engine(checkpoint),
    }
    figures = measure(makers[engine.partition("@")[0]](), prompts, new)
    print(json.dumps({"engine": engine, "case": case, **figures, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
