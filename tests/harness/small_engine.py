"""Small engines for tests of policies: random weights, the head shapes of real models, no tokenizer."""

import torch

from harness.tiny_engine import engine_of, tiny_backend
from harness.tiny_model import FULL, LOCAL, tiny_decoder
from kvloom.policies.tokenkinds import TokenKinds

VOCAB = 211
KINDS = TokenKinds(special=frozenset(range(8)), punctuation=frozenset(range(8, 40)))
LLAMA = tiny_decoder("llama")
GEMMA = tiny_decoder("gemma3", layers=(LOCAL, FULL, LOCAL, FULL))


def instruction(hint):
    """Stand in for the words that ask to repeat."""
    return [9, 8, 7, *hint, 6]


def small_engine(decoder=LLAMA, *, model=None, kinds=True, max_num_seqs=8, **options):
    """Return an engine over the weights of `decoder`, or over `model`; `options` are those of `engine_of`.

    The kernels run the model where they take its blocks.
    """
    options = {"max_num_batched_tokens": 2048, **options}
    if model is None:
        model = tiny_backend(decoder.config, decoder.weights, options.get("block_size", 16))
    engine = engine_of(
        model, max_num_seqs=max_num_seqs, rows=max_num_seqs + 1, max_position=model.config.max_position, **options
    )
    if kinds:
        facts = engine.policies.facts
        object.__setattr__(facts, "token_kinds", lambda: KINDS)
        object.__setattr__(facts, "replay_instruction", instruction)
    return engine


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
