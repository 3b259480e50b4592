"""Workers: the threads beside the event loop, for tokenisation, templates, large answers and forms."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

NUM_TOKENIZER_THREADS = 2
LARGE_ANSWER_TOKENS = 128
"""Tokens whose log-probabilities take some 2 ms to be written."""


class Workers:
    """A pool for short work, and a thread of its own for forms, a large one of which takes seconds to compile."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._forms = ThreadPoolExecutor(1, thread_name_prefix="forms")

    async def offload(self, function: Callable[[], T]) -> T:
        """Run `function` (tokenisation, a chat template) in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function)

    async def build(self, function: Callable[[], T], num_tokens: int) -> T:
        """Return `function()`, which writes about `num_tokens` tokens; many are written in a thread of the pool."""
        return function() if num_tokens <= LARGE_ANSWER_TOKENS else await self.offload(function)

    async def compiling(self, function: Callable[[], T]) -> T:
        """Run `function`, which compiles forms, in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._forms, function)

    def close(self) -> None:
        """Drop what has not begun; for any thread."""
        for pool in (self.pool, self._forms):
            pool.shutdown(wait=False, cancel_futures=True)
