"""Torch-free facts: bytes of blocks, shapes of models, and policies as data."""
