"""`kvloom bench serve`, which puts a load on a running server and reports its clients' latencies; group `bench`."""

import asyncio
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import kvloom
from kvloom.cli.answer import write, write_json
from kvloom.cli.benchengine import bench_latency, bench_throughput
from kvloom.cli.command import Command, Flag, Group
from kvloom.cli.values import JsonObject, Text, TokenCount
from kvloom.errors import InvalidInputError

if TYPE_CHECKING:
    from kvloom.bench.connection import Endpoint
    from kvloom.bench.load import Load, Outcome
    from kvloom.bench.prompts import LoadPrompt

SCHEMA = 1
"""Version of the JSON that is printed and saved."""

DEFAULT_VOCABULARY = 1000
"""Ids below this are tokens in every vocabulary; used where a server does not report its vocabulary size."""


def run(base_url: str, **values: Any) -> None:
    """Put the load on the server, print its figures and save them if asked to; raises `KvloomError`."""
    from kvloom.bench.figures import METRICS, read_goals, summary

    metrics = [name.strip() for name in values["percentile_metrics"].split(",")]
    if not set(metrics) <= set(METRICS):
        known = ", ".join(METRICS)
        raise InvalidInputError(f"--percentile-metrics are among {known}; got {values['percentile_metrics']!r}")
    percentiles = _percentiles(values["metric_percentiles"])
    goals = read_goals(values["goodput"])
    load, outcomes, seconds = asyncio.run(_measure(base_url, values))
    figures = summary(outcomes, seconds, metrics=metrics, percentiles=percentiles, goals=goals)
    errors = sorted({outcome.error for outcome in outcomes if outcome.error})
    report = {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kvloom": kvloom.__version__,
        "machine": platform.processor() or platform.machine(),
        "load": _settings(load, base_url, values),
        **figures,
        "errors": errors[:10],
    }
    if values["save_result"]:
        _save(report, values["result_dir"], values["result_filename"])
    if values["as_json"]:
        write_json(report)
    else:
        write(_table(report, figures, metrics, percentiles))
    if not figures["completed"]:
        raise InvalidInputError(f"no request was answered; the first error: {errors[0]}")


async def _measure(base_url: str, values: dict[str, Any]) -> "tuple[Load, list[Outcome], float]":
    from kvloom.bench.connection import Endpoint
    from kvloom.bench.load import Load

    headers = {"Authorization": f"Bearer {values['api_key']}"} if values["api_key"] else {}
    endpoint = Endpoint(base_url, headers)
    extra: dict[str, Any] = {"temperature": values["temperature"]}
    if values["ignore_eos"]:
        extra["ignore_eos"] = True
    extra |= values["extra_body"]
    load = Load(
        endpoint,
        values["endpoint"],
        values["model"],
        await _prompts(endpoint, values),
        rate=values["request_rate"],
        burstiness=values["burstiness"],
        max_concurrency=values["max_concurrency"],
        seed=values["seed"],
        extra=extra,
    )
    for _ in range(values["num_warmups"]):
        outcome = await load.send(load.prompts[0])
        if outcome.error:
            raise InvalidInputError(f"the warm-up at {base_url}{values['endpoint']} failed: {outcome.error}")
    done = 0

    def progress(outcome: "Outcome") -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done} of {len(load.prompts)}" + ("\n" if done == len(load.prompts) else ""))

    outcomes, seconds = await load.run(progress)
    endpoint.close()
    return load, outcomes, seconds


async def _prompts(endpoint: "Endpoint", values: dict[str, Any]) -> "list[LoadPrompt]":
    from kvloom.bench.prompts import custom_prompts, random_prompts

    if values["dataset_name"] == "custom":
        if values["dataset_path"] is None:
            raise InvalidInputError("--dataset-name custom needs --dataset-path, a file of JSON lines")
        return custom_prompts(
            values["dataset_path"], values["num_prompts"], output_len=values["random_output_len"], seed=values["seed"]
        )
    if values["endpoint"].endswith("/chat/completions"):
        raise InvalidInputError("conversations cannot carry random token ids; use --dataset-name custom")
    return random_prompts(
        values["num_prompts"],
        input_len=values["random_input_len"],
        output_len=values["random_output_len"],
        range_ratio=values["random_range_ratio"],
        prefix_len=values["random_prefix_len"],
        vocab_size=await _vocabulary(endpoint),
        seed=values["seed"],
    )


async def _vocabulary(endpoint: "Endpoint") -> int:
    """Return the server's vocabulary size where the server reports it."""
    from kvloom.bench.connection import ServerAnswerError

    try:
        return int((await endpoint.get("/server_info"))["vocab_size"])
    except (ServerAnswerError, KeyError, TypeError, ValueError):
        return DEFAULT_VOCABULARY
    except OSError as error:
        raise InvalidInputError(f"no server answers at {endpoint.base_url}: {error}. Is the server running?") from None


def _percentiles(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= percent <= 100 for percent in found):
        raise InvalidInputError(f"--metric-percentiles are numbers from 0 to 100 with commas; got {text!r}")
    return found


def _settings(load: "Load", base_url: str, values: dict[str, Any]) -> dict[str, Any]:
    names = (
        "endpoint", "model", "dataset_name", "num_prompts", "random_input_len", "random_output_len",
        "random_range_ratio", "random_prefix_len", "burstiness", "max_concurrency", "seed", "ignore_eos",
    )  # fmt: skip
    rate = load.rate if math.isfinite(load.rate) else "inf"
    return {"base_url": base_url, "request_rate": rate, **{name: values[name] for name in names}, "extra": load.extra}


