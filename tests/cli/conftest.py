"""How the tests of the command line run it: in this process with a stand-in engine, or as a user does."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvloom.cli import main


class StandInTokenizer:
    """Says what it was asked to encode."""

    has_chat_template = True

    def encode_chat(self, messages):
        """Return one token for each message and keep the messages."""
        self.messages = [dict(message) for message in messages]
        return list(range(len(messages)))


class StandInLLM:
    """Answers every prompt with the words in `words`; remembers how it was made and asked."""

    words = ("Good", " day", "!\n", "Naïve 🧵")

    def __init__(self, model, **engine):
        self.model, self.engine, self.asked, self.closed = model, engine, [], 0
        self.tokenizer = StandInTokenizer()
        StandInLLM.last = self

    def stream(self, prompt, sampling_params):
        """Yield the answer so far after each word."""
        from kvloom.engine.output import CompletionOutput, KVUsage, RequestOutput

        self.asked.append((prompt, sampling_params))
        usage = KVUsage(4096, 8192, 3, 0, 0, 16.0)
        try:
            for count in range(1, len(self.words) + 1):
                ended = "stop" if count == len(self.words) else None
                text = "".join(self.words[:count])
                completions = [
                    CompletionOutput(index, text, list(range(count)), None, None, ended, None)
                    for index in range(sampling_params.n)
                ]
                yield RequestOutput("request-0", None, [1, 2, 3], completions, ended is not None, usage)
        finally:
            self.closed += 1

    def stats(self):
        """Return one counter."""
        return {"steps": 4}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Run without any KVLOOM_ variable of the person who tests."""
    for name in [name for name in os.environ if name.startswith("KVLOOM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def llm(monkeypatch):
    """Put the stand-in in place of the engine; its newest instance is `llm.last`."""
    monkeypatch.setitem(sys.modules, "kvloom.engine.llm", SimpleNamespace(LLM=StandInLLM))
    monkeypatch.setattr(StandInTokenizer, "has_chat_template", True)
    monkeypatch.setattr(StandInLLM, "last", None, raising=False)
    return StandInLLM


@pytest.fixture
def kvloom(capsys):
    """Return a function that runs `kvloom` in this process and returns (exit code, output, errors)."""

    def run(*arguments):
        code = main.run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def kvloom_process():
    """Return a function that runs `kvloom` as a process of its own."""

    def run(*arguments, stdin="", **environment):
        return subprocess.run(
            [sys.executable, "-m", "kvloom", *arguments],
            input=stdin,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )

    return run


@pytest.fixture
def piped(monkeypatch):
    """Return a function that makes bytes the standard input of this process, as a pipe does."""
    import io

    def pipe(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return pipe
