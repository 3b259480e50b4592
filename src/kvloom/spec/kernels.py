"""Limits of the CPU kernels, each defined once, and the function of all reasons against a model. Torch-free."""

from kvloom.spec.decoder import DecoderConfig

MAX_HEAD_DIM = 384
"""Widest head that the kernels take; blocks hold heads with zeros up to a multiple of 16."""

KERNEL_ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2", "xielu")
"""Activations that the kernels have, by the name that a `DecoderConfig` has for them."""

BLOCK_SLOTS = 16
"""Blocks must hold a multiple of this many tokens."""


def model_reasons(config: DecoderConfig) -> list[str]:
    """Return every reason in the model why the kernels cannot run it; [] means that they can."""
    reasons = []
    if config.head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim is {config.head_dim}; the kernels take at most {MAX_HEAD_DIM}")
    if config.activation not in KERNEL_ACTIVATIONS:
        reasons.append(f"activation {config.activation!r} is not one of {', '.join(KERNEL_ACTIVATIONS)}")
    return reasons


def unsupported(config: DecoderConfig, block_size: int) -> list[str]:
    """Return every reason why the kernels cannot run the model in blocks of `block_size` tokens; [] means none."""
    reasons = model_reasons(config)
    if block_size % BLOCK_SLOTS:
        reasons.append(f"block_size is {block_size}; the kernels take multiples of {BLOCK_SLOTS}")
    return reasons
