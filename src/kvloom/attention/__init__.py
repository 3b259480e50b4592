"""Prefill attends, decode streams: one AttentionBatch in, [T, H, D] out."""
