"""Logits processors, bad words and allowed tokens: what they forbid is never generated."""

import pytest

from harness.characters import characters
from harness.tiny_engine import finish, greedy, nothing_left, run, tiny_engine
from harness.tiny_model import random_tokens
from kvloom.engine.params import SamplingParams
from kvloom.errors import InvalidInputError

PROMPT = random_tokens(20)


def test_only_allowed_tokens_are_generated():
    engine = tiny_engine()
    allowed = (3, 5, 8, 150)
    for params in (greedy(24, allowed_token_ids=allowed), SamplingParams(allowed_token_ids=allowed, max_tokens=24)):
        [tokens] = run(engine, [PROMPT], params)
        assert len(tokens) == 24 and set(tokens) <= set(allowed)
    nothing_left(engine)


def test_the_best_of_the_allowed_tokens_is_the_one_that_greedy_takes():
    engine = tiny_engine()
    [plain] = run(engine, [PROMPT], greedy(12))
    [same] = run(engine, [PROMPT], greedy(12, allowed_token_ids=range(211)))
    assert same == plain


def test_a_word_of_several_tokens_is_never_completed_but_its_beginning_is_free():
    tokenizer = characters()
    engine = tiny_engine(tokenizer=tokenizer)
    letters = [tokenizer.token_to_id(letter) for letter in "xyz"]
    [plain] = run(engine, [PROMPT], greedy(12, allowed_token_ids=letters))
    word = tokenizer.decode(plain[3:5])
    [tokens] = run(engine, [PROMPT], greedy(12, allowed_token_ids=letters, bad_words=[word]))
    first = tokenizer.decode(plain).index(word) + 1  # the word may have been there before
    assert tokens[:first] == plain[:first] and tokens[first] != plain[first]
    assert word not in tokenizer.decode(tokens)


def test_a_processor_sees_prompt_and_output_and_decides_last():
    calls = []

    class Counting:
        def start(self):
            return self

        def __call__(self, prompt, output, logits):
            calls.append((list(prompt), list(output)))
            logits[:] = float("-inf")
            logits[len(output) + 7] = 0.0

    engine = tiny_engine()
    [tokens] = run(engine, [PROMPT], greedy(4, logits_processors=[Counting()], logit_bias={1: 100}))
    assert tokens == [7, 8, 9, 10]
    assert calls == [(PROMPT, tokens[:n]) for n in range(4)]


def test_each_sequence_of_a_request_has_a_processor_of_its_own():
    class Once:
        def __init__(self):
            self.calls = 0

        def start(self):
            return Once()

        def __call__(self, prompt, output, logits):
            assert self.calls == len(output)
            self.calls += 1

    engine = tiny_engine()
    engine.add(PROMPT, SamplingParams(n=3, max_tokens=6, logits_processors=[Once()]))
    finish(engine)
    nothing_left(engine)


def test_a_sequence_that_may_not_go_on_ends():
    class Nothing:
        def start(self):
            return self

        def __call__(self, prompt, output, logits):
            if len(output) == 3:
                logits[:] = float("-inf")

    engine = tiny_engine(eos=(4,))
    request = engine.add(PROMPT, SamplingParams(temperature=0, max_tokens=9, logits_processors=[Nothing()]))
    finish(engine)
    assert len(request.sequences[0].output_token_ids) <= 4
    assert request.sequences[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"allowed_token_ids": (3, 211)}, "ids 0 to 210"),
        ({"bad_words": ["a0"]}, "need a tokenizer"),
    ],
)
def test_what_an_engine_cannot_keep_is_refused_at_once(options, reason):
    engine = tiny_engine()
    with pytest.raises(InvalidInputError, match=reason):
        engine.add(PROMPT, greedy(4, **options))
    assert not engine.has_work


@pytest.mark.parametrize("options", [{"allowed_token_ids": ()}, {"allowed_token_ids": (-1,)}, {"bad_words": [" "]}])
def test_impossible_options_are_refused_on_construction(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        SamplingParams(**options)
