"""Loading an engine in a process that is the command's own."""

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM


def load_llm(model: str, **arguments: Any) -> "LLM":
    """Return `LLM(model, **arguments)`, imported and loaded without garbage collections; raises `KvloomError`.

    A quarter of a million objects are made, nearly all torch's, and live as long as the process. They come out as old
    ones, so that the collections of young objects, which are the frequent ones, do not look at each of them first.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        from kvloom.engine.llm import LLM

        return LLM(model, **arguments)
    finally:
        gc.freeze()
        gc.unfreeze()  # what was frozen is put into the oldest generation
        if enabled:
            gc.enable()
