"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library once and then kept in the cache folder."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from kvloom.errors import CheckpointError, InvalidInputError, UnsupportedError
from kvloom.models.bpe_merges import merges_of_vocab
from kvloom.models.cache_dir import cache_dir, write_atomically
from kvloom.models.gguf_file import GGUFFile
from kvloom.registry import nearest
from kvloom.spec.gguf_ends import CONTROL_TOKEN, is_end

CONVERTER_VERSION = 3
"""Part of the key of converted tokenizers: raise it when the conversion gives other results than before."""

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _USER_DEFINED, _UNUSED, _BYTE = 2, 4, 5, 6
_SPACE = "\u2581"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35_SPLIT = _QWEN2_SPLIT.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(r" ?[^\s\p{L}", r" ?[^\s\p{L}\p{M}")
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_GPT2, _DIGITS, _LLAMA3, _DBRX, _QWEN2 = "gpt2", "digits", "llama3", "dbrx", "qwen2"
_CUTS = {
    _LLAMA3: (_LLAMA3_SPLIT,),
    _DBRX: (_LLAMA3_SPLIT,),
    _QWEN2: (_QWEN2_SPLIT,),
    "qwen35": (_QWEN35_SPLIT,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_SPLIT, r"[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
}
"""Expressions that split text one after the other: each splits off its matches in the pieces left by those before."""

_PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _DBRX),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **{name: name for name in ("qwen35", "falcon", "deepseek-llm", "deepseek-coder")},
}
"""Rules of splitting text before merging, by their names in GGUF files: a wrong rule gives wrong tokens silently."""


def tokenizer_of_gguf(file: GGUFFile) -> tokenizers.Tokenizer:
    """Return the tokenizer of `file`, from the cache folder if it was converted before.

    The key covers everything in the file that the tokenizer depends on, and the versions that convert it. A cache
    that cannot be read or written costs time and nothing else. Raises `CheckpointError` when the file has no
    tokenizer or a contradictory one, `UnsupportedError` when its kind is unknown.
    """
    try:
        path = cache_dir() / "tokenizers" / f"{_key(file)}.json"
    except InvalidInputError:
        return convert(file)  # a user without a home has no cache
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception:  # the library raises bare Exceptions; a damaged file is converted anew
            with contextlib.suppress(OSError):
                path.unlink()
    tokenizer = convert(file)
    text = tokenizer.to_str().encode("utf-8")
    with contextlib.suppress(OSError):
        write_atomically(path, lambda out: out.write(text))
    return tokenizer


def roles_in_gguf(file: GGUFFile, names: Sequence[str]) -> list[str | None]:
    """Return the token that has each of the roles `names` (bos, eos, unknown, padding), None where none has.

    Raises `CheckpointError` as `tokenizer_of_gguf` does.
    """
    facts = _Facts(file)
    return [facts.token(name) for name in names]


def convert(file: GGUFFile) -> tokenizers.Tokenizer:
    """Return the tokenizer of `file`, converted from its metadata; errors as in `tokenizer_of_gguf`."""
    facts = _Facts(file)
    kind = facts.value("model")
    if kind == "gpt2":
        tokenizer = _byte_level(facts)
    elif kind == "llama":
        tokenizer = _sentencepiece(facts, gemma=file.metadata["general.architecture"].startswith("gemma"))
    else:
        raise UnsupportedError(f"the tokenizer of {file.path}", [f"its kind is {kind!r}; kvloom reads gpt2 and llama"])
    _add_tokens(tokenizer, facts)
    _add_template(tokenizer, facts, kind)
    return tokenizer


def _key(file: GGUFFile) -> str:
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {tokenizers.__version__}".encode())
    for key in sorted(file.metadata):
        if key.startswith(_PREFIX) or key == "general.architecture":
            value = file.metadata[key]
            digest.update(f"\n{key} ".encode())
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode())
    return digest.hexdigest()


