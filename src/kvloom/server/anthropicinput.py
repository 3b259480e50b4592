"""What a body of Anthropic's /v1/messages asks, as a body of /v1/chat/completions."""

from collections.abc import Iterator
from typing import Any

from kvloom.server.anthropicfields import EXTRAS
from kvloom.server.fields import Body
from kvloom.server.refusal import bad_field

SAME = ("model", "temperature", "top_p", "stream", "max_tokens", *EXTRAS)
"""Fields that mean the same in both bodies."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def conversation_of(body: Body) -> Body:
    """Return the conversation that `body` asks to be answered; both have the same list of warnings.

    A last message of the assistant is continued. Mutates the warnings.
    """
    values = {name: body.get(name) for name in SAME if name in body}
    messages = list(_system(body))
    for number, message in enumerate(body.get("messages")):
        messages += _messages(message, f"messages[{number}]", body.warnings)
    values["messages"] = messages
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and "tool_calls" not in last:
        values["continue_final_message"] = True
    if "stop_sequences" in body:
        values["stop"] = body.get("stop_sequences")
    if "tools" in body:
        values["tools"] = [_tool(tool) for tool in body.get("tools")]
    if "tool_choice" in body:
        choice = body.get("tool_choice")
        named = {"type": "function", "function": {"name": choice.get("name")}}
        values["tool_choice"] = CHOICES.get(choice["type"], named)
        values["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use", False)
    config = body.get("output_config", {})
    if "format" in config:
        values["response_format"] = {"type": "json_schema", "json_schema": {"schema": config["format"]["schema"]}}
    if "effort" in config:
        values["reasoning_effort"] = config["effort"]
    return Body(values, body.warnings)


def _system(body: Body) -> Iterator[dict[str, Any]]:
    if "system" in body:
        yield {"role": "system", "content": _text(body.get("system"))}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _messages(message: dict[str, Any], path: str, warnings: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the messages that one stands for: its results of calls, each, and then its text with its calls."""
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    texts, calls = [], []
    results = 0
    for number, block in enumerate(content):
        kind, place = block["type"], f"{path}.content[{number}]"
        if kind in ("tool_use", "tool_result") and role != ("assistant" if kind == "tool_use" else "user"):
            raise bad_field("messages", f"{place} is a {kind}, which a message of the role {role!r} does not have")
        if kind == "text":
            texts.append(block["text"])
        elif kind == "tool_use":
            function = {"name": block["name"], "arguments": block["input"]}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "tool_result":
            if block.get("is_error"):
                warnings.append(f"{place}.is_error has no effect: templates have no place for it; say so in the text")
            if texts:
                raise bad_field("messages", f"{place} is a tool_result behind text; results come first in a message")
            results += 1
            yield {"role": "tool", "tool_call_id": block["tool_use_id"], "content": _text(block.get("content", ""))}
        else:
            warnings.append(f"{place} has no effect: thinking is not given back to the model")
    if texts or calls or not results:
        yield {"role": role, "content": "".join(texts), **({"tool_calls": calls} if calls else {})}


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(block["text"] for block in content)
