"""`kvloom serve [MODEL]`: the OpenAI API around one model, until a signal ends it."""

import os
from dataclasses import fields
from typing import Any

import click

from kvloom.cli.command import Command, Flag
from kvloom.cli.engineflags import ENGINE_FLAGS, MODEL_FLAG, engine_arguments
from kvloom.cli.plugin import PLUGIN_FLAG
from kvloom.cli.prompt import choose_model
from kvloom.cli.values import ByteCount, Text
from kvloom.errors import InvalidInputError
from kvloom.server.settings import SCHEDULING_POLICIES, ServerConfig

_DEFAULTS = {entry.name: entry.default for entry in fields(ServerConfig)}


def _flag(name: str, help: str, section: str = "Server", **attributes: Any) -> Flag:
    """Return the flag of one field of `ServerConfig`, with the field's default unless `attributes` has another."""
    field = name.removeprefix("--").split("/")[0].replace("-", "_")
    attributes.setdefault("default", _DEFAULTS[field])
    return Flag([name], section=section, help=help, **attributes)


PRODUCT_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
MAX_PRODUCTS = 128
"""Matrix products, compiled for one shape each, that torch caches. A server's batches differ in shape, and at torch's
default of 1024 in each of two caches a model in bfloat16 on the eager backend holds a gigabyte of them."""

SERVER_FLAGS = [
    _flag("--host", "Address to listen on; others than loopback should have an --api-key.", type=Text()),
    _flag("--port", "Port to listen on; 0 takes a free one.", type=int),
    _flag("--uds", "Unix socket to listen on in place of --host and --port.", type=Text(), metavar="PATH"),
    _flag(
        "--root-path",
        "Path under which a proxy shows the server, e.g. /llm; it may take it off or leave it.",
        type=Text(),
    ),
    _flag(
        "--allowed-hosts",
        "Host name by which the server may be asked for; may be repeated, *.example.org is all below it, * any. "
        "Without it: this machine's own names on loopback without an --api-key, else any.",
        type=Text(),
        metavar="NAME",
        multiple=True,
        default=None,
    ),
    _flag(
        "--allowed-origins",
        "Origin whose pages may use the server from a browser, e.g. https://chat.example.org; may be repeated, * any.",
        type=Text(),
        metavar="ORIGIN",
        multiple=True,
        default=None,
    ),
    _flag(
        "--ssl-certfile",
        "PEM file with the certificate and its chain: the server speaks TLS.",
        type=Text(),
        metavar="FILE",
    ),
    _flag(
        "--ssl-keyfile", "PEM file with the key of --ssl-certfile, if it is not in there.", type=Text(), metavar="FILE"
    ),
    _flag(
        "--served-model-name",
        "Name of the model in requests; may be repeated. Without it: MODEL as given.",
        type=Text(),
        multiple=True,
        default=None,
    ),
    _flag(
        "--api-key",
        "Key that clients must send; may be repeated, and KVLOOM_API_KEY may be a JSON list.",
        type=Text(),
        multiple=True,
        default=None,
    ),
    _flag("--isolate-by-key", "Never share cached prefixes between API keys.", is_flag=True),
    _flag(
        "--scheduling-policy",
        "Order of service: by arrival, or by the `priority` that requests send (lower first).",
        type=click.Choice(SCHEDULING_POLICIES),
    ),
    Flag(
        ["--generation-config"],
        section="Server",
        type=Text(),
        metavar="auto|vllm|FOLDER",
        default="auto",
        help="Defaults of sampling: auto takes the model's generation_config.json, vllm takes none of it.",
    ),
    Flag(
        ["--chat-template"],
        section="Server",
        type=Text(),
        metavar="FILE|TEXT",
        help="Jinja template of conversations in place of the model's own.",
    ),
    Flag(
        ["--seed"],
        section="Server",
        type=int,
        default=0,
        help="Seed of requests that send none; with it, the same requests in the same order get the same answers.",
    ),
    Flag(
        ["--device"],
        section="Server",
        type=click.Choice(("auto", "cpu")),
        default="auto",
        help="Where the model runs; auto is cpu.",
    ),
    Flag(
        ["--enable-chunked-prefill/--no-enable-chunked-prefill"],
        section="Server",
        default=True,
        help="Compute long prompts in chunks of --max-num-batched-tokens; it cannot be switched off.",
    ),
    _flag("--shutdown-timeout", "Time for running answers to finish after SIGTERM.", type=float, metavar="SECONDS"),
]
LIMIT_FLAGS = [
    Flag(
        ["--allow-kv-policies"],
        section="Limits",
        type=Text(),
        metavar="POLICY",
        multiple=True,
        help="Policy that requests may ask for by `kv_policy`: a method with any arguments, or one whole policy; may "
        "be repeated; `all`, `none`. Without it: every method but those that compute the prompt a second time.",
    ),
    _flag("--max-num-queued-reqs", "Most prompts that wait; more are refused with 429.", "Limits", type=int),
    _flag("--max-concurrent-requests", "Most HTTP requests at once; more are refused with 503.", "Limits", type=int),
    _flag("--max-body-bytes", "Largest body of a request.", "Limits", type=ByteCount(), metavar="BYTES"),
    _flag("--max-sequences-per-request", "Most prompts times answers of one request.", "Limits", type=int),
    _flag("--max-logprobs", "Most log-probabilities a token.", "Limits", type=int),
    _flag(
        "--client-timeout",
        "Disconnect a client that sends or receives nothing for so long.",
        "Limits",
        type=float,
        metavar="SECONDS",
    ),
    _flag(
        "--timeout-keep-alive",
        "Keep a connection open so long after an answer; longer than clients' pools keep theirs.",
        "Limits",
        type=int,
        metavar="SECONDS",
    ),
]
LOG_FLAGS = [
    _flag("--enable-log-requests", "Log the options of each request; never its text.", "Logs", is_flag=True),
    _flag("--disable-log-stats", "Do not log the load every ten seconds.", "Logs", is_flag=True),
    _flag(
        "--otlp-traces-endpoint",
        "Send OpenTelemetry traces there (OTLP over HTTP); needs kvloom[otel].",
        "Logs",
        type=Text(),
        metavar="URL",
    ),
]


