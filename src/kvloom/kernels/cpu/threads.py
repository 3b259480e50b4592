"""The number of kernel threads: the one set last, by `set_num_threads` here or by torch's.

The kernels have their own threads, which sleep when idle. Before anything is set, the number is `OMP_NUM_THREADS`, or
that of the cores that this process may use.
"""

import kvloom.kernels.cpu._ext as _ext
from kvloom.kernels.threads import asked_threads

_torch_threads = asked_threads()  # torch's setting at the last kernel call


def follow_torch() -> None:
    """Use as many threads as torch if torch's number has changed since the last call. Every kernel call calls this."""
    global _torch_threads
    count = asked_threads()
    if count != _torch_threads:
        _torch_threads = count
        _ext.set_num_threads(count)


def num_threads() -> int:
    """Return how many threads the kernels use."""
    follow_torch()
    return _ext.num_threads()


def set_num_threads(count: int) -> None:
    """Use `count` threads (at least 1) from the next call on, until this or `torch.set_num_threads` is called again."""
    follow_torch()
    _ext.set_num_threads(count)
