"""LLM: the Python API. A model, its cache and an engine in one object."""

import os
import weakref
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from kvloom.cache.kvcache import KVCache
from kvloom.engine.beam import BeamSearchParams
from kvloom.engine.callers import Add, Call, Callers, add_all
from kvloom.engine.config import EngineConfig
from kvloom.engine.engine import Engine
from kvloom.engine.output import RequestOutput
from kvloom.engine.params import SamplingParams
from kvloom.engine.prompt import Prompt, read_prompt, several
from kvloom.engine.request import Request
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.errors import DoesNotFitError, InvalidInputError
from kvloom.kernels.threads import set_threads
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.loader import load_model
from kvloom.policies.policy import Policy
from kvloom.policies.reading import read_allow_list, read_policy
from kvloom.spec.policy import FULL, PolicySpec
from kvloom.spec.store import NATIVE_STORE

if TYPE_CHECKING:
    from kvloom.engine.progressbar import ProgressBar

Messages = Seq[Mapping[str, Any]]
"""A conversation: {"role": ..., "content": ...} in order."""

POPULATED_BYTES = 64 << 20
"""First bytes of the arena whose pages are committed as the engine starts: a longer first prompt writes so many."""

PREPARED_TOKENS = 2048
"""Tokens of the longest step whose buffers are allocated as the engine starts."""



