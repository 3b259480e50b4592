"""lm_eval through the server and through transformers: one task, choice by choice; see README.md in this folder."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

FACTS = [
    ("The capital of France is", [" Paris", " Rome", " Madrid"]),
    ("The capital of Italy is", [" Rome", " Oslo", " Paris"]),
    ("The opposite of hot is", [" cold", " warm", " red"]),
    ("Two plus two is", [" four", " five", " seven"]),
    ("The sun rises in the", [" east", " west", " north"]),
    ("Water freezes at zero degrees", [" Celsius", " Kelvin", " percent"]),
    ("A dog is an", [" animal", " engine", " idea"]),
    ("The largest planet in the solar system is", [" Jupiter", " Mercury", " the Moon"]),
    ("Shakespeare wrote Romeo and", [" Juliet", " Hamlet", " Caesar"]),
    ("The chemical symbol of gold is", [" Au", " Ag", " Fe"]),
    ("Bees make", [" honey", " milk", " silk"]),
    ("The first month of the year is", [" January", " March", " December"]),
    ("Grass is usually", [" green", " blue", " purple"]),
    ("A triangle has three", [" sides", " wheels", " moons"]),
    ("The author of The Origin of Species is", [" Charles Darwin", " Isaac Newton", " Albert Einstein"]),
    ("The Great Wall is in", [" China", " Peru", " Canada"]),
]
"""A local task: prompts with choices, the first of which is right."""

TASK = """
task: local_facts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TOLERANCE = 1e-2
"""Of the log-likelihood of a whole choice."""


def evaluate(model, folder, task, **options):
    """Return lm_eval's records of the documents of a task whose files are in `folder`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=[task], task_manager=manager, log_samples=True, **options)
    return found["samples"][task]


def choices(model, folder):
    """Return (scores, [(log-likelihood, is greedy) of every choice]) of the task in `folder`."""
    docs = evaluate(model, folder, "local_facts")
    scores = {name: sum(doc[name] for doc in docs) / len(docs) for name in ("acc", "acc_norm")}
    answers = [tuple(answer) for doc in docs for answer in doc["filtered_resps"]]
    return scores, [(float(value), str(greedy)) for value, greedy in answers]


def main():
    """Compare both; the status is 1 when a score differs or a log-likelihood is further off than `TOLERANCE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", required=True, type=Path)
    arguments = parser.parse_args()

    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"question": question, "choices": choices}) for question, choices in FACTS]
        (folder / "facts.json").write_text("\n".join(lines))
        (folder / "facts.yaml").write_text(TASK.format(data=folder / "facts.json"))
        gguf = {"pretrained_model_name_or_path": str(arguments.gguf.parent), "gguf_file": arguments.gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**gguf)
        tokenizer.save_pretrained(folder / "tokenizer")
        served = LocalCompletionsAPI(
            model=arguments.model,
            base_url=f"{arguments.base_url}/completions",
            tokenizer=str(folder / "tokenizer"),
            tokenized_requests=True,
            batch_size=8,
            max_length=1024,
        )
        ours = choices(served, folder)
        model = AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32).eval()
        theirs = choices(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=1024), folder)
    worst = max(abs(a[0] - b[0]) for a, b in zip(ours[1], theirs[1], strict=True))
    greedy = sum(a[1] == b[1] for a, b in zip(ours[1], theirs[1], strict=True))
    print(f"served {ours[0]}\nhf     {theirs[0]}")
    print(f"{len(ours[1])} choices, worst difference of log-likelihoods {worst:.2e}, greedy flags equal {greedy}")
    sys.exit(ours[0] != theirs[0] or worst > TOLERANCE or greedy != len(ours[1]))


if __name__ == "__main__":
    main()
