"""Conversations: messages as clients send them, through the model's chat template, to token ids."""

import json
import re
from typing import Any

from kvloom.server.fields import MAX_WARNINGS, Body
from kvloom.server.refusal import bad_field
from kvloom.server.service import Service

ROLES = ("system", "user", "assistant", "tool")
"""Roles that every template is expected to support or to refuse itself."""

MESSAGE_FIELDS = frozenset({
    "role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations", "audio", "function_call",
})  # fmt: skip
"""Fields of messages that clients send back unchanged, and names of participants."""

OWN_VARIABLES = (
    *("messages", "tools", "documents", "self", "bos_token", "eos_token"),
    *("continue_final_message", "allow_special_tokens"),
)
"""Variables of a template that chat_template_kwargs may not set."""


def conversation_ids(service: Service, body: Body, tools: list[dict[str, Any]] | None) -> list[int]:
    """Return the token ids of a body's conversation; raises `Refusal` and `ChatTemplateError`. For any thread."""
    template = service.tokenizer.chat_template or ""
    messages = [_plain(message, number, template) for number, message in enumerate(body.get("messages"))]
    options = dict(body.get("chat_template_kwargs", {}))
    by_default = options.pop("add_generation_prompt", not body.get("continue_final_message"))
    begin = body.get("add_generation_prompt", by_default)
    for name in options:
        if name in OWN_VARIABLES:
            raise bad_field("chat_template_kwargs", f"chat_template_kwargs may not set {name!r}")
    if tools is not None:
        options["tools"] = tools
    if "documents" in body:
        if "documents" not in template:
            raise bad_field("documents", "documents have no place in this model's chat template; leave them out")
        options["documents"] = body.get("documents")
    if "reasoning_effort" in body and "reasoning_effort" in template:
        options["reasoning_effort"] = body.get("reasoning_effort")
    goes_on = body.get("continue_final_message", False)
    if goes_on and begin:
        raise bad_field("continue_final_message", "continue_final_message and add_generation_prompt exclude each other")
    options |= {"continue_final_message": goes_on, "allow_special_tokens": body.get("allow_special_tokens", False)}
    return service.tokenizer.encode_chat(messages, bool(begin), **options)


def _plain(message: dict[str, Any], number: int, template: str) -> dict[str, Any]:
    """Return a message whose content is one string; raises `Refusal` for parts that are not text and unknown roles.

    Arguments of earlier tool calls become objects, which is what templates expect.
    """
    plain = {**message, "role": _role(message["role"], number, template)}
    content = plain.get("content")
    if isinstance(content, list):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = str(part.get("type"))[:40]
                raise bad_field("messages", f"message {number} has a part of type {kind!r}; only text is supported")
        plain["content"] = "".join(part["text"] for part in content)
    elif content is None:
        plain["content"] = ""
    calls = plain.get("tool_calls")
    if isinstance(calls, list):
        plain["tool_calls"] = [_readable(call) for call in calls]
    return plain


def _role(role: str, number: int, template: str) -> str:
    """Return the role under which the template writes a message.

    `developer` is the name of newer clients for the system role. A template without the role would write a turn of a
    kind that the model was not trained on. Raises `Refusal` for such a role.
    """
    if role in ROLES or re.search(rf"""["']{re.escape(role)}["']""", template):
        return role
    if role == "developer":
        return "system"
    known = ", ".join((*ROLES, "developer"))
    raise bad_field("messages", f"message {number} has the role {role!r}; known are {known}", "unknown_role")


def note_unused(body: Body, template: str | None) -> None:
    """Warn about fields that the model's template does not use; mutates the warnings of `body`."""
    written = template or ""
    if "reasoning_effort" in body and "reasoning_effort" not in written:
        body.warnings.append("field 'reasoning_effort' has no effect: the model's chat template has no place for it")
    strange = {
        f"messages[{number}].{name}"
        for number, message in enumerate(body.get("messages", ()))
        for name, value in message.items()
        if name not in MESSAGE_FIELDS and value is not None and name not in written
    }
    room = max(0, MAX_WARNINGS - len(body.warnings))
    for path in sorted(strange)[:room]:
        body.warnings.append(f"unknown field {path[:120]!r} is ignored: the model's chat template has no place for it")


def _readable(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call
