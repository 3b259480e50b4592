"""Windows of texts, intervals, and the spelling of policies for a share of a prompt."""

import pytest

from kvloom.errors import InvalidInputError
from kvloom.measure.policies import DEFAULT_METHODS, at_share, registered_methods
from kvloom.measure.window import windows_of
from kvloom.policies.plugins import load_all
from kvloom.spec.method import METHODS

TEXTS = [list(range(1000)), list(range(2000, 2300))]


def test_windows_are_pieces_of_the_texts_that_do_not_overlap():
    found = windows_of(TEXTS, 30, 10, 100)
    assert len(found) == 1000 // 40 + 300 // 40
    seen = [token for window in found for token in (*window.prompt, *window.follow)]
    assert len(set(seen)) == len(seen)
    for window in found:
        whole = (*window.prompt, *window.follow)
        assert whole == tuple(range(whole[0], whole[0] + 40))


def test_texts_take_turns_until_one_has_no_more():
    firsts = [window.prompt[0] >= 2000 for window in windows_of(TEXTS, 30, 10, 20)]
    assert firsts == [False, True] * 7 + [False] * 6


def test_a_greater_number_only_adds_windows():
    assert windows_of(TEXTS, 30, 10, 20)[:7] == windows_of(TEXTS, 30, 10, 7)


def test_a_first_token_begins_every_prompt_and_counts_among_its_tokens():
    for window in windows_of(TEXTS, 30, 10, 5, first=[7777]):
        assert len(window.prompt) == 30
        assert window.prompt[0] == 7777
        assert window.follow[0] == window.prompt[-1] + 1


@pytest.mark.parametrize("prompt, follow, count", [(0, 10, 1), (30, 1, 1), (30, 10, 0), (2000, 10, 1)])
def test_windows_that_cannot_be_are_refused(prompt, follow, count):
    with pytest.raises(InvalidInputError, match="window"):
        windows_of(TEXTS, prompt, follow, count)


@pytest.mark.parametrize(
    "method, expected",
    [
        ("snapkv", "snapkv(keep=0.25)"),
        ("snapkv(kernel=7)+adaptive", "snapkv(keep=0.25,kernel=7)+adaptive"),
        ("window+prefill", "window(size=250)+prefill"),
        ("streaming+slack", "streaming(window=246)+slack"),
        ("streaming(sinks=8)", "streaming(sinks=8,window=242)"),
        ("fastgen", "fastgen"),
        ("full", "full"),
    ],
)
def test_a_method_is_spelled_for_a_share_of_the_prompt(method, expected):
    assert str(at_share(method, 0.25, 1000)) == expected


def test_every_registered_part_of_a_policy_is_among_the_registered_methods():
    load_all()
    found = set()
    for method in registered_methods():
        spec = at_share(method, 0.5, 100)
        found |= {spec.selector.name, spec.budget.name, spec.action.name, *(term.name for term in spec.refinements)}
    assert found == {name for name, method in METHODS.items() if method.role != "trigger"} - {"full"}


def test_the_default_methods_are_policies():
    for method in DEFAULT_METHODS:
        assert at_share(method, 0.5, 960).evicts
