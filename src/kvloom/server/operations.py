"""The routes beside completions: models, tokenisation, health, figures, and the prefix cache."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

import kvloom
from kvloom.models.tokenizer import SPECIAL_NAMES
from kvloom.server.bodies import DETOKENIZE, TOKENIZE
from kvloom.server.conversation import conversation_ids
from kvloom.server.exchange import context_of, encode_large_json, encoded_response, json_response, unless_gone
from kvloom.server.fields import Body
from kvloom.server.openapi import document
from kvloom.server.refusal import Refusal, bad_field
from kvloom.server.service import Service, checked_text
from kvloom.server.tools import offered_tools

LINKS = {"models": "/v1/models", "openapi": "/openapi.json", "health": "/health", "metrics": "/metrics"}
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


async def root(request: Request, service: Service) -> ASGIApp:
    """Answer GET /: what this is and where to go on; the model's name only where no key is asked for."""
    answer: dict[str, Any] = {"name": "kvloom", "version": kvloom.__version__}
    if not service.config.api_key:
        answer["model"] = service.names[0]
    base = service.config.root_path
    return json_response({**answer, "links": {name: base + path for name, path in LINKS.items()}})


async def models(request: Request, service: Service) -> ASGIApp:
    """Answer GET /v1/models."""
    return json_response({"object": "list", "data": [_model(service, name) for name in service.names]})


async def model(request: Request, service: Service) -> ASGIApp:
    """Answer GET /v1/models/{model}."""
    name = service.intake.check_model(Body({"model": request.path_params["model"]}))
    return json_response(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "kvloom",
        "root": service.llm.model,
        "parent": None,
        "max_model_len": service.engine.max_model_len,
    }


async def tokenize(request: Request, service: Service) -> ASGIApp:
    """Answer POST /tokenize: text or a conversation to token ids."""
    body = await _body(request, service, TOKENIZE)
    if ("prompt" in body) == ("messages" in body):
        raise bad_field("prompt", "give either 'prompt' or 'messages'")
    service.intake.check_model(body)

    def encode() -> bytes:
        if "messages" in body:
            tools = offered_tools(body, service.tokenizer.chat_template)
            ids = conversation_ids(service, body, None if tools is None else tools.offered)
        else:
            ids = service.tokenizer.encode(checked_text(body.get("prompt")), body.get("add_special_tokens", True))
        answer = {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids, "token_strs": None}
        if body.get("return_token_strs", False):
            answer["token_strs"] = [service.tokenizer.id_to_token(token) for token in ids]
        return encode_large_json(answer)

    return encoded_response(await unless_gone(request.receive, service.workers.offload(encode)))


async def tokenizer_info(request: Request, service: Service) -> ASGIApp:
    """Answer GET /tokenizer_info: special tokens, the chat template and the length, as remote tokenizers want them."""
    tokenizer = service.tokenizer
    special: dict[str, Any] = {name: tokenizer.special_tokens.get(name) for name in SPECIAL_NAMES}
    ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in special.items()}
    return json_response(
        {
            **special,
            **ids,
            "eos_token_ids": list(service.engine.sampler.eos_token_ids),
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.engine.max_model_len,
            "chat_template": tokenizer.chat_template,
        }
    )


async def detokenize(request: Request, service: Service) -> ASGIApp:
    """Answer POST /detokenize: token ids to text, control tokens included."""
    body = await _body(request, service, DETOKENIZE)
    service.intake.check_model(body)
    ids: list[int] = body.get("tokens")
    vocabulary = service.engine.runner.model.config.vocab_size
    if any(token >= vocabulary for token in ids):
        raise bad_field("tokens", f"tokens holds {max(ids)}; this model has ids 0 to {vocabulary - 1}")
    text = await unless_gone(request.receive, service.workers.offload(lambda: service.tokenizer.decode(ids, False)))
    return json_response({"prompt": text})


async def _body(request: Request, service: Service, table: Any) -> Body:
    body = await service.read_body(await service.receive_body(request), table)
    context_of(request).warnings.extend(body.warnings)
    return body


async def embeddings(request: Request, service: Service) -> ASGIApp:
    """Refuse POST /v1/embeddings, naming what computes embeddings instead."""
    raise Refusal(
        400,
        f"{service.names[0]!r} generates text, and this server computes no embeddings. Run an embedding model in a "
        "server that does (vllm serve, llama-server --embeddings, text-embeddings-inference), and send there what "
        "asks for /v1/embeddings",
        code="unsupported",
    )


async def health(request: Request, service: Service) -> ASGIApp:
    """Answer GET /health: 200 while requests are taken, 503 when the engine is dead or the server ends."""
    if not service.thread.alive:
        raise Refusal(503, f"the engine is dead: {type(service.thread.error).__name__}", code="engine_dead")
    if service.draining:
        raise Refusal(503, "the server is shutting down", code="shutting_down")
    return Response(status_code=200)


async def ping(request: Request, service: Service) -> ASGIApp:
    """Answer GET and POST /ping as /health."""
    return await health(request, service)


async def version(request: Request, service: Service) -> ASGIApp:
    """Answer GET /version."""
    return json_response({"version": kvloom.__version__})


async def load(request: Request, service: Service) -> ASGIApp:
    """Answer GET /load: requests that are being answered, prompts that run or wait."""
    answer = {"server_load": service.num_live, "requests_waiting": len(service.queue)}
    return json_response({**answer, "http_requests": service.num_open})


async def server_info(request: Request, service: Service) -> ASGIApp:
    """Answer GET /server_info: options, model and what the cache holds."""
    stats = service.thread.stats
    model = service.engine.runner.model
    return json_response(
        {
            "version": kvloom.__version__,
            "model": service.llm.model,
            "served_model_name": list(service.names),
            "dtype": service.llm.dtype,
            "backend": model.name,
            "vocab_size": model.config.vocab_size,
            "max_model_len": service.engine.max_model_len,
            "chat_template": service.tokenizer.has_chat_template,
            "server": service.config.public(),
            "engine": {name: getattr(stats, name) for name in stats.__slots__},
        }
    )


async def metrics(request: Request, service: Service) -> ASGIApp:
    """Answer GET /metrics in the text format of Prometheus."""
    text = await asyncio.to_thread(service.metrics.exposition, service.thread.stats)
    return Response(text, headers={"content-type": PROMETHEUS})


async def reset_prefix_cache(request: Request, service: Service) -> ASGIApp:
    """Answer POST /reset_prefix_cache: discard all cached prefixes; running requests keep their blocks."""
    await unless_gone(request.receive, service.between_steps(lambda engine: engine.cache.index.clear()))
    return Response(status_code=200)


async def openapi(request: Request, service: Service) -> ASGIApp:
    """Answer GET /openapi.json."""
    return json_response(document(service.config.root_path, bool(service.config.api_key)))
