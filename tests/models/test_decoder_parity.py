"""One decoder against transformers, on tiny random models of every family: the same logits however tokens arrive."""

import pytest
import torch
import transformers

from harness.tiny_model import cache_of, feed, random_tokens
from harness.tolerances import LOGITS_FLOAT32
from kvloom.cache.laneprefixes import LanePrefixes
from kvloom.cache.prefix import PrefixChain
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.decoder import Decoder

LENGTH = 110

LLAMA = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
GEMMA = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
STRETCHED = {**TWO_ROPES, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0}}


def llama(**changes):
    """Config of a small Llama."""
    return transformers.LlamaConfig(**LLAMA | changes)


def gemma(**changes):
    """Config of a small Gemma 3 whose window is far shorter than the text."""
    return transformers.Gemma3TextConfig(**{**GEMMA, "sliding_window": 20, "rope_parameters": TWO_ROPES} | changes)


CONFIGS = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama multi-head": lambda: llama(num_key_value_heads=4),
    "llama multi-query": lambda: llama(num_key_value_heads=1),
    "llama wide heads and biases": lambda: llama(head_dim=20, attention_bias=True),
    "llama 3 rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama linear rope": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    "gemma": gemma,
    "gemma untied with biases": lambda: gemma(tie_word_embeddings=False, attention_bias=True),
    "gemma window of one": lambda: gemma(sliding_window=1),
    "gemma window of a block": lambda: gemma(sliding_window=16),
    "gemma window just over a block": lambda: gemma(sliding_window=17),
    "gemma longer than any window": lambda: gemma(sliding_window=400),
    "gemma two KV heads": lambda: gemma(num_key_value_heads=2),
    "gemma stretched rope": lambda: gemma(rope_parameters=STRETCHED),
}


def spread(model):
    """Draw weights anew, large enough that attention is sharp and logits are of size ten."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.2)
            else:  # Gemma stores norms as their distance from one
                weight.normal_(mean=0.0 if "Gemma" in type(model).__name__ else 1.0, std=0.2)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    """Return (decoder, token ids, logits of transformers [n, V])."""
    return build(CONFIGS[request.param](), tmp_path_factory)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def plain_model(request, tmp_path_factory):
    """Return the same of the two plain configs, for the tests that try every way of feeding tokens."""
    return build(CONFIGS[request.param](), tmp_path_factory)


def build(config, tmp_path_factory):
    """Return (decoder, token ids, logits of transformers [n, V]) of a random model, through files on disk."""
    config._attn_implementation = "eager"
    kind = transformers.LlamaForCausalLM if config.model_type == "llama" else transformers.Gemma3ForCausalLM
    oracle = spread(kind(config).eval())
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    tokens = random_tokens(LENGTH)
    with torch.no_grad():
        logits = oracle(torch.tensor([tokens])).logits[0].float()
    assert logits.std() > 1, "the test would be too easy"
    return Decoder(checkpoint.config, dict(checkpoint.tensors(torch.float32))), tokens, logits


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("chunk", [0, 64, 7, 1], ids=["one piece", "chunks of 64", "chunks of 7", "token by token"])
def test_logits_agree_with_transformers_however_tokens_arrive(plain_model, chunk, block_size):
    decoder, tokens, expected = plain_model
    cache = cache_of(decoder, block_size=block_size)
    logits = feed(decoder, cache, cache.lanes.open(), tokens, chunk=chunk)
    cache.check_invariants()
    assert (logits - expected).abs().max() < LOGITS_FLOAT32


def test_a_prefill_followed_by_single_tokens_agrees_with_transformers(model):
    decoder, tokens, expected = model
    cache = cache_of(decoder)
    sequence = cache.lanes.open()
    first = feed(decoder, cache, sequence, tokens[:70])
    rest = feed(decoder, cache, sequence, tokens[70:], chunk=1)
    assert (torch.cat((first, rest)) - expected).abs().max() < LOGITS_FLOAT32


def test_a_fork_goes_on_as_its_parent_would(model):
    decoder, tokens, expected = model
    cache = cache_of(decoder)
    parent = cache.lanes.open()
    feed(decoder, cache, parent, tokens[:75])  # the last block is half full: both go on in copies of it
    child = cache.lanes.fork(parent)
    other = [*tokens[:75], *reversed(tokens[75:])]
    feed(decoder, cache, parent, other[75:], chunk=5)
    logits = feed(decoder, cache, child, tokens[75:], chunk=1)
    assert (logits - expected[75:]).abs().max() < LOGITS_FLOAT32


def test_an_adopted_prefix_is_as_good_as_a_computed_one(model):
    decoder, tokens, expected = model
    cache = cache_of(decoder)
    first = cache.lanes.open()
    feed(decoder, cache, first, tokens[:100], chunk=7)
    LanePrefixes(cache.lanes).publish(first, PrefixChain(), tokens, 0, 100 // 16)
    cache.lanes.close(first)
    second = cache.lanes.open()
    match = cache.index.match(tokens, PrefixChain(), LENGTH - 1)
    assert match.num_blocks == 6
    LanePrefixes(cache.lanes).adopt(second, match)
    logits = feed(decoder, cache, second, tokens[96:], chunk=9)
    assert (logits - expected[96:]).abs().max() < LOGITS_FLOAT32