def run(
    argument: str | None,
    model: str,
    generation_config: str,
    chat_template: str | None,
    seed: int,
    enable_chunked_prefill: bool,
    allow_kv_policies: tuple[str, ...],
    **values: Any,
) -> None:
    """Check the flags, load the model and serve it; raises `KvloomError`."""
    name = choose_model(click.get_current_context(), argument, model)
    if not enable_chunked_prefill:
        raise InvalidInputError("prompts are always read in chunks; raise --max-num-batched-tokens for larger ones")
    names = {entry.name for entry in fields(ServerConfig)}
    given = {key: value for key, value in values.items() if key in names and value is not None}
    for several in ("served_model_name", "api_key", "allowed_hosts", "allowed_origins"):
        given[several] = tuple(given.get(several, ()))
    config = ServerConfig(**given)

    for variable in PRODUCT_CACHES:
        os.environ.setdefault(variable, str(MAX_PRODUCTS))

    from kvloom.server.kvpolicy import allowed_policies
    from kvloom.server.serve import serve as serve_model

    options = engine_arguments(values)
    options |= {"seed": seed, "allow_kv_policies": allowed_policies(allow_kv_policies)}
    serve_model(name, config, options, generation_config=generation_config, chat_template=chat_template)


serve = Command(
    "serve",
    callback=run,
    short_help="Answer OpenAI clients.",
    help="""Serve MODEL (default: the catalogue's smollm2, fetched on first use) behind OpenAI's API at
    http://HOST:PORT/v1, with streaming, log-probabilities, token-id prompts and figures at /metrics.

    Admission is by bytes of KV cache: a request that can never fit is refused, one that does not fit now waits.""",
    params=[
        click.Argument(["argument"], required=False, metavar="[MODEL]"),
        MODEL_FLAG,
        PLUGIN_FLAG,
        *ENGINE_FLAGS,
        *SERVER_FLAGS,
        *LIMIT_FLAGS,
        *LOG_FLAGS,
    ],
)
