"""Architectures that are planned and do not run: a reader of config.json entries for each `model_type`.

For architectures that run, the shape follows from the family's config (`kvloom.spec.families`).
"""

from kvloom.registry import Registry
from kvloom.spec.architectures.altup import GEMMA_READERS
from kvloom.spec.architectures.delta import DELTA_READERS
from kvloom.spec.architectures.entries import Reader
from kvloom.spec.architectures.latent import LATENT_READERS
from kvloom.spec.architectures.softmax import SOFTMAX_READERS
from kvloom.spec.architectures.statespace import STATE_READERS

ARCHITECTURES: Registry[Reader] = Registry("architecture")

for _readers in (SOFTMAX_READERS, LATENT_READERS, GEMMA_READERS, DELTA_READERS, STATE_READERS):
    for _name, _reader in _readers.items():
        ARCHITECTURES.register(_name, _reader)
