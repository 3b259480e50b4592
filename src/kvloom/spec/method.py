"""The methods that a policy string may name: their role, their parameters and the facts that the planner uses.

Registering a method here adds its name to the grammar; its computation is in `kvloom.policies`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from kvloom.errors import InvalidInputError
from kvloom.registry import Registry, nearest
from kvloom.spec.budget import pyramid_budgets
from kvloom.spec.headpattern import streaming_limits
from kvloom.spec.kv import KVSpec
from kvloom.spec.needs import NOTHING, Needs
from kvloom.spec.triggers import Triggers
from kvloom.units import parse_count

Value: TypeAlias = int | float | bool | str
Args: TypeAlias = Mapping[str, Value]
"""Arguments of a method by name; those without a value are left out."""

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
    """One method: `params` in the order in which they are printed, and every fact that is not computation.

    All kinds: `needs` is what has to be gathered, or a rule `(args) -> Needs`. `stacks` means that one call takes
    several layers of equal lanes [L, G, S]: a scorer that reads positions and attention only, a budget whose share of a
    lane depends on that lane alone. `chooses` means that the method names the tokens that stay instead of scoring them.

    Selectors: `budgeted` ones take `budget=` or `keep=`. Others hold what is protected and the newest tokens that the
    argument `newest` counts, or `choose`, at most `lane_limits(args, kv)` tokens in each lane (None: no limit) whenever
    they act. `comparable` scores are on one scale for all heads (they sum to the same total), so that lanes may share a
    budget by them as they are; others are standardised first. `skipped` names the argument that counts the first
    layers, which keep all tokens. `acts` lists when they may act: prefill, chunk (in the middle of a prompt), decode
    (while generating). `triggers` and `default_budget` are used when the policy names none. `moved_sinks(args)` is the
    number of first tokens that are rotated to their places in the cache where positions are counted there, None where
    they are not. `query_aware` means that the published quality needs the question in the prompt.

    Selectors and refinements: `protected` is what stays whatever its score, in tokens of a lane: the argument that
    counts it, or a rule `(args, budget) -> tokens`. `attention` says of a selector that its scores are attention
    weights, computed from queries and keys, and of a refinement that it takes no other scores.

    Budgets: lanes of a layer may differ in length (`ragged`), layers may (`spans_layers`). `layer_shares` is the rule
    `(args, budget, protected, layers, prompt) -> tokens of a lane of each layer` where the prompt's length decides,
    `floor` the argument with the fraction of the budget that every lane keeps. `acts_always` budgets may drop tokens
    from a lane that holds less than its budget. Triggers: `when(args)` are the moments.
    """

    name: str
    role: Role
    summary: str
    params: tuple[Parameter, ...] = ()
    needs: Needs | Callable[[Args], Needs] = NOTHING
    stacks: bool = False
    chooses: bool = False
    budgeted: bool = False
    newest: str | None = None
    lane_limits: Callable[[Args, KVSpec], tuple[int | None, ...] | None] | None = None
    comparable: bool = True
    protected: str | Callable[[Args, int], int] | None = None
    skipped: str | None = None
    attention: bool = False
    acts: tuple[str, ...] = ("prefill",)
    triggers: tuple[str, ...] = ()
    default_budget: str = "uniform"
    moved_sinks: Callable[[Args], int | None] | None = None
    query_aware: bool = False
    ragged: bool = False
    spans_layers: bool = False
    layer_shares: Callable[[Args, int, int, int, int], list[int]] | None = None
    floor: str | None = None
    acts_always: bool = False
    when: Callable[[Args], Triggers] = lambda args: Triggers()
    paper: str = ""

    @property
    def even(self) -> bool:
        """True for a budget under which all lanes keep the same number of tokens."""
        return not (self.ragged or self.spans_layers)

    @property
    def trades(self) -> bool:
        """True for a budget that is an average, because lanes trade tokens with one another."""
        return not self.even and not self.acts_always

    def needs_of(self, args: Args) -> Needs:
        """Return what has to be gathered for the method with these arguments."""
        return self.needs if isinstance(self.needs, Needs) else self.needs(args)

    def num_protected(self, args: Args, budget: int) -> int:
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


def _replay(args: Args) -> Needs:
    plus = bool(args["normalised"])
    chunk, sinks = int(args["chunk"]), int(args["sinks"])
    return Needs(replay=chunk, replay_sinks=sinks, layer_inputs=plus, output_weights=plus)


_selector("full", "keeps every token", budgeted=False)
_selector("window", "keeps the newest tokens", _count("size", 1024, 1), budgeted=False, triggers=_ALWAYS,
          acts=_ANY_TIME, newest="size", stacks=True)
_selector("streaming", "keeps the first and the newest tokens", _count("sinks", 4), _count("window", 1020, 1),
          Parameter("positions", "choice", "true", choices=("true", "cache"), doc="as seen, or in the cache"),
          budgeted=False, triggers=_ALWAYS, acts=_ANY_TIME, paper="arXiv 2309.17453", newest="window",
          protected="sinks", stacks=True,
          moved_sinks=lambda args: int(args["sinks"]) if args["positions"] == "cache" else None)
_selector("h2o", "keeps heavy hitters of all queries so far and the newest tokens",
          Parameter("recent", "float", 0.5, 0, 1, doc="share of the budget for the newest tokens"),
          triggers=("prefill", "step"), acts=_ANY_TIME, attention=True, needs=Needs(key_mass=True), stacks=True,
          paper="arXiv 2306.14048",
          protected=lambda args, budget: int(float(args["recent"]) * budget))
_selector("tova", "keeps what the newest query attends to", triggers=("prefill", "step"), acts=_ANY_TIME,
          attention=True, needs=Needs(queries=1), stacks=True, paper="arXiv 2401.06104")
_selector("scissorhands", "keeps what a window of queries attends to persistently", _count("window", 400, 1),
          _count("recent", 10), triggers=("prefill", "step"), acts=_NOT_PER_CHUNK, attention=True,
          needs=lambda args: Needs(key_mass=True, mass_window=int(args["window"])), stacks=True,
          paper="arXiv 2305.17118", protected="recent")
_selector("snapkv", "keeps what the end of the prompt attends to", *_pooling(32, 5), triggers=_PREFILL,
          attention=True, needs=lambda args: Needs(queries=int(args["window"])), query_aware=True,
          paper="arXiv 2404.14469", protected="window")
_selector("knorm", "keeps keys of small norm", _count("skip_layers", 2), triggers=_PREFILL, acts=_ANY_TIME,
          skipped="skip_layers", comparable=False, paper="arXiv 2406.11430")
_selector("keydiff", "keeps keys unlike the mean key", triggers=_PREFILL, acts=_ANY_TIME, comparable=False,
          paper="arXiv 2504.15364")
_selector("expected", "keeps what a Gaussian of future queries is expected to attend to", _count("horizon", 512, 1),
          _count("sinks", 4), Parameter("eps", "float", 0.0, 0, doc="added to the expected weight"),
          triggers=_PREFILL, attention=True, paper="arXiv 2510.00636", protected="sinks",
          needs=lambda args: Needs(query_moments=True, moment_skip=int(args["sinks"])))
_selector("kvzip", "keeps what is needed to repeat the context", _count("chunk", 2048, 1), _count("sinks", 4),
          Parameter("normalised", "bool", False, doc="weigh by the norm of the value's output (KVzip+)"),
          triggers=_PREFILL, default_budget="global", attention=True, needs=_replay, paper="arXiv 2505.23416",
          protected="sinks")
_selector("fastgen", "chooses a cheap policy for each head that still recovers its attention",
          Parameter("recovery", "float", 0.95, 0, 1), Parameter("recent", "float", 0.3, 0, 1),
          Parameter("frequent", "float", 0.3, 0, 1), budgeted=False, chooses=True, triggers=("prefill", "step"),
          acts=_NOT_PER_CHUNK, attention=True, paper="arXiv 2310.01801",
          needs=lambda args: Needs(key_mass=True, near=float(args["recent"]), token_kinds=True))
_selector("duo", "keeps everything on retrieval heads, sinks and newest tokens on the others",
          Parameter("pattern", "text", None, doc="file that says which heads are retrieval heads"),
          Parameter("threshold", "float", 0.5, 0, 1, doc="least number in the pattern of a retrieval head"),
          _count("sinks", 4), _count("window", 256, 1), budgeted=False, chooses=True, triggers=_ALWAYS,
          acts=_ANY_TIME, lane_limits=streaming_limits, paper="arXiv 2410.10819")
_selector("random", "keeps tokens at random: the floor of every comparison", _count("sinks", 0), _count("seed", 0),
          triggers=_PREFILL, acts=_ANY_TIME, protected="sinks")


def _pyramid(args: Args, budget: int, protected: int, layers: int, prompt: int) -> list[int]:
    return pyramid_budgets(budget, protected, layers, prompt, float(args["beta"]))


for _spec in (
    MethodSpec("vatp", "refine", "weighs scores by the norm of the value", (_count("sinks", 20),),
               protected="sinks", attention=True, paper="arXiv 2406.12335"),
    MethodSpec("critical", "refine", "second half of the budget by the norm of the value's output",
               (Parameter("eps", "float", 1e-4, 0, doc="added to the mean attention weight of a query"),),
               needs=Needs(output_weights=True), chooses=True, attention=True, paper="arXiv 2502.03805"),
    MethodSpec("uniform", "budget", "every lane keeps the same number of tokens", stacks=True),
    MethodSpec("pyramid", "budget", "early layers keep more than late ones",
               (Parameter("beta", "float", 20.0, 1, doc="steepness: the last layer gets 1/beta"),),
               spans_layers=True, layer_shares=_pyramid,
               paper="arXiv 2406.02069"),
    MethodSpec("adaptive", "budget", "the heads of a layer share its budget by their scores",
               (Parameter("floor", "float", 0.2, 0, 1, doc="share of the even budget that every head keeps"),),
               ragged=True, floor="floor", paper="arXiv 2407.11550"),
    MethodSpec("global", "budget", "all heads of all layers share one budget by their scores",
               (Parameter("floor", "float", 0.0, 0, 1, doc="share of the even budget that every head keeps"),),
               ragged=True, spans_layers=True, floor="floor", paper="arXiv 2505.23416"),
    MethodSpec("threshold", "budget", "keeps every token that scores above a value, at most the budget",
               (Parameter("above", "float", 0.0, doc="in the unit of the score; attention is a mean from 0 to 1"),),
               ragged=True, acts_always=True, paper="arXiv 2601.07891"),
    MethodSpec("prefill", "trigger", "once, when the prompt is complete", when=lambda args: Triggers(prefill=True)),
    MethodSpec("chunk", "trigger", "after every chunk of the prompt", (_count("tokens", 512, 1),),
               when=lambda args: Triggers(chunk=int(args["tokens"]))),
    MethodSpec("every", "trigger", "after every so many generated tokens", (_count("tokens", 128, 1),),
               when=lambda args: Triggers(every=int(args["tokens"]))),
    MethodSpec("slack", "trigger", "when a lane exceeds its budget by so many tokens", (_count("tokens", 64, 0),),
               when=lambda args: Triggers(slack=int(args["tokens"]))),
    MethodSpec("step", "trigger", "at every generated token", when=lambda args: Triggers(slack=0)),
    MethodSpec("drop", "action", "evicted tokens are dropped"),
    MethodSpec("cam", "action", "evicted values are merged into the next kept ones", (_count("window", 32, 1),),
               needs=Needs(key_mass=True), paper="ICML 2024, CaM"),
    MethodSpec("d2o", "action", "evicted tokens are merged into their nearest kept ones",
               (Parameter("decay", "float", 0.5, 0, 1, doc="weight of the past in the threshold of similarity"), _MASS),
               paper="arXiv 2406.13035"),
    MethodSpec("kvmerger", "action", "evicted tokens are merged into the kept one of their run of similar neighbours",
               (Parameter("similarity", "float", 0.75, -1, 1, doc="least cosine of neighbours in a run"), _MASS),
               paper="arXiv 2407.08454"),
):
    METHODS.register(_spec.name, _spec)
