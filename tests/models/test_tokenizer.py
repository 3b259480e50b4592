"""Tokenizers of folders and GGUF files agree with transformers, where transformers is right."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from harness.golden import golden
from harness.real_prompts import CHAT, TOKENIZED, WHITE_SPACE
from kvloom.errors import ChatTemplateError, CheckpointError, InvalidInputError, UnsupportedError
from kvloom.models.bpe_merges import merges_of_vocab
from kvloom.models.gguf_file import GGUFFile
from kvloom.models.gguf_tokenizer import tokenizer_of_gguf
from kvloom.models.spelling import byte_alphabet
from kvloom.models.tokenizer import tokenizer_from_folder, tokenizer_from_gguf
from kvloom.spec.gguf_ends import end_token_ids


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Keep conversions of made-up files out of the user's cache."""
    if "real_model" not in {mark.name for mark in request.node.iter_markers()}:
        monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))


def save_folder(folder, **config):
    """Save a small byte-level tokenizer as a folder; `config` is its tokenizer_config.json."""
    vocab = byte_alphabet() | {"<s>": 256, "</s>": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 256)])
    backend.enable_truncation(3)
    backend.enable_padding()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gguf_tokenizer(path, kind, tokens, types=None, scores=None, merges=None, **values):
    """Write a GGUF file that has nothing but a tokenizer and return it."""
    writer = gguf.GGUFWriter(path, values.pop("architecture", "llama"))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    if types:
        writer.add_token_types(types)
    if scores:
        writer.add_token_scores(scores)
    if merges:
        writer.add_token_merges(merges)
    for name, value in values.items():
        add = {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool}[type(value)]
        add(f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}", value)
    writer.add_tensor("x", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def sentencepiece_gguf(path, **values):
    """Write a small sentencepiece tokenizer: `low` and `lower` out of letters, bytes for the rest."""
    words = ["▁", "l", "o", "w", "e", "r", "lo", "low", "er", "lower", "▁low", "▁lower"]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + words
    types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words))]
    roles = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **values}
    return gguf_tokenizer(path, "llama", tokens, types, scores, **roles)


def byte_gguf(path, merges=("Ċ Ċ", "1 2"), extra=(), **values):
    """Write a small byte-level tokenizer with the tokens that `merges` make, and `extra` (token, type)."""
    tokens = list(byte_alphabet()) + [merge.replace(" ", "") for merge in merges] + [token for token, _ in extra]
    types = [1] * (256 + len(merges)) + [kind for _, kind in extra]
    return gguf_tokenizer(path, "gpt2", tokens, types, merges=list(merges), **{"pre": "gpt-2", **values})


def spelled(tokenizer, text):
    """Return the tokens of `text` as the vocabulary spells them."""
    return [tokenizer.id_to_token(token) for token in tokenizer.encode(text)]


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_a_folder_is_tokenized_as_transformers_does_it(tmp_path, settings):
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    save_folder(tmp_path, **config)
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend | {"truncation": None, "padding": None}))
    ours, theirs = tokenizer_from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TOKENIZED:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]


def test_a_text_is_neither_cut_nor_padded_whatever_the_file_says(tmp_path):
    assert len(tokenizer_from_folder(save_folder(tmp_path)).encode("abcdefgh", add_special_tokens=False)) == 8


def test_roles_and_ends_are_known(tmp_path):
    tokenizer = tokenizer_from_folder(save_folder(tmp_path, bos_token="<s>", eos_token="</s>"), eos_token_ids=[7, 257])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (256, (7, 257), 258)
    assert tokenizer.special_ids == {256, 257}
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([256, 97, 257], skip_special_tokens=False) == "<s>a</s>"


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="save_pretrained"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_files_are_checkpoint_errors(tmp_path, name):
    save_folder(tmp_path)
    (tmp_path / name).write_text('{"version"')
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("text", [b"bytes", "half \ud800", None])
def test_only_valid_text_is_encoded(tmp_path, text):
    with pytest.raises(InvalidInputError):
        tokenizer_from_folder(save_folder(tmp_path)).encode(text)


