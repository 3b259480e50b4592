"""LengthClasses: by which rotary frequencies each sequence is rotated, where these depend on the length. Torch-free.

LongRoPE has one list of divisors for short texts and one for long ones. A sequence begins with the list of its prompt.
Where its text grows past the original context, its blocks are freed and it is computed again with the other list, as
Phi-3 is in transformers. A sequence that loses data cannot be computed again, so it takes the list of the most tokens
that it may have. So does every sequence of a model whose frequencies change with each token (dynamic NTK).
"""

from kvloom.engine.queues import Queues
from kvloom.engine.request import Sequence
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.policy import PolicySpec


class LengthClasses:
    """Chooses the class of sequences of a model with `config`, and changes it; see `RopeConfig.length_class`."""

    def __init__(self, config: DecoderConfig, queues: Queues) -> None:
        self.config = config
        self.queues = queues
        self._change = config.has_few_length_classes

    def at_start(self, prompt: int, max_tokens: int, policy: PolicySpec) -> int:
        """Return the class of a new request of `prompt` tokens that may generate `max_tokens` under `policy`."""
        grows = self._change and not policy.evicts and policy.store is None
        return self.config.length_class(prompt if grows else prompt + max_tokens)

    def update(self) -> None:
        """Let sequences whose text has become long wait to be computed again; mutates them and the queues."""
        if not self._change:
            return
        for sequence in [*self.queues.running, *self.queues.waiting]:
            if sequence.eviction is None and sequence.encoding is None:
                self._update(sequence)

    def _update(self, sequence: Sequence) -> None:
        now = self.config.length_class(len(sequence.token_ids))
        if now == sequence.length_class:
            return
        if sequence.row is not None:
            self.queues.restart(sequence)
        sequence.enter(now)
