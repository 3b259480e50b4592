"""Where what users write becomes a policy: text at the edges, one object behind them."""

import pytest

from harness.small_engine import prompt_of, small_engine
from harness.tiny_engine import greedy
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.policies.policy import Policy
from kvloom.policies.reading import read_allow_list, read_policy
from kvloom.spec.policy import FULL, PolicySpec


def test_text_and_the_object_that_it_spells_are_the_same_policy():
    spec = read_policy(" h2o( budget=64 , recent=0.5 ) ")
    assert spec == PolicySpec.parse("h2o(budget=64)") and read_policy(spec) is spec
    assert Policy.of(spec) is Policy.parse("h2o(budget=64)")


def test_what_is_neither_text_nor_a_policy_is_refused_with_its_type():
    with pytest.raises(InvalidInputError, match=r"a policy is text such as .*, not int"):
        read_policy(3)


def test_a_policy_that_is_not_allowed_is_refused_before_its_file_is_read(tmp_path):
    engine = small_engine(allow_kv_policies=read_allow_list(["snapkv"]))
    policy = read_policy(f"duo(pattern={tmp_path / 'none.json'})")
    with pytest.raises(UnsupportedError, match="allows only: full, snapkv"):
        engine.check(prompt_of(40), greedy(4), kv_policy=policy)


def test_an_encoded_cache_is_allowed_where_its_store_or_full_with_additions_is_named():
    int8 = read_policy("int8")
    for entries, allowed in [([], False), (["snapkv"], False), (["int8"], True), (["full"], True), (None, True)]:
        try:
            read_allow_list(entries).check(int8, own=FULL)
        except UnsupportedError:
            assert not allowed
        else:
            assert allowed


def test_an_engine_whose_own_policy_evicts_keeps_everything_for_a_request_that_asks_for_full():
    engine = small_engine(kv_policy=read_policy("h2o(budget=32)"))
    own, full = engine.add(prompt_of(60), greedy(4)), engine.add(prompt_of(60), greedy(4), kv_policy=FULL)
    assert own.sequences[0].eviction.policy.spec == read_policy("h2o(budget=32)")
    assert full.sequences[0].eviction is None
