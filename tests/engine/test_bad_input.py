"""Bad input from end to end of the Python API: each its class of error, its exit code, and nothing left behind."""

import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from harness.tiny import edit_json, save_tiny
from harness.tiny_engine import letters, nothing_left
from kvloom import LLM, SamplingParams
from kvloom.cache import memory
from kvloom.engine import config as engine_config
from kvloom.engine.config import EngineConfig
from kvloom.errors import (
    ChatTemplateError,
    CheckpointError,
    DoesNotFitError,
    InvalidInputError,
    KvloomError,
    ModelNotFoundError,
    UnsupportedError,
)
from kvloom.models.checkpoint import open_checkpoint

SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny(folder, "llama", vocab_size=247)
    letters()._backend.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "model"
    shutil.copytree(whole, copy)
    return copy


def test_the_whole_folder_runs(whole: Path) -> None:
    """Otherwise the damages below would prove nothing."""
    llm = LLM(whole, **SMALL)  # type: ignore[arg-type]
    (output,) = llm.chat([{"role": "user", "content": "a0b0c0"}], SamplingParams(temperature=0, max_tokens=3))
    assert output.prompt_token_ids == [0, 1, 2] and len(output.outputs[0].token_ids) == 3
    nothing_left(llm.engine)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def missing(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    rewrite(folder, change)


def misshapen(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(15, 32)}))


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["LlamaForAstrology"], model_type="astrollama")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "exit_code", "message"),
    [
        (missing, CheckpointError, 4, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (misshapen, CheckpointError, 4, r"k_proj\.weight has shape \[15, 32\], expected \[16, 32\]"),
        (unknown_architecture, UnsupportedError, 5, r"LlamaForAstrology|astrollama"),
        (truncated, CheckpointError, 4, r"model\.safetensors"),
        (no_weights, CheckpointError, 4, r"safetensors"),
        (no_config, CheckpointError, 4, r"config\.json"),
        (broken_config, CheckpointError, 4, r"config\.json"),
        (no_tokenizer, CheckpointError, 4, r"tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(
    folder: Path, damage: Callable[[Path], None], error: type[KvloomError], exit_code: int, message: str
) -> None:
    damage(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(error, match=message) as caught:
        LLM(folder, **SMALL)  # type: ignore[arg-type]
    assert caught.value.exit_code == exit_code
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.real_model
@pytest.mark.parametrize("kept", [0, 3, 100, 100_000, 98_000_000])
def test_a_truncated_gguf_file_is_refused(smollm2_path: Path, tmp_path: Path, kept: int) -> None:
    short = tmp_path / "short.gguf"
    with smollm2_path.open("rb") as source:
        short.write_bytes(source.read(kept))
    with pytest.raises(CheckpointError, match=r"short\.gguf") as caught:
        LLM(short, **SMALL)  # type: ignore[arg-type]
    assert caught.value.exit_code == 4 and list(tmp_path.iterdir()) == [short]


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere") as caught:
        LLM(tmp_path / "nowhere.gguf", **SMALL)  # type: ignore[arg-type]
    assert caught.value.exit_code == 3


def test_a_chat_template_that_loops_is_stopped_and_the_engine_goes_on(folder: Path) -> None:
    edit_json(
        folder / "tokenizer_config.json",
        chat_template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    )
    llm = LLM(folder, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ChatTemplateError) as caught:
        llm.chat([{"role": "user", "content": "a0"}])
    assert caught.value.exit_code == 8
    nothing_left(llm.engine)
    assert len(llm.generate("a0b0", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2


def test_messages_that_are_none_are_refused(whole: Path) -> None:
    llm = LLM(whole, **SMALL)  # type: ignore[arg-type]
    for messages in ("hello", [["hello"]], [{"content": "no role"}], 5, None):
        with pytest.raises((ChatTemplateError, InvalidInputError)):
            llm.chat(messages)  # type: ignore[arg-type]
    nothing_left(llm.engine)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_sequences_that_do_not_fit_together_take_turns(whole: Path) -> None:
    llm = LLM(whole, dtype="float32", kv_cache_memory_bytes=2 << 20, max_num_seqs=64)
    many = SamplingParams(n=64, max_tokens=200, ignore_eos=True, temperature=2.0)
    (output,) = llm.generate([1, 2, 3], many)  # 64 sequences of 52 KiB take turns in 2 MiB
    assert {len(answer.token_ids) for answer in output.outputs} == {200}
    assert output.kv.preemptions > 0
    nothing_left(llm.engine)


def test_a_length_that_the_cache_cannot_hold_is_refused_with_the_one_that_it_can(whole: Path) -> None:
    # two layers of two lanes of 8 + 8, held in 16 + 16: 2,048 bytes a block, 8,192 for 16 tokens, 256 of these in 2 MiB
    config = EngineConfig(kv_cache_memory_bytes=2 << 20, max_model_len=16384)
    spec = open_checkpoint(str(whole)).config.kv_spec(16, "fp32")
    with pytest.raises(DoesNotFitError, match=r"16384 tokens needs 8 MiB.*Lower --max-model-len to 4096") as caught:
        config.resolve_max_model_len(spec, 16384, 2 << 20)
    assert caught.value.exit_code == 6


def test_no_memory_for_the_cache_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    with pytest.raises(DoesNotFitError, match=r"KV cache of 4 MiB cannot be had.*Lower --kv-cache-memory") as caught:
        LLM(whole, **SMALL)  # type: ignore[arg-type]
    assert caught.value.exit_code == 6


def test_no_memory_for_the_weights_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ):

        def refuse(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("kvloom.engine.llm.load_model", refuse)
        with pytest.raises(DoesNotFitError, match=r"the weights of .* cannot be had") as caught:
            LLM(whole, **SMALL)  # type: ignore[arg-type]
        assert caught.value.exit_code == 6


def test_a_cache_beyond_the_reach_of_addresses_or_below_a_slab_is_refused(whole: Path) -> None:
    for num_bytes, message in ((256 << 30, "addresses reach 256 GiB"), (1 << 20, "it must be at least 2097152")):
        with pytest.raises(InvalidInputError, match=message):
            LLM(whole, dtype="float32", kv_cache_memory_bytes=num_bytes)


def test_the_default_cache_takes_at_most_half_of_what_is_free(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_config, "available_memory_bytes", lambda: 20 << 20)
    assert LLM(whole, dtype="float32").stats()["kv_cache_bytes"] == 10 << 20
    monkeypatch.setattr(engine_config, "available_memory_bytes", lambda: 0)
    assert LLM(whole, dtype="float32").stats()["kv_cache_bytes"] == 2 << 20


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float23"}, "unknown dtype 'float23' .did you mean 'float32'"),
        ({"block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"block_size": 16.0}, "block_size must be an integer, not 16.0"),
        ({"max_model_len": 1}, "max_model_len is 1; it must be at least 2"),
        ({"max_model_len": 300}, "max_model_len is 300; the model was made for at most 256 positions"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": "many"}, "max_num_batched_tokens must be an integer"),
        ({"kv_cache_memory_bytes": "4GiB"}, "kv_cache_memory_bytes must be an integer"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed must be an integer"),
        ({"block_size": 1 << 20}, "Use a smaller block size"),
        ({"revision": "main"}, "revision 'main' is for models of the hub"),
    ],
)
def test_wrong_options_of_an_engine_are_named(whole: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        LLM(whole, **{**SMALL, **options})  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be from 0 to 100"),
        ({"temperature": "hot"}, "temperature must be a finite number, not 'hot'"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"temperature": None}, "temperature must be a finite number, not None"),
        ({"n": 0}, "n is 0"),
        ({"n": 1.0}, "n must be an integer, not 1.0"),
        ({"n": 257}, "n is 257"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_p": 0}, "top_p is 0; it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -1}, "min_p is -1"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 17}, "min_tokens is 17, above max_tokens, which is 16"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": 5000}, "prompt_logprobs is 5000"),
        ({"stop": [""]}, "stop must be at most 64 non-empty strings"),
        ({"stop": ["a"] * 65}, "stop must be at most 64"),
        ({"stop": [1]}, "stop must be"),
        ({"stop": 5}, "stop must be"),
        ({"stop": "a", "detokenize": False}, "stop strings need detokenize=True"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": 5}, "stop_token_ids must be"),
        ({"logit_bias": {"a": 1}}, "'a' is not a token id"),
        ({"logit_bias": {1: 101}}, "it must be from -100 to 100"),
        ({"logit_bias": {1: "x"}}, "it must be from -100 to 100"),
        ({"logit_bias": [1]}, "logit_bias maps token ids to numbers"),
        ({"ignore_eos": "yes"}, "ignore_eos must be True or False"),
        ({"detokenize": 1}, "detokenize must be True or False"),
        ({"skip_special_tokens": None}, "skip_special_tokens must be True or False"),
        ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output must be True or False"),
    ],
)
def test_wrong_sampling_parameters_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2 and isinstance(caught.value, ValueError)


def test_config_files_are_left_as_they_were(whole: Path) -> None:
    before = (whole / "config.json").read_text()
    LLM(whole, **SMALL)  # type: ignore[arg-type]
    assert (whole / "config.json").read_text() == before and json.loads(before)["vocab_size"] == 247
