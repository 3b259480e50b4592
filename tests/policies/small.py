"""Small engines for tests of policies: random weights, the head shapes of real models, no tokenizer."""

import torch

from kvloom.attention.reference import ReferenceBackend
from kvloom.cache.kvcache import KVCache
from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.models.eager import EagerModel
from kvloom.policies.tokenkinds import TokenKinds
from kvloom.spec.store import NATIVE_STORE, SLAB_BYTES
from tiny_model import FULL, LOCAL, tiny_decoder

VOCAB = 211
KINDS = TokenKinds(special=frozenset(range(8)), punctuation=frozenset(range(8, 40)))
LLAMA = tiny_decoder("llama")
GEMMA = tiny_decoder("gemma3", layers=(LOCAL, FULL, LOCAL, FULL))


def instruction(hint):
    """Stand in for the words that ask to repeat."""
    return [9, 8, 7, *hint, 6]


def small_engine(
    decoder=LLAMA,
    *,
    slabs=8,
    block_size=16,
    max_num_seqs=8,
    max_num_batched_tokens=2048,
    prefix=True,
    model=None,
    kinds=True,
    max_model_len=None,
    dtype=torch.float32,
    **options,
):
    """Return an engine over `decoder` (or over `model`, which computes in `dtype`) with an arena of `slabs`."""
    model = model or EagerModel(decoder, ReferenceBackend())
    spec = model.config.kv_spec(block_size, NATIVE_STORE[str(dtype).removeprefix("torch.")])
    cache = KVCache(spec, slabs * SLAB_BYTES, max_num_seqs + 1, dtype, layout=model.layout)
    scheduler = Scheduler(
        cache.lanes,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=prefix,
    )
    fits = min(spec.max_tokens_in(cache.arena.num_bytes, max_num_batched_tokens), model.config.max_position)
    engine = Engine(
        Runner(model, cache),
        scheduler,
        None,
        max_model_len=max_model_len or fits,
        max_position=model.config.max_position,
        eos_token_ids=(),
        **options,
    )
    if kinds:
        facts = engine.policies.facts
        object.__setattr__(facts, "token_kinds", lambda: KINDS)
        object.__setattr__(facts, "replay_instruction", instruction)
    return engine


def greedy(max_tokens, **options):
    """Return parameters that take the most likely token `max_tokens` times."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options)


def run(engine, requests, each_step=None):
    """Step until `requests` have ended; returns the tokens of each sequence of each request."""
    while not all(request.finished for request in requests):
        engine.step()
        if each_step is not None:
            each_step()
    return [[sequence.output_token_ids for sequence in request.sequences] for request in requests]


def prompt_of(count, seed=0):
    """Return `count` random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()
