"""Where a plan finds a model and a machine: folders, files, caches, probes."""

import json
import struct

import pytest

from kvloom.errors import CheckpointError, InvalidInputError, ModelNotFoundError
from kvloom.plan.plot import contexts_of, draw, memory_curves
from kvloom.plan.probe import load_probe, measure_read_bandwidth, save_probe
from kvloom.plan.question import Question
from kvloom.plan.source import find_model
from kvloom.spec.catalogue import catalogue_spec
from kvloom.spec.hardware import find_device
from kvloom.spec.policy import PolicySpec

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 50, "torch_dtype": "float16",
}  # fmt: skip


def write_model(folder, weights=True):
    """Write a config.json and, when asked, a safetensors file of one tensor of 100 half-precision numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if weights:
        header = json.dumps({"x": {"dtype": "F16", "shape": [100], "data_offsets": [0, 200]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(200))


def test_a_folder_with_weights_gives_their_exact_bytes_and_says_when_they_differ_from_the_config(tmp_path):
    write_model(tmp_path / "m")
    spec = find_model(str(tmp_path / "m"))
    assert (spec.weight_bytes, spec.dtype, spec.name) == (200, "float16", "m")
    assert any("100 numbers" in note for note in spec.notes)


def test_a_config_alone_gives_computed_bytes(tmp_path):
    write_model(tmp_path / "m", weights=False)
    spec = find_model(str(tmp_path / "m" / "config.json"))
    assert spec.weight_bytes is None
    assert spec.stored_weight_bytes("float16") == 2 * spec.num_params


def test_a_repository_in_the_local_cache_is_read_before_the_catalogue(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    write_model(tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "abc")
    assert find_model("meta-llama/Llama-2-7b-hf").num_layers == 2


def test_a_repository_that_is_nowhere_is_fetched_when_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    write_model(tmp_path / "m", weights=False)
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        return tmp_path / "m" / file

    assert find_model("someone/their-model", fetch).num_layers == 2
    assert asked == [("someone/their-model", "config.json")]
    with pytest.raises(ModelNotFoundError):
        find_model("someone/their-model")


@pytest.mark.parametrize("name", ["./nowhere", "missing.gguf", "no/where/config.json"])
def test_a_path_that_is_not_there_is_not_looked_for_elsewhere(name):
    with pytest.raises(ModelNotFoundError, match="there is no file or folder"):
        find_model(name)


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        find_model(str(tmp_path))


def test_a_probe_is_kept_and_makes_the_cpu_measured(tmp_path):
    save_probe(3e10, {"bfloat16": 4e11}, 250 << 20, tmp_path / "probe.json")
    device = find_device("cpu:8GiB", load_probe(tmp_path / "probe.json"))
    assert (device.bandwidth, device.peak("bfloat16"), device.measured, device.memory_bytes) == (
        3e10,
        4e11,
        True,
        8 << 30,
    )


def test_no_probe_is_none_and_a_damaged_one_an_error(tmp_path):
    assert load_probe(tmp_path / "probe.json") is None
    (tmp_path / "probe.json").write_text('{"schema": "other"}')
    with pytest.raises(CheckpointError, match="--probe"):
        load_probe(tmp_path / "probe.json")


def test_the_bandwidth_probe_reads_all_its_memory():
    assert measure_read_bandwidth(8 << 20, threads=2, repeats=2) > 1e6


def test_curves_of_memory_rise_and_eviction_lies_below_the_full_cache():
    asked = Question(catalogue_spec("smollm2"), find_device("cpu:8GiB"), 4000, 96, users=8)
    curves = memory_curves(asked, [PolicySpec(), PolicySpec.parse("snapkv(budget=512)")])
    full, kept = (dict(curve) for curve in curves.values())
    assert list(full.values()) == sorted(full.values())
    assert kept[4096] < full[4096]
    assert 4096 in contexts_of(asked) and contexts_of(asked)[-1] == asked.model.max_position


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_plot_is_written_in_the_format_of_its_name(tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    asked = Question(catalogue_spec("smollm2"), find_device("cpu:8GiB"), 1000, 24)
    draw(asked, [PolicySpec()], tmp_path / f"plot{suffix}")
    assert (tmp_path / f"plot{suffix}").read_bytes().startswith(magic)


def test_a_plot_of_another_format_is_refused(tmp_path):
    asked = Question(catalogue_spec("smollm2"), find_device("cpu:8GiB"), 1000, 24)
    with pytest.raises(InvalidInputError, match="neither"):
        draw(asked, [], tmp_path / "plot.pdf")
