"""EagerModel: the reference decoder over any attention backend, as a `Model`."""

import torch

from kvloom.attention.backend import AttentionBackend
from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache, Layout
from kvloom.models.decoder import Decoder
from kvloom.models.model import StepOutput, StepWanted


class EagerModel:
    """`Decoder` and a backend as one `Model`; faster models are compared with it."""

    def __init__(self, decoder: Decoder, backend: AttentionBackend) -> None:
        self.decoder = decoder
        self.backend = backend
        self.name = backend.name
        self.computes_in_torch = True
        self.layout: Layout = "rows"
        self.config = decoder.config
        self.device = decoder.device
        self.inverse_frequencies = decoder.inverse_frequencies
        self.output_weight = decoder.output_weight
        self.logits = decoder.logits

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights (see `Model`)."""
        return self.decoder.num_bytes

    def prepare(self, num_tokens: int) -> None:
        """Do nothing: torch allocates the memory of each step (see `Model`)."""

    def step(self, batch: AttentionBatch, cache: KVCache, wanted: StepWanted) -> StepOutput:
        """Process the batch (see `Model`)."""
        queries: list[torch.Tensor] = []
        rows = wanted.query_rows

        def collect(layer: int, q: torch.Tensor) -> None:
            assert rows is not None
            queries.append(q[torch.from_numpy(rows).to(q.device, torch.int64)])

        inputs: list[torch.Tensor] = []

        def measure(layer: int, x: torch.Tensor) -> None:
            inputs.append(torch.linalg.vector_norm(x.float(), dim=-1))

        hidden = self.decoder.forward(
            batch, cache, self.backend, None if rows is None else collect, measure if wanted.input_norms else None
        )
        logits = self.decoder.logits(hidden[torch.from_numpy(wanted.logit_rows).to(hidden.device, torch.int64)])
        return StepOutput(
            greedy=_best_tokens(logits),
            logits=logits,
            hidden=hidden if wanted.hidden else None,
            queries=torch.stack(queries) if rows is not None else None,
            input_norms=torch.stack(inputs) if wanted.input_norms else None,
        )


def _best_tokens(logits: torch.Tensor) -> list[int]:
    """Return the first index of the largest of each row of logits [N, V], -1 where that is not a finite number."""
    best = torch.argmax(logits, dim=-1)
    found = logits.gather(-1, best[:, None])[:, 0]
    return torch.where(torch.isfinite(found), best, -1).tolist()
