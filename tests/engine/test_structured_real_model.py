"""SmolLM2 fills in fifty schemas; every answer is JSON that fits, streamed or not."""

import json

import pytest

from kvloom.engine.llm import LLM
from kvloom.engine.params import SamplingParams
from kvloom.engine.structured_params import StructuredOutputsParams

pytest.importorskip("llguidance", reason="the extra kvloom[structured] is not installed")
pytestmark = pytest.mark.real_model

WORD = {"type": "string", "maxLength": 24}
COUNT = {"type": "integer", "minimum": 0, "maximum": 9999}
LEAVES = [
    WORD,
    COUNT,
    {"type": "boolean"},
    {"enum": ["low", "middle", "high"]},
    {"type": "null"},
    {"const": "fixed"},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
    {"anyOf": [COUNT, {"type": "boolean"}]},
    {"type": "string", "enum": ["a b", 'with "quotes"', "Größe"]},
    {"type": "integer", "minimum": -5, "maximum": 5},
]


def record(**properties):
    """Return the schema of an object that has exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def several(items, least=1, most=3):
    """Return the schema of a short array."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SCHEMAS = [
    *(record(value=leaf) for leaf in LEAVES),
    *(several(leaf) for leaf in LEAVES),
    *(record(name=WORD, value=leaf) for leaf in LEAVES),
    *(record(inner=record(value=leaf), list=several(COUNT, 0, 2)) for leaf in LEAVES),
    *(several(record(key=leaf, on={"type": "boolean"}), 1, 2) for leaf in LEAVES),
]


def fits(value, schema):
    """Return whether a value fits a schema, as far as the schemas here go."""
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = schema["type"]
    if kind == "object":
        keys = schema["properties"]
        return isinstance(value, dict) and set(value) == set(keys) and all(fits(value[k], keys[k]) for k in keys)
    if kind == "array":
        right = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return right and all(fits(item, schema["items"]) for item in value)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema.get("maxLength", 9)
    return value is None if kind == "null" else isinstance(value, bool)


@pytest.fixture(scope="module")
def llm(smollm2_path):
    """Return SmolLM2 with room for a few short sequences."""
    return LLM(str(smollm2_path), dtype="float32", max_model_len=512, kv_cache_memory_bytes=256 << 20)


def prompt(schema):
    """Return a conversation that asks for what the schema describes."""
    return [{"role": "user", "content": f"Describe a lighthouse as JSON with this schema: {json.dumps(schema)}"}]


def params_of(schema):
    """Return sampling that is held to the schema."""
    form = StructuredOutputsParams(json=schema)
    return SamplingParams(temperature=0.8, seed=3, max_tokens=200, structured_outputs=form)


def test_fifty_schemas_give_fifty_answers_that_fit(llm):
    assert len(SCHEMAS) == 50
    outputs = llm.chat([prompt(s) for s in SCHEMAS], [params_of(s) for s in SCHEMAS], use_tqdm=False)
    for schema, output in zip(SCHEMAS, outputs, strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop", (schema, answer.text)
        assert fits(json.loads(answer.text), schema), (schema, answer.text)


def test_a_streamed_answer_fits_and_is_the_same(llm):
    for schema in SCHEMAS[20:40:5]:
        ids = llm.tokenizer.encode_chat(prompt(schema))
        *_, last = llm.stream({"prompt_token_ids": ids}, params_of(schema))
        [whole] = llm.generate([{"prompt_token_ids": ids}], params_of(schema))
        assert last.outputs[0].text == whole.outputs[0].text
        assert fits(json.loads(last.outputs[0].text), schema)
