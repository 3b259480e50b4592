"""`kvloom plan` from the command line: flags, text, JSON, errors and imports."""

import json
import os
import subprocess
import sys

import pytest

from kvloom.cli.plan import plan
from kvloom.cli.plantext import show_bytes
from kvloom.cli.serve import serve
from kvloom.errors import InvalidInputError, KvloomError


def run(capsys, *arguments):
    """Run the command in this process and return what it printed."""
    with plan.make_context("plan", list(arguments)) as context:
        plan.invoke(context)
    return capsys.readouterr().out


def test_bytes_are_shown_in_both_units():
    assert show_bytes(1_342_177_280) == "1.25 GiB = 1.342 GB"
    assert show_bytes(42_949_672_960) == "40 GiB = 42.95 GB"
    assert show_bytes(69_120) == "67.5 KiB = 69.12 kB"


def test_the_text_gives_verdict_figures_and_how_they_are_known(capsys):
    text = run(capsys, "llama-2-70b", "--device", "h100", "--devices", "4", "--users", "32", "--context", "4096")
    assert "FITS" in text
    assert "10 GiB = 10.74 GB" in text
    assert "exact" in text
    assert "assumed" in text


def test_json_holds_the_same_figures(capsys):
    data = json.loads(run(capsys, "llama-2-7b", "--device", "h100", "--context", "4096", "--json"))
    assert data["schema"] == "kvloom.plan/1"
    assert data["memory"]["kv_per_request"] == {"value": 2_147_483_648, "unit": "bytes", "label": "exact"}
    assert data["memory"]["kv_per_token"]["value"] == 524_288


def test_the_quantization_is_part_of_the_question_its_bytes_and_the_command(capsys):
    asked = ["smollm2", "--device", "cpu:8GiB", "--quantization", "int4", "--max-loss", "1%"]
    data = json.loads(run(capsys, *asked, "--json"))
    assert data["question"]["quantization"] == "int4"
    assert data["memory"]["weights"]["value"] == 95_003_904
    assert "--quantization int4" in data["recommendation"]["command"]
    text = run(capsys, *asked)
    assert "bfloat16 with weights in int4" in text
    assert "as the kernels pack them in int4" in text


def test_both_commands_know_the_same_quantizations_and_say_the_same_of_them():
    ours, theirs = (next(p for p in command.params if p.name == "quantization") for command in (plan, serve))
    assert (ours.type.choices, ours.help) == (theirs.type.choices, theirs.help)


def test_a_hypothetical_model_needs_only_numbers(capsys):
    data = json.loads(run(capsys, "--layers", "80", "--heads", "64", "--head-dim", "128", "--context", "4K", "--json"))
    assert data["memory"]["kv_per_request"]["value"] == 10 << 30
    assert data["memory"]["weights"]["label"] == "assumed"


def test_comparisons_explanations_and_recommendation_are_added_when_asked(capsys):
    asked = (
        "smollm2 --device cpu:1GiB --users 99 --compare stores --compare attention --explain generation --max-loss 1%"
    )
    text = run(capsys, *asked.split())
    for words in (
        "what to change, cheapest first",
        "kivi2",
        "MLA (512+64)",
        "with and without a cache",
        "recommendation",
    ):
        assert words in text


def test_lists_and_schema_need_no_model(capsys):
    assert "llama-3-8b" in run(capsys, "--list-models")
    assert "3,350 GB/s" in run(capsys, "--list-devices")
    assert json.loads(run(capsys, "--json-schema"))["title"] == "kvloom.plan/1"


BAD = [
    (["llama-3-8b", "--users", "0"], "at least 1"),
    (["llama-3-8b", "--prompt", "0"], "at least 1"),
    (["llama-3-8b", "--device", "h1o0"], "'h100'"),
    (["llama-3-8b", "--device", "cpu:lots"], "is not a size"),
    (["llama-3-8b", "--layers", "3"], "contradict"),
    (["--layers", "4"], "--layers and --heads"),
    ([], "name a MODEL"),
    (["--layers", "4", "--heads", "6", "--kv-heads", "4"], "not divisible"),
    (["llama-3-8b", "--context", "100", "--prompt", "90", "--output", "30"], "contradicts"),
    (["llama-3-8b", "--context", "100", "--prompt", "190"], "no room"),
    (["llama-3-8b", "--compare", "atention"], "'attention'"),
    (["llama-3-8b", "--explain", "reech"], "'reach'"),
    (["llama-3-8b", "--devices", "3"], "32 query heads are not divisible by 3"),
    (["llama-3-8b", "--kv-policy", "snpkv(budget=1)"], "'snapkv'"),
    (["llama-3-8b", "--kv-policy", "kivi2"], "--block-size 32"),
    (["llama-3-8b", "--quantization", "int8", "--device", "h100"], "not on h100"),
    (["llama-3-8b", "--quantization", "int4", "--block-size", "24"], "multiple of 16 tokens"),
    (["llama-3-8b", "--max-loss", "200%"], "--max-loss"),
    (["llama-3-8b", "--target-tpot", "soon"], "--target-tpot"),
    (["llama-3-8b", "--gpu-memory-utilization", "1.5"], "at most 1"),
    (["llama-3-8b", "--measured", "nowhere.json"], "cannot read"),
    (["llama-3-8b", "--plot", "plan.pdf"], ".png or .svg"),
    (["lama-3-8b"], "'llama-3-8b'"),
    (["meta-lama/Llama-2-7b-hf"], "'meta-llama/llama-2-7b-hf'"),
    (["./nowhere"], "no file or folder"),
    (["model.gguf"], "no file or folder"),
]


@pytest.mark.parametrize("arguments, words", BAD)
def test_bad_input_is_one_line_with_exit_code_2(capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(KvloomError) as caught:
        run(capsys, *arguments)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{"model_type": "vit", "image_size": 224}, {"model_type": "lama"}])
def test_a_config_that_is_not_understood_has_exit_code_2(capsys, tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidInputError):
        run(capsys, str(path))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_written_as_its_name_says(capsys, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan{suffix}"
    run(capsys, "gemma-3-1b", "--device", "h100", "--users", "8", "--plot", str(path))
    start = path.read_bytes()[:2000]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in start


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "kvloom", "plan", "someone/their-model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (7, "", 1)
    assert "the hub cannot be reached; give a folder" in done.stderr


def test_planning_imports_nothing_heavy():
    program = (
        "import sys\nfrom kvloom.cli.plan import plan\n"
        "c = plan.make_context('plan', ['llama-3-8b', '--device', 'h100', '--compare', 'policies', '--explain', "
        "'reach'])\n"
        "plan.invoke(c)\n"
        "heavy = ('torch', 'transformers', 'numpy', 'gguf', 'safetensors', 'huggingface_hub', 'matplotlib', 'rich')\n"
        "sys.exit(' '.join(h for h in heavy if h in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
