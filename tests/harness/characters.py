"""A tokenizer whose tokens spell characters, so that random models can be made to write anything."""

import tokenizers
from tokenizers import AddedToken, decoders, models

from kvloom.models.tokenizer import Tokenizer

EOS = 4
"""The token that ends an answer."""


def characters():
    """Return a tokenizer of 211 tokens: one for each printable character, and some of several."""
    words = [chr(code) for code in range(33, 127)] + ["Ġ", "true", "false", "null", '",', '":', "},", "ab", "10"]
    vocab = {word: i + 5 for i, word in enumerate(words)} | {f"<{i}>": i for i in range(5)}
    vocab |= {f"word{i}": i for i in range(len(vocab), 211)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(f"<{i}>", special=True) for i in range(5)])
    return Tokenizer(backend, special_tokens={"eos_token": f"<{EOS}>"})
