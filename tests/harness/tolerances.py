"""Tolerances between two computations of the same number, with their reasons, for all inexact comparisons."""

ATTENTION_FLOAT32 = 2e-5
"""Output of attention in float32 against float64 loops: sums of up to a few hundred products of size one."""

ATTENTION_BFLOAT16 = 2e-2
"""Output of attention rounded once to bfloat16 (8 bits: 2**-9 relative) on values of size up to four."""

LOGITS_FLOAT32 = 1e-3
"""Logits of size ten in float32 against another order of the same sums (transformers): the promise to users."""

LOGITS_SAME_WEIGHTS = 2e-4
"""Logits of size ten of one decoder in float32 over two attention implementations: only attention is summed anew."""

LOGPROB_FLOAT32 = 1e-4
"""Log-probabilities in float32 of the same logits: one log-sum-exp over the vocabulary."""

GREEDY_TIE = 1e-3
"""Greedy tokens may differ only where the two best logits are closer than this: float32 sums in another order."""
