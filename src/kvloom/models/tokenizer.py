"""Tokenizer: text to token ids and back, and conversations to prompts, as the checkpoint defines them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken

from kvloom.errors import ChatTemplateError, CheckpointError, InvalidInputError
from kvloom.models.chat_template import ChatTemplate
from kvloom.models.controltokens import ControlTokens
from kvloom.models.spelling import Spelling

if TYPE_CHECKING:
    from kvloom.models.gguf_file import GGUFFile

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Tokens that a checkpoint gives a role, under the names that chat templates use."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the roles of its special tokens and a chat template.

    `special_tokens` maps `SPECIAL_NAMES` to tokens; `eos_token_ids` are all ids that end a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = dict(special_tokens)
        bos, eos = (self.token_to_id(self.special_tokens.get(name)) for name in ("bos_token", "eos_token"))
        self.bos_token_id = bos
        self.eos_token_ids = tuple(dict.fromkeys((*eos_token_ids, *([eos] if eos is not None else []))))
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included; ids may have gaps and the model may have more."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that mark structure and that decoding leaves out on demand."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def spelling(self) -> Spelling:
        """The bytes that each token adds to a text; raises `UnsupportedError` when they depend on its neighbours."""
        return Spelling(self._backend)

    def needed_beyond(self, vocab_size: int) -> list[str]:
        """Return the tokens with ids from `vocab_size` on that texts or conversations may contain.

        Special tokens without a role that are not in the chat template are left out: some checkpoints list those of
        images, for which their language model has no embedding. A text with such a token is refused.
        """
        found = [(index, token) for token, index in self._backend.get_vocab().items() if index >= vocab_size]
        roles, written = set(self.special_tokens.values()), self.chat_template or ""
        idle = {i for i, token in found if i in self.special_ids and token not in roles and token not in written}
        return [token for index, token in sorted(found) if index not in idle]

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, or None when there is none with that id."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str | None) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with BOS (and EOS) where the checkpoint adds them, unless told not to.

        Raises `InvalidInputError` for text that is not valid Unicode.
        """
        if not isinstance(text, str):
            raise InvalidInputError(f"the text to encode is {type(text).__name__}, expected str")
        _check_unicode(text)
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be turned into prompts."""
        return self.chat_template is not None

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ChatTemplateError(
                "this model has no chat template; give plain text, or a template: --chat-template of kvloom serve and "
                "chat, `chat_template` of the tokenizer"
            )
        return ChatTemplate(self.chat_template)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any
    ) -> str:
        """Return the prompt for a conversation; `options` are variables of the template (`tools`, ...).

        Raises `ChatTemplateError` when there is no template, or it fails on these messages, or exceeds its limits.
        """
        variables = {**self.special_tokens, **options}
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        allow_special_tokens: bool = False,
        continue_final_message: bool = False,
        **options: Any,
    ) -> list[int]:
        """Return the token ids of `apply_chat_template`; the template itself writes BOS, so none is added here.

        Names of control tokens in messages and options are text, unless `allow_special_tokens`. With
        `continue_final_message` the ids end where the content of the last message does; raises `InvalidInputError` when
        that is not in the prompt. Other errors as in `apply_chat_template`.
        """

        def rendered(messages: Any, options: Mapping[str, Any]) -> str:
            text = self.apply_chat_template(messages, add_generation_prompt, **options)
            _check_unicode(text)
            return _up_to_content(text, messages[-1]) if continue_final_message else text

        text = rendered(messages, options)
        control, given = self._control_tokens, [messages, options]
        mark = control.mark_for(given, self.chat_template)
        marked = given if allow_special_tokens else control.marked(given, mark)
        if marked == given:
            return self.encode(text, add_special_tokens=False)
        return control.encode(text, rendered(*marked), mark)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        ends = set(self.eos_token_ids)
        if isinstance(self._backend.model, tokenizers.models.BPE):
            ends &= self._backend.get_added_tokens_decoder().keys()  # merges make the others of ordinary text
        return ControlTokens(self._backend, self.special_ids | ends)


def _up_to_content(text: str, message: Mapping[str, Any]) -> str:
    """Return a rendered text up to the end of the content of its last message."""
    final = str(message.get("content") or "").strip()
    place = text.rfind(final)
    if not final or place < 0:
        raise InvalidInputError("the last message has no text in the prompt to go on from")
    return text[: place + len(final)]


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the text has half a surrogate pair at character {error.start}") from None


def tokenizer_from_gguf(file: "GGUFFile", eos_token_ids: Iterable[int] = ()) -> Tokenizer:
    """Return the tokenizer of a GGUF file; errors as in `tokenizer_of_gguf`."""
    from kvloom.models.gguf_tokenizer import roles_in_gguf, tokenizer_of_gguf  # with it comes all that reads GGUF files

    backend = tokenizer_of_gguf(file)
    special = dict(zip(SPECIAL_NAMES, roles_in_gguf(file, ("bos", "eos", "unknown", "padding")), strict=True))
    template = file.metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        special_tokens={name: token for name, token in special.items() if token is not None},
        eos_token_ids=eos_token_ids,
        chat_template=template if isinstance(template, str) else None,
    )


def tokenizer_from_folder(folder: Path, eos_token_ids: Iterable[int] = ()) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder; raises `CheckpointError`.

    `tokenizer.json` alone decides which tokens are added before and after a text, as in transformers 5: the settings
    `add_bos_token` and `add_eos_token` of older configs are already in it.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; make one with AutoTokenizer.from_pretrained(...).save_pretrained(...) "
            "of transformers, or give another folder's with --tokenizer"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from error
    config = _read_object(folder / "tokenizer_config.json")
    special = {name: content for name in SPECIAL_NAMES if (content := _content(config.get(name)))}
    _mark_special(backend, special.values())
    return Tokenizer(
        backend,
        special_tokens=special,
        eos_token_ids=eos_token_ids,
        chat_template=_chat_template(folder, config),
    )


def _mark_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Make tokens with a role special where `tokenizer.json` has them only as ordinary ones."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    ordinary = [token for token in tokens if token not in added and backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ordinary])


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the folder's default chat template: its own file, else the entry of `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    found = _read_object(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None


def _content(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fetch it again") from error
