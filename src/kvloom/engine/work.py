"""Work: the tokens of one sequence in a step of the engine. Torch-free."""

from dataclasses import dataclass

from kvloom.engine.request import Sequence


@dataclass(frozen=True)
class Work:
    """`num_tokens` tokens of `sequence`, from `start`; `samples` when its next token is chosen in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
