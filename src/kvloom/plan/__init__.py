"""The planner: bytes and speed in closed form. `from kvloom.plan import plan, Plan`."""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from kvloom.plan.answer import Plan as Plan
    from kvloom.plan.planner import plan as plan

_LAZY = {"Plan": "kvloom.plan.answer", "plan": "kvloom.plan.planner"}

__all__ = ["Plan", "plan"]


def __getattr__(name: str) -> object:
    """Import the public names on first use, so that modules of this package stay as light as they are alone."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvloom.plan' has no attribute {name!r}")
