"""Tracing: one OpenTelemetry span per exchange when an endpoint is configured, else nothing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.types import Scope

from kvloom.errors import InvalidInputError
from kvloom.server.exchange import Context

ATTRIBUTES = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
}
"""Facts of an exchange under the names of OpenTelemetry's conventions for generative models."""


class Span:
    """The span of one exchange; without tracing it does nothing."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def finish(self, status: int, facts: Mapping[str, Any]) -> None:
        """Write the status and the facts into the span."""
        if self._span is None:
            return
        self._span.set_attribute("http.response.status_code", status)
        for name, attribute in ATTRIBUTES.items():
            if name in facts:
                self._span.set_attribute(attribute, facts[name])


class Tracer:
    """Makes spans and sends them to `endpoint` (OTLP over HTTP); None makes none.

    Raises `InvalidInputError` when the packages of the extra are missing.
    """

    def __init__(self, endpoint: str | None, model: str, exporter: Any = None) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if endpoint is None and exporter is None:
            return
        try:
            from opentelemetry.propagate import extract
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError as error:
            raise InvalidInputError(f"--otlp-traces-endpoint needs kvloom[otel]: {error}") from None
        self._extract = extract
        self._model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "kvloom"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvloom")

    @contextmanager
    def span(self, scope: Scope, context: Context) -> Iterator[Span]:
        """Return the span of an exchange, a child of the caller's where its headers name one."""
        if self._tracer is None:
            yield Span()
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "gen_ai.system": "kvloom",
            "gen_ai.request.model": self._model,
            "gen_ai.request.id": context.request_id,
        }
        name = f"{scope['method']} {scope['path']}"
        with self._tracer.start_as_current_span(name, context=self._extract(headers), attributes=attributes) as span:
            yield Span(span)

    def close(self) -> None:
        """Send the remaining spans and wait for that."""
        if self._provider is not None:
            self._provider.shutdown()
