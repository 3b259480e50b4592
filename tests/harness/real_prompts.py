"""What the tests ask SmolLM2 and Gemma 3 270M, and what `scripts/write_golden.py` asks transformers."""

import itertools
from pathlib import Path

import numpy as np

from harness.tiny_model import random_tokens
from kvloom.models.tokenizer import Tokenizer

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
NEW_TOKENS = 64
SCORED_TOKENS = 700
LONG_PROMPT, LONG_NEW, LONG_CHUNK = 16_000, 24, 2048

TEXTS = {
    "word": ("Hello", 1),
    "space": (" ", 1),
    "two words": ("Once upon", 2),
    "question": ("What is the capital of France?", 7),
    "prose": ("It was a bright cold day in April, and the clocks were striking thirteen.", 16),
    "code": ("def fibonacci(n):\n    if n < 2:\n        return n\n    return ", 17),
    "numbers": ("1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144,", 31),
    "French": ("Les sanglots longs des violons de l'automne blessent mon cœur d'une langueur monotone.", 33),
    "signs and emoji": ("日本語のテキスト 🧵🪡 и кириллица — ½ ∑∞ «quotes» \t\n\n  tabs", 45),
    "JSON": ('{"name": "kvloom", "tags": ["cache", "lanes"], "nested": {"a": [1, 2.5, -3e4, null, true]},', 50),
    "repetition": ("ba " * 200, 64),
    "chat": ("<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n", 14),
    "licence, 100 tokens": (LICENSE, 100),
    "licence, 150 tokens": (LICENSE[2000:], 150),
    "licence, 256 tokens": (LICENSE[1000:], 256),
    "licence, 500 tokens": (LICENSE[500:], 500),  # just below Gemma's window
    "licence, 600 tokens": (LICENSE[4000:], 600),  # the window has moved on
    "licence, 1000 tokens": (LICENSE, 1000),
    "licence, 2000 tokens": (LICENSE, 2000),
}
"""Texts and the number of their first tokens that is asked."""

PROMPTS = (*TEXTS, "random ids")

ECHOED = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Grüße aus Köln — 你好 🙂",
]
"""Texts whose log-probabilities the server echoes."""

TOKENIZED = [
    "Hello world",
    "  two spaces before, and after  ",
    "naïve café, 日本語のテキスト, עברית, emoji 🧵🙂👩‍👩‍👧, e\u0301",
    "def f(x):\n    return x ** y  # code\n\n\n\tend",
    "It's they'll we've I'd DON'T",
    "<|im_start|>user\nhi<|im_end|>\n<start_of_turn>model\n<table>\t\t</table>",
    "\x00\x01 \ufffd \u2028 \u00a0\u3000",
    "a" * 200 + " " * 50 + "!" * 50,
    "",
]
"""Texts with what tokenizers disagree about."""

WHITE_SPACE = ["List:\n\n12   3", "\t\t\tx\n\n\n\n\n"]
"""Runs of white space before digits, which transformers' reading of SmolLM2's file cuts differently."""

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "?"},
]


def prompts(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """20 prompts of 1 to 2,000 tokens; a text that is shorter in this tokenizer is what it is."""
    found = {name: tokenizer.encode(text)[:count] for name, (text, count) in TEXTS.items()}
    found["random ids"] = random_tokens(120, 49152, seed=1)
    assert len(found) == 20 and max(map(len, found.values())) == 2000 and min(map(len, found.values())) == 1
    return found


def long_prompt(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of sentences of the licence in ever new orders, so that no part of the text repeats another."""
    sentences, rng = [s.strip() for s in LICENSE.replace("\n\n", ". ").split(". ")], np.random.default_rng(0)
    orders = (" ".join(sentences[i] + "." for i in rng.permutation(len(sentences))) for _ in itertools.count())
    ids = tokenizer.encode(next(orders))
    while len(ids) < LONG_PROMPT:
        ids += tokenizer.encode(next(orders))[1:]
    return ids[:LONG_PROMPT]