def test_the_chat_template_comes_from_its_own_file_before_the_config(tmp_path):
    save_folder(tmp_path, chat_template="config", bos_token="<s>")
    assert tokenizer_from_folder(tmp_path).chat_template == "config"
    save_folder(tmp_path, chat_template=[{"name": "tools", "template": "t"}, {"name": "default", "template": "named"}])
    assert tokenizer_from_folder(tmp_path).chat_template == "named"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert tokenizer_from_folder(tmp_path).chat_template == "own file"


def test_a_chat_prompt_has_the_template_s_bos_and_no_second_one(tmp_path):
    save_folder(tmp_path, bos_token="<s>", chat_template="{{ bos_token }}{{ messages[0].content }}")
    tokenizer = tokenizer_from_folder(tmp_path)
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]) == [256, *tokenizer.encode("a", False)]


def test_without_a_chat_template_the_error_says_what_to_do(tmp_path):
    tokenizer = tokenizer_from_folder(save_folder(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match=r"give plain text.*--chat-template"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


def test_sentencepiece_merges_by_score_and_spells_unknown_characters_in_bytes(tmp_path):
    tokenizer = tokenizer_from_gguf(sentencepiece_gguf(tmp_path / "t.gguf"))
    assert spelled(tokenizer, "lower low") == ["<s>", "▁lower", "▁low"]
    assert spelled(tokenizer, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("low é  low")) == "low é  low"


def test_sentencepiece_puts_a_space_before_a_text_only_where_the_file_says_so(tmp_path):
    tokenizer = tokenizer_from_gguf(sentencepiece_gguf(tmp_path / "t.gguf", add_space_prefix=False))
    assert spelled(tokenizer, "low") == ["<s>", "low"]
    assert tokenizer.decode(tokenizer.encode(" low")) == " low"


@pytest.mark.parametrize(("values", "bos"), [({}, True), ({"add_bos_token": False}, False)])
def test_sentencepiece_adds_bos_unless_told_not_to(tmp_path, values, bos):
    assert (tokenizer_from_gguf(sentencepiece_gguf(tmp_path / "t.gguf", **values)).encode("l")[0] == 1) == bos


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["Ċ", "Ċ", "12"]),
        ("smollm", ["ĊĊ", "1", "2"]),
        ("llama-bpe", ["ĊĊ", "12"]),
        ("qwen2", ["ĊĊ", "1", "2"]),
    ],
)
def test_byte_level_text_is_cut_as_the_file_s_vocabulary_was_learned(tmp_path, pre, tokens):
    tokenizer = tokenizer_from_gguf(byte_gguf(tmp_path / "t.gguf", pre=pre))
    assert spelled(tokenizer, "\n\n12") == tokens


def test_an_unknown_cut_of_the_text_is_refused_not_guessed(tmp_path):
    with pytest.raises(UnsupportedError, match=r"'smolm'.*did you mean 'smollm'"):
        tokenizer_from_gguf(byte_gguf(tmp_path / "t.gguf", pre="smolm"))


def without_pre(path, **values):
    """Write a byte-level tokenizer that does not say how text is cut."""
    return gguf_tokenizer(path, "gpt2", [*byte_alphabet(), "12"], merges=["1 2"], **values)


@pytest.mark.parametrize("values", [{}, {"pre": "default"}, {"architecture": "qwen2"}])
def test_a_file_that_does_not_say_how_text_is_cut_is_refused(tmp_path, values):
    with pytest.raises(UnsupportedError, match=r"does not say how text is cut.*--tokenizer"):
        tokenizer_from_gguf(without_pre(tmp_path / "t.gguf", **values))


