"""LiteLLM: completions, conversations, responses and Anthropic's messages, and too much text."""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network first

import litellm
from conversation import MESSAGES, QUESTION, TOO_LONG


def _fields(base_url):
    return {"api_base": base_url, "api_key": "none", "max_tokens": 16, "temperature": 0}


def chat(base_url, model):
    """Conversations, whole and streamed, and a completion."""
    fields = _fields(base_url)
    whole = litellm.completion(model=f"openai/{model}", messages=MESSAGES, **fields).choices[0].message.content
    stream = litellm.completion(model=f"openai/{model}", messages=MESSAGES, stream=True, **fields)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == whole
    text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="The sky is", **fields)
    assert text.choices[0].text
    return whole


def responses(base_url, model):
    """Through the route of responses."""
    fields = {"api_base": base_url, "api_key": "none", "max_output_tokens": 16, "temperature": 0}
    found = litellm.responses(model=f"openai/{model}", input=QUESTION, **fields)
    return found.output[0].content[0].text


def anthropic(base_url, model):
    """Through Anthropic's route."""
    fields = {**_fields(base_url), "api_base": base_url.removesuffix("/v1")}
    return litellm.completion(model=f"anthropic/{model}", messages=MESSAGES, **fields).choices[0].message.content


def overflow(base_url, model):
    """A prompt that is too long is of the class for that."""
    try:
        messages = [{"role": "user", "content": TOO_LONG}]
        litellm.completion(model=f"openai/{model}", messages=messages, **_fields(base_url))
    except litellm.ContextWindowExceededError as error:
        return type(error).__name__
    raise AssertionError("a prompt that is too long is answered")


CHECKS = (chat, responses, anthropic, overflow)