class _Facts:
    """The metadata of the tokenizer: `tokens`, `types` (1 = normal) of each token, and single values."""

    def __init__(self, file: GGUFFile) -> None:
        self.path: Path = file.path
        self._metadata = file.metadata
        self.architecture: str = file.metadata["general.architecture"]
        self.tokens: list[str] = self._strings("tokens") or []
        if not self.tokens:
            raise CheckpointError(f"{self.path} has no tokenizer ({_PREFIX}tokens is missing); fetch the model again")
        self.types = self.numbers("token_type") or [1] * len(self.tokens)
        self.vocab = {token: index for index, token in enumerate(self.tokens)}
        self.merges = self._strings("merges")

    def value(self, name: str) -> Any:
        return self._metadata.get(_PREFIX + name)

    def numbers(self, name: str) -> list[Any] | None:
        values = self.value(name)
        if values is None:
            return None
        if not isinstance(values, np.ndarray) or len(values) != len(self.tokens):
            raise CheckpointError(f"{self.path}: {_PREFIX}{name} does not have one number for each token")
        found: list[Any] = values.tolist()
        return found

    def token(self, name: str) -> str | None:
        index = self.value(f"{name}_token_id")
        if index is None:
            return self._usual(name)
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise CheckpointError(f"{self.path}: {name} token is {index!r}, but there are {len(self.tokens)} tokens")
        return self.tokens[index]

    def _usual(self, name: str) -> str | None:
        """Return the token with a role that a sentencepiece file leaves out, if it is where such files have it."""
        usual = {"unknown": ("<unk>", 0), "bos": ("<s>", 1), "eos": ("</s>", 2)}.get(name)
        if self.value("model") != "llama" or usual is None:
            return None
        token, index = usual
        return token if self.tokens[index : index + 1] == [token] else None

    def rules(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ")) for merge in self.merges or ()]
        bad = [pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= self.vocab.keys()]
        if bad:
            raise CheckpointError(f"{self.path}: {len(bad)} merges do not fit the vocabulary, the first is {bad[0]}")
        return [(pair[0], pair[1]) for pair in pairs]

    def _strings(self, name: str) -> list[str] | None:
        values = self.value(name)
        if values is None or (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            return values
        raise CheckpointError(f"{self.path}: {_PREFIX}{name} is not a list of strings")


def _byte_level(facts: _Facts) -> tokenizers.Tokenizer:
    """Byte-level BPE (Radford et al. 2019), with the rule of splitting with which the merges were learned."""
    name = facts.value("pre")
    if name in (None, "default"):
        if facts.architecture != "gpt2":
            raise UnsupportedError(
                f"the tokenizer of {facts.path}",
                [
                    f"it does not say how text is cut ({_PREFIX}pre is {name!r}), and a guess would give other tokens "
                    "than the model knows; give the original model's tokenizer with --tokenizer, or a newer file"
                ],
            )
        name = "gpt-2"
    if name not in _PRE_TOKENIZERS:
        hint = nearest(str(name), list(_PRE_TOKENIZERS))
        raise UnsupportedError(f"the tokenizer of {facts.path}", [f"it cuts text in the way {name!r}, unknown{hint}"])
    cut = _PRE_TOKENIZERS[name]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=facts.vocab, merges=facts.rules(), ignore_merges=cut == _LLAMA3))
    if cut == _GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif cut == _DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _CUTS[cut]]
        spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, spelt])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(facts: _Facts, gemma: bool) -> tokenizers.Tokenizer:
    """Sentencepiece BPE with bytes for unknown characters. Gemma spells runs of spaces out and ranks by position."""
    if gemma:
        tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in facts.tokens]
        facts.vocab = {token: index for index, token in enumerate(tokens)}
    scores = facts.numbers("scores")
    whole = {_UNKNOWN, CONTROL_TOKEN, _UNUSED, _BYTE}
    if facts.merges:
        rules = facts.rules()
    else:
        if scores is None:
            raise CheckpointError(f"{facts.path} has neither merges nor scores of its tokens; fetch the model again")
        rank = float if gemma else [-score for score in scores].__getitem__
        rules = merges_of_vocab(facts.vocab, lambda index: facts.types[index] not in whole, rank)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=facts.vocab, merges=rules, unk_token=facts.token("unknown"), fuse_unk=True, byte_fallback=True)
    )
    spell = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = bool(facts.value("add_space_prefix") is not False) and not gemma
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif prefix:  # one more space stands before a text, and before what follows a special token, even before a space
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([*spell, decoders.Strip(" ", 1, 0)] if prefix else spell)
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, facts: _Facts) -> None:
    """Mark the tokens that are matched whole in a text: control tokens are special, the user's own are not."""
    named = {facts.token(name) for name in ("bos", "eos", "eot", "eom", "padding")}
    special, plain = [], []
    for token, kind in zip(facts.tokens, facts.types, strict=True):
        if kind == CONTROL_TOKEN or token in named or is_end(token, kind):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED and token in facts.vocab:
            plain.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_template(tokenizer: tokenizers.Tokenizer, facts: _Facts, kind: str) -> None:
    """Put BOS before and EOS after a text where the file, or else the default of its kind, says so."""
    habit = kind == "llama" or _PRE_TOKENIZERS.get(facts.value("pre")) == _LLAMA3
    wanted = facts.value("add_bos_token")
    bos = facts.token("bos") if (habit if wanted is None else wanted) else None
    eos = facts.token("eos") if facts.value("add_eos_token") else None
    special = [(token, facts.vocab[token]) for token in dict.fromkeys((bos, eos)) if token is not None]
    if not special:
        return
    before, after = ([f"{token}:0"] if token is not None else [] for token in (bos, eos))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after], pair=[*before, "$A:0", *after, "$B:1"], special_tokens=special
    )
