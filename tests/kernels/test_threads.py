"""The kernels' threads beside those of other libraries: their number, sleep when idle, and forks."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.threads import threads
from harness.tiny_engine import finish, greedy, nothing_left, run, tiny_engine
from harness.tiny_model import random_tokens
from kvloom.kernels import cpu
from kvloom.kernels.cpu import _ext

TASKS = Path("/proc/self/task")
linux = pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted in /proc")


def tasks() -> int:
    """Return the number of threads of this process."""
    return len(list(TASKS.iterdir()))


def settled() -> int:
    """Return the number of threads once twenty looks in a row find the same: threads take a moment to end."""
    looks = [tasks()]
    while len(looks) < 20 or len(set(looks[-20:])) > 1:
        time.sleep(0.005)
        looks.append(tasks())
    return looks[-1]


def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds, for threads begin and end when the system lets them; fails after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def sleeps(task: str) -> bool:
    """Return whether a thread waits for something, as one that spins never does."""
    return (TASKS / task / "stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Begin with one thread, whatever other tests left behind, and put back what was."""
    with threads(1):
        yield


def work() -> torch.Tensor:
    """One product that all threads share."""
    generator = torch.Generator().manual_seed(0)
    weight = cpu.PackedWeight(torch.randn(256, 64, generator=generator), "fp32")
    return cpu.linear(torch.randn(40, 64, generator=generator), weight)


def process(program: str, **environment: str) -> str:
    """Return what a Python process prints; it may take a minute."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=inherited | environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- how many --------------------------------------------------------------------------------------------------------


def test_the_environment_says_how_many_threads_there_are() -> None:
    program = "from kvloom.kernels import cpu; print(cpu.num_threads())"
    assert int(process(program, OMP_NUM_THREADS="3")) == 3


@linux
def test_without_a_word_there_are_no_more_threads_than_cores_that_the_process_may_use() -> None:
    program = "from kvloom.kernels import cpu; print(cpu.num_threads())"
    one = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); "
    assert 1 <= int(process(program)) <= len(os.sched_getaffinity(0))
    assert int(process(one + program)) == 1


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu.max": "max 100000"}, 0),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 0),
        ({"cpu/cpu.cfs_quota_us": "350000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({}, 0),
    ],
)
def test_a_container_s_share_of_the_cores_is_read_from_its_control_group(
    tmp_path: Path, files: dict[str, str], threads: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert _ext.quota_threads(str(tmp_path)) == threads


def test_torch_s_number_is_followed_and_the_later_word_counts() -> None:
    torch.set_num_threads(1)
    assert cpu.num_threads() == 1
    torch.set_num_threads(2)
    assert cpu.num_threads() == 2
    cpu.set_num_threads(3)
    assert (cpu.num_threads(), torch.get_num_threads()) == (3, 2)
    torch.set_num_threads(1)
    cpu.set_num_threads(2)
    assert cpu.num_threads() == 2
    torch.set_num_threads(2)
    torch.set_num_threads(1)
    assert cpu.num_threads() == 2  # nobody looked in between, and torch is where it was


@linux
def test_threads_are_those_of_the_number_and_no_others() -> None:
    torch.set_num_threads(1)
    expected = work()
    alone = settled()
    for count in (3, 2, 1, 4):
        cpu.set_num_threads(count)
        assert torch.equal(work(), expected)
        until(lambda count=count: tasks() == alone + count - 1)  # type: ignore[misc]
    torch.set_num_threads(2)  # a number given to torch takes the kernels' threads away too
    cpu.num_threads()
    torch.set_num_threads(1)
    assert torch.equal(work(), expected)
    until(lambda: tasks() == alone)


@linux
def test_two_engines_share_one_set_of_threads() -> None:
    run(tiny_engine(kind="cpu"), [random_tokens(30)], greedy(4))  # a step ends OpenMP's threads, if there are any
    alone = settled()
    cpu.set_num_threads(2)
    for _ in range(2):
        run(tiny_engine(kind="cpu"), [random_tokens(30)], greedy(4))
        until(lambda: tasks() == alone + 1)


# ---- in peace with others --------------------------------------------------------------------------------------------


@linux
def test_idle_threads_sleep() -> None:
    torch.set_num_threads(1)
    work()
    others = {task.name for task in TASKS.iterdir()}
    cpu.set_num_threads(4)
    work()
    team = {task.name for task in TASKS.iterdir()} - others
    assert len(team) == 3
    until(lambda: all(map(sleeps, team)))


@linux
def test_a_step_ends_torch_s_waiting_threads_and_torch_starts_new_ones() -> None:
    torch.set_num_threads(1)
    cpu.set_num_threads(2)
    engine = tiny_engine(kind="cpu")
    engine.add(random_tokens(20), greedy(6))
    engine.step()
    alone = settled()
    torch.set_num_threads(4)
    cpu.set_num_threads(2)
    numbers = torch.arange(1 << 20, dtype=torch.float32)
    expected = numbers * 2
    for _ in range(3):
        assert torch.equal(numbers * 2, expected)
        if torch.__config__.parallel_info().find("OpenMP") >= 0:
            assert tasks() > alone  # torch's own, which would spin while the step runs
        engine.step()
        until(lambda: tasks() == alone)
    finish(engine)


def test_calls_from_many_threads_at_once_with_ever_other_numbers_of_threads_give_what_one_gives() -> None:
    torch.set_num_threads(1)
    expected, found = work(), []

    def several(seed: int) -> None:
        for i in range(30):
            cpu.set_num_threads(1 + (i + seed) % 4)
            found.append(torch.equal(work(), expected))

    callers = [threading.Thread(target=several, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert found == [True] * 120


def test_two_engines_in_two_threads_give_what_each_gives_alone() -> None:
    torch.set_num_threads(1)
    cpu.set_num_threads(2)
    prompts = [[random_tokens(40 + i, seed=10 * seed + i) for i in range(3)] for seed in range(2)]
    alone = [run(tiny_engine(kind="cpu"), own, greedy(25)) for own in prompts]
    engines = [tiny_engine(kind="cpu") for _ in prompts]
    together: dict[int, list[list[int]]] = {}

    def generate(number: int) -> None:
        together[number] = run(engines[number], prompts[number], greedy(25))

    callers = [threading.Thread(target=generate, args=(number,)) for number in range(2)]
    for caller in callers:
        caller.start()
    for step in range(40):  # and somebody changes the number all the while
        cpu.set_num_threads(1 + step % 3)
        time.sleep(0.002)
    for caller in callers:
        caller.join(60)
    assert [together[number] for number in range(2)] == alone
    for engine in engines:
        nothing_left(engine)


FORK = """
import os, threading, time
import torch
from kvloom.kernels import cpu