def test_gpt2_itself_is_cut_as_gpt2_where_its_file_does_not_say(tmp_path):
    assert spelled(tokenizer_from_gguf(without_pre(tmp_path / "t.gguf", architecture="gpt2")), "a12") == ["a", "12"]


def test_a_sentencepiece_file_without_roles_has_the_usual_ones(tmp_path):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    file = gguf_tokenizer(tmp_path / "t.gguf", "llama", words, [2, 3, 3] + [6] * 256 + [1], [0.0] * len(words))
    tokenizer = tokenizer_from_gguf(file, eos_token_ids=end_token_ids(file.metadata))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (tokenizer.encode("a")[0], tokenizer.eos_token_ids) == (1, (2,))


ENDS = [
    # tokens beside their types, metadata, the tokens that end an answer
    ([("<|im_start|>", 3), ("<|im_end|>", 3), ("<|endoftext|>", 3)], {"eos": 2}, {"<|im_end|>", "<|endoftext|>"}),
    ([("<|begin_of_text|>", 3), ("<|end_of_text|>", 3), ("<|eom_id|>", 3), ("<|eot_id|>", 3)], {"eos": 1},
     {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}),
    ([("<|end|>", 4), ("<|user|>", 3), ("<s>", 3)], {}, {"<|end|>"}),
    ([("</s>", 3), ("<eos>", 3)], {}, {"</s>", "<eos>"}),
    ([("<eos>", 3), ("</s>", 4), ("<end_of_turn>", 3)], {"eos": 0}, {"<eos>", "<end_of_turn>"}),
    ([("<|return|>", 3), ("<|call|>", 3), ("<|end|>", 3)], {}, {"<|return|>", "<|call|>"}),
    ([("stop", 1), ("over", 1), ("out", 1)], {"eos": 0, "eot": 1, "eom": 2}, {"stop", "over", "out"}),
    ([("a", 1), ("b", 3)], {}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "roles", "ends"), ENDS, ids=[tokens[0][0] for tokens, _, _ in ENDS])
def test_an_answer_ends_at_every_token_whose_role_or_name_says_so(tmp_path, tokens, roles, ends):
    file = byte_gguf(tmp_path / "t.gguf", extra=tokens, **{f"{key}_token_id": 258 + at for key, at in roles.items()})
    tokenizer = tokenizer_from_gguf(file)
    found = {tokenizer.id_to_token(token) for token in end_token_ids(file.metadata)}
    assert found == ends
    assert {tokenizer.token_to_id(token) for token in ends} <= tokenizer.special_ids


def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="'bert'"):
        tokenizer_from_gguf(gguf_tokenizer(tmp_path / "t.gguf", "bert", ["a"]))


def test_control_tokens_are_special_and_tokens_of_the_user_are_not(tmp_path):
    file = byte_gguf(tmp_path / "t.gguf", extra=[("<|end|>", 3), ("<think>", 4)], eos_token_id=258)
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer.encode("<think><|end|>") == [259, 258]
    assert (tokenizer.special_ids, tokenizer.eos_token_ids) == ({258}, (258,))


def test_a_chat_template_in_the_file_is_used(tmp_path):
    tokenizer = tokenizer_from_gguf(byte_gguf(tmp_path / "t.gguf", chat_template="{{ messages[0].content }}!"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": ("Ċ Ċ", "x yz")}, "1 merges do not fit"),
        ({"bos_token_id": 9999}, "bos token is 9999"),
    ],
)
def test_a_contradictory_tokenizer_is_a_checkpoint_error(tmp_path, change, message):
    if "merges" in change:
        tokens = [*byte_alphabet(), "ĊĊ"]
        file = gguf_tokenizer(tmp_path / "t.gguf", "gpt2", tokens, merges=list(change["merges"]), pre="gpt-2")
    else:
        file = byte_gguf(tmp_path / "t.gguf", **change)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_gguf(file)


