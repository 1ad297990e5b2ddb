"""Task files of lm-eval in a folder: multiple choice, whole texts, generation.  No network."""

import json

TASKS = {
    "local_choice": """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}},
  {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
""",
    "local_text": """task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""",
    "local_generate": """task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""",
}
QUESTIONS = [
    ("What is the capital of France?", ["London", "Paris", "Rome", "Berlin"], 1),
    ("What is the capital of Italy?", ["London", "Paris", "Rome", "Berlin"], 2),
    ("How many legs has a spider?", ["six", "eight", "ten"], 1),
    ("What do bees make?", ["honey", "milk", "paper made of wood"], 0),
    ("Which is the largest planet?", ["Mars", "Venus", "Jupiter", "Mercury"], 2),
    ("What colour is the sky on a clear day?", ["green", "blue"], 1),
]
TEXTS = ["The cat sat on the mat.", "A short one", "hello world " * 30]


def write_tasks(folder):
    """Write the three tasks and their documents; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    rows = [{"question": q, "choices": c, "label": n} for q, c, n in QUESTIONS]
    for name, content in (("choice", rows), ("text", [{"text": x} for x in TEXTS])):
        lines = "\n".join(map(json.dumps, content))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder
