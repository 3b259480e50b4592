"""The `openai` package as a client: sync, async, streamed, and the errors that it raises."""

import asyncio

import openai
import pytest


@pytest.fixture
def client(tiny_server):
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


COMPLETIONS = [
    {"prompt": "hello", "max_tokens": 12},
    {"prompt": [60, 61, 62], "max_tokens": 12, "n": 2, "temperature": 1.0, "seed": 1},
    {"prompt": [[60, 61], [62]], "max_tokens": 5, "logprobs": 2},
    {"prompt": ["a", "b"], "max_tokens": 5, "stop": ["zzz"], "echo": True},
    {"prompt": "x", "max_tokens": 5, "extra_body": {"top_k": 3, "min_p": 0.1, "ignore_eos": True}},
]
MESSAGES = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]
CHATS = [
    {"max_tokens": 12},
    {"max_completion_tokens": 6, "n": 2, "temperature": 1.0, "seed": 1},
    {"max_tokens": 6, "logprobs": True, "top_logprobs": 2},
    {"max_tokens": 6, "stop": "\u0005"},
]


@pytest.mark.parametrize("fields", COMPLETIONS)
def test_completions_are_the_same_streamed_and_asynchronous(client, tiny_server, fields):
    fields = {"model": "tiny", "temperature": 0, **fields}
    whole = client.completions.create(**fields)
    texts = ["" for _ in whole.choices]
    usage = None
    with client.completions.create(**fields, stream=True, stream_options={"include_usage": True}) as stream:
        for event in stream:
            usage = event.usage or usage
            for choice in event.choices:
                texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens

    async def later():
        async with openai.AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="none") as other:
            return await other.completions.create(**fields)

    assert [choice.text for choice in asyncio.run(later()).choices] == texts


@pytest.mark.parametrize("fields", CHATS)
def test_conversations_are_the_same_streamed_and_asynchronous(client, tiny_server, fields):
    fields = {"model": "tiny", "messages": MESSAGES, "temperature": 0, **fields}
    whole = client.chat.completions.create(**fields)
    texts = ["" for _ in whole.choices]
    with client.chat.completions.create(**fields, stream=True) as stream:
        for event in stream:
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]

    async def later():
        async with openai.AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="none") as other:
            found = ["" for _ in texts]
            async for event in await other.chat.completions.create(**fields, stream=True):
                for choice in event.choices:
                    found[choice.index] += choice.delta.content or ""
            return found

    assert asyncio.run(later()) == texts


def test_log_probabilities_arrive_in_the_clients_types(client):
    body = client.completions.create(model="tiny", prompt="hi", logprobs=1, max_tokens=3, temperature=0)
    shown = body.choices[0].logprobs
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset)
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, max_tokens=3)
    assert all(entry.logprob <= 0 and entry.bytes for entry in chat.choices[0].logprobs.content)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "kvloom"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "gpt"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"prompt": [1] * 999}, openai.BadRequestError),
        ({"suffix": "x"}, openai.BadRequestError),
    ],
)
def test_refusals_become_the_clients_own_errors(client, fields, error):
    with pytest.raises(error) as raised:
        client.completions.create(**{"model": "tiny", "prompt": "hi", **fields})
    assert raised.value.body["message"]
