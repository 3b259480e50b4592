"""kvloom beside other engines: same weights, token ids and thread count, interleaved in one run.

Regime: a small model on few cores, decode bound by memory bandwidth, prefill by arithmetic. Metric: tokens per second
as each case defines it (peers.py). Every engine and case runs in a process of its own, engines in turn, several rounds;
the table gives medians and the spread, the last line is JSON. Every figure is written to `--results` at once. A later
run continues from that file. Run it on an idle machine: a busy core slows the barriers of every engine. Compare ratios
within one run only.

    python benchmarks/compare.py --checkpoint FOLDER --rounds 3 \
        --engine kvloom=.venv/bin/python --engine vllm=OTHER/bin/python --engine llama.cpp=THIRD/bin/python:MODEL.gguf

An engine's name may end in @LABEL, so that it runs twice with different checkpoints (llama.cpp@q8_0).
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

CASES = ("single:512", "single:2048", "single:4096", "single:8000", "uniform", "mixed")
SCHEMA_VERSION = 1


def main() -> None:
    """Run every engine on every case in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder with bf16 safetensors")
    parser.add_argument("--engine", action="append", required=True, metavar="NAME=PYTHON[:CHECKPOINT]")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="file of one JSON object a figure; added to, and read first")
    options = parser.parse_args()
    found: dict[tuple[str, str, str], list[float]] = {}
    if options.results and options.results.exists():
        for line in options.results.read_text().splitlines():
            row = json.loads(line)
            found.setdefault((row["engine"], row["case"], row["figure"]), []).append(row["value"])
    for _ in range(options.rounds):
        for case in options.cases:
            for engine in options.engine:
                name, _, where = engine.partition("=")
                python, _, checkpoint = where.partition(":")
                for figure, value in run(name, python, checkpoint or options.checkpoint, case).items():
                    found.setdefault((name, case, figure), []).append(value)
                    if options.results:
                        with options.results.open("a") as file:
                            print(
                                json.dumps({"engine": name, "case": case, "figure": figure, "value": value}), file=file
                            )
    for (name, case, figure), values in sorted(found.items(), key=lambda item: (item[0][1:], item[0][0])):
        low, middle, high = min(values), statistics.median(values), max(values)
        unit = "MiB" if figure == "peak_mib" else "tok/s"
        print(f"{case:12} {figure:8} {name:16} {middle:9.1f} {unit:5}  ({low:.1f} to {high:.1f}, {len(values)})")
    rows = [{"engine": k[0], "case": k[1], "figure": k[2], "values": v} for k, v in found.items()]
    print(json.dumps({"schema_version": SCHEMA_VERSION, "rounds": options.rounds, "rows": rows}))


def run(name: str, python: str, checkpoint: str, case: str) -> dict[str, float]:
    """Return the figures of one process, {} when the engine cannot run the case."""
    # -P: otherwise an engine that imports, say, `kernels` would import the script of that name in this folder.
    command = [python, "-P", str(Path(__file__).with_name("peers.py")), name, checkpoint, case]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"engine"')]
    if done.returncode or not lines:
        print(f"{name} on {case}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]}", flush=True)
        return {}
    figures: dict[str, float] = json.loads(lines[-1])
    return {key: value for key, value in figures.items() if key not in ("engine", "case")}


if __name__ == "__main__":
    main()
