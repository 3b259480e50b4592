"""Tokenizers of GGUF files give the golden tokenisations that llama.cpp is tested with."""

import pytest

from harness.vocabularies import NAMES, vocabularies
from kvloom.models.gguf_file import GGUFFile
from kvloom.models.tokenizer import tokenizer_from_gguf

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("name", NAMES)
def test_every_golden_text_has_its_golden_tokens(name, tmp_path, monkeypatch):
    folder = vocabularies()
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))  # convert anew
    path = folder / f"ggml-vocab-{name}.gguf"
    texts = (folder / f"{path.name}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    golden = [[int(token) for token in line.split()] for line in (folder / f"{path.name}.out").read_text().splitlines()]
    tokenizer = tokenizer_from_gguf(GGUFFile(path))
    found = [tokenizer.encode(text, add_special_tokens=False) for text in texts[: len(golden)]]
    wrong = [(text, got, want) for text, got, want in zip(texts, found, golden, strict=False) if got != want]
    assert len(golden) > 40 and wrong == []
