"""Counters and histograms of the server, under `kvloom:` and, with the same values, under vLLM's names."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from kvloom.engine.output import KVUsage
from kvloom.engine.request import Request
from kvloom.engine.stepfigures import StepFigures
from kvloom.server.enginestats import EngineStats
from kvloom.server.ticket import Ledger

OWN, TWIN = "kvloom:", "vllm:"

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

MAX_POLICY_LABELS = 64
"""Policies that are counted by name; further ones are counted together, as `other`."""

TWINS = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "generation_tokens",
        "prompt_tokens_cached",
        "request_success",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "iteration_tokens_total",
        "cache_config_info",
    }
)
"""Metrics that exist under both names."""

GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Sequences that run.", lambda s: s.running),
    "num_requests_waiting": ("Requests that wait for their first slots.", lambda s: s.waiting),
    "kv_cache_usage_perc": ("Share of the KV cache that requests hold, 0 to 1.", lambda s: s.kv_usage),
    "kv_bytes_cached": ("Bytes that only the prefix index holds.", lambda s: s.kv_bytes_cached),
    "kv_bytes_peak": ("Most bytes that were ever in use.", lambda s: s.kv_bytes_peak),
    "kv_bits_per_token": ("Bits that running sequences hold, for each token seen.", lambda s: s.kv_bits_per_token),
    "lane_spread_tokens": ("Longest less shortest lane of the most uneven sequence.", lambda s: s.lane_spread),
    "kv_bytes_stranded": ("Bytes lost in partly filled slabs.", lambda s: s.kv_bytes_stranded),
}
COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix index.", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Prompt tokens found in the prefix index.", lambda s: s.prefix_hits),
    "num_preemptions": ("Sequences whose blocks were taken.", lambda s: s.preemptions),
    "prompt_tokens": ("Prompt tokens of all accepted requests.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.generation_tokens),
    "prompt_tokens_cached": ("Prompt tokens that were not computed again.", lambda s: s.prefix_hits),
    "engine_steps": ("Iterations of the engine.", lambda s: s.steps),
    "engine_step_seconds": ("Time spent in them.", lambda s: s.step_seconds),
}
"""What the engine counts itself; read off its snapshot at each scrape."""

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of a request.", SECONDS),
    "request_time_per_output_token_seconds": ("Mean time of a token after the first.", SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the last token.", SECONDS),
    "request_queue_time_seconds": ("From arrival to the first work.", SECONDS),
    "request_prefill_time_seconds": ("From the first work to the first token.", SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", SECONDS),
    "request_prompt_tokens": ("Prompt tokens of a finished request.", TOKENS),
    "request_generation_tokens": ("Tokens generated for a finished request.", TOKENS),
    "request_lane_spread_tokens": ("Longest less shortest lane of a finished request.", (0, *TOKENS)),
    "request_kv_peak_bytes": ("Most KV bytes of a finished request.", tuple(4.0**k for k in range(8, 20))),
    "iteration_tokens_total": ("Tokens put through the model in one step.", STEP_TOKENS),
}


class ServerMetrics:
    """All metrics of one server, in a registry of their own. Methods may be called from any thread."""

    def __init__(self, model_name: str, cache_config: dict[str, str]) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._inner = CollectorRegistry()
        self._policies: set[str] = set()
        names = tuple(self._labels)
        self._histograms = {
            name: Histogram(OWN + name, doc, names, buckets=buckets, registry=self._inner).labels(**self._labels)
            for name, (doc, buckets) in HISTOGRAMS.items()
        }
        self._success = Counter(
            OWN + "request_success", "Finished requests by reason.", (*names, "finished_reason"), registry=self._inner
        )
        self._failures = Counter(OWN + "request_failures", "Requests lost to errors.", names, registry=self._inner)
        self._evicted = Counter(
            OWN + "evicted_tokens", "Tokens dropped, over lanes.", (*names, "policy"), registry=self._inner
        )
        self._read = self._plain("kv_read_bytes", "Bytes of K and V attended over; with engine_step_seconds the rate.")
        self._returned = self._plain("kv_returned_bytes", "Bytes that policies gave back to the arena.")
        self._responses = Counter(
            OWN + "http_responses", "HTTP responses.", (*names, "route", "status"), registry=self._inner
        )
        self._refused = Counter(
            OWN + "requests_refused", "Requests refused by code of the error.", (*names, "code"), registry=self._inner
        )
        info = Gauge(OWN + "cache_config_info", "The cache's options.", (*names, *cache_config), registry=self._inner)
        info.labels(**self._labels, **cache_config).set(1)
        for reason in ("stop", "length", "abort"):
            self._success.labels(**self._labels, finished_reason=reason)
        self._failures.labels(**self._labels)

    def _policy_label(self, method: str) -> str:
        """Return the label of a policy: clients choose arguments, and each new label would be kept permanently."""
        if method in self._policies or len(self._policies) < MAX_POLICY_LABELS:
            self._policies.add(method)
            return method
        return "other"

    def _plain(self, name: str, doc: str) -> Counter:
        return Counter(OWN + name, doc, tuple(self._labels), registry=self._inner).labels(**self._labels)

    # ---- from the engine's thread ---------------------------------------------------------------------------------

    def stepped(self, figures: StepFigures) -> None:
        """Record one step."""
        if figures.tokens:
            self._histograms["iteration_tokens_total"].observe(figures.tokens)
        if figures.traffic is not None:
            self._read.inc(figures.traffic.read_bytes)
            self._returned.inc(figures.traffic.returned_bytes)

    def progressed(self, ledger: Ledger, now: float) -> None:
        """Record that a request got a token at `now` (`time.monotonic()`); mutates the ledger's clock."""
        timing = ledger.request.timing
        if ledger.last_token is None:
            self._histograms["time_to_first_token_seconds"].observe((timing.first_token or now) - timing.arrived)
        else:
            self._histograms["inter_token_latency_seconds"].observe(now - ledger.last_token)
        ledger.last_token = now

    def ended(self, request: Request, reason: str, usage: KVUsage) -> None:
        """Record the end of a request and its reason (`stop`, `length`, `abort`, `error`)."""
        if usage.evicted_tokens:
            self._evicted.labels(**self._labels, policy=self._policy_label(usage.method)).inc(usage.evicted_tokens)
        if reason == "error":
            self._failures.labels(**self._labels).inc()
            return
        self._success.labels(**self._labels, finished_reason=reason).inc()
        if reason == "abort":
            return
        timing, observed = request.timing, self._histograms
        tokens = sum(s.num_output_tokens for s in request.sequences)
        started, first, last = timing.started or 0.0, timing.first_token or 0.0, timing.last_token or 0.0
        observed["e2e_request_latency_seconds"].observe(last - timing.arrived)
        observed["request_queue_time_seconds"].observe(started - timing.arrived)
        observed["request_prefill_time_seconds"].observe(first - started)
        observed["request_decode_time_seconds"].observe(last - first)
        longest = max(s.num_output_tokens for s in request.sequences)
        if longest > 1:
            observed["request_time_per_output_token_seconds"].observe((last - first) / (longest - 1))
        observed["request_prompt_tokens"].observe(len(request.prompt_token_ids))
        observed["request_generation_tokens"].observe(tokens)
        observed["request_kv_peak_bytes"].observe(usage.bytes_peak)
        observed["request_lane_spread_tokens"].observe(usage.longest_lane - usage.shortest_lane)

    # ---- from the event loop --------------------------------------------------------------------------------------

    def responded(self, route: str, status: int, code: str | None) -> None:
        """Record an HTTP response; `code` is that of its error, if it is one."""
        self._responses.labels(**self._labels, route=route, status=str(status)).inc()
        if code is not None:
            self._refused.labels(**self._labels, code=code).inc()

    def exposition(self, stats: EngineStats) -> bytes:
        """Return everything in the text format of Prometheus."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Exposition(self._inner, stats, self._labels))
        registry.register(ProcessCollector(registry=None))
        return generate_latest(registry)


class _Exposition(Collector):
    """The inner registry and the engine's snapshot, each metric of `TWINS` under both names."""

    def __init__(self, inner: CollectorRegistry, stats: EngineStats, labels: dict[str, str]) -> None:
        self.inner, self.stats, self.labels = inner, stats, labels

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, and its twin after it."""
        for metric in (*self.inner.collect(), *self._engine()):
            yield metric
            if metric.name.removeprefix(OWN) in TWINS:
                twin = Metric(TWIN + metric.name.removeprefix(OWN), metric.documentation, metric.type)
                twin.samples = [s._replace(name=TWIN + s.name.removeprefix(OWN)) for s in metric.samples]
                yield twin

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: names are unique by construction."""
        return iter(())

    def _engine(self) -> Iterator[Metric]:
        for name, (doc, read) in GAUGES.items():
            yield self._metric(name, doc, "gauge", name, read(self.stats))
        for name, (doc, read) in COUNTERS.items():
            yield self._metric(name, doc, "counter", name + "_total", read(self.stats))
        in_use = self._metric("kv_bytes", "Bytes that requests hold, by store.", "gauge", "kv_bytes", 0.0)
        labels = {**self.labels, "store": self.stats.store}
        in_use.samples = [
            Sample(OWN + "kv_bytes", {**self.labels, "store": store}, float(count))
            for store, count in self.stats.kv_bytes_by_store.items()
        ]
        yield in_use
        by_policy = self._metric("request_kv_bytes", "Bytes of running sequences, by policy.", "gauge", "", 0.0)
        by_policy.samples = [
            Sample(OWN + "request_kv_bytes", {**labels, "policy": policy}, float(count))
            for policy, count in sorted(self.stats.kv_bytes_by_policy.items())
        ]
        yield by_policy

    def _metric(self, name: str, doc: str, kind: str, sample: str, value: float) -> Metric:
        metric = Metric(OWN + name, doc, kind)
        metric.samples = [Sample(OWN + sample, self.labels, float(value))]
        return metric
