"""A real model behind the server gives the log-probabilities that transformers gives."""

import json

import openai
import pytest

from harness.golden import digest, golden
from harness.real_prompts import ECHOED
from harness.serving import running

TOLERANCE = 1e-3
"""Of one token's log-probability in float32, through two implementations."""


@pytest.fixture(scope="module")
def server(smollm2_path):
    from kvloom import LLM

    llm = LLM(str(smollm2_path), dtype="float32", max_model_len=512, kv_cache_memory_bytes=128 << 20)
    with running(llm, served_model_name=("smollm2",)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.real_model
def test_echoed_log_probabilities_are_those_of_transformers(client, server):
    prompts = [server.service.tokenizer.encode(text) for text in ECHOED]
    answer = client.completions.create(
        model="smollm2", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    for ids, choice, expected in zip(prompts, answer.choices, golden("smollm2")["echoed"], strict=True):
        assert digest(ids) == expected["prompt"]
        wanted = [*expected["logprobs"], expected["best"][-1]]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=TOLERANCE)
        best = [max(entry.values()) for entry in choice.logprobs.top_logprobs[1:]]
        assert best == pytest.approx(expected["best"], abs=TOLERANCE)


@pytest.mark.real_model
def test_a_conversation_is_answered_and_streams_the_same(client):
    fields = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = client.chat.completions.create(**fields).choices[0].message.content
    assert "Paris" in whole
    with client.chat.completions.create(**fields, stream=True) as stream:
        assert "".join(event.choices[0].delta.content or "" for event in stream if event.choices) == whole


FORMS = {
    "place": {"name": {"type": "string", "maxLength": 24}, "people": {"type": "integer", "minimum": 0, "maximum": 999}},
    "verdict": {"right": {"type": "boolean"}, "grade": {"enum": ["low", "middle", "high"]}},
    "list": {"colours": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3}},
    "code": {"id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}, "old": {"type": "null"}},
}


@pytest.mark.real_model
@pytest.mark.parametrize("name", FORMS)
def test_an_answer_with_a_schema_fits_it_and_streams_the_same(client, name):
    pytest.importorskip("llguidance", reason="the extra kvloom[structured] is not installed")
    import jsonschema

    keys = FORMS[name]
    schema = {"type": "object", "properties": keys, "required": list(keys), "additionalProperties": False}
    fields = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": f"Describe a {name} of Iceland as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": schema}},
        "temperature": 0.8,
        "seed": 5,
        "max_tokens": 120,
    }
    whole = client.chat.completions.create(**fields).choices[0]
    assert whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content), schema)
    with client.chat.completions.create(**fields, stream=True) as stream:
        assert "".join(e.choices[0].delta.content or "" for e in stream if e.choices) == whole.message.content
