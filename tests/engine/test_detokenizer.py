"""Text that comes out token by token is the text that decoding everything at once gives."""

from itertools import chain

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from kvloom.engine.detokenizer import IncrementalDetokenizer
from kvloom.engine.stops import StopStrings
from kvloom.errors import UnsupportedError
from kvloom.models.spelling import byte_alphabet
from kvloom.models.tokenizer import Tokenizer

EMOJI = "🧵"


def byte_level():
    """A byte-level vocabulary: all bytes (token id = byte), some words, one special token."""
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    words = ["the", " end", "ST", "OP", "é", " né", "\n\n", EMOJI + "x"]
    vocab = {alphabet[byte]: byte for byte in range(256)}
    for word in words:
        vocab["".join(alphabet[byte] for byte in word.encode())] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return Tokenizer(backend, special_tokens={"eos_token": "<|end|>"})


def sentencepiece(strip=True):
    """A sentencepiece vocabulary: words with their spaces, a token for each byte, one special token."""
    words = ["<unk>", "<s>", "▁the", "▁", "cat", "é", "▁▁", "STO", "P", ".", "日"]
    vocab = {word: index for index, word in enumerate(words)} | {f"<0x{byte:02X}>": 100 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return Tokenizer(backend, special_tokens={"bos_token": "<s>"})


BYTE_LEVEL, SENTENCEPIECE, UNSTRIPPED = byte_level(), sentencepiece(), sentencepiece(strip=False)
BYTES = st.integers(0, 255)
BYTE_LEVEL_IDS = st.lists(st.one_of(st.integers(256, BYTE_LEVEL.vocab_size), BYTES), max_size=40)
WORDS = st.integers(1, 10)
CHARACTER = st.characters(codec="utf-8").map(lambda text: [100 + byte for byte in text.encode()])
SPELLED = st.lists(st.one_of(WORDS.map(lambda word: [word]), CHARACTER), max_size=15).map(
    lambda runs: list(chain.from_iterable(runs))
)
BROKEN = st.lists(st.one_of(WORDS, st.integers(0x80, 0xBF).map(lambda byte: 100 + byte)), max_size=40)


def stream(tokenizer, prompt, output, **options):
    """Return the detokenizer after all of `output`, and the deltas that it gave, the last one from `finish`."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, **options)
    deltas = [detokenizer.append(token) for token in output]
    return detokenizer, [*deltas, detokenizer.finish()]


def first_stop(text, stops, include):
    """Return (text up to the stop string that is complete first, the longest such), or (text, None)."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


@given(prompt=BYTE_LEVEL_IDS, output=BYTE_LEVEL_IDS, skip=st.booleans())
def test_deltas_of_byte_level_tokens_add_up_to_what_decoding_at_once_adds(prompt, output, skip):
    before = BYTE_LEVEL.decode(prompt, skip)
    assume(not before.endswith("\ufffd"))
    detokenizer, deltas = stream(BYTE_LEVEL, prompt, output, skip_special_tokens=skip)
    assert "".join(deltas) == BYTE_LEVEL.decode(prompt + output, skip)[len(before) :]
    assert detokenizer.text == "".join(deltas)


@pytest.mark.parametrize("tokenizer", [SENTENCEPIECE, UNSTRIPPED], ids=["strips", "keeps"])
@given(prompt=SPELLED, output=st.one_of(SPELLED, BROKEN), skip=st.booleans())
def test_deltas_of_sentencepiece_tokens_add_up_to_what_decoding_at_once_adds(tokenizer, prompt, output, skip):
    prompt = [*prompt, 9] if prompt else prompt  # a run of bytes that goes on from the prompt would be one run
    before = tokenizer.decode(prompt, skip)
    _, deltas = stream(tokenizer, prompt, output, skip_special_tokens=skip)
    assert "".join(deltas) == tokenizer.decode(prompt + output, skip)[len(before) :]


@given(
    output=BYTE_LEVEL_IDS,
    stops=st.lists(
        st.sampled_from(["STOP", "TO", "e", "the end", "é", "\ufffd", "x🧵", "nén"]), max_size=3, unique=True
    ),
    include=st.booleans(),
)
def test_the_text_ends_at_the_first_stop_string_wherever_tokens_cut_it(output, stops, include):
    whole = BYTE_LEVEL.decode(output)
    detokenizer, deltas = stream(BYTE_LEVEL, [], output, stop=tuple(stops), include_stop_str_in_output=include)
    text, hit = first_stop(whole, stops, include)
    assert ("".join(deltas), detokenizer.stop_hit) == (text, hit)


def num_undecided(text, stops):
    """Return the length of the longest end of `text` that begins a stop string."""
    beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
    return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


@given(output=BYTE_LEVEL_IDS, stops=st.sampled_from([("STOP",), ("the end", "TO"), ("éé",)]))
def test_exactly_the_text_that_a_later_token_could_make_part_of_a_stop_string_waits(output, stops):
    free, held = IncrementalDetokenizer(BYTE_LEVEL, []), IncrementalDetokenizer(BYTE_LEVEL, [], stop=stops)
    for token in output:
        free.append(token)
        held.append(token)
        if held.stop_hit is None:
            assert held.text == free.text[: len(free.text) - num_undecided(free.text, stops)]


def ids(text):
    """Return one byte-level token for each byte of `text`."""
    return list(text.encode())


def test_a_character_comes_out_with_its_last_byte():
    _, deltas = stream(BYTE_LEVEL, [], ids("a" + EMOJI))
    assert deltas == ["a", "", "", "", EMOJI, ""]


def test_a_character_that_the_prompt_began_is_finished_by_the_output():
    first, *rest = ids("é")
    assert stream(BYTE_LEVEL, [*ids("caf"), first], rest)[1] == ["é", ""]


def test_an_unfinished_character_is_one_replacement_at_the_end():
    assert stream(BYTE_LEVEL, [], ids(EMOJI)[:3])[1] == ["", "", "", "\ufffd"]


def test_text_that_may_begin_a_stop_string_waits_and_then_goes_on():
    _, deltas = stream(BYTE_LEVEL, [], ids("xSTOx"), stop=("STOP",))
    assert deltas == ["x", "", "", "", "STOx", ""]


def test_text_that_may_begin_a_stop_string_is_given_out_at_the_end():
    assert stream(BYTE_LEVEL, [], ids("xST"), stop=("STOP",))[1] == ["x", "", "", "ST"]


def test_tokens_after_a_stop_string_add_nothing():
    detokenizer, deltas = stream(BYTE_LEVEL, [], ids("aSTOPb"), stop=("STOP",))
    assert (detokenizer.text, deltas[-2:]) == ("a", ["", ""])


def test_a_stop_string_before_min_tokens_does_not_count():
    detokenizer, deltas = stream(BYTE_LEVEL, [], ids("abcab"), stop=("ab",), min_tokens=4)
    assert ("".join(deltas), detokenizer.stop_hit) == ("abc", "ab")


def test_a_stop_string_that_the_token_number_min_tokens_completes_counts():
    detokenizer, _ = stream(BYTE_LEVEL, [], ids("abc"), stop=("ab",), min_tokens=2)
    assert (detokenizer.text, detokenizer.stop_hit) == ("", "ab")


def test_special_tokens_are_left_out_or_spelled():
    end = BYTE_LEVEL.eos_token_ids[0]
    assert stream(BYTE_LEVEL, [], [end, 65])[0].text == "A"
    assert stream(BYTE_LEVEL, [], [end, 65], skip_special_tokens=False)[0].text == "<|end|>A"


def test_the_space_before_a_word_is_kept_after_a_prompt_and_dropped_at_the_start():
    assert stream(SENTENCEPIECE, [4], [2])[0].text == " the"
    assert stream(SENTENCEPIECE, [1], [2])[0].text == "the"


def test_whole_characters_stay_when_their_run_of_bytes_turns_invalid():
    output = [100 + byte for byte in "日".encode()] + [100 + 0xFF, 100 + 0x41]
    assert stream(UNSTRIPPED, [], output)[0].text == "日\ufffd\ufffd"


def test_an_id_without_a_token_adds_nothing():
    assert stream(BYTE_LEVEL, [], [10**6, 65])[0].text == "A"


def test_the_work_for_a_token_does_not_grow_with_the_text():
    class Counting(Tokenizer):
        decoded = 0

        def decode(self, token_ids, skip_special_tokens=True):
            Counting.decoded += 1
            return super().decode(token_ids, skip_special_tokens)

    counting = Counting(BYTE_LEVEL._backend, special_tokens={})
    detokenizer = IncrementalDetokenizer(counting, ids("a" * 1000), stop=("STOP",))
    for token in ids("STO" * 1000):
        detokenizer.append(token)
        assert len(detokenizer._held) < 4
    assert Counting.decoded == 0


def test_a_decoder_that_cannot_be_streamed_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="WordPiece"):
        IncrementalDetokenizer(Tokenizer(backend, special_tokens={}), [])


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_automaton_finds_the_longest_stop_string_that_ends_at_each_character(text, stops):
    automaton = StopStrings(stops)
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        assert automaton.read(text[end - 1]) == (max(matches, key=len) if matches else None)
