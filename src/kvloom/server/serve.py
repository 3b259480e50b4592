"""Run the server: uvicorn around the application, with an orderly shutdown."""

import asyncio
import contextlib
import gc
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.config import Config

import kvloom
from kvloom.engine.llm import LLM
from kvloom.engine.startup import engine_figures
from kvloom.errors import InvalidInputError
from kvloom.models.chat_template import read_template
from kvloom.server.app import build_app
from kvloom.server.listening import address_of, listen
from kvloom.server.logs import configure_logs, wrapped_stderr
from kvloom.server.sampling import generation_defaults
from kvloom.server.service import Service
from kvloom.server.settings import ServerConfig
from kvloom.server.tracing import Tracer

logger = logging.getLogger("kvloom.server")

BACKLOG = 1024
LAST_SECONDS = 5
"""Time for cancelled answers to be sent, after the shutdown timeout."""

STATS_SECONDS = 10.0
TICK = 0.05
SWITCH_SECONDS = 0.0002
"""Seconds for which the engine's thread may hold the interpreter while the event loop waits for it.

Every call on a socket releases the interpreter lock. At Python's default of 5 ms a busy engine would stretch an
exchange, which has some dozens of such calls, to a quarter of a second.
"""


class Server(uvicorn.Server):
    """Uvicorn's server with kvloom's shutdown: after SIGTERM or SIGINT new requests are refused and running ones may
    finish for `shutdown_timeout` seconds, then they are cancelled; a second signal cancels at once.
    """

    def __init__(self, config: Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.hurry = False
        self._stats: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Start the engine's thread, then listen."""
        self.service.start()
        await super().startup(sockets)
        if self.started:
            scheme = "https" if self.config.is_ssl else "http"
            addresses = [address_of(sock, scheme) for server in self.servers for sock in server.sockets]
            logger.info("listening", extra={"facts": {"addresses": addresses, "model": self.service.names[0]}})
            if not self.service.config.disable_log_stats:
                self._stats = asyncio.create_task(self._log_stats())

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT for the time of the run; the process then ends with a status of its own."""
        loop = asyncio.get_running_loop()
        taken = []
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
                loop.add_signal_handler(number, self._signalled, number)
                taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)

    def _signalled(self, number: int) -> None:
        self.hurry = self.should_exit
        self.should_exit = True
        logger.info("%s: %s", signal.Signals(number).name, "cancelling" if self.hurry else "finishing what runs")

    async def shutdown(self, sockets: Any = None) -> None:
        """Finish or cancel what runs, close every connection, and stop the engine's thread."""
        service = self.service
        service.draining = True
        deadline = time.monotonic() + service.config.shutdown_timeout
        while service.num_live and not self.hurry and time.monotonic() < deadline:
            await asyncio.sleep(TICK)
        if service.num_live:
            logger.warning("cancelling %d requests", service.num_live)
            service.cancel_all()
        if self._stats is not None:
            self._stats.cancel()
        await super().shutdown(sockets)
        service.stop_watching()
        await asyncio.to_thread(service.close)
        logger.info("stopped")

    async def _log_stats(self) -> None:
        """Write a line about the load at intervals, while there is any."""
        before = self.service.thread.stats
        while True:
            await asyncio.sleep(STATS_SECONDS)
            stats = self.service.thread.stats
            if stats.steps != before.steps:
                facts = {
                    "running": stats.running,
                    "waiting": len(self.service.queue),
                    "prompt_tokens_per_s": round((stats.prompt_tokens - before.prompt_tokens) / STATS_SECONDS, 1),
                    "generation_tokens_per_s": round(
                        (stats.generation_tokens - before.generation_tokens) / STATS_SECONDS, 1
                    ),
                    "kv_usage": round(stats.kv_usage, 4),
                    "prefix_hit_rate": round(stats.prefix_hits / max(1, stats.prefix_queries), 4),
                    "preemptions": stats.preemptions,
                }
                logger.info("load", extra={"facts": facts})
            before = stats


def build_server(llm: LLM, config: ServerConfig, *, tracer: Tracer | None = None) -> Server:
    """Return a server around `llm`, ready to `run`; configures no logs."""
    service = Service(llm, config)
    app = build_app(service, tracer or Tracer(config.otlp_traces_endpoint, service.names[0]))
    options = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        uds=config.uds,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    return Server(options, service)


def serve(
    model: str,
    config: ServerConfig,
    llm_options: Mapping[str, Any],
    *,
    generation_config: str = "auto",
    chat_template: str | None = None,
) -> None:
    """Load `model` and answer requests until a signal ends it; raises `KvloomError` when it cannot start.

    `generation_config` says where the defaults of sampling come from: `auto`, `vllm`, or a folder. `chat_template` is
    a file or the text of a template, None for the model's own.
    """
    configure_logs()
    with wrapped_stderr():
        _serve(model, config, llm_options, generation_config, chat_template)


def _serve(
    model: str,
    config: ServerConfig,
    llm_options: Mapping[str, Any],
    generation_config: str,
    chat_template: str | None,
) -> None:
    sys.setswitchinterval(SWITCH_SECONDS)
    tracer = Tracer(config.otlp_traces_endpoint, (config.served_model_name or (model,))[0])
    if not config.is_loopback and not config.api_key:
        logger.warning(
            "SECURITY: the server listens on %s without an API key: everyone who reaches this port can use it. "
            "Give --api-key, or --host 127.0.0.1",
            config.host,
        )
    template = None if chat_template is None else read_template(chat_template)
    sock = listen(config)
    started = time.monotonic()
    llm = LLM(model, **llm_options)
    if template is not None:
        llm.tokenizer.chat_template = template
    facts = {
        "version": kvloom.__version__,
        "model": llm.model,
        "dtype": llm.dtype,
        "max_model_len": llm.max_model_len,
        "seconds": round(time.monotonic() - started, 2),
        **engine_figures(llm),
    }
    logger.info("model loaded", extra={"facts": facts})
    config = replace(config, generation_defaults=_generation_defaults(generation_config, llm))
    server = build_server(llm, config, tracer=tracer)
    spare_collections()
    try:
        server.run([sock])
    finally:
        gc.unfreeze()  # so that objects are collected at the end of the process
        tracer.close()


def spare_collections() -> None:
    """Exclude all existing objects from Python's garbage collections, until `gc.unfreeze`.

    Half a million objects of modules and the model live as long as the process. A full collection traverses each of
    them and stops every thread for 0.15 seconds on a small machine; objects of requests take a few ms.
    """
    gc.collect()
    gc.freeze()


def _generation_defaults(source: str, llm: LLM) -> dict[str, Any]:
    """Return the sampling defaults of `source`; raises `InvalidInputError` for a file that cannot be read."""
    if source in ("auto", "vllm"):
        return generation_defaults(llm.generation_config if source == "auto" else {})
    path = Path(source)
    path = path / "generation_config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"cannot read the generation config {path}: {error}. Give auto, vllm or a folder"
        raise InvalidInputError(message) from None
    if not isinstance(found, dict):
        raise InvalidInputError(f"the generation config {path} is not a JSON object")
    return generation_defaults(found)
