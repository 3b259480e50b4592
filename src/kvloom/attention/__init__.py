"""Attention over lanes: an AttentionBatch of prefill chunks and decode tokens in, [T, H, D] out."""
