"""The spelling of policies: what parses, what it means, how it prints, and how mistakes are answered."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import InvalidInputError
from kvloom.spec.format import store_names
from kvloom.spec.method import METHODS
from kvloom.spec.policy import PolicySpec

SPELLINGS = [
    "full",
    "int8",
    "snapkv(budget=1024,window=64)+adaptive+int4",
    "streaming(window=1000,positions=cache)",
    "h2o(keep=0.5)+slack+kivi2(residual=64)",
    "expected(budget=512,eps=0.01)+vatp+adaptive(floor=0.3)+d2o",
    "kvzip(budget=2048,normalised=true)+int8(sinks=4)",
    "kvzip(budget=2048)+uniform",
    "knorm(budget=256)+chunk+every(tokens=64)",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_canonical_spelling_prints_as_it_was_written(text):
    assert str(PolicySpec.parse(text)) == text


def test_the_order_of_terms_blanks_and_spelled_defaults_do_not_matter():
    assert PolicySpec.parse(" int4 + adaptive + snapkv( window=32 , budget=1K )") == PolicySpec.parse(
        "snapkv(budget=1024)+adaptive(floor=0.2)+int4"
    )


@st.composite
def policies(draw):
    """Return a policy string of random terms with random budgets."""
    selectors = [name for name, m in METHODS.items() if m.role == "selector"]
    name = draw(st.sampled_from(selectors))
    method = METHODS.get(name)
    terms = [f"{name}(budget={draw(st.integers(64, 4096))})" if method.budgeted else name]
    if name != "full":
        for role in ("refine", "trigger", "action"):
            found = [n for n, m in METHODS.items() if m.role == role]
            terms += draw(st.lists(st.sampled_from(found), max_size=1))
        if method.budgeted:
            terms += draw(st.lists(st.sampled_from([n for n, m in METHODS.items() if m.role == "budget"]), max_size=1))
    terms += draw(st.lists(st.sampled_from(store_names()), max_size=1))
    return "+".join(draw(st.permutations(terms)))


@pytest.mark.parametrize(
    "text, name",
    [
        ("fp8", "fp8_e4m3"),
        ("fp8(residual=64)", "fp8_e4m3(residual=64)"),
        ("int8_per_token_head", "int8"),
        ("knorm(keep=0.5)+fp8", "knorm(keep=0.5)+fp8_e4m3"),
    ],
)
def test_other_spellings_of_a_store_are_the_same_policy(text, name):
    assert PolicySpec.parse(text) == PolicySpec.parse(name) and str(PolicySpec.parse(text)) == name


@given(policies())
def test_every_policy_parses_back_from_its_own_spelling(text):
    policy = PolicySpec.parse(text)
    assert PolicySpec.parse(str(policy)) == policy


@pytest.mark.parametrize(
    "text, words",
    [
        ("snpkv(budget=9)", ["unknown policy 'snpkv'", "'snapkv'"]),
        ("snapkv", ["neither of budget and keep"]),
        ("snapkv(budget=64,keep=0.5)", ["both of budget and keep"]),
        ("snapkv(budget=10)", ["below its window of 32"]),
        ("snapkv(budgt=64)", ["no parameter 'budgt'", "'budget'"]),
        ("snapkv(budget=0)", ["at least 1"]),
        ("snapkv(budget=many)", ["whole number"]),
        ("snapkv(budget=100.7)", ["budget of snapkv", "whole number"]),
        ("snapkv(budget=1.0001k)", ["whole number"]),
        ("snapkv(keep=nan)", ["finite"]),
        ("snapkv(budget=64)+threshold(above=inf)", ["finite"]),
        ("snapkv(keep=1.5)", ["from 0 to 1"]),
        ("snapkv(budget=64,budget=65)", ["twice"]),
        ("snapkv(64)", ["write key=value"]),
        ("snapkv(budget=64,pooling=sum)", ["'sum'", "avg, max"]),
        ("adaptive", ["evicts nothing"]),
        ("streaming+pyramid", ["takes no budget"]),
        ("int8+int4", ["two of the kind store"]),
        ("snapkv(budget=64)+h2o(budget=64)", ["two of the kind selector"]),
        ("a(b", ["unbalanced"]),
        ("int8++full", ["empty term"]),
        ("", ["empty term"]),
        ("int8(residul=3)", ["'residul'", "'residual'"]),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(text, words):
    with pytest.raises(InvalidInputError) as caught:
        PolicySpec.parse(text)
    assert all(word in str(caught.value) for word in words)


def test_tokens_kept_never_exceed_the_prompt():
    texts = ("h2o(budget=1024)", "h2o(keep=0.25)", "streaming", "full")
    assert [PolicySpec.parse(text).tokens_kept(100) for text in texts] == [100, 25, 100, 100]


def test_lengths_that_the_data_decides_are_not_known():
    assert PolicySpec.parse("fastgen").tokens_kept(100) is None
    assert not PolicySpec.parse("snapkv(budget=64)+adaptive").lengths_known
    assert PolicySpec.parse("snapkv(budget=64)+pyramid+int4").lengths_known
