"""A flag means the same on the command line, in its environment variable and in a config file."""

import pytest

from kvloom.cli.main import cli
from kvloom.cli.reference import reference
from kvloom.cli.samplingflags import sampling_params
from kvloom.engine.params import SamplingParams


def test_sampling_flags_reach_the_engine_under_their_own_names(kvloom, llm):
    kvloom(
        *["generate", "--temperature", "0.5", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--seed", "3"],
        *["--max-tokens", "1k", "--min-tokens", "2", "--stop", "a b", "--stop", "c", "--stop-token-ids", "7"],
        *["--ignore-eos", "--include-stop-str-in-output", "--presence-penalty", "1", "--frequency-penalty", "0.5"],
        *["--repetition-penalty", "1.1", "--logit-bias", '{"17": -5}', "--no-skip-special-tokens", "--n", "2", "x"],
    )
    assert llm.last.asked[0][1] == SamplingParams(
        n=2, temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, seed=3, max_tokens=1000, min_tokens=2, stop=("a b", "c"),
        stop_token_ids=(7,), ignore_eos=True, include_stop_str_in_output=True, presence_penalty=1.0,
        frequency_penalty=0.5, repetition_penalty=1.1, logit_bias={17: -5.0}, skip_special_tokens=False,
    )  # fmt: skip


def test_engine_flags_reach_the_engine_and_those_not_given_stay_its_own(kvloom, llm):
    kvloom("generate", "--max-model-len", "2K", "--kv-cache-memory-bytes", "64MiB", "--no-enable-prefix-caching", "x")
    assert llm.last.engine == {
        "dtype": "auto", "max_model_len": 2048, "kv_cache_memory_bytes": 64 << 20, "block_size": 16,
        "enable_prefix_caching": False, "max_num_seqs": 64, "max_num_batched_tokens": 2048, "backend": "auto",
        "populate": False, "kv_policy": "full", "kv_cache_dtype": "auto",
    }  # fmt: skip


def test_generate_is_greedy_and_256_tokens_long_by_default(kvloom, llm):
    kvloom("generate", "x")
    assert llm.last.asked[0][1] == SamplingParams(temperature=0.0, max_tokens=256)


def test_max_tokens_auto_leaves_the_length_to_the_model(kvloom, llm):
    kvloom("generate", "--max-tokens", "auto", "x")
    assert llm.last.asked[0][1].max_tokens is None


@pytest.mark.parametrize("command", [c for _, c in cli.leaves()], ids=[n for n, _ in cli.leaves()])
def test_every_flag_has_an_environment_twin_named_after_it(command):
    for name, flag in command.flags.items():
        assert flag.envvar == "KVLOOM_" + name.upper().replace("-", "_")
        assert flag.help


def test_the_environment_sets_a_flag_and_the_command_line_wins(kvloom, llm, monkeypatch):
    monkeypatch.setenv("KVLOOM_MAX_TOKENS", "5")
    monkeypatch.setenv("KVLOOM_TOP_K", "9")
    monkeypatch.setenv("KVLOOM_ENABLE_PREFIX_CACHING", "0")
    monkeypatch.setenv("KVLOOM_MODEL", "from-environment")
    kvloom("generate", "--top-k", "3", "x")
    sampling = llm.last.asked[0][1]
    assert (sampling.max_tokens, sampling.top_k, llm.last.model) == (5, 3, "from-environment")
    assert llm.last.engine["enable_prefix_caching"] is False


@pytest.mark.parametrize(("value", "stops"), [("a b", ("a b",)), ('["a b", "c"]', ("a b", "c"))])
def test_the_twin_of_a_repeatable_flag_is_one_text_or_a_json_list(kvloom, llm, monkeypatch, value, stops):
    monkeypatch.setenv("KVLOOM_STOP", value)
    kvloom("generate", "x")
    assert llm.last.asked[0][1].stop == stops


def test_a_bad_value_in_the_environment_is_refused_by_name(kvloom, monkeypatch):
    monkeypatch.setenv("KVLOOM_TOP_K", "few")
    code, _, err = kvloom("generate", "x")
    assert code == 2
    assert err.startswith("error: Invalid value for '--top-k' (from KVLOOM_TOP_K): 'few' is not")


def test_a_misspelt_variable_of_a_flag_is_named_on_stderr(kvloom, llm, monkeypatch):
    monkeypatch.setenv("KVLOOM_TEMPRATURE", "1")
    code, _, err = kvloom("generate", "x")
    assert code == 0
    ignored = "KVLOOM_TEMPRATURE is not a setting of kvloom and is ignored"
    assert err == f"warning: {ignored}; did you mean KVLOOM_TEMPERATURE?\n"


def test_a_config_file_sets_flags_below_environment_and_command_line(kvloom, llm, monkeypatch, tmp_path):
    config = tmp_path / "flags.yaml"
    config.write_text(
        "model: from-config\nmax-model-len: 4k\ntop_k: 7\nmin-tokens: 1\nmax-tokens: 8\nignore-eos: true\n"
        "stop: [a b, c]\nlogit-bias: {17: -5}\nenable-prefix-caching: false\n"
    )
    monkeypatch.setenv("KVLOOM_MAX_TOKENS", "5")
    assert kvloom("generate", "--config", str(config), "--min-tokens", "2", "x")[0] == 0
    sampling = llm.last.asked[0][1]
    assert (sampling.top_k, sampling.min_tokens, sampling.max_tokens) == (7, 2, 5)
    assert (sampling.ignore_eos, sampling.stop, sampling.logit_bias) == (True, ("a b", "c"), {17: -5.0})
    assert (llm.last.model, llm.last.engine["max_model_len"]) == ("from-config", 4000)
    assert llm.last.engine["enable_prefix_caching"] is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temprature: 1", "unknown key 'temprature' (did you mean 'temperature'?)"),
        ("top-k: 1\ntop_k: 2", "'top_k' is given twice"),
        ("top-k: 1.5", "'1.5' is not a valid integer"),
        ("top-k: [1]", "takes one value"),
        ("top-k: true", "must be a value of type integer"),
        ("top-k:", "must be a value of type integer, not None"),
        ("ignore-eos: 1", "must be true or false"),
        ("- top-k", "must be a YAML mapping"),
        ("top-k: [", "is not valid YAML"),
        ("config: other.yaml", "unknown key 'config'"),
    ],
)
def test_a_wrong_config_file_is_refused_in_one_line(kvloom, llm, tmp_path, text, expected):
    config = tmp_path / "flags.yaml"
    config.write_text(text)
    code, _, err = kvloom("generate", "--config", str(config), "x")
    assert (code, err.count("\n")) == (2, 1)
    assert expected in err


def test_a_missing_config_file_is_refused(kvloom, tmp_path):
    code, _, err = kvloom("generate", "--config", str(tmp_path / "none.yaml"), "x")
    assert code == 2
    assert "No such file" in err


def test_sampling_flags_are_fields_of_sampling_params():
    assert sampling_params({"temperature": 0.0, "unrelated": 1}) == SamplingParams(temperature=0.0)


def test_the_reference_page_is_what_the_commands_say(request):
    page = request.config.rootpath / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == reference(), "run `python -m kvloom.cli.reference > docs/cli.md`"
