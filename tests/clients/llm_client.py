"""The `llm` command line, with the server as an extra OpenAI model."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import llm  # noqa: F401  (so that the matrix sees whether it is installed)
from conversation import QUESTION


def command(base_url, model):
    """Answers, streamed and whole."""
    with tempfile.TemporaryDirectory() as folder:
        entry = [{"model_id": "served", "model_name": model, "api_base": base_url, "api_key_name": "served"}]
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps(entry))
        Path(folder, "keys.json").write_text(json.dumps({"served": "none"}))
        environment = {**os.environ, "LLM_USER_PATH": folder}
        answers = []
        for more in ([], ["--no-stream"]):
            command = [sys.executable, "-m", "llm", "-m", "served", "-o", "temperature", "0", "-o", "max_tokens", "16"]
            command += [*more, QUESTION]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            answers.append(done.stdout.strip())
    assert answers[0] == answers[1]
    return answers[0]


CHECKS = (command,)
