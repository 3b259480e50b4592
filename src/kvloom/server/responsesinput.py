"""What a body of /v1/responses asks, as a body of /v1/chat/completions."""

from collections.abc import Iterator
from typing import Any

from kvloom.server.fields import Body
from kvloom.server.refusal import bad_field
from kvloom.server.responsesfields import EXTRAS

SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", *EXTRAS)
"""Fields that mean the same in both bodies."""

NAMES = {"messages": "input", "prompt": "input", "max_tokens": "max_output_tokens", "response_format": "text"}
"""Fields of a conversation's body, and what each is called in this one."""

LOGPROBS = "message.output_text.logprobs"


def conversation_of(body: Body) -> Body:
    """Return the conversation that `body` asks to be answered; both have the same list of warnings.

    Raises `Refusal` for what only a server that keeps answers could do. Mutates the warnings.
    """
    values = {name: body.get(name) for name in SAME if name in body}
    values["messages"] = list(_messages(body))
    if "max_output_tokens" in body:
        values["max_tokens"] = body.get("max_output_tokens")
    if "tools" in body:
        values["tools"] = [_tool(tool) for tool in body.get("tools")]
    choice = body.get("tool_choice")
    if choice is not None:
        named = isinstance(choice, dict)
        values["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}} if named else choice
    form = body.get("text", {}).get("format", {})
    if form:
        wrapped = {name: entry for name, entry in form.items() if name != "type"}
        values["response_format"] = {"type": form["type"], **({"json_schema": wrapped} if wrapped else {})}
    if "effort" in body.get("reasoning", {}):
        values["reasoning_effort"] = body.get("reasoning")["effort"]
    _note_unfollowed(body)
    return Body(values, body.warnings)


def _note_unfollowed(body: Body) -> None:
    """Warn about wishes that change nothing; raises `Refusal` for one that would."""
    if LOGPROBS in body.get("include", ()):
        raise bad_field("include", f"include {LOGPROBS} is not supported; /v1/chat/completions has log-probabilities")
    for name in body.get("include", ()):
        body.warnings.append(f"include {name[:80]!r} has no effect: answers have no such part")
    if body.get("store"):
        body.warnings.append("field 'store' has no effect: nothing is kept; send the whole conversation each time")
    for name in ("summary", "generate_summary"):
        if name in body.get("reasoning", {}):
            body.warnings.append(f"field 'reasoning.{name}' has no effect: no summaries are made")
    if "verbosity" in body.get("text", {}):
        body.warnings.append("field 'text.verbosity' has no effect: it is a hosted model's length of answers")
    if body.get("stream_options", {}).get("include_obfuscation"):
        body.warnings.append("field 'stream_options.include_obfuscation' has no effect: nothing is obfuscated")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
    return {"type": "function", "function": function}


def _messages(body: Body) -> Iterator[dict[str, Any]]:
    """Yield the messages of a conversation: calls belong to the assistant's message before them."""
    if "instructions" in body:
        yield {"role": "system", "content": body.get("instructions")}
    given = body.get("input")
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    names: dict[str, str] = {}
    speaking: dict[str, Any] | None = None
    for number, item in enumerate(given):
        kind = item["type"]
        if kind == "function_call":
            names[item["call_id"]] = item["name"]
            speaking = speaking or {"role": "assistant", "content": ""}
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            speaking.setdefault("tool_calls", []).append(call)
        elif kind == "reasoning":
            body.warnings.append(f"input[{number}] has no effect: reasoning is not given back to the model")
        else:
            if speaking is not None:
                yield speaking
                speaking = None
            message = _message(item, number, names)
            if message["role"] == "assistant":
                speaking = message
            else:
                yield message
    if speaking is not None:
        yield speaking


def _message(item: dict[str, Any], number: int, names: dict[str, str]) -> dict[str, Any]:
    """Return the message of an item that is one; `names` are the functions that were called, by call id."""
    if item["type"] == "item_reference":
        raise bad_field(
            "input",
            f"input[{number}] refers to an item that a server has kept, and nothing is kept here: send the item "
            "itself. Clients do so with store=false (Vercel's AI SDK: providerOptions.openai.store)",
            "unsupported_field",
        )
    if item["type"] == "message":
        return {"role": item["role"], "content": _text(item["content"])}
    name = names.get(item["call_id"])
    if name is None:
        wrong = str(item["call_id"])[:80]
        raise bad_field(
            "input", f"input[{number}] is the output of {wrong!r}, and no function_call before it has that id"
        )
    return {"role": "tool", "tool_call_id": item["call_id"], "name": name, "content": _text(item["output"])}


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", part.get("refusal", "")) for part in content)
