"""The OpenAPI document describes what the server takes; requests made from it find no server error."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from harness.serving import call, make_llm, running
from kvloom.server.app import ROUTES

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = {"/v1/completions": 100, "/v1/chat/completions": 100}
"""Examples by route, of the right kind and then of the wrong; 20 elsewhere."""


@pytest.fixture(scope="module")
def small(tiny_folder):
    """A server whose answers are short whatever is asked for."""
    with running(make_llm(tiny_folder, max_model_len=64)) as server:
        yield server


def test_every_route_but_the_documents_own_is_described(tiny_server):
    paths = call(tiny_server, "GET", "/openapi.json").json()["paths"]
    assert set(paths) | {"/openapi.json", "/v1/models/{model:path}"} == {path for _, path, _ in ROUTES}


def test_at_least_500_requests_made_from_the_document_find_no_server_error(small):
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    statuses = []
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.POSITIVE or operation.body:
                check_operation(operation.as_strategy(generation_mode=mode), EXAMPLES.get(operation.path, 20), statuses)
    assert len(statuses) >= 500 and {200, 400} <= set(statuses)
    small.wait_idle()
    assert small.blocks_in_use() == 0


def check_operation(cases, count, statuses):
    """Send `count` requests drawn from `cases`; every answer must be one that the document declares."""

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def check(case):
        statuses.append(case.call_and_validate(checks=CHECKS).status_code)

    check()
