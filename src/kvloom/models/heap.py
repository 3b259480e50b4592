"""The C library's heap: giving back what was freed, which it keeps otherwise."""

import ctypes


def release_free_heap() -> None:
    """Give freed memory back to the system where the C library can (glibc); elsewhere nothing happens.

    Reading a vocabulary or decoding weights frees tens to hundreds of MiB in small pieces that would stay for good.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
