"""Cost: the time and the memory of one request that runs alone on the engine."""

from collections.abc import Callable
from dataclasses import dataclass

from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.measure.forced import never
from kvloom.measure.window import Window
from kvloom.spec.policy import PolicySpec


@dataclass(frozen=True)
class Cost:
    """Seconds to the first token and for each later one; bytes in use in the arena at the last token and at most."""

    ttft_s: float
    tpot_s: float
    kv_bytes: int
    kv_peak_bytes: int


def cost_of(engine: Engine, window: Window, policy: PolicySpec, stop: Callable[[], bool] = never) -> Cost | None:
    """Run `window` alone on an idle `engine` without a prefix cache, or return None when `stop()` became true.

    Tokens are those of the text; logits are not used. Bytes are those of all blocks in use in the arena. Raises as
    `Engine.add` does; the engine is left without requests.
    """
    assert not engine.has_work, "the engine is not idle"
    arena = engine.cache.arena
    before = arena.used_bytes
    arena.peak_bytes = before
    params = SamplingParams(temperature=0, detokenize=False)
    request = engine.add(window.prompt, params, forced_token_ids=window.follow, kv_policy=policy)
    held = 0
    try:
        while not request.finished:
            if stop():
                return None
            engine.step()
            if not request.finished:
                held = arena.used_bytes - before
    finally:
        engine.abort(request.request_id)
    timing = request.timing
    assert timing.first_token is not None and timing.last_token is not None
    return Cost(
        ttft_s=timing.first_token - timing.arrived,
        tpot_s=(timing.last_token - timing.first_token) / (len(window.follow) - 1),
        kv_bytes=held,
        kv_peak_bytes=arena.peak_bytes - before,
    )
