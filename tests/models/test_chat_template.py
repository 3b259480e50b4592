"""A chat template gives what transformers gives, and can neither reach the machine nor keep it busy."""

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvloom.errors import ChatTemplateError, InvalidInputError
from kvloom.models import chat_template
from kvloom.models.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Né? <b>&\n"},
    {"role": "assistant", "content": " Yes. "},
]
TEMPLATES = {
    "loop": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}",
    "trimmed blocks": "{% for m in messages %}\n  {% if loop.last %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\nend\n",
    "generation prompt": "{% if add_generation_prompt %}<assistant>{% endif %}{{ bos_token }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }} {{ {'b': 'é', 'a': 1} | tojson(indent=2) }} {{ 'x<>' | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "undefined": "[{{ nothing }}{{ tools is none }}{{ documents is defined }}]",
    "filters": "{{ messages | map(attribute='role') | join(', ') }} {{ 'ab' | upper }} {{ messages[1:] | length }}",
    "macro": "{% macro say(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}{{ say(messages[0]) }}",
    "methods": "{{ messages[0].content.split(' ')[-1].strip('.') }} {{ messages[0].items() | list }}",
}
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "one huge power": "{{ 7 ** (10 ** 9) }}",
    "doubled lists": (
        "{% set n = namespace(x=[1]) %}{% for i in range(70) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}"
    ),
}
HUGE = {
    "repeated string": "{{ 'a' * 10 ** 10 }}",
    "doubled string": "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "format width": "{{ '%9999999999d' | format(3) }}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


def render(source, **options):
    """Render `source` with the usual messages in a process of its own that ends with the call."""
    template = ChatTemplate(source, max_seconds=options.pop("max_seconds", 5.0))
    try:
        return template.render(MESSAGES, **options)
    finally:
        template.close()


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no prompt"])
def test_a_template_gives_what_transformers_gives(source, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=prompt, bos_token="<s>", tools=None, documents=None
    )
    assert render(source, add_generation_prompt=prompt, bos_token="<s>") == expected[0]


def test_the_date_is_today_s():
    before = time.strftime("%d %b %Y")
    assert render("{{ strftime_now('%d %b %Y') }}") in (before, time.strftime("%d %b %Y"))


def test_a_template_s_own_refusal_is_passed_on():
    with pytest.raises(ChatTemplateError, match="refuses these messages: no system role"):
        render("{{ raise_exception('no system role') }}")


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_that_does_not_end_is_ended(source):
    with pytest.raises(ChatTemplateError, match=r"stopped: it computed for more than 1 s|too much memory"):
        render(source, max_seconds=1.0)


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE.keys())
def test_a_template_that_makes_huge_values_is_an_error(source):
    with pytest.raises(ChatTemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__.os }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(source):
    with pytest.raises(ChatTemplateError):
        render(source)


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 | nofilter }}", "{% for x in %}", "{{ undefined.attribute }}"])
def test_a_wrong_template_is_an_error(source):
    with pytest.raises(ChatTemplateError):
        render(source)


def test_the_line_of_a_syntax_error_is_named():
    with pytest.raises(ChatTemplateError, match="line 3"):
        render("a\nb\n{% if %}")


def test_a_template_that_is_too_long_is_refused():
    with pytest.raises(ChatTemplateError, match="characters"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1))


@pytest.mark.parametrize("messages", [[], "hello", {"role": "user"}, [{"content": "x"}], ["x"], [{"role": 3}]])
def test_messages_that_are_none_are_invalid_input(messages):
    with pytest.raises(InvalidInputError, match="message"):
        ChatTemplate("x").render(messages)


def test_options_that_are_not_plain_values_are_invalid_input():
    with pytest.raises(InvalidInputError, match="plain JSON"):
        ChatTemplate("x").render(MESSAGES, tools=[object()])


def test_a_template_goes_on_after_it_was_ended_once():
    template = ChatTemplate(
        "{% if n %}{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}{% endif %}x"
    )
    template._max_seconds = template._job["seconds"] = 1.0
    assert template.render(MESSAGES, n=0) == "x"
    with pytest.raises(ChatTemplateError, match="stopped"):
        template.render(MESSAGES, n=99999)
    assert template.render(MESSAGES, n=0) == "x"
    template.close()


def test_one_process_serves_many_renderings_and_threads():
    template = ChatTemplate("{{ messages[0].content }}{{ n }}")
    template.render(MESSAGES, n=0)
    worker = template._worker.pid
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: template.render(MESSAGES, n=n), range(64)))
    assert texts == [f"Be brief.{n}" for n in range(64)]
    assert template._worker.pid == worker
    template.close()


def test_large_messages_pass():
    message = {"role": "user", "content": "né" * 500_000}
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([message]) == message["content"]
    template.close()


def gone(pid):
    """Return whether no process has that id any more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_process_ends_with_the_template():
    template = ChatTemplate("x")
    template.render(MESSAGES)
    worker = template._worker.pid
    del template
    gc.collect()
    assert gone(worker)


def test_a_process_that_was_killed_is_replaced():
    template = ChatTemplate("x")
    template.render(MESSAGES)
    os.kill(template._worker.pid, signal.SIGKILL)
    template._worker.wait()
    assert template.render(MESSAGES) == "x"
    template.close()


def test_a_loop_ends_even_when_the_program_that_asked_is_gone():
    source = ENDLESS["nested loops"]
    code = (
        "import os, signal, threading\nfrom kvloom.models.chat_template import ChatTemplate\n"
        f"template = ChatTemplate({source!r}, max_seconds=1.0)\n"
        "threading.Thread(target=lambda: template.render([{'role': 'user'}]), daemon=True).start()\n"
        "while template._worker is None: pass\n"
        "print(template._worker.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    worker = int(done.stdout)
    while not gone(worker) and not _is_zombie(worker):
        time.sleep(0.05)


def _is_zombie(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_process_that_cannot_start_says_so(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("import a_module_that_nobody_has")
    monkeypatch.setattr(chat_template, "_WORKER", tmp_path / "worker.py")
    with pytest.raises(ChatTemplateError, match="ended with status 1"):
        render("x")
