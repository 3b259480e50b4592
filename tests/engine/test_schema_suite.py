"""The public JSON-Schema test suite: a schema is refused with the place at fault, or every answer fits it."""

import json
from collections import Counter
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from kvloom.engine.structured import StructuredOutputs
from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.errors import InvalidInputError
from kvloom.models.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="the extra kvloom[structured] is not installed")

CASES = json.loads(Path(__file__).with_name("json_schema_suite.json").read_text())["cases"]
DRAFTS = {"draft7": jsonschema.Draft7Validator, "draft2020-12": jsonschema.Draft202012Validator}
SEEDS = (0, 1, 2)
MAX_TOKENS = 400
EOS = 256


@pytest.fixture(scope="module")
def structured():
    """Grammars over a vocabulary of the 256 bytes and a token that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return StructuredOutputs(Tokenizer(backend, special_tokens={"eos_token": "<end>"}), EOS + 1, (EOS,))


@pytest.fixture(scope="module")
def accepted(structured):
    """Cases whose schema is accepted, with the processor that keeps answers to it; and the refusals of the others."""
    found, refusals = [], []
    for case in CASES:
        try:
            found.append((case, structured.processor(StructuredOutputsParams(json=case["schema"]))))
        except InvalidInputError as error:
            refusals.append((case, str(error)))
    return found, refusals


def forms(schema):
    """Return the schema alone and as the value of a property, where that changes no reference."""
    text = json.dumps(schema)
    if "$" in text or '"id"' in text:
        return [schema]
    wrapped = {"type": "object", "properties": {"v": schema}, "required": ["v"], "additionalProperties": False}
    return [schema, wrapped]


def sample(structured, processor, seed):
    """Return an answer drawn at temperature 1 from random logits, None when it did not end in time.

    Marks that close something are likelier, so that most answers end.
    """
    random, favoured = np.random.default_rng(seed), np.zeros(EOS + 1, np.float32)
    closing = [i for i, piece in enumerate(structured.pieces) if piece in (b'"', b"}", b"]", b",")]
    favoured[[*closing, EOS]] = 2.5
    one, tokens = processor.start(), []
    while len(tokens) < MAX_TOKENS:
        logits = torch.from_numpy(random.standard_normal(EOS + 1, np.float32) + favoured)
        one([], tokens, logits)
        assert torch.isfinite(logits).any(), "no token may come"
        token = int((logits + torch.from_numpy(random.gumbel(size=EOS + 1).astype(np.float32))).argmax())
        if token == EOS:
            return b"".join(structured.pieces[t] for t in tokens).decode()
        tokens.append(token)
    return None


def test_at_least_300_schemas_are_accepted_and_every_finished_answer_fits(structured, accepted):
    wrong, finished, schemas = [], 0, 0
    for case, _ in accepted[0]:
        ended = False
        for schema in forms(case["schema"]):
            processor = structured.processor(StructuredOutputsParams(json=schema))
            kind = DRAFTS[case["draft"]]
            validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
            for seed in SEEDS:
                text = sample(structured, processor, seed)
                if text is None:
                    continue
                finished, ended = finished + 1, True
                error = next(validator.iter_errors(json.loads(text)), None)
                if error is not None:
                    wrong.append((case["file"], case["about"], text[:100], error.message[:100]))
        schemas += ended
    assert wrong == []
    assert schemas >= 300 and finished >= 1000


def test_no_invalid_instance_of_the_suite_can_be_an_answer(structured, accepted):
    """The suite's own counter-examples: a grammar may not let any of them through to its end."""
    let_through = []
    ids = {piece: token for token, piece in enumerate(structured.pieces)}
    for case, processor in accepted[0]:
        for instance in case["wrong"]:
            one, tokens = processor.start(), []
            text = json.dumps(instance, ensure_ascii=False).encode("utf-8", "surrogatepass")
            for byte in text:
                logits = torch.zeros(EOS + 1)
                one([], tokens, logits)
                token = ids[bytes([byte])]
                if torch.isneginf(logits[token]):
                    break
                tokens.append(token)
            else:
                logits = torch.zeros(EOS + 1)
                one([], tokens, logits)
                if not torch.isneginf(logits[EOS]):
                    let_through.append((case["file"], case["about"], text[:100]))
    assert let_through == []


def test_a_refusal_names_a_place_that_is_in_the_schema(accepted):
    refused_by_keyword = Counter()
    for case, message in accepted[1]:
        assert "kept to at '" in message or isinstance(case["schema"], bool), (case["schema"], message)
        pointer = message.partition("kept to at '")[2].partition("'")[0]
        here = case["schema"]
        for step in filter(None, pointer.split("/")):
            name = step.replace("~1", "/").replace("~0", "~")
            here = here[int(name)] if isinstance(here, list) else here[name]
        refused_by_keyword[pointer.rpartition("/")[2]] += 1
    assert {"not", "if", "contains", "dependentRequired", "unevaluatedProperties"} <= set(refused_by_keyword)


REFUSED = [
    ({"not": {"type": "string"}}, "/not"),
    ({"properties": {"a": {"if": {"const": 1}, "then": {"const": 1}}}}, "/properties/a/if"),
    ({"properties": {"a/b": {"items": {"contains": {}}}}}, "/properties/a~1b/items/contains"),
    ({"dependentRequired": {"a": ["b"]}}, "/dependentRequired"),
    ({"items": {"oneOf": [{"type": "integer"}, {"minimum": 2}]}}, "/items/oneOf"),
    ({"properties": {"a": {"$ref": "http://elsewhere.example/schema"}}}, "/properties/a"),
    ({"properties": {"a": {"type": "string", "format": "colour"}}}, "/properties/a"),
    ({"properties": {"a": {"pattern": "(?=a)b"}}}, "/properties/a"),
    ({"$defs": {"a": {"uniqueItems": True}}, "properties": {"b": {"$ref": "#/$defs/a"}}}, "/$defs/a/uniqueItems"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "/x-guidance"),
    ({"properties": {"a": False, "b": {"uniqueItems": True}}}, "/properties/b/uniqueItems"),
    ({"properties": {"a": {"$id": "other", "type": "string"}}}, "/properties/a/$id"),
]


@pytest.mark.parametrize(("schema", "pointer"), REFUSED)
def test_what_cannot_be_kept_is_refused_with_its_pointer(structured, schema, pointer):
    with pytest.raises(InvalidInputError) as refused:
        structured.processor(StructuredOutputsParams(json=schema))
    assert f"kept to at '{pointer}'" in str(refused.value)


KEPT = [
    ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, ["3", "4", "5"]),
    ({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 20}, ["7", "14"]),
    ({"type": "string", "pattern": "^a+$", "maxLength": 2, "minLength": 2}, ['"aa"']),
    ({"enum": [1, "1", None, [2]]}, ["1", '"1"', "null", "[2]"]),
    ({"oneOf": [{"const": "a"}, {"const": "b"}]}, ['"a"', '"b"']),
]


@pytest.mark.parametrize(("schema", "texts"), KEPT)
def test_what_is_accepted_is_kept_in_full(structured, schema, texts):
    processor = structured.processor(StructuredOutputsParams(json=schema))
    assert {sample(structured, processor, seed) for seed in range(12)} <= set(texts)
