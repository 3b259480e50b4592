"""`kvloom plan MODEL`: will it fit, for how many users, how long a context, how fast at best, with which cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.answer import write, write_json
from kvloom.cli.command import Command, Flag
from kvloom.cli.plugin import PLUGIN_FLAG
from kvloom.cli.values import TokenCount
from kvloom.errors import InvalidInputError, ModelNotFoundError, UnsupportedError
from kvloom.spec.packing import QUANTIZATIONS

if TYPE_CHECKING:
    from kvloom.plan import Plan

PRINTED = ("probe", "list_models", "list_devices", "json_schema", "as_json", "plot")
"""Flags that say what is printed or written; all others are keywords of `kvloom.plan.plan`."""


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
    """Return the plan that the flags ask for: `kvloom.plan.plan` with the flags as keywords."""
    from kvloom.plan import plan

    return plan(model, **{name: value for name, value in values.items() if name not in PRINTED})


def _listed(values: Mapping[str, Any]) -> bool:
    """Answer the flags that need no model; return whether one was given."""
    if values["probe"]:
        from kvloom.cli.probe import probe

        write(probe())
    elif values["list_models"]:
        from kvloom.cli.table import table
        from kvloom.spec.catalogue import catalogue_entry, catalogue_names

        entries = {name: catalogue_entry(name) for name in catalogue_names()}
        models = [(name, ", ".join(entry["ids"]), entry["source"]) for name, entry in entries.items()]
        write("\n".join(table(("name", "ids", "source"), models)) + "\n")
    elif values["list_devices"]:
        from kvloom.cli.table import table
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
    params=[click.Argument(["model"], metavar="[MODEL]", required=False), *FLAGS, PLUGIN_FLAG],
)
