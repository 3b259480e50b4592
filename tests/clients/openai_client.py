"""The `openai` package: conversations, responses, functions, forms, and a prompt that is too long."""

import json

import openai
from conversation import DESCRIPTION, MESSAGES, PARAMETERS, QUESTION, TOO_LONG, weather
from pydantic import BaseModel


class City(BaseModel):
    """A form for an answer."""

    in_france: bool


def _client(base_url):
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


def chat(base_url, model):
    """A conversation, whole and streamed."""
    fields = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
    whole = _client(base_url).chat.completions.create(**fields).choices[0].message.content
    stream = _client(base_url).chat.completions.create(**fields, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == whole
    return whole


def responses(base_url, model):
    """A response, whole and streamed, that says what the conversation says."""
    fields = {"model": model, "input": QUESTION, "temperature": 0, "max_output_tokens": 16}
    whole = _client(base_url).responses.create(**fields)
    stream = _client(base_url).responses.create(**fields, stream=True)
    assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == whole.output_text
    assert whole.output_text == chat(base_url, model)
    return whole.output_text


def responses_functions(base_url, model):
    """A forced call, its output, and an answer to both."""
    client = _client(base_url)
    tool = {"type": "function", "name": "weather", "description": DESCRIPTION, "parameters": PARAMETERS, "strict": True}
    items = [{"role": "user", "content": "How is the weather in Rome?"}]
    fields = {"model": model, "tools": [tool], "temperature": 0, "max_output_tokens": 60, "store": False}
    first = client.responses.create(input=items, tool_choice="required", parallel_tool_calls=False, **fields)
    [call] = first.output
    output = weather(**json.loads(call.arguments))
    items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": output}]
    return client.responses.create(input=items, **fields).output_text


def parse(base_url, model):
    """Objects of a class, by conversation and by response, whole and streamed."""
    client = _client(base_url)
    fields = {"model": model, "temperature": 0}
    said = client.chat.completions.parse(messages=MESSAGES, response_format=City, **fields).choices[0].message.parsed
    answered = client.responses.parse(input=QUESTION, text_format=City, **fields).output_parsed
    with client.responses.stream(input=QUESTION, text_format=City, **fields) as stream:
        streamed = stream.get_final_response().output_parsed
    assert said == answered == streamed
    return repr(said)


def overflow(base_url, model):
    """A prompt beyond the model's length is a bad request with the code for that, by both routes."""
    client = _client(base_url)
    codes = []
    for ask in (
        lambda: client.responses.create(model=model, input=TOO_LONG),
        lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": TOO_LONG}]),
    ):
        try:
            ask()
        except openai.BadRequestError as error:
            codes.append(error.code)
    assert codes == ["context_length_exceeded"] * 2, codes
    return codes[0]


CHECKS = (chat, responses, responses_functions, parse, overflow)
