"""Numbers of threads: the kernels' own, and torch's, which is one while the kernels do the heavy work.

Torch divides an operation among OpenMP threads, which wait for one another by spinning. Beside a busy process, a thread
that has no core delays the others by milliseconds, in operations that take microseconds. Scoring, selection and
sampling consist of such operations. A single thread waits for no other.
"""

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Calling(threading.local):
    """Torch's number of threads in the calling thread before it was set to one; None where it was not set."""

    asked: int | None = None


_calling = _Calling()


def asked_threads() -> int:
    """Return the number of threads set for torch in the calling thread, also within `one_torch_thread`."""
    return torch.get_num_threads() if _calling.asked is None else _calling.asked


@contextmanager
def one_torch_thread(wanted: bool = True) -> Iterator[None]:
    """Make torch compute in the calling thread alone until the end; unless `wanted`, change nothing.

    Takes some 10 microseconds. A thread that first uses torch meanwhile keeps a single torch thread.
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
    """Make torch compute in the calling thread alone for that thread's lifetime; other threads are unchanged."""
    if _calling.asked is not None:
        return
    asked = _calling.asked = torch.get_num_threads()
    if asked == 1:
        return
    torch.set_num_threads(1)
    # Torch gives the number set last to each thread that first uses it, so the former number is set once more.
    other = threading.Thread(target=torch.set_num_threads, args=(asked,))
    other.start()
    other.join()


def tell_threads(count: int) -> None:
    """Record `count` as torch's number of threads for the calling thread, which may still be limited to one."""
    if _calling.asked is not None:
        _calling.asked = count
    elif torch.get_num_threads() != count:
        torch.set_num_threads(count)


def set_threads(count: int) -> None:
    """Use `count` threads, at least 1, in the kernels (if they are installed) and where torch computes a model."""
    torch.set_num_threads(count)
    if importlib.util.find_spec("kvloom.kernels.cpu._ext") is not None:
        from kvloom.kernels import cpu

        cpu.set_num_threads(count)
