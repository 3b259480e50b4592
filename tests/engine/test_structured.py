"""Structured outputs: whatever the weights, an answer follows its schema, expression or grammar."""

import json
import re

import pytest

from harness.characters import EOS, characters
from harness.tiny_engine import finish, nothing_left, tiny_engine
from harness.tiny_model import random_tokens
from kvloom.engine.params import SamplingParams
from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.errors import InvalidInputError, UnsupportedError

pytest.importorskip("llguidance", reason="the extra kvloom[structured] is not installed")

PROMPT = random_tokens(20)


@pytest.fixture(scope="module")
def engine():
    """Return an engine with random weights whose tokens spell characters."""
    return tiny_engine(tokenizer=characters(), eos=(EOS,))


def answers(engine, form, count=6, max_tokens=300, **options):
    """Return the texts of `count` sampled answers of a form; all ended by themselves."""
    params = SamplingParams(
        n=count, seed=1, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**form), **options
    )
    request = engine.add(PROMPT, params)
    finish(engine)
    outputs = engine.output(request).outputs
    assert {output.finish_reason for output in outputs} == {"stop"}
    return [output.text for output in outputs]


SCHEMAS = {
    "integer": {"type": "integer", "minimum": 0, "maximum": 99},
    "boolean": {"type": "boolean"},
    "enumeration": {"enum": ["red", "green", "blue"]},
    "object": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 4},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_is_json_that_fits_its_schema(engine, name):
    for text in answers(engine, {"json": SCHEMAS[name]}):
        value = json.loads(text)
        if name == "integer":
            assert isinstance(value, int) and 0 <= value <= 99
        elif name == "boolean":
            assert isinstance(value, bool)
        elif name == "enumeration":
            assert value in SCHEMAS[name]["enum"]
        elif name == "object":
            assert list(value) == ["name", "old"] and len(value["name"]) <= 6 and isinstance(value["old"], bool)
        else:
            assert 2 <= len(value) <= 4 and set(value) <= {1, 2, 3}


def test_every_answer_matches_its_expression(engine):
    expression = r"[a-f]{3}-[0-9]{2,4}(x|yy)"
    assert all(re.fullmatch(expression, text) for text in answers(engine, {"regex": expression}))


def test_every_answer_is_one_of_its_choices(engine):
    choices = ["yes", "no (maybe)", "a|b"]
    assert set(answers(engine, {"choice": choices}, count=8)) <= set(choices)


def test_every_answer_follows_its_grammar(engine):
    grammar = 'root ::= "(" root ")" | number\nnumber ::= [0-9] [0-9]'
    assert all(re.fullmatch(r"(\(*)\d\d(\)*)", text) for text in answers(engine, {"grammar": grammar}, temperature=0.5))


def test_greedy_and_streamed_answers_are_kept_to_their_form_and_agree(engine):
    params = SamplingParams(
        temperature=0, max_tokens=200, structured_outputs=StructuredOutputsParams(json=SCHEMAS["object"])
    )
    whole = engine.add(PROMPT, params)
    finish(engine)
    streamed = engine.add(PROMPT, params)
    pieces, shown = [], ""
    while engine.has_work:
        engine.step()
        text = engine.output(streamed).outputs[0].text
        assert text.startswith(shown)
        pieces.append(text[len(shown) :])
        shown = text
    assert "".join(pieces) == engine.output(whole).outputs[0].text
    assert set(json.loads(shown)) == {"name", "old"}
    nothing_left(engine)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"json": {"type": "object", "properties": 5}}, "cannot be kept to at '/properties'"),
        ({"json": {"const": "\ud800"}}, "cannot be"),
        ({"regex": "a(b"}, "regex cannot be read"),
        ({"regex": "[\U000b6a82-\u00e7"}, "regex cannot be read"),
        ({"grammar": "\U000b6a82 ::= \ud800"}, "grammar cannot be read"),
        ({"grammar": "root ::= missing"}, "grammar cannot be read"),
    ],
)
def test_a_form_that_cannot_be_read_is_refused_before_anything_runs(engine, form, reason):
    with pytest.raises(InvalidInputError, match=reason):
        engine.add(PROMPT, SamplingParams(structured_outputs=StructuredOutputsParams(**form)))
    assert not engine.has_work


def test_a_model_that_cannot_end_an_answer_is_refused():
    tokenizer = characters()
    tokenizer.eos_token_ids = ()
    engine = tiny_engine(tokenizer=tokenizer)
    with pytest.raises(UnsupportedError, match="no token that ends"):
        engine.add(PROMPT, SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")))


@pytest.mark.parametrize("form", [{}, {"regex": "a", "json_object": True}, {"choice": []}, {"json": "{"}, {"json": 5}])
def test_a_form_is_exactly_one_thing(form):
    with pytest.raises(InvalidInputError):
        StructuredOutputsParams(**form)
