"""Loading an engine in a process that is the command's own."""

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM


def load_llm(model: str, **arguments: Any) -> "LLM":
    """Return `LLM(model, **arguments)`; what is imported for it is taken out of garbage collections. `KvloomError`.

    Importing makes a quarter of a million objects, nearly all torch's, which live as long as the process. They are
    looked at once, when all are there, instead of again and again in between, later, and when the process ends. That
    one look is needed: what is garbage in cycles may hold the frames of callers, and through them the model for good.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        from kvloom.engine.llm import LLM
    finally:
        if enabled:
            gc.enable()
    gc.collect()
    gc.freeze()  # before the kernels and the model, which are freed in order at the end
    return LLM(model, **arguments)
