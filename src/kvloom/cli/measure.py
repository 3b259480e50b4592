"""`kvloom measure MODEL --text FILE`: what cache policies cost a model on a text, in quality, memory and speed."""

import hashlib
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.answer import write, write_json
from kvloom.cli.command import Command, Flag
from kvloom.cli.engineflags import ENGINE_FLAGS, MODEL_FLAG, engine_arguments
from kvloom.cli.interrupt import StopOnInterrupt
from kvloom.cli.loading import load_llm
from kvloom.cli.plugin import PLUGIN_FLAG
from kvloom.cli.prompt import choose_model
from kvloom.cli.values import Text, TokenCount
from kvloom.errors import InvalidInputError, KvloomError

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM
    from kvloom.measure.results import Results
    from kvloom.measure.session import Progress, Session
    from kvloom.measure.window import Window
    from kvloom.spec.policy import PolicySpec

STDOUT = Path("-")
SWITCHED_ON = ("1", "true", "yes", "on", "-")
"""Values of --json, from the environment for instance, that name no file."""

CPUINFO = Path("/proc/cpuinfo")
SAVE_SECONDS = 10.0
FEW_WINDOWS = 8
"""With fewer windows intervals are rough, and the report says so."""


def run(
    argument: str | None,
    model: str,
    text: tuple[Path, ...],
    kv_policies: tuple[str, ...],
    all_policies: bool,
    keep: tuple[float, ...],
    context: int | None,
    output: int,
    windows: int,
    cost_runs: int,
    as_json: Path | None,
    **values: Any,
) -> None:
    """Run the missing measurements, store and print them; raises `KvloomError`, and `KeyboardInterrupt` at the end."""
    name = choose_model(click.get_current_context(), argument, model)
    texts = [_read(path) for path in text]
    _check_numbers(keep, output, windows, cost_runs)

    from kvloom.measure.results import Results
    from kvloom.measure.session import Session, check_policy
    from kvloom.policies.reading import read_policy
    from kvloom.spec.policy import FULL

    named = [read_policy(policy) for policy in kv_policies]

    file = None if as_json in (None, STDOUT) else as_json
    llm = load_llm(name, enable_prefix_caching=False, **engine_arguments(values))
    size = context or min(1024, llm.max_model_len)
    if size <= output:
        raise InvalidInputError(f"--context {size} leaves no prompt beside --output {output}; raise --context")
    found = _windows(llm, texts, size, output, windows)
    check_policy(llm.engine, found[0], FULL)
    if len(found) < windows:
        _say(f"the text has room for {len(found)} windows of {size} tokens, not {windows}")
    facts = _facts(llm, texts)
    if file is None:
        results = Results(_planned_name(name, llm), _machine(), facts)
    else:
        results = Results.open(file, _planned_name(name, llm), _machine(), facts)
    policies = [*named, *_chosen(llm, found[0], bool(named), all_policies, keep)]
    with StopOnInterrupt() as interrupt:
        session = Session(llm.engine, found, policies, results, cost_runs=cost_runs, stop=lambda: interrupt.asked)
        _follow(session, results, file)
    _report(results, session, name, as_json)
    if interrupt.asked:
        _say(f"stopped; {f'the same command continues from {file}' if file else 'with --json FILE it could continue'}")
        raise KeyboardInterrupt


def _follow(session: "Session", results: "Results", file: Path | None) -> None:
    """Run the session, write its progress to standard error, and save the results at intervals and at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    began = saved = time.monotonic()
    first: int | None = None
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        try:
            for progress in session.run():
                first = progress.done if first is None else first
                left = time_left(progress.done - first, progress.total - progress.done, time.monotonic() - began)
                words = ", ".join(part for part in (left, _now(progress)) if part)
                bar.update(task, total=progress.total, completed=progress.done, description=words)
                if time.monotonic() - saved > SAVE_SECONDS:
                    saved = time.monotonic()
                    if file is not None:
                        results.save(file)
                    if not console.is_terminal:
                        _say(f"{progress.done} of {progress.total} runs{left and ', '}{left}, now {_now(progress)}")
        finally:
            if file is not None:
                results.save(file)


def time_left(done: int, missing: int, elapsed: float) -> str:
    """Return about how long `missing` runs take when `done` took `elapsed` seconds; nothing when `done` is 0."""
    if not done or not missing:
        return ""
    seconds = elapsed / done * missing
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"about {seconds / size:.2g} {unit} left"
    return f"about {max(1, round(seconds))} s left"


def _now(progress: "Progress") -> str:
    return "" if progress.policy is None else str(progress.policy)


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def _read(path: Path) -> str:
    """Return a text; raises `InvalidInputError`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"cannot read --text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"--text {path} is not UTF-8 at byte {error.start}") from error


def _check_numbers(keep: tuple[float, ...], output: int, windows: int, cost_runs: int) -> None:
    for share in keep:
        if not 0 < share < 1:
            raise InvalidInputError(f"--keep is {share}; it must be above 0 and below 1")
    for flag, value, least in (("--output", output, 2), ("--windows", windows, 1), ("--cost-runs", cost_runs, 0)):
        if value < least:
            raise InvalidInputError(f"{flag} is {value}; it must be at least {least}")


