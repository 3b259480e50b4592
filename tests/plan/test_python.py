"""`kvloom.plan.plan`: the flags of the command as keywords, the same answer, kvloom's own errors."""

import inspect
import json
import subprocess
import sys

import pytest

import kvloom.plan
from kvloom.cli.plan import PRINTED
from kvloom.cli.plan import plan as command
from kvloom.errors import InvalidInputError, ModelNotFoundError, UnsupportedError
from kvloom.plan import Plan, plan
from kvloom.plan.planner import DESCRIBING, lengths, seconds


def test_a_plan_has_the_figures_verdict_and_advice_of_its_question():
    found = plan("llama-2-7b", "h100", context=4096)
    assert isinstance(found, Plan)
    assert (found.memory.fits, found.advice) == (True, [])
    assert found.sizes["kv_per_request"].value == 2_147_483_648
    assert found.sizes["kv_per_request"].label == "exact"


def test_the_command_prints_the_plan_that_python_returns(capsys):
    words = ["smollm2", "--device", "cpu:1GiB", "--users", "99", "--target-tpot", "50ms", "--bandwidth", "20",
             "--compare", "stores", "--max-loss", "1%", "--json"]  # fmt: skip
    with command.make_context("plan", words) as context:
        command.invoke(context)
    printed = json.loads(capsys.readouterr().out)
    found = plan("smollm2", "cpu:1GiB", users=99, target_tpot=0.05, bandwidth=20, compare="stores", max_loss=0.01)
    assert json.loads(json.dumps(found.json())) == printed


def test_every_keyword_is_a_flag_of_the_command_with_the_same_default():
    flags = {str(param.name): param.to_info_dict()["default"] for param in command.params}
    keywords = {
        name: parameter.default
        for name, parameter in inspect.signature(plan).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name != "model"
    }
    assert {*keywords, *DESCRIBING} == set(flags) - set(PRINTED) - {"model", "config", "plugin"}
    assert {name: flags[name] or default for name, default in keywords.items()} == keywords


BAD = [
    ({"model": "llama-3-8b", "users": 1.5}, InvalidInputError, "--users is 1.5; it must be a whole number"),
    ({"model": "llama-3-8b", "context": "4096"}, InvalidInputError, "--context is '4096'"),
    ({"model": "llama-3-8b", "max_num_batched_tokens": None}, InvalidInputError, "--max-num-batched-tokens is None"),
    ({"model": "llama-3-8b", "gpu_memory_utilization": "90%"}, InvalidInputError, "it must be a number"),
    ({"model": "llama-3-8b", "compare": "atention"}, InvalidInputError, "'attention'"),
    ({"model": "llama-3-8b", "target_tpot": "soon"}, InvalidInputError, "--target-tpot"),
    ({"model": "llama-3-8b", "layers": 4}, InvalidInputError, "contradict"),
    ({"layers": 4, "heads": True}, InvalidInputError, "--heads is True"),
    ({"layers": 4, "heads": 4, "headdim": 64}, InvalidInputError, "'head_dim'"),
    ({"model": "llama-3-8b", "devices": 3}, UnsupportedError, "32 query heads are not divisible by 3"),
    ({"model": "./nowhere"}, ModelNotFoundError, "no file or folder"),
]


@pytest.mark.parametrize("keywords, error, words", BAD)
def test_wrong_arguments_raise_errors_of_kvloom_that_name_them(keywords, error, words):
    with pytest.raises(error) as caught:
        plan(**keywords)
    assert words in str(caught.value)


def test_importing_the_package_loads_no_planner_and_planning_loads_no_torch():
    program = (
        "import sys, kvloom.plan\n"
        "assert 'kvloom.plan.planner' not in sys.modules\n"
        "kvloom.plan.plan('llama-3-8b', 'h100')\n"
        "print([name for name in ('torch', 'numpy', 'click', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_package_names_what_it_has_and_refuses_what_it_has_not():
    assert set(kvloom.plan.__all__) == {"Plan", "plan"}
    with pytest.raises(AttributeError, match="no attribute 'planned'"):
        kvloom.plan.planned  # noqa: B018


@pytest.mark.parametrize(
    "given, expected",
    [
        ((None, None, None, None), (3584, 512)),
        ((1000, None, None, None), (875, 125)),
        ((1000, 900, None, None), (900, 100)),
        ((1000, None, 100, None), (900, 100)),
        ((None, 900, 100, None), (900, 100)),
        ((None, None, None, 1024), (896, 128)),
    ],
)  # fmt: skip
def test_what_is_not_given_of_the_lengths_is_filled_in(given, expected):
    assert lengths(*given) == expected


@pytest.mark.parametrize("text, value", [("50ms", 0.05), ("2s", 2.0), ("0.25", 0.25), (None, None)])
def test_times_may_be_given_in_milliseconds(text, value):
    assert seconds("--target-tpot", text) == value
