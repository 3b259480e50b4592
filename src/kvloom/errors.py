"""Every error that kvloom raises on purpose, with the exit code that the command line gives it.

A message says what was wrong, what was expected and what to do about it. `assert` is for our own bugs only.
"""

from collections.abc import Sequence


class KvloomError(Exception):
    """Base of all deliberate errors; `exit_code` is the status of the command line."""

    exit_code = 1


class InvalidInputError(KvloomError, ValueError):
    """An argument, prompt or option is wrong, whatever the state of the machine."""

    exit_code = 2


class ModelNotFoundError(KvloomError):
    """No model has that name or lies at that path."""

    exit_code = 3


class CheckpointError(KvloomError):
    """The files of a model are damaged, incomplete or do not fit their config."""

    exit_code = 4


class UnsupportedError(KvloomError):
    """A combination that kvloom refuses; `reasons` lists every reason."""

    exit_code = 5

    def __init__(self, what: str, reasons: Sequence[str]) -> None:
        self.what = what
        self.reasons = tuple(reasons)
        super().__init__(what + ": " + "; ".join(self.reasons))


class DoesNotFitError(KvloomError):
    """The KV cache or the weights need more memory than there is, at present or at all."""

    exit_code = 6


class RequestFailedError(KvloomError):
    """One request failed by its own logits or by the caller's code; other requests continue."""


class MethodError(RequestFailedError):
    """A cache method returned an invalid result or read an input that it did not declare; the message names it."""

    exit_code = 9


class DownloadError(KvloomError):
    """A file could not be fetched: no connection, an interrupted transfer or a wrong checksum."""

    exit_code = 7


class ChatTemplateError(KvloomError):
    """A chat template is missing, unsafe, endless or fails on these messages."""

    exit_code = 8
