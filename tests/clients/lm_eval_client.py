"""`lm_eval` through the server alone: generation by conversations, scores with the server's own tokenizer."""

import json
import tempfile
from pathlib import Path

import lm_eval  # noqa: F401  (so that the matrix sees whether it is installed)

from harness import FACTS, TASK, evaluate

ANSWERS = """
task: local_answers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  temperature: 0
metric_list:
  - metric: exact_match
"""


def _tasks(folder):
    """Write the local tasks into `folder`."""
    lines = [json.dumps({"question": question, "choices": choices}) for question, choices in FACTS]
    (folder / "facts.json").write_text("\n".join(lines))
    for name, task in (("facts", TASK), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(task.format(data=folder / "facts.json"))


def chat(base_url, model):
    """`local-chat-completions`: every document is answered."""
    from lm_eval.models.openai_completions import LocalChatCompletion

    with tempfile.TemporaryDirectory() as name:
        _tasks(Path(name))
        served = LocalChatCompletion(model=model, base_url=f"{base_url}/chat/completions", num_concurrent=4)
        found = evaluate(served, Path(name), "local_answers", apply_chat_template=True)
    texts = [text for doc in found for text in doc["filtered_resps"]]
    assert len(texts) == len(FACTS) and all(texts), texts
    return texts[0]


def remote_tokenizer(base_url, model):
    """`local-completions` with `tokenizer_backend=remote`: scores as with a tokenizer at hand, and whole answers."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.utils import check_remote_tokenizer_support

    url = f"{base_url}/completions"
    assert check_remote_tokenizer_support(url), "the server's tokenizer is not found"
    with tempfile.TemporaryDirectory() as name:
        _tasks(Path(name))
        options = {"model": model, "base_url": url, "tokenizer_backend": "remote", "max_length": 1024}
        served = LocalCompletionsAPI(**options, tokenized_requests=True, batch_size=8)
        scored = evaluate(served, Path(name), "local_facts")
        answered = evaluate(served, Path(name), "local_answers")
    texts = [text for doc in answered for text in doc["filtered_resps"]]
    assert len(texts) == len(FACTS) and all(texts), texts
    return sum(doc["acc"] for doc in scored) / len(scored)


CHECKS = (chat, remote_tokenizer)
