"""Operations: the products and sums of a prompt and of a generated token, all devices together."""

from dataclasses import dataclass
from functools import cached_property

from kvloom.plan.question import Question
from kvloom.plan.reads import Reads
from kvloom.spec.layer import Attention, Latent, Recurrent


def causal_pairs(tokens: int, window: int | None) -> int:
    """Return the (query, key) pairs of `tokens` causal queries, each reading at most `window` keys and itself first."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


@dataclass(frozen=True)
class Operations:
    """Operations of one request of a `Question`."""

    question: Question

    @cached_property
    def reads(self) -> Reads:
        """What its tokens attend to."""
        return Reads(self.question)

    def decode_flops(self, prompt: int, generated: int) -> float:
        """Return the operations of one generated token of one request, all devices together."""
        model = self.question.model
        seen, attending = prompt + generated, 0
        attention = 0.0
        for layer in model.layers:
            keys = float(min(seen, layer.window or seen))
            if layer.window is None and not isinstance(layer.mixer, Recurrent):
                keys = self.reads.held_in(attending, prompt, generated)
            attending += not isinstance(layer.mixer, Recurrent)
            attention += layer.mixer.attention_flops(keys)
            attention += 0.0 if layer.beside is None else layer.beside.attention_flops(1)
        return 2.0 * (model.layer_matrix_params + model.head_params) + attention

    def prefill_flops(self, prompt: int) -> float:
        """Return the operations of one prompt, logits of its last token only, all devices together.

        In the last layer only the last token is counted: the others need only keys and values there, which is little.
        """
        model = self.question.model
        attention = 0.0
        for index, layer in enumerate(model.layers):
            last = index + 1 == len(model.layers)
            pairs = min(prompt, layer.window or prompt) if last else causal_pairs(prompt, layer.window)
            if isinstance(layer.mixer, Latent):
                attention += layer.mixer.expanded_flops(1) * pairs
            elif isinstance(layer.mixer, Attention):
                attention += layer.mixer.attention_flops(1) * pairs
            attention += sum(part.attention_flops(1) for part in layer.recurrences) * (1 if last else prompt)
        whole = model.layer_matrix_params - model.layers[-1].active_matrix_params(model.hidden_size)
        return 2.0 * (whole * prompt + (model.layer_matrix_params - whole) + model.head_params) + attention
