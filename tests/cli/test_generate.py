"""`kvloom generate` finds its prompt and shows the answer in the form that was asked for."""

import json

import pytest

ANSWER = "Good day!\nNaïve 🧵"


@pytest.fixture
def plain(llm, monkeypatch):
    """Make the stand-in a model without a chat template."""
    made = llm.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.tokenizer.has_chat_template = False

    monkeypatch.setattr(llm, "__init__", make)
    return llm


def test_one_argument_is_the_prompt_and_goes_through_the_chat_template(kvloom, llm):
    assert kvloom("generate", "Hello") == (0, ANSWER + "\n", "")
    assert llm.last.model == "smollm2"
    assert llm.last.tokenizer.messages == [{"role": "user", "content": "Hello"}]
    assert llm.last.asked[0][0] == {"prompt_token_ids": [0]}


def test_two_arguments_are_model_and_prompt(kvloom, llm):
    kvloom("generate", "my.gguf", "Hello")
    assert (llm.last.model, llm.last.tokenizer.messages[0]["content"]) == ("my.gguf", "Hello")


def test_raw_sends_the_prompt_as_it_is(kvloom, llm):
    kvloom("generate", "--raw", " Hello\n")
    assert llm.last.asked[0][0] == " Hello\n"


def test_a_system_message_stands_before_the_prompt(kvloom, llm):
    kvloom("generate", "--system", "Be brief.", "Hello")
    assert [message["role"] for message in llm.last.tokenizer.messages] == ["system", "user"]


def test_a_model_without_a_template_continues_the_plain_prompt(kvloom, plain):
    assert kvloom("generate", "Hello")[0] == 0
    assert plain.last.asked[0][0] == "Hello"


def test_a_system_message_needs_a_template(kvloom, plain):
    code, _, err = kvloom("generate", "--system", "Be brief.", "Hello")
    assert code == 8
    assert "no chat template" in err


@pytest.mark.parametrize("arguments", [["-"], ["smollm2", "-"], []])
def test_a_piped_prompt_loses_only_its_last_line_end(kvloom, llm, piped, arguments):
    piped("Grüße\n\n".encode())
    kvloom("generate", "--raw", *arguments)
    assert llm.last.asked[0][0] == "Grüße\n"


def test_a_piped_prompt_that_is_not_utf8_is_refused(kvloom, llm, piped):
    piped(b"ab\xff")
    code, _, err = kvloom("generate", "-")
    assert (code, err) == (2, "error: the prompt on standard input is not UTF-8 at byte 2\n")


def test_text_is_written_as_it_grows(llm, monkeypatch):
    from kvloom.cli import answer, main

    pieces = []
    monkeypatch.setattr(answer, "write", pieces.append)
    main.run(["generate", "Hello"])
    assert pieces == [*llm.words, "\n"]


def test_json_is_the_whole_request_output_on_one_line(kvloom, llm):
    code, out, err = kvloom("generate", "--json", "Hello")
    assert (code, out.count("\n"), err) == (0, 1, "")
    printed = json.loads(out)
    assert printed["outputs"][0]["text"] == ANSWER
    assert printed["outputs"][0]["finish_reason"] == "stop"
    assert printed["prompt_token_ids"] == [1, 2, 3]
    assert (printed["kv"]["bytes_now"], printed["kv"]["bytes_peak"], printed["kv"]["cached_tokens"]) == (4096, 8192, 3)
    assert "stats" not in printed


def test_stats_stand_on_stderr_or_inside_the_json(kvloom, llm):
    _, out, err = kvloom("generate", "--stats", "Hello")
    lines = dict(line.split(": ") for line in err.splitlines())
    assert out == ANSWER + "\n"
    assert (lines["prompt_tokens"], lines["completion_tokens"], lines["kv_bytes_peak"]) == ("3", "4", "8192")
    assert (lines["finish_reason"], lines["engine_steps"]) == ("stop", "4")
    _, out, err = kvloom("generate", "--stats", "--json", "Hello")
    assert (json.loads(out)["stats"]["kv_bytes_peak"], err) == (8192, "")


def test_several_answers_stand_under_headings(kvloom, llm):
    _, out, _ = kvloom("generate", "--n", "2", "Hello")
    assert out == f"--- 1 of 2 (stop)\n{ANSWER}\n--- 2 of 2 (stop)\n{ANSWER}\n"


def test_infinities_are_null_in_json(capsys):
    from kvloom.cli.answer import write_json

    write_json({"a": [float("-inf"), float("nan"), 0.5], 3: (1, None)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 0.5], "3": [1, None]}
