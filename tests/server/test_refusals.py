"""What the server refuses: the status, OpenAI's error shape, and the field at fault."""

import pytest

from harness.serving import call, complete, converse, make_llm, running
from kvloom.errors import InvalidInputError
from kvloom.server.kvpolicy import allowed_policies

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def refused(reply, status, param=None, code=None):
    assert reply.status == status, reply.body
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "structural_tag": "x"}}, "structured_outputs"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "(" * 70}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a", "min_tokens": 2}, "structured_outputs"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": "one"}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [257]}, None),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"priority": 1}, "priority"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"kv_policy": 3}, "kv_policy"),
        ({"request_id": "a b"}, "request_id"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_a_wrong_field_is_named(tiny_server, fields, param):
    refused(complete(tiny_server, **fields), 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "tools"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"functions": [{}]}, "functions"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"documents": [{}]}, "documents"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_a_wrong_field_of_a_conversation_is_named(tiny_server, fields, param):
    refused(converse(tiny_server, **fields), 400, param)


def test_a_prompt_beyond_the_models_length_says_so_with_numbers(tiny_server):
    message = refused(complete(tiny_server, prompt=[1] * 300), 400, "prompt", "context_length_exceeded")
    assert "300" in message and "256" in message


def test_ids_beyond_the_vocabulary_are_refused(tiny_server):
    refused(complete(tiny_server, prompt=[257]), 400)
    refused(call(tiny_server, "POST", "/detokenize", {"tokens": [257]}), 400, "tokens")


def test_an_unknown_policy_is_refused_with_reasons(tiny_server):
    assert "oblivion" in refused(complete(tiny_server, kv_policy="oblivion(budget=4)"), 400)


def test_a_policy_that_is_not_allowed_is_refused_with_those_that_are(tiny_folder):
    with running(make_llm(tiny_folder, allow_kv_policies=("snapkv", "tova(budget=32)"))) as server:
        for policy in ("knorm(budget=16)", "tova(budget=16)", "kvzip(budget=16)"):
            message = refused(complete(server, kv_policy=policy), 400, "kv_policy", "unsupported")
            assert "snapkv" in message and "tova(budget=32" in message
        for policy in ("snapkv(budget=24,window=8)", "tova(budget=32)", "full", "none"):
            assert complete(server, kv_policy=policy, max_tokens=2).status == 200


def test_a_server_allows_by_default_what_does_not_read_the_prompt_again():
    allowed = allowed_policies(())
    assert "kvzip" not in allowed and {"full", "snapkv", "streaming", "h2o"} <= set(allowed)
    assert allowed_policies(("all",)) is None and allowed_policies(("none",)) == ()
    assert allowed_policies(("snapkv", "tova(budget=32)")) == ("snapkv", "tova(budget=32)")
    with pytest.raises(InvalidInputError, match="stand alone"):
        allowed_policies(("all", "snapkv"))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"nul", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"],
)
def test_garbage_is_bad_and_nothing_worse(tiny_server, raw):
    refused(call(tiny_server, "POST", "/v1/completions", raw=raw), 400)


def test_half_a_surrogate_pair_is_bad_input(tiny_server):
    for raw in (rb'{"prompt": "\ud800"}', rb'{"prompt": "a", "stop": "\ud800", "max_tokens": 2}'):
        assert call(tiny_server, "POST", "/v1/completions", raw=raw).status in (200, 400)


def test_a_body_of_another_type_is_refused(tiny_server):
    refused(call(tiny_server, "POST", "/v1/completions", raw=b"{}", headers={"Content-Type": "text/plain"}), 415)


def test_a_body_beyond_the_limit_is_refused_and_read_to_its_end(tiny_server):
    huge = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    refused(call(tiny_server, "POST", "/v1/completions", raw=huge), 413, code="body_too_large")


def test_unknown_routes_methods_and_models_are_told_apart(tiny_server):
    refused(call(tiny_server, "GET", "/v2"), 404, code="no_such_route")
    reply = call(tiny_server, "GET", "/v1/completions")
    refused(reply, 405)
    assert reply.headers["allow"] == "POST"
    refused(complete(tiny_server, model="gpt"), 404, "model", "model_not_found")
    refused(call(tiny_server, "GET", "/v1/models/gpt"), 404, "model")
    assert call(tiny_server, "GET", "/v1/models/tiny").json()["id"] == "tiny"


def test_a_field_that_nobody_knows_is_warned_about_with_the_nearest_name(tiny_server):
    reply = complete(tiny_server, temprature=0.5, session_id="s")
    assert reply.status == 200
    warning = reply.headers["kvloom-warning"]
    assert "'temprature'" in warning and "'temperature'" in warning and "session_id" in warning


def test_a_warning_cannot_write_headers_of_its_own(tiny_server):
    reply = complete(tiny_server, **{"x\r\nSet-Cookie: a=b": 1, "日本": 2})
    assert reply.status == 200 and "set-cookie" not in reply.headers


def test_fields_that_ask_for_nothing_pass_without_a_word(tiny_server):
    fields = {"suffix": None, "use_beam_search": False, "user": "me", "response_format": {"type": "text"}}
    reply = complete(tiny_server, **fields)
    assert reply.status == 200 and "kvloom-warning" not in reply.headers


def test_what_can_never_fit_is_refused_with_the_bytes(tiny_folder):
    with running(make_llm(tiny_folder, kv_cache_memory_bytes=2 << 20)) as server:
        server.service.engine.admission.max_model_len = 10**6
        message = refused(complete(server, max_tokens=100_000), 400, code="kv_cache_exceeded")
        assert "MiB" in message and "100005 tokens" in message


def test_priority_is_taken_where_it_is_followed(tiny_folder):
    with running(make_llm(tiny_folder), scheduling_policy="priority") as server:
        assert complete(server, priority=3).status == 200
