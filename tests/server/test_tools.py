"""Functions that a model may call: offered, forced, named and strict; calls in pieces, whole, and cut off."""

import json

import pytest

from harness.serving import converse
from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.errors import UnsupportedError
from kvloom.server.fields import Body
from kvloom.server.toolcalls import ToolCallReader
from kvloom.server.tools import offered_tools

NUMBERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def tool(name="add", parameters=NUMBERS, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


ONE = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
TOOLS = [tool(), tool("negate", ONE)]
SAMPLED = {"temperature": 1.0, "max_tokens": 200}


def answer(reply):
    assert reply.status == 200, reply.body
    return reply.json()


def calls_of(choice):
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in choice["message"]["tool_calls"]
    ]


def is_sum(arguments):
    return list(arguments) == ["a", "b"] and 0 <= arguments["a"] <= 99 and isinstance(arguments["b"], bool)


def test_tools_reach_the_template_that_has_them(tiny_server):
    small = tool(parameters={"type": "object"})
    plain, offered = answer(converse(tiny_server)), answer(converse(tiny_server, tools=[small]))
    assert offered["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 50
    assert answer(converse(tiny_server, tools=[small], tool_choice="none"))["choices"] == plain["choices"]


def test_a_template_without_tools_refuses_them_with_all_reasons():
    with pytest.raises(UnsupportedError) as refused:
        offered_tools(Body({"tools": [{"type": "other"}]}), "{{ messages }}")
    assert len(refused.value.reasons) == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_forced_answer_is_a_call_whose_arguments_fit(calling_server, seed):
    body = answer(
        converse(calling_server, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed, **SAMPLED)
    )
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    for name, arguments in calls_of(choice):
        assert is_sum(arguments) if name == "add" else (name, arguments["x"]) == ("negate", 1)


def test_a_named_function_is_the_one_that_is_called(calling_server):
    named = {"type": "function", "function": {"name": "add"}}
    [choice] = answer(converse(calling_server, tools=TOOLS, tool_choice=named, **SAMPLED))["choices"]
    [(name, arguments)] = calls_of(choice)
    assert name == "add" and is_sum(arguments)


def test_streamed_pieces_of_a_call_are_the_whole_call(calling_server):
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 5, **SAMPLED}
    [whole] = answer(converse(calling_server, **fields))["choices"]
    events = converse(calling_server, stream=True, **fields).events()
    pieces = [p for e in events for c in e["choices"] for p in c["delta"].get("tool_calls", ())]
    assert len(pieces) > 3 and [p["function"].get("name") for p in pieces if "id" in p] == [
        pieces[0]["function"]["name"]
    ]
    said = whole["message"]["tool_calls"][0]["function"]
    assert pieces[0]["function"]["name"] == said["name"]
    assert "".join(p["function"]["arguments"] for p in pieces) == said["arguments"]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_by_max_tokens_stays_a_call(calling_server):
    fields = {"tools": TOOLS[:1], "tool_choice": "required", "temperature": 0, "max_tokens": 42}
    [choice] = answer(converse(calling_server, **fields))["choices"]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add" and call["function"]["arguments"].startswith('{"a": ')


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool(parameters={"not": {}}, strict=True)]}, "tools"),
        ({"tools": [tool(parameters={"type": "array"})], "tool_choice": "required"}, "tools"),
    ],
)
def test_what_cannot_be_called_is_refused(calling_server, fields, param):
    reply = converse(calling_server, **fields)
    assert (reply.status, reply.json()["error"]["param"]) == (400, param), reply.body


def test_parameters_that_cannot_be_kept_are_warned_about_where_nobody_was_promised_them(calling_server):
    reply = converse(calling_server, tools=[tool(parameters={"not": {}})], tool_choice="required", max_tokens=4)
    assert reply.status == 200 and "'/not'" in reply.headers["kvloom-warning"]


def test_a_strict_function_leaves_text_free_and_keeps_its_calls(calling_server):
    """The grammar of an answer that may hold calls: text passes, a call that does not fit does not."""
    service = calling_server.service
    processors = service.engine.processors.processors

    def check(form):
        return processors(
            service.intake.limits.params(Body({}), n=1, max_tokens=1, logprobs=None).__class__(structured_outputs=form)
        )

    form = offered_tools(Body({"tools": [tool(strict=True)]}), "tools <tool_call>").form(check, [])
    [processor] = check(form)

    def passes(text):
        import torch

        one, tokens = processor.start(), service.tokenizer.encode(text, False)
        for count in range(len(tokens) + 1):
            logits = torch.zeros(257)
            one([], tokens[:count], logits)
            token = tokens[count] if count < len(tokens) else 256
            if torch.isneginf(logits[token]):
                return False
        return True

    good = '<tool_call>\n{"name": "add", "arguments": {"a": 5, "b": true}}\n</tool_call>'
    assert isinstance(form, StructuredOutputsParams)
    assert passes("some text < no call") and passes(good) and passes(f"text {good} more\n{good}")
    assert not passes(good.replace("5", "500")) and not passes(good.replace("add", "sub"))
    assert not passes('<tool_call>\n{"name": "add", "arguments": {"a": 5')


@pytest.mark.parametrize("size", [1, 3, 7, 200])
def test_calls_are_read_the_same_however_the_text_is_cut(size):
    call = {"name": "add", "arguments": {"a": 'br{ace "quoted" }', "b": [1, {"c": "</tool_call>"}]}}
    other = {"parameters": {"z": 1}, "name": "late"}
    text = (
        f"well <tool_call>\n{json.dumps(call)}\n</tool_call> and <tool_call>no call</tool_call>"
        f"<tool_call>{json.dumps(other)}</tool_call> < end"
    )
    reader, content, pieces = ToolCallReader(), "", []
    for start in range(0, len(text), size):
        for piece in reader.read(text[start : start + size], start + size >= len(text)):
            if isinstance(piece, str):
                content += piece
            else:
                pieces.append(piece)
    assert content == "well  and <tool_call>no call</tool_call> < end"
    read = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reader.calls]
    assert read == [("add", call["arguments"]), ("late", {"z": 1})]
    for index, whole in enumerate(reader.calls):
        mine = [p for p in pieces if p["index"] == index]
        assert "".join(p["function"]["arguments"] for p in mine) == whole["function"]["arguments"]
        assert mine[0]["id"] == whole["id"]


def test_arguments_are_told_as_they_come():
    reader = ToolCallReader()
    assert reader.read('<tool_call>{"name": "a", "argum', False) == []
    [begun, piece] = reader.read('ents": {"x": "lo', False)
    assert (begun["function"], piece["function"]) == ({"name": "a", "arguments": ""}, {"arguments": '{"x": "lo'})
    assert reader.read("ng", False)[0]["function"]["arguments"] == "ng"


def test_only_the_first_call_is_kept_where_one_is_asked_for():
    one = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    reader = ToolCallReader(only_first=True)
    *pieces, after = reader.read(one + one.replace('"a"', '"b"') + "x", True)
    assert [call["function"]["name"] for call in reader.calls] == ["a"] and {p["index"] for p in pieces} == {0}
    assert after == "x"


def test_what_is_no_call_at_the_end_is_content():
    reader = ToolCallReader()
    assert reader.read("a<tool_call>{", False) == ["a"]
    assert reader.read('"x"', True) == ['<tool_call>{"x"']
