"""Other people's clients against a running server; see README.md in this folder."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]


def with_litellm(base_url, model):
    """Completions and conversations, whole and streamed."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network first
    import litellm

    fields = {"api_base": base_url, "api_key": "none", "temperature": 0, "max_tokens": 16}
    whole = litellm.completion(model=f"openai/{model}", messages=MESSAGES, **fields).choices[0].message.content
    stream = litellm.completion(model=f"openai/{model}", messages=MESSAGES, stream=True, **fields)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == whole
    text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="The sky is", **fields)
    assert text.choices[0].text
    return whole


def with_langchain(base_url, model):
    """A chat model, invoked, streamed and in a batch."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=16)
    whole = chat.invoke(QUESTION)
    assert "".join(part.content for part in chat.stream(QUESTION)) == whole.content
    assert [answer.content for answer in chat.batch([QUESTION, QUESTION])] == [whole.content] * 2
    assert whole.usage_metadata["output_tokens"] > 0
    return whole.content


def with_llm(base_url, model):
    """The `llm` command line, with the server as an extra OpenAI model."""
    with tempfile.TemporaryDirectory() as folder:
        entry = [{"model_id": "served", "model_name": model, "api_base": base_url, "api_key_name": "served"}]
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps(entry))
        Path(folder, "keys.json").write_text(json.dumps({"served": "none"}))
        environment = {**os.environ, "LLM_USER_PATH": folder}
        answers = []
        for more in ([], ["--no-stream"]):
            command = [sys.executable, "-m", "llm", "-m", "served", "-o", "temperature", "0", "-o", "max_tokens", "16"]
            command += [*more, QUESTION]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            answers.append(done.stdout.strip())
    assert answers[0] == answers[1]
    return answers[0]


CLIENTS = {"litellm": with_litellm, "langchain_openai": with_langchain, "llm": with_llm}


def main():
    """Run every client that is installed; the status is 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    failed = False
    for name, client in CLIENTS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name}: skipped, not installed")
            continue
        try:
            print(f"{name}: ok, said {client(arguments.base_url, arguments.model)!r}")
        except Exception as error:
            failed = True
            print(f"{name}: FAILED, {type(error).__name__}: {error}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
