"""Record: the observations and state of one policy for one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvloom.policies.observation import Observation


@dataclass
class Record:
    """Tokens, observations of their queries, and the state of the method; all of it starts empty.

    The first `prompt_tokens` of `token_ids` are the prompt, and the list may grow. `budget` is in tokens a lane.
    `replay_scores` are those of a replay that has just been run, by layer; `remembered` is what the method has put
    into `ScoreContext.state`, by layer; `acted_at` the tokens that had been seen when the policy last acted.
    """

    token_ids: Sequence[int]
    prompt_tokens: int
    budget: int
    seed: int
    observation: Observation
    replay_scores: dict[int, torch.Tensor] = field(default_factory=dict)
    remembered: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    acted_at: int = 0

    def clear(self) -> None:
        """Discard all observations: the sequence is computed again from its tokens."""
        self.observation.clear()
        self.replay_scores.clear()
        self.remembered.clear()
        self.acted_at = 0

    def fork(self, token_ids: Sequence[int], seed: int) -> "Record":
        """Return an independent copy for a sequence with its own tokens; without the scores of a replay."""
        remembered = {layer: dict(known) for layer, known in self.remembered.items()}
        return Record(
            token_ids,
            self.prompt_tokens,
            self.budget,
            seed,
            self.observation.fork(),
            remembered=remembered,
            acted_at=self.acted_at,
        )
