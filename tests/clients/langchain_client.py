"""LangChain's `ChatOpenAI`: invoked, streamed, in a batch, with forms and functions, and too much text."""

from conversation import QUESTION, TOO_LONG
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A form for an answer."""

    in_france: bool


def _chat(base_url, model, **fields):
    return ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_retries=0, **fields)


def chat(base_url, model):
    """Invoked, streamed and in a batch."""
    one = _chat(base_url, model, max_tokens=16)
    whole = one.invoke(QUESTION)
    assert "".join(part.content for part in one.stream(QUESTION)) == whole.content
    assert [answer.content for answer in one.batch([QUESTION, QUESTION])] == [whole.content] * 2
    assert whole.usage_metadata["output_tokens"] > 0
    return whole.content


def responses(base_url, model):
    """Through the route of responses."""
    return _chat(base_url, model, use_responses_api=True, max_tokens=16).invoke(QUESTION).text


def json_schema(base_url, model):
    """An object of a class, by a form."""
    return repr(_chat(base_url, model).with_structured_output(City, method="json_schema").invoke(QUESTION))


def function_calling(base_url, model):
    """An object of a class, by a call."""
    found = _chat(base_url, model, max_tokens=60).with_structured_output(City, method="function_calling")
    return repr(found.invoke(QUESTION))


def overflow(base_url, model):
    """A prompt that is too long is of the class for that."""
    try:
        _chat(base_url, model).invoke(TOO_LONG)
    except ContextOverflowError as error:
        return type(error).__name__
    raise AssertionError("a prompt that is too long is answered")


CHECKS = (chat, responses, json_schema, function_calling, overflow)