torch.set_num_threads(2)
cpu.set_num_threads(3)
weight = cpu.PackedWeight(torch.ones(512, 512), "fp32")
x = torch.ones(64, 512)
stop = False

def busy():
    while not stop:
        cpu.linear(x, weight)

callers = [threading.Thread(target=busy) for _ in range(2)]
for caller in callers:
    caller.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if (cpu.linear(x, weight) == 512).all() and cpu.num_threads() == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop = True
for caller in callers:
    caller.join()
assert (cpu.linear(x, weight) == 512).all()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_child_forked_in_the_middle_of_calls_computes_on_its_own_threads() -> None:
    assert process(FORK) == "done\n"


FORK_OF_AN_ENGINE = """
import os
import torch
from harness.tiny_engine import greedy, run, tiny_engine
from harness.tiny_model import random_tokens
from kvloom.kernels import cpu

torch.set_num_threads(2)
numbers = torch.ones(1 << 20) * 2  # torch has threads that the child will not have
cpu.set_num_threads(2)
engine = tiny_engine(kind="cpu")
expected = run(engine, [random_tokens(30)], greedy(8))
(torch.ones(1 << 20) * 2).sum()
child = os.fork()
if child == 0:
    os._exit(0 if run(engine, [random_tokens(30)], greedy(8)) == expected else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert run(engine, [random_tokens(30)], greedy(8)) == expected
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_an_engine_goes_on_in_a_forked_child_and_in_its_parent() -> None:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    assert process(FORK_OF_AN_ENGINE, PYTHONPATH=path) == "done\n"


def test_arrays_of_thousands_of_rows_are_shared_by_more_threads_than_cores() -> None:
    torch.set_num_threads(1)
    cpu.set_num_threads(16)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((3000, 50), dtype=np.float32))
    assert torch.equal(cpu.argmax(values), values.argmax(1).int())


def test_a_team_that_shrinks_and_grows_among_too_few_cores_gives_what_one_thread_gives() -> None:
    torch.set_num_threads(1)
    prompts = [random_tokens(40 + i, seed=i) for i in range(3)]
    expected, product = run(tiny_engine(kind="cpu"), prompts, greedy(40)), work()
    cpu.set_num_threads(12)
    assert run(tiny_engine(kind="cpu"), prompts, greedy(40)) == expected
    assert all(torch.equal(work(), product) for _ in range(200))
    assert cpu.num_threads() == 12
