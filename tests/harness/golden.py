"""Golden figures of real models: what transformers gives in float32, written once by `scripts/write_golden.py`.

Loading the oracles takes minutes, and their answers do not change. Each figure stands beside a digest of the ids that
were asked, so that a changed prompt is not mistaken for a changed answer.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"
CHUNK = 1 << 20


def golden(model: str) -> dict[str, Any]:
    """Return the figures of `model`: "smollm2" or "gemma"."""
    found: dict[str, Any] = json.loads((FOLDER / f"{model}.json").read_text(encoding="utf-8"))
    return found


def digest(ids: Sequence[int]) -> str:
    """Return what tells one list of token ids from another."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def fingerprint(weight: torch.Tensor) -> list[float]:
    """Return the sum of the sizes of all elements, and a random projection that depends on the place of each."""
    flat = weight.detach().float().numpy().ravel()
    pattern, size, projection = np.random.default_rng(0).standard_normal(CHUNK), 0.0, 0.0
    for number, start in enumerate(range(0, len(flat), CHUNK)):
        part = flat[start : start + CHUNK].astype(np.float64)
        size += float(np.abs(part).sum())
        projection += float(part @ pattern[: len(part)]) * (1 + number % 7)
    return [size, projection]
