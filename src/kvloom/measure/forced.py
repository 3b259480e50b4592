"""Forced decode: a policy's predictions of a text's own next tokens, beside those of the full cache."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Request
from kvloom.engine.request import Sequence as Running
from kvloom.measure.window import Window
from kvloom.spec.policy import PolicySpec

Reference = dict[tuple[int, int], torch.Tensor]
"""Log-probabilities [V] float32 of the full cache by (window, token after the prompt)."""


def never() -> bool:
    """Return False: the default of `stop`, which never stops a run."""
    return False


@dataclass(frozen=True)
class Score:
    """One policy on one window, means over its scored tokens.

    `nll` is the negative log-likelihood of the text's token in nats, `kl` is KL(full || policy) in nats, `agreement`
    the share of tokens at which both have the same most likely token; `evicted` counts tokens over all lanes.
    """

    nll: float
    kl: float
    agreement: float
    evicted: int


def forced_scores(
    engine: Engine,
    windows: Sequence[Window],
    policy: PolicySpec,
    reference: Reference,
    stop: Callable[[], bool] = never,
) -> list[Score] | None:
    """Run all `windows` at once on `engine` and return a score for each, or None when `stop()` became true.

    An empty `reference` is filled, so that the first run, under `FULL`, is compared with itself. The first token
    after a prompt comes from the prompt's own forward pass, before anything was evicted, and is not scored. Raises as
    `Engine.add` does; the engine is left without requests.
    """
    fill, params = not reference, SamplingParams(temperature=0, detokenize=False)
    order: dict[Request, int] = {}
    found: list[list[tuple[float, float, float]]] = [[] for _ in windows]

    def watch(sequences: list[Running], logits: torch.Tensor) -> None:
        for sequence, row in zip(sequences, logits, strict=True):
            index, step = order[sequence.request], sequence.num_output_tokens
            if step == 0:
                continue
            own = torch.log_softmax(row.float(), -1)
            if fill:
                reference[index, step] = own
            full = reference[index, step]
            kl = max(0.0, float((full.exp() * (full - own)).sum()))
            agrees = float(full.argmax() == own.argmax())
            found[index].append((-float(own[windows[index].follow[step]]), kl, agrees))

    before, engine.continuation.observer = engine.continuation.observer, watch
    try:
        for index, window in enumerate(windows):
            request = engine.add(window.prompt, params, forced_token_ids=window.follow, kv_policy=policy)
            order[request] = index
        while engine.has_work:
            if stop():
                return None
            engine.step()
    finally:
        engine.continuation.observer = before
        for request in order:
            engine.abort(request.request_id)
    for request in order:
        if request.error is not None:
            raise request.error
    evicted = [engine.kv_usage(request).evicted_tokens for request in order]
    means = [[statistics.fmean(column) for column in zip(*rows, strict=True)] for rows in found]
    return [Score(nll, kl, agreement, count) for (nll, kl, agreement), count in zip(means, evicted, strict=True)]
