"""Answers of a given form over HTTP: whatever the weights, streamed or not, by every name that clients have for it."""

import json
import re

import openai
import pytest

from harness.serving import complete, converse, make_llm, make_model, running

pytest.importorskip("llguidance", reason="the extra kvloom[structured] is not installed")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "old": {"type": "boolean"}, "none": {"const": None}},
    "required": ["name", "old", "none"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 1.0, "seed": 3, "max_tokens": 120}
FORMATTED = {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}}


def fits(text):
    value = json.loads(text)
    return (
        list(value) == ["name", "old", "none"]
        and len(value["name"]) <= 5
        and isinstance(value["old"], bool)
        and value["none"] is None
    )


def streamed(reply):
    assert reply.status == 200, reply.body
    choices = [choice for event in reply.events() for choice in event["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@pytest.mark.parametrize("ask", [complete, converse])
@pytest.mark.parametrize(
    "fields", [FORMATTED, {"structured_outputs": {"json": SCHEMA, "regex": None}}, {"guided_json": json.dumps(SCHEMA)}]
)
def test_an_answer_fits_its_schema_streamed_or_not(tiny_server, ask, fields):
    whole = ask(tiny_server, **SAMPLED, **fields)
    assert whole.status == 200 and "kvloom-warning" not in whole.headers, whole.body
    [choice] = whole.json()["choices"]
    text = choice["text"] if ask is complete else choice["message"]["content"]
    assert choice["finish_reason"] == "stop" and fits(text)
    assert streamed(ask(tiny_server, stream=True, **SAMPLED, **fields)) == text


def test_any_object_will_do_where_that_is_what_was_asked_for(tiny_server):
    fields = {"response_format": {"type": "json_object"}, "logit_bias": {str(ord("}") - 33): 20}}
    reply = complete(tiny_server, **{**SAMPLED, **fields})
    assert isinstance(json.loads(reply.json()["choices"][0]["text"]), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-f]{3}-[0-9]{2}"}, "[a-f]{3}-[0-9]{2}"),
        ({"guided_choice": ["yes", "no (maybe)"]}, r"yes|no \(maybe\)"),
        ({"structured_outputs": {"choice": ["yes", "no"], "disable_fallback": True}}, "yes|no"),
        ({"guided_grammar": 'root ::= "<" [0-9]+ ">" | "<>"'}, "<[0-9]*>"),
    ],
)
def test_expressions_choices_and_grammars_are_followed(tiny_server, fields, pattern):
    reply = complete(tiny_server, **SAMPLED, logit_bias={str(ord(">") - 33): 20}, **fields)
    assert re.fullmatch(pattern, reply.json()["choices"][0]["text"])


def test_a_form_that_cannot_be_read_is_bad_input_and_leaves_nothing(tiny_server):
    for fields in (
        {"guided_regex": "a(b"},
        {"guided_grammar": "root ::= missing"},
        {"guided_json": {"type": "object", "properties": 5}},
    ):
        reply = complete(tiny_server, **fields)
        assert reply.status == 400 and "cannot be " in reply.json()["error"]["message"], reply.body
    tiny_server.wait_idle()


def test_each_answer_of_several_follows_the_form_by_itself(tiny_server):
    reply = complete(tiny_server, prompt=["a", "b"], n=3, **SAMPLED, **FORMATTED)
    texts = [choice["text"] for choice in reply.json()["choices"]]
    assert len(texts) == 6 and all(map(fits, texts))


def test_the_client_library_parses_what_it_asked_for(tiny_server):
    import pydantic

    class Answer(pydantic.BaseModel):
        right: bool
        grade: int = pydantic.Field(ge=1, le=6)

    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model="tiny", messages=[{"role": "user", "content": "?"}], response_format=Answer, max_tokens=60, seed=1
        )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_words_and_tokens_that_are_ruled_out_do_not_come(tiny_server):
    fields = {"max_tokens": 12, "allowed_token_ids": [65, 66, 67], "return_token_ids": True}
    [plain] = complete(tiny_server, **fields).json()["choices"]
    assert set(plain["token_ids"]) <= {65, 66, 67}
    word = plain["text"][2:4]
    reply = complete(tiny_server, **fields, bad_words=[word])
    assert reply.status == 200 and word not in reply.json()["choices"][0]["text"]


def test_without_the_package_a_form_is_refused_with_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llguidance" else found(name))
    with running(make_llm(make_model(tmp_path))) as server:
        reply = complete(server, **FORMATTED)
    assert reply.status == 400 and "kvloom[structured]" in reply.json()["error"]["message"]


def test_a_grammar_that_takes_too_much_work_fails_its_request_with_the_reason(tiny_server):
    """Every `x` may be empty, so that a row of the parser holds an item for each of them, four times over."""
    grammar = "root ::= s\ns ::= s s | " + "x " * 700 + '\nx ::= "a" | ""\n'
    reply = complete(tiny_server, structured_outputs={"grammar": grammar}, logit_bias={str(ord("a") - 33): 100})
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (500, "request_failed")
    assert "form of the answer cannot be followed" in error["message"] and "<state>" not in error["message"]
    assert "left recursion" in error["message"]
    tiny_server.wait_idle()
    assert tiny_server.blocks_in_use() == 0