def _chosen(
    llm: "LLM", window: "Window", named: bool, everything: bool, keep: tuple[float, ...]
) -> "Iterator[PolicySpec]":
    """Yield the policies of the list that the flags choose; prints on standard error which are left out, and why."""
    from kvloom.measure.policies import DEFAULT_METHODS, at_share, registered_methods, registered_stores
    from kvloom.measure.session import runnable
    from kvloom.policies.plugins import load_all

    if everything:
        load_all()
        methods = [*registered_methods(), *registered_stores()]
    elif named:
        return
    else:
        methods = list(DEFAULT_METHODS)
    for method in methods:
        spelled = [at_share(method, share, len(window.prompt)) for share in keep]
        able, refused = runnable(llm.engine, window, list(dict.fromkeys(spelled)))
        yield from able
        for policy, reason in refused.items():
            _say(f"left out {policy}: {reason}")


def _windows(llm: "LLM", texts: list[str], context: int, output: int, count: int) -> "list[Window]":
    from kvloom.measure.window import windows_of

    tokenizer = llm.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    bos = tokenizer.bos_token_id
    first = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
    return windows_of(ids, context - output, output, count, first)


def _facts(llm: "LLM", texts: list[str]) -> dict[str, Any]:
    """Return the facts that must be equal for results to be comparable."""
    return {
        "texts_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
        "dtype": llm.dtype,
        "backend": llm.engine.runner.model.name,
        "quantization": llm.config.quantization,
        "block_size": llm.engine.cache.spec.block_size,
    }


def _planned_name(name: str, llm: "LLM") -> str:
    """Return the name that `kvloom plan` gives the same model."""
    from kvloom.plan.source import find_model

    try:
        return find_model(name).name
    except KvloomError:
        return llm.model


def _machine() -> str:
    """Return the processor, as the system names it."""
    import torch

    name = platform.processor() or platform.machine()
    if CPUINFO.is_file():
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"


def _report(results: "Results", session: "Session", name: str, as_json: Path | None) -> None:
    """Print the results as JSON, or as a table with the command that uses them."""
    if as_json == STDOUT:
        write_json(results.json())
        return
    from kvloom.cli.measuretext import results_text

    sizes = {(row.context, row.output) for row in session.rows}
    found = [entry for entry in results.summaries() if (entry["context"], entry["output"]) in sizes]
    write(results_text(found, results.model, results.machine))
    if found and max(entry["windows"] for entry in found) < FEW_WINDOWS:
        write(f"\nfewer than {FEW_WINDOWS} windows: intervals are rough; raise --windows\n")
    if as_json is not None and found:
        write(f"\nto choose a policy by these: kvloom plan {name} --measured {as_json} --max-loss 1%\n")


class ResultsFile(click.ParamType[Path]):
    """A file, or None for JSON on standard output."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; `-` for the values that name no file."""
        return STDOUT if str(value).lower() in SWITCHED_ON else Path(value)


_WHAT, _TELL = "What is measured", "Answer"

FLAGS = [
    Flag(["--text"], section=_WHAT, type=click.Path(path_type=Path), multiple=True, required=True, metavar="FILE",
         help="Text in UTF-8 from which prompts and their continuations are taken. Repeatable; all in turn."),
    Flag(["--kv-policy", "kv_policies"], section=_WHAT, type=Text(), multiple=True, metavar="POLICY",
         help="Policy to measure, e.g. 'snapkv(budget=1024)+adaptive'. Repeatable. Without it: a short list."),
    Flag(["--all-policies"], section=_WHAT, is_flag=True, help="Every registered method, and every part of one."),
    Flag(["--keep"], section=_WHAT, type=float, multiple=True, default=(0.5, 0.25), metavar="SHARE",
         help="Share of the prompt that the listed policies keep. Repeatable."),
    Flag(["--context"], section=_WHAT, type=TokenCount(), metavar="N",
         help="Tokens of one window, prompt and scored tokens; 1024, or what the model can, when left out."),
    Flag(["--output"], section=_WHAT, type=int, default=64, metavar="N",
         help="Tokens of the text after each prompt that are scored."),
    Flag(["--windows"], section=_WHAT, type=int, default=16, metavar="N", help="Windows of the text."),
    Flag(["--cost-runs"], section=_WHAT, type=int, default=2, metavar="N",
         help="Windows that are also run alone, for TTFT, TPOT and bytes of the KV cache."),
    Flag(["--json", "as_json"], section=_TELL, type=ResultsFile(), is_flag=False, flag_value="-", metavar="[FILE]",
         help="Store results in FILE, and continue from those it has; without FILE print one line of JSON."),
]  # fmt: skip

measure = Command(
    "measure",
    callback=run,
    short_help="What does this cache cost this model on this text?",
    help="""Measure what cache policies cost MODEL (default: the catalogue's smollm2) on a text: perplexity and
    divergence from the full cache over the text's own next tokens, bytes of KV cache read off the arena, time to the
    first token and per output token. The engine is the one that serves.

    Ctrl-C keeps what is finished; the same command with the same --json FILE continues from there. The file is what
    `kvloom plan --measured` reads.""",
    params=[
        click.Argument(["argument"], required=False, metavar="[MODEL]"),
        *FLAGS,
        MODEL_FLAG,
        PLUGIN_FLAG,
        *(flag for flag in ENGINE_FLAGS if flag.name not in ("kv_policy", "enable_prefix_caching")),
    ],
)
