"""`kvloom bench latency` and `kvloom bench throughput`: an engine in this process, with no server in between."""

import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import kvloom
from kvloom.cli.answer import write, write_json
from kvloom.cli.command import Command, Flag
from kvloom.cli.engineflags import ENGINE_FLAGS, MODEL_FLAG, engine_arguments
from kvloom.cli.loading import load_llm
from kvloom.cli.plugin import PLUGIN_FLAG
from kvloom.cli.prompt import choose_model
from kvloom.cli.values import TokenCount
from kvloom.errors import InvalidInputError

if TYPE_CHECKING:
    from kvloom.bench.prompts import LoadPrompt
    from kvloom.engine.llm import LLM

SCHEMA = 1
"""Version of the JSON that is printed and saved."""


def run_latency(argument: str | None, model: str, **values: Any) -> None:
    """Time one batch again and again and print its latency; raises `KvloomError`."""
    from kvloom.bench.direct import latency_figures, run_at_once

    name = _model(argument, model)
    llm = _engine(name, values)
    prompts = _prompts(llm, values["batch_size"], values)
    runs: list[Any] = []
    try:
        for index in range(values["num_iters_warmup"] + values["num_iters"]):
            run = run_at_once(llm.engine, prompts, _greedy)
            if index >= values["num_iters_warmup"]:
                runs.append(run)
            _progress(index + 1, values["num_iters_warmup"] + values["num_iters"], "iterations")
    except KeyboardInterrupt:
        if not runs:
            raise
        sys.stderr.write(f"\nstopped after {len(runs)} of {values['num_iters']} iterations; their figures:\n")
    figures = latency_figures(runs)
    lines = [
        f"Avg latency: {figures['avg_latency']:.4f} seconds",
        f"Avg time to first token: {figures['avg_time_to_first_token']:.4f} seconds",
        *(f"{percent}% percentile latency: {value:.4f} seconds" for percent, value in figures["percentiles"].items()),
    ]
    _report(name, values, ("batch_size", "num_iters"), figures, lines)


def run_throughput(argument: str | None, model: str, **values: Any) -> None:
    """Answer many prompts as fast as possible and print the rates; raises `KvloomError`."""
    from kvloom.bench.direct import run_at_once, throughput_figures

    name = _model(argument, model)
    llm = _engine(name, values)
    run_at_once(llm.engine, _prompts(llm, 1, values | {"input_len": 16, "output_len": 4}), _greedy)
    run = run_at_once(llm.engine, _prompts(llm, values["num_prompts"], values), _greedy)
    figures = throughput_figures(run, values["num_prompts"])
    lines = [
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['tokens_per_second']:.2f} total tokens/s, "
        f"{figures['output_tokens_per_second']:.2f} output tokens/s",
        f"{figures['num_requests']} requests, {figures['total_num_tokens']:,} tokens, "
        f"{figures['elapsed_time']:.2f} seconds",
    ]
    _report(name, values, ("num_prompts", "random_range_ratio"), figures, lines)


def _model(argument: str | None, flag: str) -> str:
    return choose_model(click.get_current_context(), argument, flag)


def _engine(name: str, values: dict[str, Any]) -> "LLM":
    """Return the model; the prefix cache is off by default, else each iteration after the first would hit it."""
    asked = click.get_current_context().get_parameter_source("enable_prefix_caching")
    arguments = engine_arguments(values)
    if asked is click.core.ParameterSource.DEFAULT:
        arguments["enable_prefix_caching"] = False
    return load_llm(name, **arguments)


def _prompts(llm: "LLM", count: int, values: dict[str, Any]) -> "list[LoadPrompt]":
    from kvloom.bench.prompts import random_prompts

    return random_prompts(
        count,
        input_len=values["input_len"],
        output_len=values["output_len"],
        range_ratio=values.get("random_range_ratio", 0.0),
        prefix_len=0,
        vocab_size=llm.engine.runner.model.config.vocab_size,
        seed=values["seed"],
    )


def _greedy(tokens: int) -> Any:
    from kvloom.engine.params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def _progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} of {total} {what}" + ("\n" if done == total else ""))


def _report(
    name: str, values: dict[str, Any], settings: tuple[str, ...], figures: dict[str, Any], lines: list[str]
) -> None:
    """Print the figures as text or as JSON, and write the JSON to `--output-json`."""
    report = {
        "schema": SCHEMA,
        "kvloom": kvloom.__version__,
        "machine": platform.processor() or platform.machine(),
        "model": name,
        **{key: values[key] for key in ("input_len", "output_len", "seed", *settings)},
        **figures,
    }
    if values["output_json"] is not None:
        try:
            values["output_json"].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidInputError(f"cannot save the result as {values['output_json']}: {error}") from None
    if values["as_json"]:
        write_json(report)
    else:
        write("\n".join(lines) + "\n")


def _flag(names: list[str], section: str, help: str, **attributes: Any) -> Flag:
    return Flag(names, section=section, help=help, **attributes)


def _params(input_len: int, output_len: int, own: list[Flag]) -> list[click.Parameter]:
    return [
        click.Argument(["argument"], required=False, metavar="[MODEL]"),
        _flag(["--input-len"], "Load", "Tokens of a prompt.", type=TokenCount(), default=input_len),
        _flag(["--output-len"], "Load", "Tokens of an answer.", type=TokenCount(), default=output_len),
        *own,
        _flag(["--seed"], "Load", "Of the prompts.", type=int, default=0),
        MODEL_FLAG,
        PLUGIN_FLAG,
        *ENGINE_FLAGS,
        _flag(["--output-json"], "Result", "File for the figures.", type=click.Path(path_type=Path, dir_okay=False)),
        _flag(["--json", "as_json"], "Result", "Print the figures as one line of JSON.", is_flag=True),
    ]


_COUNT = click.IntRange(1)

bench_latency = Command(
    "latency",
    callback=run_latency,
    short_help="Time one batch from its start to its end.",
    help="""Run one batch of random prompts through MODEL (default: the catalogue's smollm2) again and again and print
    how long it takes: average, percentiles and time to first token. Greedy, answers of full length; the prefix cache
    is off unless asked for.""",
    params=_params(
        32,
        128,
        [
            _flag(["--batch-size"], "Load", "Prompts at once.", type=_COUNT, default=8),
            _flag(["--num-iters"], "Load", "Times that are measured.", type=_COUNT, default=10),
            _flag(["--num-iters-warmup"], "Load", "Times before.", type=click.IntRange(0), default=2),
        ],
    ),
)

bench_throughput = Command(
    "throughput",
    callback=run_throughput,
    short_help="Answer many prompts as fast as possible.",
    help="""Queue random prompts for MODEL (default: the catalogue's smollm2) all at once and print requests and tokens
    a second. Greedy, answers of full length; the prefix cache is off unless asked for.""",
    params=_params(
        256,
        128,
        [
            _flag(["--num-prompts"], "Load", "Number of requests.", type=_COUNT, default=32),
            _flag(["--random-range-ratio"], "Load", "Lengths vary by this share.", type=float, default=0.0),
        ],
    ),
)
