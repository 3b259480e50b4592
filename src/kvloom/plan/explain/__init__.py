"""Explanations with the user's own model in the numbers: `kvloom plan MODEL --explain TOPIC`."""

from kvloom.plan.explain.explanation import Explainer, Explanation
from kvloom.plan.explain.generation import generation
from kvloom.plan.explain.intensity import intensity
from kvloom.plan.explain.layouts import layouts
from kvloom.plan.explain.preallocation import preallocation
from kvloom.plan.explain.projections import projections
from kvloom.plan.explain.reach import reach
from kvloom.plan.explain.scores import scores
from kvloom.plan.question import Question
from kvloom.registry import Registry

TOPICS: Registry[Explainer] = Registry("topic")
TOPICS.register("generation", generation)
TOPICS.register("preallocation", preallocation)
TOPICS.register("projections", projections)
TOPICS.register("scores", scores)
TOPICS.register("reach", reach)
TOPICS.register("intensity", intensity)
TOPICS.register("layouts", layouts)


def explain(asked: Question, topic: str) -> Explanation:
    """Return the explanation of `topic` for `asked`; raises `InvalidInputError` naming the nearest topic."""
    return TOPICS.get(topic)(asked)


__all__ = ["TOPICS", "Explanation", "explain"]
