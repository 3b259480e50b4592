"""kvloom: plan, measure and serve the KV cache of large language models."""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true; `typing` would double the time until SIGTERM has a handler

if TYPE_CHECKING:
    from kvloom.engine.beam import BeamSearchParams as BeamSearchParams
    from kvloom.engine.llm import LLM as LLM
    from kvloom.engine.output import RequestOutput as RequestOutput
    from kvloom.engine.params import SamplingParams as SamplingParams
    from kvloom.engine.structured_params import StructuredOutputsParams as StructuredOutputsParams

_LAZY = {
    "BeamSearchParams": "kvloom.engine.beam",
    "LLM": "kvloom.engine.llm",
    "RequestOutput": "kvloom.engine.output",
    "SamplingParams": "kvloom.engine.params",
    "StructuredOutputsParams": "kvloom.engine.structured_params",
}

__all__ = ["LLM", "BeamSearchParams", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]


def __getattr__(name: str) -> object:
    """Import the public classes on first use, so that `import kvloom` stays free of torch."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvloom' has no attribute {name!r}")