class LLM:
    """Loads a model and generates with it, offline or as the engine of a server.

    `model` is a catalogue name, a Hugging Face id, a folder with safetensors or a `.gguf` file. `kv_policy` is the
    policy of every request that names none, as text such as `snapkv(budget=1024)+adaptive` or as a `PolicySpec`;
    `allow_kv_policies` lists which others requests may name (selectors or whole policies), None for any. `hf_overrides`
    are entries that replace those of the model's config.json, such as `{"rope_scaling": {...}}`. `threads` is how many
    threads compute, in this process: all models share them. Without it: `OMP_NUM_THREADS`, or as many as there are
    cores to use. `populate` makes the first pages of the cache and of a step's buffers at once: the start takes up to
    half a second longer, and a first long prompt need not wait for them. Raises `KvloomError`s: model not found,
    checkpoint damaged, unsupported, does not fit.

    Methods may be called from any number of threads: one thread runs the engine, and the requests of all callers share
    its steps. It ends with `close`, which leaving a `with` block and garbage collection call too. `engine` is for one
    thread, and only while no call runs. A process that was forked while no call ran may go on with its copy.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2",
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        seed: int = 0,
        backend: str = "auto",
        quantization: str | None = None,
        threads: int | None = None,
        kv_policy: str | PolicySpec | None = None,
        kv_cache_dtype: str = "auto",
        allow_kv_policies: Seq[str] | None = None,
        hf_overrides: Mapping[str, Any] | None = None,
        populate: bool = True,
    ) -> None:
        config = EngineConfig(
            dtype=dtype,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            seed=seed,
            backend=backend,
            quantization=quantization,
            threads=threads,
            kv_policy=FULL if kv_policy is None else read_policy(kv_policy),
            kv_cache_dtype=kv_cache_dtype,
            allow_kv_policies=read_allow_list(allow_kv_policies),
        )
        if not isinstance(model, str | os.PathLike):
            raise InvalidInputError(f"model must be a name or a path, not {type(model).__name__}")
        if threads is not None:
            set_threads(threads)
        Policy.of(config.stored_policy)  # one that cannot run is refused before anything is loaded
        checkpoint = open_checkpoint(os.fspath(model), revision=revision, overrides=hf_overrides)
        self.model = checkpoint.name
        self.generation_config = checkpoint.generation_config
        self.config = config
        self.dtype = config.resolve_dtype()
        torch_dtype = getattr(torch, self.dtype)
        spec = checkpoint.config.kv_spec(block_size, NATIVE_STORE[self.dtype])
        kv_bytes = config.resolve_kv_bytes(spec, checkpoint.config.max_position)
        length = config.resolve_max_model_len(spec, checkpoint.config.max_position, kv_bytes)
        self.tokenizer = checkpoint.tokenizer() if tokenizer is None else open_checkpoint(tokenizer).tokenizer()
        checkpoint.check(self.tokenizer)
        try:
            runnable = load_model(
                checkpoint, torch_dtype, block_size=block_size, backend=config.backend, quantization=config.quantization
            )
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            raise DoesNotFitError(
                f"the weights of {self.model} in {self.dtype} cannot be had: no memory is left. Use a smaller model, "
                "another --dtype or --quantization"
            ) from error
        cache = KVCache(spec, kv_bytes, max_num_seqs + 1, torch_dtype, layout=runnable.layout)
        if populate:
            # Not while the weights are read, because reading needs memory too.
            cache.memory.populate(POPULATED_BYTES)
            runnable.prepare(min(max_num_batched_tokens, PREPARED_TOKENS))
        scheduler = Scheduler(
            cache.lanes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.engine = Engine(
            Runner(runnable, cache),
            scheduler,
            self.tokenizer,
            max_model_len=length,
            eos_token_ids=checkpoint.config.eos_token_ids,
            seed=seed,
            kv_policy=config.kv_policy,
            kv_store=config.kv_store,
            allow_kv_policies=config.allow_kv_policies,
            max_position=config.max_model_len or checkpoint.config.max_position,
        )
        self._callers = Callers(self.engine)
        self._finalizer = weakref.finalize(self, self._callers.close)

    def close(self) -> None:
        """End the engine's thread; calls that wait fail, and later ones raise `InvalidInputError`."""
        self._finalizer()

    def __enter__(self) -> Self:
        """Return itself, to be closed on leaving."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""
        return self.engine.max_model_len

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Return one finished `RequestOutput` for each prompt, in order.

        Shows a progress bar on stderr (a terminal only) for several prompts unless `use_tqdm` is False. All prompts are
        checked before any runs; on an error or Ctrl-C every request of the call is aborted and its memory is free.
        """
        given = several(prompts)
        if isinstance(sampling_params, Seq):
            params = list(sampling_params)
        else:
            params = [SamplingParams() if sampling_params is None else sampling_params] * len(given)
        if len(params) != len(given):
            raise InvalidInputError(f"{len(given)} prompts need as many sampling_params, or one; got {len(params)}")
        adds = [self._adding(prompt, chosen) for prompt, chosen in zip(given, params, strict=True)]
        return self._finished(add_all(adds), use_tqdm and len(adds) > 1, len(adds))

    def beam_search(self, prompts: Prompt | Seq[Prompt], params: BeamSearchParams | None = None) -> list[RequestOutput]:
        """Return one finished `RequestOutput` for each prompt, whose outputs are the best sequences, best first.

        `cumulative_logprob` of an output is the sum over its tokens. Raises as `generate` does, without side effects.
        """
        adds: list[Callable[[Engine], Request]] = []
        for prompt in several(prompts):
            ids, options = read_prompt(prompt, self.tokenizer)
            adds.append(
                partial(Engine.add_beam_search, prompt_token_ids=ids, params=params or BeamSearchParams(), **options)
            )
        return self._finished(add_all(adds), False, len(adds))

    def chat(
        self,
        messages: Messages | Seq[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Return answers to one conversation or several, through the model's chat template (`ChatTemplateError`).

        `template_options` are those of `Tokenizer.encode_chat` and variables of the template. Control tokens that
        messages spell are text, unless `allow_special_tokens=True` is among them.
        """
        if not isinstance(messages, Seq):
            kind = type(messages).__name__
            raise InvalidInputError(f"messages are a list of dicts, or a list of such lists; not {kind}")
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Seq[Any] = [messages] if single else messages
        prompts = [{"prompt_token_ids": self.tokenizer.encode_chat(list(c), **template_options)} for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Yield the request as it grows, after every token; closing the iterator early aborts it.

        It grows while any call waits for a token; steps of another call may add several tokens at once.
        """
        call = Call(add_all([self._adding(prompt, sampling_params or SamplingParams())]), streaming=True)
        with self._closing(call):
            while True:
                (output,) = self._callers.wait_for(call)
                yield output
                if output.finished:
                    return

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request of any caller before the next step; its caller gets it with the finish reason `abort`.

        Returns its output so far, or None when there is no such request. Its blocks are free on return.
        """
        return self._callers.call(lambda engine: engine.abort(request_id)).result()

    def stats(self) -> dict[str, Any]:
        """Return counters of the engine and bytes of the cache, taken between two steps."""
        return self._callers.call(self._counts).result()

    def _counts(self, engine: Engine) -> dict[str, Any]:
        cache = engine.cache
        return {
            "model": self.model,
            "dtype": self.dtype,
            "backend": engine.runner.model.name,
            "max_model_len": engine.max_model_len,
            "weight_bytes": engine.runner.model.num_bytes,
            "kv_cache_bytes": cache.arena.num_bytes,
            "kv_bytes_in_use": cache.bytes_in_use,
            "kv_bytes_cached": cache.index.idle_bytes,
            "kv_bytes_peak": cache.arena.peak_bytes,
            "kv_bytes_stranded": cache.arena.slabs.stranded_bytes,
            "requests_running": len(engine.scheduler.running),
            "requests_waiting": len(engine.scheduler.waiting),
            "preemptions": engine.scheduler.num_preemptions,
            "prefix_cache_queries": engine.scheduler.prefixes.queries,
            "prefix_cache_hits": engine.scheduler.prefixes.hits,
            "prompt_tokens": engine.num_prompt_tokens,
            "generation_tokens": engine.answers.num_generated_tokens,
            "evicted_tokens": engine.evictions.evicted_tokens,
            "steps": engine.num_steps,
            "step_seconds": engine.step_seconds,
        }

    def _adding(self, prompt: Prompt, params: SamplingParams) -> Callable[[Engine], Request]:
        """Return a function that queues a request; prompt and answer form are processed in the caller's thread."""
        if not isinstance(params, SamplingParams):
            raise InvalidInputError(f"sampling_params must be SamplingParams, not {type(params).__name__}")
        ids, options = read_prompt(prompt, self.tokenizer)
        if params.structured_outputs is not None:
            self.engine.processors.processors(params)
        return partial(Engine.add, prompt_token_ids=ids, params=params, **options)

    def _finished(self, add: Add, show: bool, total: int) -> list[RequestOutput]:
        """Return the outputs of the requests that `add` queues, once all have ended."""
        call, engine = Call(add), self.engine
        with _progress_bar(total) if show else nullcontext() as bar, self._closing(call):

            def shown(call: Call) -> None:
                assert bar is not None
                bar.show(total - len(call.pending), engine.answers.num_generated_tokens, engine.step_seconds)

            return self._callers.wait_for(call, None if bar is None else shown) if total else []

    def _closing(self, call: Call) -> ExitStack:
        stack = ExitStack()
        stack.callback(self._callers.close_call, call)
        return stack


def _progress_bar(total: int) -> "ProgressBar":
    """Return a bar for `total` requests; what draws it is loaded only where one is shown, for a start takes long."""
    from kvloom.engine.progressbar import ProgressBar

    return ProgressBar(total)
