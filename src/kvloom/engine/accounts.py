"""Accounts: what a request has produced, and what it holds and held of the cache."""

from kvloom.engine.output import KVUsage, RequestOutput, kv_usage_of, output_of
from kvloom.engine.queues import Queues
from kvloom.engine.request import Request, Status


class Accounts:
    """Snapshots of requests, taken between two steps."""

    def __init__(self, queues: Queues) -> None:
        self.queues = queues

    def output(self, request: Request) -> RequestOutput:
        """Return a snapshot of a request, complete or so far."""
        self._note_bytes(request)
        return output_of(request)

    def kv_usage(self, request: Request) -> KVUsage:
        """Return a request's present and peak usage of the cache, without a copy of its tokens."""
        self._note_bytes(request)
        return kv_usage_of(request)

    def _note_bytes(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.status is Status.RUNNING:
                self.queues.note_bytes(sequence)
