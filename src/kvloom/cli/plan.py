"""`kvloom plan MODEL`: will it fit, for how many users, how long a context, how fast at best, with which cache."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.answer import write, write_json
from kvloom.cli.command import Command, Flag
from kvloom.cli.values import TokenCount
from kvloom.errors import DownloadError, InvalidInputError, ModelNotFoundError, UnsupportedError
from kvloom.spec.packing import QUANTIZATIONS

if TYPE_CHECKING:
    from kvloom.plan.answer import Plan
    from kvloom.plan.question import Question
    from kvloom.spec.model import ModelSpec

HYPOTHESIS = (
    "layers", "heads", "kv_heads", "head_dim", "hidden", "intermediate", "vocab", "window", "global_every", "kv_rank",
    "rope_dim", "share_kv", "yoco", "experts", "experts_per_token", "recurrent_every", "state_elements",
)  # fmt: skip
"""Flags that describe a model that does not exist."""

HUB_SECONDS = 5
"""Seconds without an answer after which the hub counts as out of reach."""


def run(model: str | None, **values: Any) -> None:
    """Print the plan, or what one of the listing flags asks for; raises the errors of `kvloom.plan`."""
    try:
        if _listed(values):
            return
        plan = make_plan(model, values)
        if values["plot"] is not None:
            from kvloom.plan.compare import candidate_policies
            from kvloom.plan.plot import draw

            draw(plan.question, candidate_policies(plan.question), values["plot"])
        if values["as_json"]:
            write_json(plan.json())
            return
        from kvloom.cli.plantext import plan_text

        write(plan_text(plan))
    except (UnsupportedError, ModelNotFoundError) as error:  # a plan takes nothing but what is asked
        raise InvalidInputError(str(error)) from error


def make_plan(model: str | None, values: Mapping[str, Any]) -> "Plan":
    """Return the plan that the flags ask for; loads nothing heavy."""
    from kvloom.plan.answer import Plan
    from kvloom.plan.compare import compare
    from kvloom.plan.explain import explain
    from kvloom.plan.measured import read_measurements
    from kvloom.plan.recommend import parse_loss, recommend

    asked = make_question(model, values)
    measured = None if values["measured"] is None else read_measurements(values["measured"])
    if measured is not None:
        measured.check_for(asked)
    recommendation = None
    if values["max_loss"] is not None:
        recommendation = recommend(asked, model or asked.model.name, parse_loss(values["max_loss"]), measured)
    return Plan(
        asked,
        measured,
        {what: compare(asked, what) for what in dict.fromkeys(values["compare"])},
        tuple(explain(asked, topic) for topic in dict.fromkeys(values["explain"])),
        recommendation,
    )


def make_question(model: str | None, values: Mapping[str, Any]) -> "Question":
    """Return the checked question that the flags ask."""
    from kvloom.plan.probe import load_probe
    from kvloom.plan.question import Question
    from kvloom.spec.hardware import find_device
    from kvloom.spec.policy import PolicySpec

    spec = _model(model, values)
    name = values["device"]
    device = find_device(name, load_probe() if name.lower().startswith("cpu") else None)
    given = {"bandwidth": (values["bandwidth"], 1e9), "peak": (values["peak"], 1e12)}
    device = device.with_speed(**{name: n * unit for name, (n, unit) in given.items() if n is not None})
    prompt, output = lengths(values["context"], values["prompt"], values["output"], spec.max_position)
    dtype = values["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if device.kind == "cpu" or spec.dtype == "float8_e4m3fn" else spec.dtype
    return Question(
        spec, device, prompt, output, values["users"], PolicySpec.parse(values["kv_policy"]), dtype, values["devices"],
        values["block_size"], values["max_num_batched_tokens"], values["gpu_memory_utilization"],
        seconds("--target-ttft", values["target_ttft"]), seconds("--target-tpot", values["target_tpot"]),
        values["quantization"],
    )  # fmt: skip


def lengths(context: int | None, prompt: int | None, output: int | None, longest: int | None) -> tuple[int, int]:
    """Return (prompt, output) tokens; raises `InvalidInputError` when what was given cannot be true together.

    The context defaults to 4096 tokens or the model's, whichever is less, and an eighth of it is output.
    """
    for flag, value, least in (("--context", context, 2), ("--prompt", prompt, 1), ("--output", output, 0)):
        if value is not None and value < least:
            raise InvalidInputError(f"{flag} is {value}; it must be at least {least}")
    if prompt is not None and output is not None:
        if context is not None and context != prompt + output:
            raise InvalidInputError(
                f"--context {context} contradicts --prompt {prompt} and --output {output}, which make {prompt + output}"
            )
        return prompt, output
    whole = context or max(min(4096, longest or 4096), (prompt or 0) * 9 // 8, (output or 0) * 8)
    if prompt is None and output is None:
        output = max(1, whole // 8)
    if prompt is not None:
        output = whole - prompt
    assert output is not None
    if (prompt is not None and output < 0) or whole - output < 1:
        given = f"--prompt {prompt}" if prompt is not None else f"--output {output}"
        raise InvalidInputError(f"--context {whole} leaves no room beside {given}; raise --context")
    return whole - output, output


def seconds(flag: str, text: str | None) -> float | None:
    """Return the seconds that `50ms`, `0.05s` or `0.05` names; raises `InvalidInputError`."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|)\s*", text)
    if match is None:
        raise InvalidInputError(f"{flag} is {text!r}; write seconds or e.g. 50ms")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def _model(model: str | None, values: Mapping[str, Any]) -> "ModelSpec":
    given = {name: values[name] for name in HYPOTHESIS if values[name] not in (None, False)}
    if given and model is not None:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InvalidInputError(f"MODEL {model!r} and {flags} contradict each other: name a model or describe one")
    if given:
        from kvloom.spec.hypothetical import Hypothesis

        if "layers" not in given or "heads" not in given:
            raise InvalidInputError("a hypothetical model needs at least --layers and --heads")
        return Hypothesis(**given).build()
    if model is None:
        raise InvalidInputError(
            "name a MODEL, or describe one with --layers and --heads; --list-models shows known ones"
        )
    from kvloom.plan.source import find_model

    return find_model(model, None if _offline() else _fetch)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no")


