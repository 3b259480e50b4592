"""A load: when requests are sent, and the times and tokens of each.

Closed loop: `max_concurrency` clients, each sending when its last answer has ended. Open loop: requests arrive at
`rate` a second whatever the server does, with gaps from a gamma distribution (burstiness 1 is Poisson); a limit of
concurrency on top of it delays requests beyond the limit, and `lag` is their delay.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvloom.bench.connection import Endpoint, ServerAnswerError
from kvloom.bench.prompts import LoadPrompt


@dataclass
class Outcome:
    """Result of one request. Seconds: `lag` behind schedule, `sent` on the clock, other times since it was sent."""

    sent: float
    lag: float = 0.0
    ttft: float | None = None
    end: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    kv_peak_bytes: int | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether an answer came to its end."""
        return self.error is None and self.ttft is not None

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first; None for fewer than two tokens."""
        if self.ttft is None or self.end is None or self.output_tokens < 2:
            return None
        return (self.end - self.ttft) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Load:
    """A load on one server. `rate` in requests a second, infinite for all at once."""

    endpoint: Endpoint
    path: str
    model: str | None
    prompts: Sequence[LoadPrompt]
    rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    async def run(self, progress: Callable[[Outcome], None] = lambda outcome: None) -> tuple[list[Outcome], float]:
        """Send everything and return the outcomes in the order of the prompts, and the seconds that it took."""
        slots = asyncio.Semaphore(self.max_concurrency or len(self.prompts))
        started = time.perf_counter()

        async def one(prompt: LoadPrompt, planned: float) -> Outcome:
            await asyncio.sleep(max(0.0, started + planned - time.perf_counter()))
            async with slots:
                outcome = await self.send(prompt)
            outcome.lag = outcome.sent - (started + planned) if math.isfinite(self.rate) else 0.0
            progress(outcome)
            return outcome

        jobs = [one(prompt, at) for prompt, at in zip(self.prompts, self.arrivals(), strict=True)]
        outcomes = await asyncio.gather(*jobs)
        return list(outcomes), time.perf_counter() - started

    def arrivals(self) -> list[float]:
        """Return when each request is due, in seconds from the start, ascending."""
        if not math.isfinite(self.rate):
            return [0.0] * len(self.prompts)
        rng = random.Random(self.seed)
        times, now = [], 0.0
        for _ in self.prompts:
            times.append(now)
            now += rng.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))
        return times

    async def send(self, prompt: LoadPrompt) -> Outcome:
        """Send one request and follow its answer to the end; errors are part of the outcome."""
        outcome = Outcome(time.perf_counter())
        last = outcome.sent
        try:
            async for arrived, event in self.endpoint.events(self.path, self._body(prompt)):
                if event.get("usage"):
                    _read_usage(outcome, event["usage"])
                if not any(_says_something(choice) for choice in event.get("choices", ())):
                    continue
                if outcome.ttft is None:
                    outcome.ttft = arrived - outcome.sent
                else:
                    outcome.gaps.append(arrived - last)
                last = arrived
                outcome.end = arrived - outcome.sent
            if outcome.ttft is None:
                outcome.error = "the answer had no text"
        except (ServerAnswerError, OSError, EOFError, ValueError) as error:
            outcome.error = str(error) or type(error).__name__
        except Exception as error:  # h11 raises its own types when the connection breaks
            outcome.error = f"{type(error).__name__}: {error}"
        return outcome

    def _body(self, prompt: LoadPrompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": prompt.max_tokens,
            **self.extra,
        }
        if self.model is not None:
            body["model"] = self.model
        if self.path.endswith("/chat/completions"):
            return {**body, "messages": [{"role": "user", "content": prompt.prompt}]}
        return {**body, "prompt": prompt.prompt}


def _says_something(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("tool_calls") or choice.get("finish_reason"))


def _read_usage(outcome: Outcome, usage: Mapping[str, Any]) -> None:
    outcome.prompt_tokens = usage.get("prompt_tokens", 0)
    outcome.output_tokens = usage.get("completion_tokens", 0)
    outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    outcome.kv_peak_bytes = (usage.get("kv") or {}).get("bytes_peak")
