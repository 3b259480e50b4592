"""The decoder without a cache: gradients of a loss over whole sequences, against transformers."""

import pytest
import torch

from harness.families import decoder_of, oracle_of

SOURCES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "layers.0.q": "model.layers.0.self_attn.q_proj.weight",
    "layers.1.v": "model.layers.1.self_attn.v_proj.weight",
    "layers.1.mlp_norm": "model.layers.1.post_attention_layernorm.weight",
    "layers.2.o": "model.layers.2.self_attn.o_proj.weight",
    "layers.2.gate": "model.layers.2.mlp.gate_proj.weight",
    "layers.2.down": "model.layers.2.mlp.down_proj.weight",
}
"""Canonical name -> name in transformers, of weights in every kind of part."""


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of each next token."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("variant", ["llama", "mistral, window"])
def test_gradients_of_a_loss_over_whole_sequences_are_those_of_transformers(variant, tmp_path):
    oracle, ids = oracle_of(variant), torch.randint(3, 131, (3, 26), generator=torch.Generator().manual_seed(1))
    decoder = decoder_of(oracle, tmp_path)
    for weight in decoder.weights.values():
        weight.requires_grad_()
    loss_of(decoder.sequence_logits(ids), ids).backward()
    loss_of(oracle(ids).logits, ids).backward()
    expected = dict(oracle.named_parameters())
    for name, source in SOURCES.items():
        found, wanted = decoder.weights[name].grad, expected[source].grad
        assert wanted.abs().max() > 1e-3
        assert (found - wanted).norm() < 1e-4 * wanted.norm(), name
