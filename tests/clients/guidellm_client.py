"""`guidellm`: a load of a few requests on each API that it speaks, through its command line."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import guidellm  # noqa: F401  (so that the matrix sees whether it is installed)
from conversation import QUESTION

COUNT = 2


def _load(base_url, model, route):
    """Run `COUNT` streamed requests on `route` and return what their answers came to, in tokens."""
    target = base_url.removesuffix("/v1")
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "data.jsonl"), Path(folder, "report.json")
        data.write_text(f"{json.dumps({'prompt': QUESTION})}\n" * COUNT)
        command = [sys.executable, "-m", "guidellm", "run", "--disable-progress"]
        command += ["--backend", f"kind=openai_http,target={target},model={model},request_format={route},max_tokens=8"]
        command += ["--data", f"kind=json_file,path={data}", "--profile", "kind=concurrent,streams=2"]
        command += ["--constraint", f"kind=max_requests,count={COUNT}", "--output", f"kind=json,path={report}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
        [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == COUNT and not requests["errored"], requests["errored"][:1]
    return [request["output_metrics"]["text_tokens"] for request in requests["successful"]]


def conversations(base_url, model):
    """/v1/chat/completions."""
    return _load(base_url, model, "/v1/chat/completions")


def completions(base_url, model):
    """/v1/completions."""
    return _load(base_url, model, "/v1/completions")


def responses(base_url, model):
    """/v1/responses."""
    return _load(base_url, model, "/v1/responses")


CHECKS = (conversations, completions, responses)
