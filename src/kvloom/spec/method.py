"""The methods that a policy string may name: their role, their parameters and the facts that the planner uses.

Registering a method here adds its name to the grammar; its computation is in `kvloom.policies`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from kvloom.errors import InvalidInputError
from kvloom.registry import Registry, nearest
from kvloom.spec.headpattern import streaming_limits
from kvloom.spec.kv import KVSpec
from kvloom.units import parse_count

Value: TypeAlias = int | float | bool | str
Role: TypeAlias = Literal["selector", "refine", "budget", "trigger", "action"]


@dataclass(frozen=True)
class Parameter:
    """One `key=value` of a method: its kind, default (None: may be left out), limits or choices."""

    name: str
    kind: Literal["int", "float", "bool", "choice", "text"]
    default: Value | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    doc: str = ""

    def parse(self, text: str, method: str) -> Value:
        """Return the value that `text` spells; raises `InvalidInputError` naming the parameter."""
        where = f"{self.name} of {method}"
        if self.kind == "bool":
            if text not in ("true", "false"):
                raise InvalidInputError(f"{where} is {text!r}; it must be true or false")
            return text == "true"
        if self.kind == "choice":
            if text not in self.choices:
                hint = nearest(text, list(self.choices))
                raise InvalidInputError(f"{where} is {text!r}{hint}; known: {', '.join(self.choices)}")
            return text
        if self.kind == "text":
            return text
        try:
            value: int | float = parse_count(text) if self.kind == "int" else float(text)
        except ValueError as error:
            wanted = "a whole number" if self.kind == "int" else "a number"
            raise InvalidInputError(f"{where} is {text!r}; it must be {wanted}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInputError(f"{where} is {text!r}; it must be a finite number")
        self.check(value, method)
        return value

    def check(self, value: Value, method: str) -> None:
        """Raise `InvalidInputError` when a number lies outside the limits."""
        if isinstance(value, str):
            return
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            limit = f"from {self.low:g} to {self.high:g}" if self.high is not None else f"at least {self.low:g}"
            raise InvalidInputError(f"{self.name} of {method} is {value}; it must be {limit}")


@dataclass(frozen=True)
class MethodSpec:
    """One method: `params` in the order in which they are printed, and facts for planner, docs and checks.

    Selectors: `budgeted` ones take `budget=` or `keep=`. The length of others is `fixed_tokens(args)` or depends on the
    data (`ragged`), at most `lane_limits(args, kv)` tokens in each lane (None: no limit) whenever they act.
    `skipped` names the argument that counts the first layers, which keep all tokens. `acts` lists when they may act:
    prefill, chunk (in the middle of a prompt), decode (while generating). `triggers` and `default_budget` are used when
    the policy names none. `query_aware` means that the published quality needs the question in the prompt, `replays`
    that the prompt is read a second time, in parts of `chunk` tokens.

    Selectors and refinements: `protected` are the tokens of a lane that stay whatever their score: the name of the
    argument that counts them, or a rule `(args, budget) -> tokens`. `attention` means, of a selector, that it scores by
    attention weights, which it computes from queries and keys; of a refinement, that it takes no other scores.
    """

    name: str
    role: Role
    summary: str
    params: tuple[Parameter, ...] = ()
    budgeted: bool = False
    ragged: bool = False
    fixed_tokens: Callable[[dict[str, Value]], int] | None = None
    lane_limits: Callable[[dict[str, Value], KVSpec], tuple[int | None, ...] | None] | None = None
    protected: str | Callable[[dict[str, Value], int], int] | None = None
    skipped: str | None = None
    attention: bool = False
    acts: tuple[str, ...] = ("prefill",)
    triggers: tuple[str, ...] = ()
    default_budget: str = "uniform"
    query_aware: bool = False
    replays: bool = False
    paper: str = ""

    def num_protected(self, args: dict[str, Value], budget: int) -> int:
        """Return the most tokens of a lane that stay whatever their score, for a budget of that many."""
        if self.protected is None:
            return 0
        return int(args[self.protected]) if isinstance(self.protected, str) else self.protected(args, budget)

    def parameter(self, name: str) -> Parameter:
        """Return the parameter called `name`; raises `InvalidInputError` naming the nearest one."""
        for parameter in self.params:
            if parameter.name == name:
                return parameter
        known = [parameter.name for parameter in self.params]
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise InvalidInputError(f"{self.name} has no parameter {name!r}{nearest(name, known)}; {takes}")


METHODS: Registry[MethodSpec] = Registry("policy")

BUDGET = Parameter("budget", "int", None, 1, doc="tokens kept per lane, averaged over lanes")
KEEP = Parameter("keep", "float", None, 0, 1, doc="fraction of the prompt that is kept, instead of budget")


def _count(name: str, default: int | None, low: int = 0, doc: str = "") -> Parameter:
    return Parameter(name, "int", default, low, doc=doc)


def _pooling(window: int, kernel: int) -> tuple[Parameter, ...]:
    return (
        _count("window", window, 1, "newest prompt tokens whose queries score the rest, and which stay"),
        _count("kernel", kernel, 1, "width of the pooling over neighbours"),
        Parameter("pooling", "choice", "avg", choices=("avg", "max"), doc="pooling of scores"),
    )


def register_selector(name: str, summary: str, *params: Parameter, **facts: Any) -> None:
    """Register an eviction method; `facts` are fields of `MethodSpec`. It is budgeted unless they say otherwise.

    Raises `InvalidInputError` when the name is taken.
    """
    facts.setdefault("budgeted", True)
    lead = (BUDGET, KEEP) if facts["budgeted"] else ()
    METHODS.register(name, MethodSpec(name, "selector", summary, (*lead, *params), **facts))


def _selector(name: str, summary: str, *params: Parameter, **facts: Any) -> None:
    register_selector(name, summary, *params, **facts)


_PREFILL, _ALWAYS = ("prefill",), ("chunk", "step")
_ANY_TIME, _NOT_PER_CHUNK = ("prefill", "chunk", "decode"), ("prefill", "decode")
_MASS = Parameter("mass", "bool", False, doc="a merged entry gets the softmax mass of all that it stands for")

_selector("full", "keeps every token", budgeted=False)
_selector("window", "keeps the newest tokens", _count("size", 1024, 1), budgeted=False, triggers=_ALWAYS,
          acts=_ANY_TIME, fixed_tokens=lambda args: int(args["size"]))
_selector("streaming", "keeps the first and the newest tokens", _count("sinks", 4), _count("window", 1020, 1),
          Parameter("positions", "choice", "true", choices=("true", "cache"), doc="as seen, or in the cache"),
          budgeted=False, triggers=_ALWAYS, acts=_ANY_TIME, paper="arXiv 2309.17453",
          fixed_tokens=lambda args: int(args["sinks"]) + int(args["window"]), protected="sinks")
_selector("h2o", "keeps heavy hitters of all queries so far and the newest tokens",
          Parameter("recent", "float", 0.5, 0, 1, doc="share of the budget for the newest tokens"),
          triggers=("prefill", "step"), acts=_ANY_TIME, attention=True, paper="arXiv 2306.14048",
          protected=lambda args, budget: int(float(args["recent"]) * budget))
_selector("tova", "keeps what the newest query attends to", triggers=("prefill", "step"), acts=_ANY_TIME,
          attention=True, paper="arXiv 2401.06104")
_selector("scissorhands", "keeps what a window of queries attends to persistently", _count("window", 400, 1),
          _count("recent", 10), triggers=("prefill", "step"), acts=_NOT_PER_CHUNK, attention=True,
          paper="arXiv 2305.17118", protected="recent")
_selector("snapkv", "keeps what the end of the prompt attends to", *_pooling(32, 5), triggers=_PREFILL,
          attention=True, query_aware=True, paper="arXiv 2404.14469", protected="window")
_selector("knorm", "keeps keys of small norm", _count("skip_layers", 2), triggers=_PREFILL, acts=_ANY_TIME,
          skipped="skip_layers", paper="arXiv 2406.11430")
_selector("keydiff", "keeps keys unlike the mean key", triggers=_PREFILL, acts=_ANY_TIME, paper="arXiv 2504.15364")
_selector("expected", "keeps what a Gaussian of future queries is expected to attend to", _count("horizon", 512, 1),
          _count("sinks", 4), Parameter("eps", "float", 0.0, 0, doc="added to the expected weight"),
          triggers=_PREFILL, attention=True, paper="arXiv 2510.00636", protected="sinks")
_selector("kvzip", "keeps what is needed to repeat the context", _count("chunk", 2048, 1), _count("sinks", 4),
          Parameter("normalised", "bool", False, doc="weigh by the norm of the value's output (KVzip+)"),
          triggers=_PREFILL, default_budget="global", attention=True, replays=True, paper="arXiv 2505.23416",
          protected="sinks")
_selector("fastgen", "chooses a cheap policy for each head that still recovers its attention",
          Parameter("recovery", "float", 0.95, 0, 1), Parameter("recent", "float", 0.3, 0, 1),
          Parameter("frequent", "float", 0.3, 0, 1), budgeted=False, ragged=True, triggers=("prefill", "step"),
          acts=_NOT_PER_CHUNK, attention=True, paper="arXiv 2310.01801")
_selector("duo", "keeps everything on retrieval heads, sinks and newest tokens on the others",
          Parameter("pattern", "text", None, doc="file that says which heads are retrieval heads"),
          Parameter("threshold", "float", 0.5, 0, 1, doc="least number in the pattern of a retrieval head"),
          _count("sinks", 4), _count("window", 256, 1), budgeted=False, ragged=True, triggers=_ALWAYS,
          acts=_ANY_TIME, lane_limits=streaming_limits, paper="arXiv 2410.10819")
_selector("random", "keeps tokens at random: the floor of every comparison", _count("sinks", 0), _count("seed", 0),
          triggers=_PREFILL, acts=_ANY_TIME, protected="sinks")

for _spec in (
    MethodSpec("vatp", "refine", "weighs scores by the norm of the value", (_count("sinks", 20),),
               protected="sinks", attention=True, paper="arXiv 2406.12335"),
    MethodSpec("critical", "refine", "second half of the budget by the norm of the value's output",
               (Parameter("eps", "float", 1e-4, 0, doc="added to the mean attention weight of a query"),),
               attention=True, paper="arXiv 2502.03805"),
    MethodSpec("uniform", "budget", "every lane keeps the same number of tokens"),
    MethodSpec("pyramid", "budget", "early layers keep more than late ones",
               (Parameter("beta", "float", 20.0, 1, doc="steepness: the last layer gets 1/beta"),),
               paper="arXiv 2406.02069"),
    MethodSpec("adaptive", "budget", "the heads of a layer share its budget by their scores",
               (Parameter("floor", "float", 0.2, 0, 1, doc="share of the even budget that every head keeps"),),
               ragged=True, paper="arXiv 2407.11550"),
    MethodSpec("global", "budget", "all heads of all layers share one budget by their scores",
               (Parameter("floor", "float", 0.0, 0, 1, doc="share of the even budget that every head keeps"),),
               ragged=True, paper="arXiv 2505.23416"),
    MethodSpec("threshold", "budget", "keeps every token that scores above a value, at most the budget",
               (Parameter("above", "float", 0.0, doc="in the unit of the score; attention is a mean from 0 to 1"),),
               ragged=True, paper="arXiv 2601.07891"),
    MethodSpec("prefill", "trigger", "once, when the prompt is complete"),
    MethodSpec("chunk", "trigger", "after every chunk of the prompt", (_count("tokens", 512, 1),)),
    MethodSpec("every", "trigger", "after every so many generated tokens", (_count("tokens", 128, 1),)),
    MethodSpec("slack", "trigger", "when a lane exceeds its budget by so many tokens", (_count("tokens", 64, 0),)),
    MethodSpec("step", "trigger", "at every generated token"),
    MethodSpec("drop", "action", "evicted tokens are dropped"),
    MethodSpec("cam", "action", "evicted values are merged into the next kept ones", (_count("window", 32, 1),),
               paper="ICML 2024, CaM"),
    MethodSpec("d2o", "action", "evicted tokens are merged into their nearest kept ones",
               (Parameter("decay", "float", 0.5, 0, 1, doc="weight of the past in the threshold of similarity"), _MASS),
               paper="arXiv 2406.13035"),
    MethodSpec("kvmerger", "action", "evicted tokens are merged into the kept one of their run of similar neighbours",
               (Parameter("similarity", "float", 0.75, -1, 1, doc="least cosine of neighbours in a run"), _MASS),
               paper="arXiv 2407.08454"),
):
    METHODS.register(_spec.name, _spec)
