"""How many threads compute: the kernels' own, and torch's, which keep to one while the kernels do the heavy work.

Torch shares an operation among threads of OpenMP that wait for one another by spinning. Beside a busy process the one
that is not running keeps the others waiting for milliseconds, in operations of microseconds. Scoring, choosing and
sampling are made of such operations. One thread has nobody to wait for.
"""

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Calling(threading.local):
    """What torch was told in the calling thread before it was put to one thread; None where it was not."""

    asked: int | None = None


_calling = _Calling()


def asked_threads() -> int:
    """Return how many threads torch was told to use in the calling thread, also within `one_torch_thread`."""
    return torch.get_num_threads() if _calling.asked is None else _calling.asked


@contextmanager
def one_torch_thread(wanted: bool = True) -> Iterator[None]:
    """Let torch compute in the calling thread alone until the end; unless `wanted`, change nothing.

    Takes some 10 microseconds. A thread that uses torch for the first time meanwhile is given one thread for good.
    """
    if not wanted or _calling.asked is not None:
        yield
        return
    asked = _calling.asked = torch.get_num_threads()
    if asked > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if asked > 1:
            torch.set_num_threads(asked)
        _calling.asked = None


def keep_one_torch_thread() -> None:
    """Let torch compute in the calling thread alone for as long as that lives; other threads are left as they are."""
    if _calling.asked is not None:
        return
    asked = _calling.asked = torch.get_num_threads()
    if asked == 1:
        return
    torch.set_num_threads(1)
    # Torch gives the last number to each thread that uses it for the first time: let that be the one from before.
    other = threading.Thread(target=torch.set_num_threads, args=(asked,))
    other.start()
    other.join()


def tell_threads(count: int) -> None:
    """Take `count` for what torch was told in the calling thread, which may keep it to one all the same."""
    if _calling.asked is not None:
        _calling.asked = count
    elif torch.get_num_threads() != count:
        torch.set_num_threads(count)


def set_threads(count: int) -> None:
    """Use `count` threads, at least 1, in the kernels (if they were built) and where a model is computed in torch."""
    torch.set_num_threads(count)
    if importlib.util.find_spec("kvloom.kernels.cpu._ext") is not None:
        from kvloom.kernels import cpu

        cpu.set_num_threads(count)
