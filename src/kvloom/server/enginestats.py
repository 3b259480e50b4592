"""EngineStats: a snapshot of the engine's counters and the cache's bytes, made by the engine's thread for others."""

from dataclasses import dataclass

from kvloom.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and what is in use now.

    `kv_bytes_in_use` are held by requests, `_by_store` the same by store, `_cached` held by the prefix index alone,
    `_stranded` by partly filled slabs; `store` is the native one. `kv_bytes_by_policy` counts blocks that are shared
    once for each sequence, `kv_bits_per_token` is what running sequences hold over the tokens that they have seen, and
    `lane_spread` the largest difference of the lengths of one sequence's lanes, in tokens.
    """

    running: int
    waiting: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    step_seconds: float
    kv_bytes: int
    kv_bytes_in_use: int
    kv_bytes_cached: int
    kv_bytes_peak: int
    kv_bytes_stranded: int
    store: str
    kv_bytes_by_store: dict[str, int]
    kv_bytes_by_policy: dict[str, int]
    kv_bits_per_token: float
    lane_spread: int

    @property
    def kv_usage(self) -> float:
        """Share of the arena that requests hold, 0 to 1."""
        return self.kv_bytes_in_use / self.kv_bytes


def read_stats(engine: Engine) -> EngineStats:
    """Return a snapshot; only for the thread that runs the engine."""
    scheduler, cache = engine.scheduler, engine.cache
    by_policy: dict[str, int] = {}
    seen = spread = 0
    for sequence in scheduler.running:
        if sequence.row is None:
            continue
        scheduler.queues.note_bytes(sequence)
        policy = sequence.kv_method
        by_policy[policy] = by_policy.get(policy, 0) + sequence.kv_bytes
        seen += int(cache.lanes.seen[sequence.row])
        spread = max(spread, sequence.kv_spread[1] - sequence.kv_spread[0])
    return EngineStats(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        preemptions=scheduler.num_preemptions,
        prefix_queries=scheduler.prefixes.queries,
        prefix_hits=scheduler.prefixes.hits,
        prompt_tokens=engine.num_prompt_tokens,
        generation_tokens=engine.answers.num_generated_tokens,
        steps=engine.num_steps,
        step_seconds=engine.step_seconds,
        kv_bytes=cache.arena.num_bytes,
        kv_bytes_in_use=cache.bytes_in_use,
        kv_bytes_cached=cache.index.idle_bytes,
        kv_bytes_peak=cache.arena.peak_bytes,
        kv_bytes_stranded=cache.arena.slabs.stranded_bytes,
        store=cache.spec.store,
        kv_bytes_by_store=cache.bytes_by_store(),
        kv_bytes_by_policy=by_policy,
        kv_bits_per_token=8.0 * sum(by_policy.values()) / seen if seen else 0.0,
        lane_spread=spread,
    )
