"""`kvloom chat` keeps the conversation, and Ctrl-C stops an answer between two tokens."""

import io
import signal
import sys

import pytest

from kvloom.cli import chat as chat_module
from kvloom.cli.interrupt import StopOnInterrupt

ANSWER = "Good day!\nNaïve 🧵"


@pytest.fixture
def typed(monkeypatch):
    """Return a function that types lines at a terminal; an exception among them is raised in place of a line."""

    def type_lines(*lines):
        left = list(lines)
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)

        def ask(prompt):
            line = left.pop(0) if left else EOFError()
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", ask)

    return type_lines


def roles(llm):
    """Return the roles of the messages that were sent last."""
    return [message["role"] for message in llm.last.tokenizer.messages]


def test_piped_lines_are_messages_of_one_conversation(kvloom, llm, piped):
    piped(b"Hello\n\nAnd you?\n")
    assert kvloom("chat") == (0, f"{ANSWER}\n{ANSWER}\n", "")
    assert llm.last.tokenizer.messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "And you?"},
    ]


def test_reset_discards_all_but_the_system_message(kvloom, llm, piped):
    piped(b"Hello\n/reset\nAgain\n/exit\nNever\n")
    kvloom("chat", "--system", "Be brief.", "my.gguf")
    assert (roles(llm), len(llm.last.asked), llm.last.model) == (["system", "user"], 2, "my.gguf")


def test_an_unknown_slash_word_names_the_nearest_and_is_not_sent(kvloom, llm, piped):
    piped(b"/rest\n")
    _, out, err = kvloom("chat")
    assert (out, llm.last.asked) == ("", [])
    assert "/rest is not a command (did you mean '/reset'?)" in err


def test_at_a_terminal_ctrl_c_clears_the_line_and_ctrl_d_ends(kvloom, llm, typed):
    typed("Hello", KeyboardInterrupt(), "Again")
    code, _, _ = kvloom("chat")
    assert (code, len(llm.last.asked)) == (0, 2)


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(kvloom, llm, typed, monkeypatch):
    typed("Hello", "Again")
    write = chat_module.write_growing

    def interrupted(outputs):
        if len(llm.last.asked) == 0:
            signal.raise_signal(signal.SIGINT)
        write(outputs)

    monkeypatch.setattr(chat_module, "write_growing", interrupted)
    code, out, _ = kvloom("chat")
    assert (code, out) == (0, f"\n{ANSWER}\n\n")
    assert (len(llm.last.asked), llm.last.closed) == (2, 2)
    assert llm.last.tokenizer.messages[1] == {"role": "assistant", "content": "Good"}


def test_an_error_at_a_terminal_leaves_the_conversation_as_it_was(kvloom, llm, typed, monkeypatch):
    from kvloom.errors import InvalidInputError

    typed("too long", "Hello")
    stream = llm.stream

    def fail_first(self, prompt, sampling):
        if not self.asked:
            self.asked.append(prompt)
            raise InvalidInputError("the prompt has 9 tokens")
        return stream(self, prompt, sampling)

    monkeypatch.setattr(llm, "stream", fail_first)
    code, out, err = kvloom("chat")
    assert (code, roles(llm)) == (0, ["user"])
    assert "error: the prompt has 9 tokens" in err
    assert out == f"{ANSWER}\n\n"


def test_an_error_in_a_pipe_ends_the_program_with_its_exit_code(kvloom, llm, piped, monkeypatch):
    from kvloom.errors import DoesNotFitError

    def fail(self, prompt, sampling):
        raise DoesNotFitError("too big")

    monkeypatch.setattr(llm, "stream", fail)
    piped(b"Hello\n")
    assert kvloom("chat") == (6, "", "error: too big\n")


def test_a_model_without_a_template_cannot_converse(kvloom, llm, monkeypatch):
    made = llm.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.tokenizer.has_chat_template = False

    monkeypatch.setattr(llm, "__init__", make)
    code, _, err = kvloom("chat", "base.gguf")
    assert (code, err.count("\n")) == (8, 1)
    assert "base.gguf has no chat template" in err and "--chat-template" in err


def test_the_second_ctrl_c_is_an_interrupt_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopOnInterrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
