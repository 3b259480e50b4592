"""Traces: one span an exchange, with the caller's trace as its parent."""

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from harness.serving import call, complete, make_llm, running
from kvloom.server.tracing import Tracer


@pytest.fixture
def spans(tiny_folder):
    """Finished spans of a few exchanges."""
    exporter = InMemorySpanExporter()
    tracer = Tracer(None, "tiny", exporter)
    with running(make_llm(tiny_folder), tracer=tracer) as server:
        parent = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
        body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True}
        assert call(server, "POST", "/v1/completions", body, parent).status == 200
        assert complete(server, temperature=-1).status == 400
        server.wait_idle()
    tracer.close()
    return exporter.get_finished_spans()


def test_spans_carry_tokens_statuses_and_the_callers_trace(spans):
    first, second = spans
    assert f"{first.context.trace_id:032x}" == "1" * 32 and f"{first.parent.span_id:016x}" == "2" * 16
    assert first.attributes["gen_ai.usage.input_tokens"] == 5 and first.attributes["gen_ai.usage.output_tokens"] == 3
    assert [span.attributes["http.response.status_code"] for span in spans] == [200, 400]
    assert second.parent is None and second.name == "POST /v1/completions"
