"""The `anthropic` package: messages, streams, tools, counted tokens, and its classes of errors."""

import anthropic
from conversation import DESCRIPTION, MESSAGES, PARAMETERS, TOO_LONG, weather

GREEDY = {"extra_body": {"temperature": 0}}
"""The package has no argument for it."""


def _client(base_url):
    return anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key="none", max_retries=0)


def text(base_url, model):
    """A message, whole and streamed."""
    fields = {"model": model, "messages": MESSAGES, **GREEDY, "max_tokens": 16}
    whole = _client(base_url).messages.create(**fields)
    with _client(base_url).messages.stream(**fields) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    return whole.content[0].text


def tools(base_url, model):
    """A forced call, whole and streamed, its result, and an answer to both."""
    client = _client(base_url)
    tool = {"name": "weather", "description": DESCRIPTION, "input_schema": PARAMETERS}
    messages = [{"role": "user", "content": "How is the weather in Rome?"}]
    fields = {"model": model, "tools": [tool], **GREEDY, "max_tokens": 60}
    forced = {"tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}}
    first = client.messages.create(messages=messages, **forced, **fields)
    [call] = first.content
    with client.messages.stream(messages=messages, **forced, **fields) as stream:
        assert stream.get_final_message().content[0].input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": weather(**call.input)}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    return repr(client.messages.create(messages=messages, **fields).content[0])


def count(base_url, model):
    """The tokens of a prompt are those that an answer says it had."""
    counted = _client(base_url).messages.count_tokens(model=model, messages=MESSAGES).input_tokens
    usage = _client(base_url).messages.create(model=model, messages=MESSAGES, max_tokens=1).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    return str(counted)


def errors(base_url, model):
    """Errors are of the classes that they have there."""
    client = _client(base_url)
    try:
        client.messages.create(model="absent", messages=MESSAGES, max_tokens=1)
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError("a model that is absent is found")
    try:
        client.messages.create(model=model, messages=[{"role": "user", "content": TOO_LONG}], max_tokens=1)
    except anthropic.BadRequestError as error:
        return error.body["error"]["message"][:60]
    raise AssertionError("a prompt that is too long is answered")


CHECKS = (text, tools, count, errors)
