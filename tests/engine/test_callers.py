"""Many threads on one `LLM`: every answer is the one given alone, errors reach their caller, and nothing is left."""

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from harness.serving import make_llm, make_model
from harness.tiny_engine import nothing_left
from kvloom import LLM, BeamSearchParams, RequestOutput, SamplingParams
from kvloom.errors import InvalidInputError

NUM_THREADS = 8
NUM_CALLS = int(os.environ.get("KVLOOM_TEST_CALLS", "25"))
"""Calls of each thread."""

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a vocabulary of bytes, made for 256 tokens."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    """The tiny model in float32, eight sequences at once."""
    with make_llm(folder) as found:
        yield found
        assert found.stats()["requests_running"] == found.stats()["requests_waiting"] == 0
        nothing_left(found.engine)


def in_threads(work: Callable[[int], list[object]], count: int = NUM_THREADS) -> list[list[object]]:
    """Return what `work(number)` returns in each of `count` threads that start together."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> list[object]:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def answer(output: RequestOutput) -> list[tuple[list[int], str]]:
    return [(one.token_ids, one.text) for one in output.outputs]


def asked(llm: LLM, number: int) -> object:
    """Return the answer to the `number`-th of seven kinds of calls."""
    prompt, kind = f"Call number {number % 40}.", number % 7
    if kind == 0:
        return [answer(output) for output in llm.generate([prompt, prompt + " Again."], GREEDY)]
    if kind == 1:
        return [answer(output) for output in llm.generate(prompt, SamplingParams(n=2, seed=number % 40, max_tokens=5))]
    if kind == 2:
        return [answer(output) for output in llm.chat([{"role": "user", "content": prompt}], GREEDY)]
    if kind == 3:
        return answer(list(llm.stream(prompt, GREEDY))[-1])
    if kind == 4:
        return [answer(output) for output in llm.beam_search(prompt, BeamSearchParams(beam_width=2, max_tokens=4))]
    if kind == 5:
        stream = llm.stream(prompt, ENDLESS)
        first = answer(next(stream))
        stream.close()
        return len(first)
    stream = llm.stream(prompt, ENDLESS)
    output = next(stream)
    assert llm.abort(output.request_id) is not None
    (last,) = list(stream)[-1:]
    assert last.outputs[0].finish_reason == "abort"
    return llm.tokenizer.decode(llm.tokenizer.encode(prompt))


def test_eight_threads_get_the_answers_that_each_call_gets_alone(llm: LLM) -> None:
    numbers = [[thread * NUM_CALLS + call for call in range(NUM_CALLS)] for thread in range(NUM_THREADS)]
    expected = {number: asked(llm, number) for row in numbers for number in row}
    found = in_threads(lambda thread: [asked(llm, number) for number in numbers[thread]])
    for row, answers in zip(numbers, found, strict=True):
        assert answers == [expected[number] for number in row]


def test_callers_share_the_steps_of_the_engine(llm: LLM) -> None:
    alone = llm.stats()["steps"]
    llm.generate("Number 0", ENDLESS)
    alone = llm.stats()["steps"] - alone
    before = llm.stats()["steps"]
    in_threads(lambda number: list(llm.generate(f"Number {number}", ENDLESS)))
    assert llm.stats()["steps"] - before < NUM_THREADS * alone / 2


def test_an_error_reaches_the_caller_whose_request_it_is(llm: LLM) -> None:
    expected = answer(llm.generate("Fine", ENDLESS)[0])

    def work(number: int) -> list[object]:
        if number % 2:
            with pytest.raises(InvalidInputError, match="is not a token id"):
                llm.generate([[1], [1 << 20]], GREEDY)
            return [expected]
        return [answer(llm.generate("Fine", ENDLESS)[0])]

    assert in_threads(work) == [[expected]] * NUM_THREADS


def test_a_step_that_fails_raises_from_every_call_that_it_lost_and_from_no_other(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream("Paused, and lost with the others", ENDLESS)
    next(stream)
    honest = llm.engine.runner.model.step
    monkeypatch.setattr(llm.engine.runner.model, "step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate("Lost", GREEDY)
    monkeypatch.setattr(llm.engine.runner.model, "step", honest)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert len(llm.generate("Not lost", GREEDY)[0].outputs[0].token_ids) == 6


def test_ctrl_c_aborts_the_requests_of_its_caller_alone(llm: LLM) -> None:
    expected = answer(llm.generate("Other", ENDLESS)[0])
    main, others = threading.get_ident(), list[object]()

    def other() -> None:
        others.append(answer(llm.generate("Other", ENDLESS)[0]))
        signal.pthread_kill(main, signal.SIGINT)
        others.append(answer(llm.generate("Other", ENDLESS)[0]))

    thread = threading.Thread(target=other)
    prompts = [f"Main {number}" for number in range(60)]
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        llm.generate(prompts, ENDLESS)
    thread.join()
    assert others == [expected] * 2


def test_a_stream_goes_on_only_while_somebody_waits(llm: LLM) -> None:
    stream = llm.stream("Paused", ENDLESS)
    next(stream)
    steps = llm.stats()["steps"]
    time.sleep(0.05)
    assert llm.stats()["steps"] == steps
    next(stream)
    assert llm.stats()["steps"] == steps + 1
    stream.close()


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvloom-engine"]


def test_no_thread_is_left_after_close_or_collection(folder: Path) -> None:
    others = engine_threads()
    closed, collected = make_llm(folder), make_llm(folder)
    for found in (closed, collected):
        found.generate("Begin", GREEDY)
    mine = [thread for thread in engine_threads() if thread not in others]
    assert len(mine) == 2
    closed.close()
    gone = weakref.ref(collected.engine)
    del collected, found
    gc.collect()
    assert not any(thread.is_alive() for thread in mine) and gone() is None


def test_a_closed_llm_refuses_calls_and_fails_those_that_wait(folder: Path) -> None:
    llm = make_llm(folder)
    stream = llm.stream("Paused", ENDLESS)
    next(stream)
    failed = threading.Event()

    def waits() -> None:
        with pytest.raises(InvalidInputError, match="closed while this call waited"):
            llm.generate([f"Number {number}" for number in range(500)], ENDLESS)
        failed.set()

    thread = threading.Thread(target=waits)
    thread.start()
    while llm.stats()["requests_running"] < 2:
        time.sleep(0.001)
    llm.close()
    thread.join()
    assert failed.is_set()
    for call in (lambda: llm.generate("Late", GREEDY), lambda: next(stream), llm.stats):
        with pytest.raises(InvalidInputError, match="closed"):
            call()
    nothing_left(llm.engine)


def test_the_engine_computes_with_as_many_threads_as_the_caller_set(llm: LLM) -> None:
    seen = []
    llm.engine.continuation.observer = lambda sequences, logits: seen.append(torch.get_num_threads())
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            llm.generate("One token", SamplingParams(temperature=0, max_tokens=1))
    finally:
        torch.set_num_threads(before)
        llm.engine.continuation.observer = None
    assert seen == [1, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_between_calls_answers_for_itself(llm: LLM) -> None:
    expected = answer(llm.generate("Before", GREEDY)[0])
    stream = llm.stream("Before", GREEDY)
    next(stream)
    child = os.fork()
    if child == 0:
        same = answer(llm.generate("Before", GREEDY)[0]) == expected and answer(list(stream)[-1]) == expected
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert answer(list(stream)[-1]) == expected
