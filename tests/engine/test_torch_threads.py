"""Torch keeps to one thread in a step of the kernels, whose own threads are as many as asked for."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from harness.threads import threads
from harness.tiny_engine import greedy, run, tiny_engine
from harness.tiny_model import random_tokens
from kvloom.engine.callers import Call, Callers, add_all
from kvloom.engine.config import EngineConfig
from kvloom.errors import InvalidInputError
from kvloom.kernels import cpu
from kvloom.kernels.threads import keep_one_torch_thread, one_torch_thread, set_threads
from kvloom.policies.reading import read_policy
from kvloom.policies.scorers.knorm import Knorm


def watched(engine, monkeypatch, policy="knorm(budget=20,skip_layers=0)"):
    """Return what is filled with (torch's threads, the kernels' threads) in scoring and in sampling."""
    found = {}

    def look(where):
        found[where] = torch.get_num_threads(), cpu.num_threads()

    score = Knorm.score
    monkeypatch.setattr(Knorm, "score", lambda self, context: (look("scoring"), score(self, context))[1])
    engine.continuation.observer = lambda sequences, logits: look("sampling")
    run(engine, [random_tokens(40)], greedy(3), kv_policy=read_policy(policy))
    return found


@pytest.mark.parametrize("kind, torch_threads", [("cpu", 1), ("eager", 3)])
def test_scoring_and_sampling_run_on_one_torch_thread_unless_the_model_itself_computes_in_torch(
    kind, torch_threads, monkeypatch
):
    with threads(3):
        found = watched(tiny_engine(kind=kind), monkeypatch)
        assert found == {"scoring": (torch_threads, 3), "sampling": (torch_threads, 3)}
        assert (torch.get_num_threads(), cpu.num_threads()) == (3, 3)


def test_a_step_that_fails_gives_torch_its_threads_back(monkeypatch):
    with threads(3):
        engine = tiny_engine(kind="cpu")

        def fail(sequences, logits):
            raise ValueError("observed")

        engine.continuation.observer = fail
        engine.add(random_tokens(10), greedy(2))
        with pytest.raises(ValueError, match="observed"):
            engine.step()
        assert torch.get_num_threads() == 3


def test_a_thread_of_its_own_leaves_torch_s_threads_to_those_that_begin_later():
    with threads(3), ThreadPoolExecutor(1) as engine_thread:
        engine_thread.submit(torch.set_num_threads, 3).result()
        engine_thread.submit(keep_one_torch_thread).result()
        assert engine_thread.submit(torch.get_num_threads).result() == 1
        assert engine_thread.submit(cpu.num_threads).result() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3


@pytest.mark.parametrize("kind, torch_threads", [("cpu", 1), ("eager", 2)])
def test_the_thread_of_an_llm_uses_the_caller_s_number_in_the_kernels_and_one_in_torch(kind, torch_threads):
    found = []
    with threads(3):
        engine = tiny_engine(kind=kind)

        def watch(sequences, logits):
            found.append((torch.get_num_threads(), cpu.num_threads()))

        engine.continuation.observer = watch
        callers = Callers(engine)
        try:
            assert callers.call(lambda engine: cpu.num_threads()).result() == 3
            torch.set_num_threads(2)
            call = Call(add_all([lambda engine: engine.add(random_tokens(10), greedy(1))]))
            callers.wait_for(call)
            callers.close_call(call)
        finally:
            callers.close()
        assert found == [(torch_threads, 2)]


def test_one_torch_thread_within_another_changes_nothing():
    with threads(3):
        with one_torch_thread(), one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with one_torch_thread(wanted=False):
            assert torch.get_num_threads() == 3


def test_a_number_of_threads_is_that_of_torch_and_of_the_kernels():
    with threads(1):
        set_threads(4)
        assert (torch.get_num_threads(), cpu.num_threads()) == (4, 4)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_threads_that_is_none_is_refused(count):
    with pytest.raises(InvalidInputError, match="threads"):
        EngineConfig(threads=count)
