"""The C library's heap: returns free memory, which the library otherwise keeps, to the system."""

import ctypes


def release_free_heap() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere nothing happens.

    Reading a vocabulary or decoding weights frees tens to hundreds of MiB in small pieces, which the heap would keep.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
