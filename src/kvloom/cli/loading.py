"""Loading an engine in a process that is the command's own."""

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM


def load_llm(model: str, **arguments: Any) -> "LLM":
    """Return `LLM(model, **arguments)`, imported and loaded without garbage collections; raises `KvloomError`.

    Loading creates a quarter of a million objects, nearly all torch's, that live as long as the process. They are moved
    to the oldest generation, so that the frequent collections of young objects do not traverse them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        from kvloom.engine.llm import LLM

        return LLM(model, **arguments)
    finally:
        gc.freeze()
        gc.unfreeze()  # moves the frozen objects to the oldest generation
        if enabled:
            gc.enable()
