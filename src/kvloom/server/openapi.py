"""The OpenAPI document, made from the tables of fields and routes."""

from collections.abc import Mapping
from typing import Any

from kvloom.server.anthropicfields import COUNT_TOKENS, MESSAGES
from kvloom.server.bodies import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from kvloom.server.dialect import ANTHROPIC, ANTHROPIC_TYPES, dialect_of
from kvloom.server.fields import Effect, Field
from kvloom.server.refusal import TYPES
from kvloom.server.responsesfields import RESPONSES

JSON_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": sorted(set(TYPES.values()))},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

ANTHROPIC_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string", "enum": sorted(set(ANTHROPIC_TYPES.values()))},
                "message": {"type": "string"},
            },
        },
    },
}

POSTS: dict[str, tuple[str, Mapping[str, Field]]] = {
    "/v1/completions": ("Continue prompts of text or token ids.", COMPLETION),
    "/v1/chat/completions": ("Answer a conversation.", CHAT),
    "/v1/responses": ("Answer a conversation with items; nothing is kept.", RESPONSES),
    "/v1/messages": ("Answer a conversation in Anthropic's form.", MESSAGES),
    "/v1/messages/count_tokens": ("The tokens of a conversation's prompt.", COUNT_TOKENS),
    "/tokenize": ("Text or a conversation to token ids.", TOKENIZE),
    "/detokenize": ("Token ids to text.", DETOKENIZE),
}
GETS = {
    "/v1/models": "The models that are served.",
    "/": "What this is, and where to go on.",
    "/tokenizer_info": "Special tokens, chat template and length of the model.",
    "/version": "The version of the server.",
    "/load": "How much runs and waits.",
    "/server_info": "Options of the server and figures of the engine.",
}


def body_schema(table: Mapping[str, Field]) -> dict[str, Any]:
    """Return the schema of a body: the fields of `table` that are used; others are allowed."""
    properties = {}
    for name, entry in table.items():
        if entry.effect is Effect.USED:
            kind = entry.kind.schema()
            if not entry.required:
                kind = {"anyOf": [kind, {"type": "null"}]}
            properties[name] = {"description": entry.doc, **kind}
    required = [name for name, entry in table.items() if entry.required]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def document(root_path: str, with_keys: bool) -> dict[str, Any]:
    """Return the document of a server behind `root_path`, which asks for a key where `with_keys`."""
    paths: dict[str, Any] = {}
    for path, (summary, table) in POSTS.items():
        content = {"application/json": {"schema": body_schema(table)}}
        answers = {"application/json": {"schema": {"type": "object"}}}
        if "stream" in table:
            answers["text/event-stream"] = {}  # events of JSON chunks; OpenAPI 3.1 has no schema for one event
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": content},
                "responses": {"200": {"description": "Done.", "content": answers}, **_errors(JSON_ERRORS, path)},
            }
        }
    for path, summary in GETS.items():
        answer = {"description": "Done.", "content": {"application/json": {"schema": {"type": "object"}}}}
        paths[path] = {"get": {"summary": summary, "responses": {"200": answer, **_errors((401, 403, 500, 503))}}}
    for path, method, summary in (
        ("/health", "get", "Whether requests are taken."),
        ("/ping", "get", "Whether requests are taken."),
        ("/reset_prefix_cache", "post", "Discard cached prefixes."),
    ):
        responses = {"200": {"description": "Done."}, **_errors((401, 403, 500, 503))}
        paths[path] = {method: {"summary": summary, "responses": responses}}
    refused = {"summary": "Refused: no embeddings are computed here.", "responses": _errors((400, 401, 403, 500, 503))}
    paths["/v1/embeddings"] = {"post": refused}
    text = {"text/plain": {"schema": {"type": "string"}}}
    metrics = {"200": {"description": "Figures.", "content": text}, **_errors((403, 500, 503))}
    paths["/metrics"] = {"get": {"summary": "Figures in the text format of Prometheus.", "responses": metrics}}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "kvloom", "version": "1", "description": "OpenAI's API around one language model."},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
    }
    if with_keys:
        found["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        found["security"] = [{"key": []}]
    return found


def _errors(statuses: tuple[int, ...], path: str = "/") -> dict[str, Any]:
    schema = ANTHROPIC_SCHEMA if dialect_of(path) is ANTHROPIC else ERROR_SCHEMA
    content = {"application/json": {"schema": schema}}
    return {str(status): {"description": TYPES[status].replace("_", " "), "content": content} for status in statuses}