def _fetch(repository: str, file: str) -> Path:
    """Return the path of one small file of a hub repository, from the hub's cache where it is there."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    away = (
        f"{repository!r} is in neither the catalogue nor the local cache, and the hub cannot be reached; "
        "give a folder, a config.json or a .gguf file"
    )
    try:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file), timeout=HUB_SECONDS)
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception as error:  # the type depends on the HTTP library of the hub's client; a download would retry
            raise DownloadError(away) from error
        return Path(hf_hub_download(repository, file))
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(away) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(f"the hub has no {file} of {repository!r}, or it needs HF_TOKEN") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise DownloadError(f"fetching {file} of {repository!r} failed: {error}") from error


def _listed(values: Mapping[str, Any]) -> bool:
    """Answer the flags that need no model; return whether one was given."""
    if values["probe"]:
        from kvloom.cli.probe import probe

        write(probe())
    elif values["list_models"]:
        from kvloom.cli.plantext import table
        from kvloom.spec.catalogue import catalogue_entry, catalogue_names

        entries = {name: catalogue_entry(name) for name in catalogue_names()}
        models = [(name, ", ".join(entry["ids"]), entry["source"]) for name, entry in entries.items()]
        write("\n".join(table(("name", "ids", "source"), models)) + "\n")
    elif values["list_devices"]:
        from kvloom.cli.plantext import table
        from kvloom.spec.hardware import DEVICES
        from kvloom.units import format_bytes

        devices = [
            (
                name,
                format_bytes(d.memory_bytes or 0),
                f"{(d.bandwidth or 0) / 1e9:,.0f} GB/s",
                f"{(d.peak('bfloat16') or 0) / 1e12:,.0f} TFLOP/s",
                d.source,
                d.as_of,
            )
            for name, d in DEVICES.items()
        ]
        header = ("device", "memory", "bandwidth", "16-bit peak", "source", "read on")
        write("\n".join(table(header, devices)) + "\n")
    elif values["json_schema"]:
        from importlib import resources

        write(resources.files("kvloom.plan").joinpath("schema.json").read_text(encoding="utf-8"))
    else:
        return False
    return True


def _number(name: str, help: str, section: str, **attributes: Any) -> Flag:
    attributes.setdefault("type", TokenCount())
    attributes.setdefault("metavar", "N")
    return Flag([name], section=section, help=help, **attributes)


_MODEL, _ASK, _TELL = "A model that does not exist", "Question", "Answer"

FLAGS = [
    Flag(["--device"], section=_ASK, default="cpu", help="E.g. h100, cpu, cpu:64GiB, h100:94GiB; see --list-devices."),
    Flag(["--bandwidth"], section=_ASK, type=float, metavar="GB/s", help="Bandwidth of a device, if not its own."),
    Flag(["--peak"], section=_ASK, type=float, metavar="TFLOP/s", help="Peak of a device in --dtype, if not its own."),
    _number("--devices", "Equal devices, tensor parallel.", _ASK, type=int, default=1),
    _number("--context", "Tokens of one request, prompt and output; 4k is 4000, 4K is 4096.", _ASK),
    _number("--prompt", "Tokens of the prompt.", _ASK),
    _number("--output", "Tokens that are generated.", _ASK),
    _number("--users", "Requests at once.", _ASK, type=int, default=1),
    Flag(["--kv-policy"], section=_ASK, default="full", help='Cache policy, e.g. "snapkv(budget=1024)+adaptive+int8".'),
    Flag(
        ["--dtype"],
        section=_ASK,
        default="auto",
        type=click.Choice(["auto", "bfloat16", "float16", "float32", "float8_e4m3fn"]),
        help="Of weights and native K/V (float8_e4m3fn: weights alone, K/V stay in 16 bit); auto is the model's own, "
        "bfloat16 on a CPU.",
    ),
    Flag(
        ["--quantization"],
        section=_ASK,
        type=click.Choice(QUANTIZATIONS),
        help="Weights in 8 bits (int8), in 4 (int4), or weights and activations in 8 (w8a8). Without it: in --dtype.",
    ),
    _number("--block-size", "Tokens of one KV head in a block.", _ASK, type=int, default=16),
    _number("--max-num-batched-tokens", "Most tokens in one step.", _ASK, default=2048),
    Flag(
        ["--gpu-memory-utilization", "--device-memory-utilization"],
        section=_ASK,
        type=float,
        default=0.9,
        help="Share of the device's memory that may be used.",
    ),
    Flag(["--target-ttft"], section=_ASK, metavar="TIME", help="Wanted time to first token, e.g. 500ms."),
    Flag(["--target-tpot"], section=_ASK, metavar="TIME", help="Wanted time per output token, e.g. 50ms."),
    Flag(
        ["--compare"],
        section=_TELL,
        multiple=True,
        metavar="WHAT",
        help="Side by side: attention, stores or policies. Repeatable.",
    ),
    Flag(
        ["--explain"],
        section=_TELL,
        multiple=True,
        metavar="TOPIC",
        help="generation, preallocation, projections, scores, reach, intensity or layouts. Repeatable.",
    ),
    Flag(["--max-loss"], section=_TELL, metavar="SHARE", help="Recommend a policy of at most this loss, e.g. 1%."),
    Flag(
        ["--measured"],
        section=_TELL,
        type=click.Path(path_type=Path),
        metavar="FILE.json",
        help="Measured speed and loss of policies (schema kvloom.measure/1).",
    ),
    Flag(
        ["--plot"],
        section=_TELL,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write memory over context as .png or .svg (needs matplotlib).",
    ),
    Flag(["--json", "as_json"], section=_TELL, is_flag=True, help="Print one line of JSON; see --json-schema."),
    Flag(["--json-schema"], section=_TELL, is_flag=True, help="Print the JSON schema of the answer and exit."),
    Flag(["--probe"], section=_TELL, is_flag=True, help="Measure this machine's speed, store it, and exit."),
    Flag(["--list-models"], section=_TELL, is_flag=True, help="List the catalogue and exit."),
    Flag(["--list-devices"], section=_TELL, is_flag=True, help="List the devices and exit."),
    _number("--layers", "Decoder layers.", _MODEL),
    _number("--heads", "Query heads.", _MODEL),
    _number("--kv-heads", "KV heads; as many as query heads when left out.", _MODEL),
    _number("--head-dim", "Width of a head.", _MODEL),
    _number("--hidden", "Width of the residual stream; heads x head size when left out.", _MODEL),
    _number("--intermediate", "Width of the gated MLP.", _MODEL),
    _number("--vocab", "Vocabulary.", _MODEL),
    _number("--window", "Sliding window in tokens, the query included.", _MODEL),
    _number("--global-every", "Every Nth layer has global attention.", _MODEL),
    _number("--kv-rank", "Latent attention: rank of the latent.", _MODEL),
    _number("--rope-dim", "Latent attention: width of the rotary key.", _MODEL),
    _number("--share-kv", "Consecutive layers that share one K/V.", _MODEL),
    Flag(["--yoco"], section=_MODEL, is_flag=True, help="The second half of the layers reads one global K/V."),
    _number("--experts", "Experts of each MLP.", _MODEL),
    _number("--experts-per-token", "Experts that run for a token.", _MODEL),
    _number("--recurrent-every", "All layers but every Nth are recurrent.", _MODEL),
    _number("--state-elements", "Elements of the state of a recurrent layer.", _MODEL),
]

plan = Command(
    "plan",
    callback=run,
    short_help="Will it fit, how many users, how fast at best?",
    help="""Plan the memory and the best possible speed of MODEL: a Hugging Face id, a folder, a config.json, a .gguf
    file, a name of the catalogue (--list-models), or a model that --layers and --heads describe. Bytes come from the
    formulas that the allocator uses; every figure is labelled exact, bound, assumed or measured. No weights are
    loaded.""",
    params=[click.Argument(["model"], metavar="[MODEL]", required=False), *FLAGS],
)
