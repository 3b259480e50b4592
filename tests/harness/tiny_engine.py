"""Engines around tiny random models, and a tokenizer whose tokens can be read."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import tokenizers
import torch
from tokenizers import decoders, models

from harness.tiny_model import random_weights, tiny_config
from harness.tolerances import GREEDY_TIE
from kvloom.attention.reference import ReferenceBackend
from kvloom.cache.kvcache import KVCache
from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Request, Sequence
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.eager import EagerModel
from kvloom.models.model import Model
from kvloom.models.tokenizer import Tokenizer
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.kernels import unsupported
from kvloom.spec.store import NATIVE_STORE, SLAB_BYTES


def letters() -> Tokenizer:
    """Return a tokenizer of 211 tokens of two characters each, 0 is `a0`, 1 is `b0`, 26 is `a1`, and 35 of one."""
    pairs = [(chr(97 + i % 26), str(i // 26)) for i in range(211)]
    vocab = {letter + digit: i for i, (letter, digit) in enumerate(pairs)}
    for character in "abcdefghijklmnopqrstuvwxyz012345678":
        vocab[character] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, special_tokens={})


def engine_of(
    model: Model,
    *,
    dtype: torch.dtype = torch.float32,
    slabs: int = 8,
    block_size: int = 16,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    rows: int | None = None,
    prefix: bool = True,
    max_model_len: int | None = None,
    eos: tuple[int, ...] = (),
    tokenizer: Tokenizer | None = None,
    **options: object,
) -> Engine:
    """Return an engine around `model`, which computes in `dtype`, with an arena of `slabs`.

    The lane table has `rows` rows (None: one a sequence). A request may have `max_model_len` tokens (None: as many as
    the arena holds and the model was made for). `options` go to `Engine`.
    """
    spec = model.config.kv_spec(block_size, NATIVE_STORE[str(dtype).removeprefix("torch.")])
    cache = KVCache(spec, slabs * SLAB_BYTES, rows or max_num_seqs, dtype, layout=model.layout)
    scheduler = Scheduler(
        cache.lanes,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=prefix,
    )
    if max_model_len is None:
        max_model_len = min(
            spec.max_tokens_in(cache.arena.num_bytes, max_num_batched_tokens), model.config.max_position
        )
    return Engine(
        Runner(model, cache),
        scheduler,
        tokenizer,
        max_model_len=max_model_len,
        eos_token_ids=eos,
        **options,  # type: ignore[arg-type]
    )


def tiny_engine(
    family: str = "llama",
    *,
    kind: str | None = None,
    slabs: int = 8,
    block_size: int = 16,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    prefix: bool = True,
    max_model_len: int = 1024,
    eos: tuple[int, ...] = (),
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    **changes: object,
) -> Engine:
    """Return an engine in float32 around `tiny_config(family, **changes)`.

    `kind` is the backend, "eager" or "cpu"; None takes the kernels where they run the model, which is much faster.
    """
    config = tiny_config(family, **changes)
    return engine_of(
        tiny_backend(config, random_weights(config), block_size, kind),
        slabs=slabs,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix=prefix,
        max_model_len=max_model_len,
        eos=eos,
        tokenizer=tokenizer,
        seed=seed,
    )


def tiny_backend(
    config: DecoderConfig, weights: Mapping[str, torch.Tensor], block_size: int, kind: str | None = None
) -> Model:
    """Return a model in float32 on one backend: "eager", "cpu", or (None) the kernels where they run the model."""
    if kind is None:
        kind = "eager" if unsupported(config, block_size) else "cpu"
    if kind == "eager":
        return EagerModel(Decoder(config, weights), ReferenceBackend())
    return CompiledModel(config, weights.items(), torch.float32)


def greedy(max_tokens: int, **options: object) -> SamplingParams:
    """Return greedy sampling of exactly `max_tokens` tokens."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)  # type: ignore[arg-type]


def finish(engine: Engine, most_steps: int = 20000) -> None:
    """Step until nothing is left to do; every count agrees after each step."""
    for _ in range(most_steps):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work, "the engine goes round in circles"
    engine.cache.check_invariants()


def run(engine: Engine, prompts: Seq[list[int]], params: SamplingParams, **options: object) -> list[list[int]]:
    """Return the output tokens of all prompts, computed together."""
    requests = [engine.add(prompt, params, **options) for prompt in prompts]  # type: ignore[arg-type]
    finish(engine)
    return [request.sequences[0].output_token_ids for request in requests]


def nothing_left(engine: Engine) -> None:
    """Assert that no request, row or block is in use, except what the prefix index keeps."""
    engine.cache.check_invariants()
    assert engine.requests == {} and not engine.has_work
    assert engine.cache.bytes_in_use == 0
    assert engine.cache.lanes.open_sequences == []
    engine.cache.index.clear()
    assert engine.cache.arena.used_bytes == 0 and engine.cache.arena.slabs.stranded_bytes == 0


class Margins:
    """An observer that notes how far apart the two best logits of every token are."""

    def __init__(self) -> None:
        self.of: dict[Request, list[float]] = {}

    def __call__(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        best = torch.topk(logits, 2).values
        for sequence, (first, second) in zip(sequences, best.tolist(), strict=True):
            if sequence.index == 0:
                self.of.setdefault(sequence.request, []).append(first - second)


def assert_same_unless_tied(found: list[int], expected: list[int], margins: list[float]) -> None:
    """Assert equal tokens up to the first place where the oracle's two best logits are a tie."""
    for place, (mine, other) in enumerate(zip(found, expected, strict=True)):
        if mine != other:
            assert margins[place] < GREEDY_TIE, f"token {place} is {mine}, expected {other} by {margins[place]}"
            return