def _table(
    report: dict[str, Any], figures: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]
) -> str:
    """Return the figures as a table: counts and rates, then one line for each latency."""
    from kvloom.bench.figures import METRICS

    latencies = tuple(f"_{metric}_ms" for metric in metrics)
    lines = [f"{name:<26}{_number(value):>14}" for name, value in figures.items() if not name.endswith(latencies)]
    columns = ["mean", "median", *(f"p{percent:g}" for percent in percentiles)]
    lines += ["", f"{'milliseconds':<26}" + "".join(f"{column:>12}" for column in columns)]
    for metric in metrics:
        cells = [figures.get(f"{column}_{metric}_ms") for column in columns]
        lines.append(f"{METRICS[metric]:<26}" + "".join(f"{_number(cell):>12}" for cell in cells))
    lines += [f"error: {error}" for error in report["errors"]]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _save(report: dict[str, Any], folder: Path, name: str | None) -> None:
    path = folder / (name or f"kvloom-bench-serve-{report['date'].replace(':', '')}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"cannot save the result as {path}: {error}") from None


class _Rate(click.ParamType[float]):
    """Requests a second: a number above 0, or `inf`."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the rate; fails as a usage error."""
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if not rate > 0:
            self.fail(f"{value!r} is not a rate; give requests a second, or inf", param, ctx)
        return rate


def _flag(name: str, help: str, section: str, **attributes: Any) -> Flag:
    return Flag(name.split(), section=section, help=help, **attributes)


LOAD_FLAGS = [
    _flag("--request-rate", "Requests a second (open loop); inf: all at once.", "Load", type=_Rate(), default="inf"),
    _flag("--burstiness", "Shape of the gaps: 1 is Poisson, less is burstier.", "Load", type=float, default=1.0),
    _flag("--max-concurrency", "Most requests at once: with --request-rate inf a closed loop.", "Load", type=int),
    _flag("--num-prompts", "Number of requests.", "Load", type=click.IntRange(1), default=100),
    _flag("--num-warmups", "Requests before the measure.", "Load", type=click.IntRange(0), default=1),
    _flag("--seed", "Of prompts and arrivals.", "Load", type=int, default=0),
]
PROMPT_FLAGS = [
    _flag("--dataset-name", "Kind of prompts.", "Prompts", type=click.Choice(["random", "custom"]), default="random"),
    _flag("--dataset-path", "JSON lines with a `prompt` each.", "Prompts", type=click.Path(path_type=Path)),
    _flag("--random-input-len", "Tokens of a random prompt.", "Prompts", type=TokenCount(), default=1024),
    _flag("--random-output-len", "Tokens of an answer.", "Prompts", type=TokenCount(), default=128),
    _flag("--random-range-ratio", "Lengths vary by this share.", "Prompts", type=float, default=0.0),
    _flag("--random-prefix-len", "Tokens before them that all share.", "Prompts", type=click.IntRange(0), default=0),
    _flag("--ignore-eos", "Answers of full length.", "Prompts", is_flag=True),
    _flag("--temperature", "Of the sampling.", "Prompts", type=float, default=0.0),
    _flag("--extra-body", "Further fields of the body, as JSON.", "Prompts", type=JsonObject(), default="{}"),
]
RESULT_FLAGS = [
    _flag("--percentile-metrics", "Latencies to report.", "Result", type=Text(), default="ttft,tpot,itl,e2el"),
    _flag("--metric-percentiles", "Percentiles of them.", "Result", type=Text(), default="50,90,99"),
    _flag("--goodput", "Goal in ms, e.g. ttft:500; may be repeated.", "Result", type=Text(), multiple=True),
    _flag("--save-result", "Write the figures to a file, too.", "Result", is_flag=True),
    _flag("--result-dir", "Folder for it.", "Result", type=click.Path(path_type=Path), default="."),
    _flag("--result-filename", "Its name; with the date by default.", "Result", type=Text()),
    _flag("--json as_json", "Print the figures as one line of JSON.", "Result", is_flag=True),
]

bench_serve = Command(
    "serve",
    callback=run,
    short_help="Put a load on a running server.",
    help="""Send requests to a running OpenAI server, kvloom's or another, and report latencies of its clients: time
    to first token, time per output token, inter-token and end-to-end latency, throughput and goodput.

    Arrivals follow --request-rate whatever the server does (open loop); with --max-concurrency alone each client
    sends when its last answer has ended (closed loop).""",
    params=[
        _flag("--base-url", "URL of the server.", "Server", type=Text(), default="http://127.0.0.1:8000"),
        _flag("--endpoint", "Route of the requests.", "Server", type=Text(), default="/v1/completions"),
        _flag("--model", "Served name; the server's first when absent.", "Server", type=Text()),
        _flag("--api-key", "Key to send.", "Server", type=Text()),
        *LOAD_FLAGS,
        *PROMPT_FLAGS,
        *RESULT_FLAGS,
    ],
)

bench = Group(
    "bench", commands=[bench_latency, bench_throughput, bench_serve], help="Measure speed.", short_help="Measure speed."
)