def test_a_conversion_is_kept_and_used_again(tmp_path, monkeypatch):
    file = byte_gguf(tmp_path / "t.gguf")
    first = tokenizer_of_gguf(file).to_str()
    monkeypatch.setattr("kvloom.models.gguf_tokenizer.convert", None)
    assert tokenizer_of_gguf(file).to_str() == first


def test_another_tokenizer_or_converter_has_another_place_in_the_cache(tmp_path, monkeypatch):
    kept = tmp_path / "cache" / "tokenizers"
    tokenizer_of_gguf(byte_gguf(tmp_path / "a.gguf"))
    tokenizer_of_gguf(byte_gguf(tmp_path / "b.gguf", pre="smollm"))
    monkeypatch.setattr("kvloom.models.gguf_tokenizer.CONVERTER_VERSION", 10**6)
    tokenizer_of_gguf(byte_gguf(tmp_path / "a.gguf"))
    assert len(list(kept.iterdir())) == 3


def test_a_damaged_conversion_is_made_again(tmp_path):
    file = byte_gguf(tmp_path / "t.gguf")
    first = tokenizer_of_gguf(file).to_str()
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    kept.write_text(kept.read_text()[:100])
    assert tokenizer_of_gguf(file).to_str() == first
    assert tokenizers.Tokenizer.from_file(str(kept)).to_str() == first


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "file" / "cache"))
    assert tokenizer_of_gguf(byte_gguf(tmp_path / "t.gguf")).get_vocab_size() == 258


@given(tokens=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=12, unique=True))
def test_recovered_merges_are_all_pairs_that_make_a_token_in_the_order_of_the_tokens(tokens):
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = merges_of_vocab(vocab, lambda index: True, float)
    pairs = {(a, b) for a in tokens for b in tokens if a + b in vocab}
    assert set(merges) == pairs
    assert len(merges) == len(pairs)
    ranks = [vocab[a + b] for a, b in merges]
    assert ranks == sorted(ranks)


@pytest.mark.real_model
def test_smollm2_is_tokenized_as_transformers_does_it_apart_from_digits(smollm2_path):
    ours, expected = tokenizer_from_gguf(GGUFFile(smollm2_path)), golden("smollm2")
    for text, theirs in zip(TOKENIZED, expected["tokenizer"][: len(TOKENIZED)], strict=True):
        assert ours.encode(text) == theirs["ids"]
        assert ours.decode(ours.encode(text), False) == theirs["text"] == text
    assert ours.apply_chat_template(CHAT) == expected["chat"]["text"]
    assert ours.encode_chat(CHAT) == expected["chat"]["ids"]
    assert [ours.bos_token_id, *ours.eos_token_ids] == expected["roles"]


@pytest.mark.real_model
def test_smollm2_keeps_white_space_before_a_digit_together(smollm2_path):
    """Its vocabulary was learned with every digit cut off first, so line ends before a digit are one token."""
    tokenizer = tokenizer_from_gguf(GGUFFile(smollm2_path))
    assert spelled(tokenizer, "a:\n\n12   3") == ["a", ":", "ĊĊ", "1", "2", "ĠĠĠ", "3"]


@pytest.mark.real_model
def test_gemma_is_tokenized_as_transformers_does_it(gemma_path):
    ours, expected = tokenizer_from_gguf(GGUFFile(gemma_path)), golden("gemma")
    for text, theirs in zip([*TOKENIZED, *WHITE_SPACE], expected["tokenizer"], strict=True):
        assert ours.encode(text) == theirs["ids"]
        assert ours.decode(ours.encode(text)) == theirs["plain"]
    assert [ours.bos_token_id, *ours.eos_token_ids] == expected["roles"]


@pytest.mark.real_model
def test_neither_torch_nor_transformers_is_loaded_to_tokenize(smollm2_path):
    code = (
        "import sys; from kvloom.models.checkpoint import open_checkpoint\n"
        f"open_checkpoint({str(smollm2_path)!r}).tokenizer().encode_chat([{{'role': 'user', 'content': 'hi'}}])\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
