"""Write the golden figures of the tests: what a sequence of every family takes, walked over the lane table.

    python scripts/write_golden.py

Needs the project's test dependencies. A commit that changes the figures must say why they change.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parents[1] / "tests"


def write_bytes() -> None:
    """Write what a sequence of every variant takes in the arena."""
    from harness.families import VARIANTS, oracle_of
    from harness.walked_bytes import GEOMETRIES, walked_bytes
    from kvloom.models.checkpoint import open_checkpoint

    rows = []
    for variant in VARIANTS:
        with TemporaryDirectory() as folder:
            oracle_of(variant).save_pretrained(folder)
            config = open_checkpoint(folder).config
        figures = {f"{store}, {size}": walked_bytes(config.kv_spec(size, store)) for store, size in GEOMETRIES}
        rows.append(f" {json.dumps(variant)}: {json.dumps(figures)}")
    path = TESTS / "cache" / "golden_walked_bytes.json"
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    write_bytes()
