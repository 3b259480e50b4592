"""Plan: all figures that answer one question, for a terminal or for JSON."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvloom.plan.advice import Advice, advise
from kvloom.plan.compare import Row, per_token
from kvloom.plan.explain import Explanation
from kvloom.plan.figure import ALL_DEVICES, EACH_DEVICE, LABELS, Figure
from kvloom.plan.measured import Measurements
from kvloom.plan.memory import MOST_TOKENS, Memory
from kvloom.plan.question import Question
from kvloom.plan.recommend import Recommendation
from kvloom.plan.roofline import Roofline
from kvloom.plan.serving import serve_refusals

SCHEMA = "kvloom.plan/1"

USERS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of users in the table; the asked number is added."""


@dataclass(frozen=True)
class Plan:
    """The answers to a `Question`, with the explanations and comparisons that were asked for."""

    question: Question
    measurements: Measurements | None = None
    comparisons: dict[str, list[Row]] = field(default_factory=dict)
    explanations: tuple[Explanation, ...] = ()
    recommendation: Recommendation | None = None

    @cached_property
    def memory(self) -> Memory:
        """Memory of one device."""
        return Memory(self.question)

    @cached_property
    def roofline(self) -> Roofline:
        """Work and least times."""
        return Roofline(self.question)

    @cached_property
    def advice(self) -> list[Advice]:
        """Changes for a question that does not fit; empty when it fits."""
        return advise(self.question)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that the figures do not show."""
        asked, found = self.question, list(self.question.model.notes)
        refusals = [reason for reason in serve_refusals(asked) if "was made for" not in reason]
        if refusals:
            found.append(f"kvloom serve cannot run this yet: {'; '.join(refusals)}")
        longest = asked.model.max_position
        if longest is not None and asked.context > longest:
            found.append(f"the model was made for {longest} tokens; {asked.context} are asked")
        if self.measurements is not None and self.measurements.model not in ("", asked.model.name):
            found.append(f"measurements are of {self.measurements.model}, the plan is of {asked.model.name}")
        return tuple(found)

    @cached_property
    def sizes(self) -> dict[str, Figure]:
        """Bytes by purpose, on one device unless the name says otherwise."""
        memory, asked = self.memory, self.question
        found = {
            "weights": memory.process.weights,
            "kv_per_token": per_token(asked, asked.policy.store, on_device=True),
            "kv_per_request": memory.kv_of_request,
            "kv_total": memory.kv,
            "activations": memory.process.activations,
            "runtime": memory.process.runtime,
            "tokenizer": memory.process.tokenizer,
            "loading": memory.process.loading,
            "total": memory.total,
            "usable": memory.usable,
        }
        if asked.model.state_bytes:
            found["state_per_request"] = memory.state
        if asked.devices > 1:
            found = {name: figure.of(EACH_DEVICE) for name, figure in found.items()}
        measured = self.measurements.of(asked.policy) if self.measurements else None
        if measured is not None and measured.kv_peak_bytes is not None:
            where = f"at most, of one request of {measured.context} tokens"
            found["kv_measured"] = Figure(measured.kv_peak_bytes, "bytes", "measured", where)
        if asked.model.file_bytes is not None:
            disk = Figure(asked.model.file_bytes, "bytes", "exact", "as the files store them")
            found["weights_on_disk"] = disk if asked.devices == 1 else disk.of(ALL_DEVICES)
        return found

    @cached_property
    def limits(self) -> dict[str, Figure]:
        """The largest batch for the context and the longest context for the batch."""
        users, context = self.memory.max_users(), self.memory.max_context()
        unlimited = "memory does not limit it" if context is not None and context >= MOST_TOKENS else ""
        found = {
            "max_users": Figure(users, "users", "assumed", f"of {self.question.context} tokens each"),
            "max_context": Figure(context, "tokens", "assumed", unlimited or f"for {self.question.users} users"),
        }
        return found if self.question.devices == 1 else {name: figure.of(ALL_DEVICES) for name, figure in found.items()}

    @cached_property
    def speeds(self) -> dict[str, Figure]:
        """Lower bounds of time, the bytes and operations behind them, and measured times where there are any."""
        asked, roof = self.question, self.roofline
        reads, operations, made = roof.reads, roof.operations, max(0, asked.output - 1)
        tpot = roof.tpot()
        found = {
            "ttft_lower_bound": roof.ttft(),
            "tpot_lower_bound": tpot,
            "decode_weight_bytes": Figure(reads.weight_bytes(asked.users), "bytes", reads.weights_label,
                                          "read per step and device"),
            "decode_kv_bytes": Figure(asked.users * reads.kv_read_bytes(asked.prompt, made), "bytes",
                                      "assumed" if asked.model.state_bytes else "exact",
                                      "read per step and device at the full context"),
            "decode_flops": Figure(asked.users * operations.decode_flops(asked.prompt, made), "FLOP",
                                   "exact", "per step, all devices"),
            "prefill_flops": Figure(operations.prefill_flops(asked.prompt), "FLOP", "exact", "per prompt, all devices"),
            "kv_bound_context": Figure(roof.kv_bound_context, "tokens", "exact",
                                       "from here on a step reads more KV than weights" if roof.kv_bound_context
                                       else "never: weights always outweigh the KV"),
        }
        if reads.weight_bytes(asked.users, expected=True) != reads.weight_bytes(asked.users):
            found["tpot_uniform_routing"] = Figure(roof.tpot(expected=True).value, "s", "assumed",
                                                   "were experts chosen uniformly at random")
        if tpot.value:
            best = asked.users / (tpot.value if tpot.low is None else tpot.low)
            found["tokens_per_s_at_best"] = Figure(best, "tokens/s", tpot.label, "all users together")
        if asked.devices > 1:
            found = {name: figure if "device" in figure.note else figure.of(ALL_DEVICES)
                     for name, figure in found.items()}
        measured = self.measurements.of(asked.policy) if self.measurements else None
        if measured is not None:
            where = f"{measured.context} tokens"
            if measured.tpot_s is not None:
                found["tpot_measured"] = Figure(measured.tpot_s, "s", "measured", where)
            if measured.ttft_s is not None:
                found["ttft_measured"] = Figure(measured.ttft_s, "s", "measured", where)
            found["loss_measured"] = Figure(measured.loss, "share", "measured", f"{measured.metric}, {where}")
        return found

    @cached_property
    def targets(self) -> dict[str, bool | None]:
        """Whether the asked latencies are possible at all: False means that no implementation can reach them here.

        None means unknown: the speed of the device, or its peak in the compute dtype.
        """
        found: dict[str, bool | None] = {}
        for name, target in (("ttft", self.question.target_ttft), ("tpot", self.question.target_tpot)):
            if target is not None:
                least = self.speeds[f"{name}_lower_bound"]
                unsure = least.value is None or (least.low is not None and least.low <= target < least.value)
                found[name] = None if unsure else (least.value or 0) <= target
        return found

    @cached_property
    def grid(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[tuple[int, bool | None], ...], ...]]:
        """Contexts, users, and for each pair the total bytes of a device and whether they fit."""
        longest = max(self.question.context, self.question.model.max_position or 32768)
        contexts = {self.question.context}
        size = 1024
        while size <= min(longest, 1 << 20):
            contexts.add(size)
            size *= 4 if longest > 65536 else 2
        users = tuple(sorted({*USERS, self.question.users}))
        rows = tuple(sorted(contexts))
        return rows, users, tuple(tuple(self.memory.cell(context, n) for n in users) for context in rows)

    def json(self) -> dict[str, Any]:
        """Return the plan as the JSON object that schema `kvloom.plan/1` describes."""
        asked = self.question
        contexts, users, cells = self.grid
        device = asked.device
        return {
            "schema": SCHEMA,
            "model": {
                "name": asked.model.name, "family": asked.model.family, "attention": asked.model.attention_kind,
                "layers": asked.model.num_layers, "parameters": asked.model.num_params,
                "active_parameters": asked.model.active_params, "source": asked.model.source,
            },
            "question": {
                "device": device.name, "devices": asked.devices, "prompt": asked.prompt, "output": asked.output,
                "context": asked.context, "users": asked.users, "kv_policy": str(asked.policy), "dtype": asked.dtype,
                "quantization": asked.quantization, "block_size": asked.block_size,
                "max_num_batched_tokens": asked.chunk, "gpu_memory_utilization": asked.utilization,
            },
            "device": {
                "name": device.name, "memory_bytes": device.memory_bytes, "bandwidth": device.bandwidth,
                "peak": self.roofline.rates.peak, "source": device.source, "as_of": device.as_of,
                "label": "measured" if device.measured else "assumed",
            },
            "fits": self.memory.fits,
            "memory": {name: figure.json() for name, figure in self.sizes.items()},
            "limits": {name: figure.json() for name, figure in self.limits.items()},
            "speed": {name: figure.json() for name, figure in self.speeds.items()},
            "targets": self.targets,
            "table": [
                {"context": context, "users": n, "bytes": cell[0], "fits": cell[1]}
                for context, row in zip(contexts, cells, strict=True) for n, cell in zip(users, row, strict=True)
            ],
            "advice": [advice.json() for advice in self.advice],
            "comparisons": {what: [row.json() for row in rows] for what, rows in self.comparisons.items()},
            "explanations": [explanation.json() for explanation in self.explanations],
            "recommendation": None if self.recommendation is None else self.recommendation.json(),
            "warnings": list(self.warnings),
            "labels": dict(LABELS),
        }  # fmt: skip
