"""What an LSM still knows of text is measured by lm-eval, whose own command reads the folder as any LLM's."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset_builders.nano.grammar import sample_sentence
from dataset_builders.nano.tasks import answers

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

NANO = Path(__file__).parents[2] / "assets" / "nano" / "llm"
CONTEXT = 3000  # lm-eval's own guess, where it finds none, would be 2048
ASKED = {
    "translation": "Translate the speech into Spanish.",
    "question_who": "Who did it?",
    "intent": "What is the intent of the speaker?",
}
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
CHOOSE = """
task: choose
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
task: write
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["|"], max_gen_toks: 40}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Every question about sentences of the nano language, to be answered with the answer to it, not to another."""
    found, draw = [], random.Random(0)
    for place, instruction in enumerate(list(ASKED.values()) * 2):
        transcript = str(sample_sentence(draw, "train"))
        choices = [answers(task, transcript)[0] for task in ASKED]
        found.append({"prompt": f"{instruction}\n{transcript}", "choices": choices, "answer": place % len(ASKED)})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lm_eval")


@pytest.fixture(scope="module")
def text_llm(folder):
    """The nano LLM, with a context of its own, and its tokenizer: what goes into the LSM and is not trained there."""
    shutil.copytree(NANO, folder / "llm")
    config = json.loads((folder / "llm" / "config.json").read_text())
    (folder / "llm" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return AutoModelForCausalLM.from_pretrained(folder / "llm"), AutoTokenizer.from_pretrained(folder / "llm")


@pytest.fixture(scope="module")
def measured(folder, text_llm, rows, compose_tiny, whisper_dir) -> dict:
    """What the command writes of an LSM: its results, and the samples of both tasks in order."""
    compose_tiny(str(whisper_dir), str(folder / "llm"), str(folder / "lsm"))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in {"choose": CHOOSE, "write": WRITE}.items():
        (tasks / f"{name}.yaml").write_text(TASK.format(rows=tasks / "rows.jsonl") + task)
    command = (
        f"lm_eval --model hf --model_args pretrained={folder / 'lsm'},trust_remote_code=True --tasks choose,write "
        f"--include_path {tasks} --apply_chat_template --device cpu --batch_size 4 --log_samples "
        f"--output_path {folder / 'out'}"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], env=environment, cwd=folder, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [results] = (folder / "out").glob("*/results_*.json")
    found = {"results": json.loads(results.read_text())}
    for name in ("choose", "write"):
        [samples] = (folder / "out").glob(f"*/samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in samples.read_text().splitlines()]
        assert [sample["doc"] for sample in found[name]] == rows
    return found


def prompt_of(row: dict, tokenizer) -> str:
    message = {"role": "user", "content": row["prompt"]}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def log_likelihood(llm, tokenizer, prompt: str, answer: str) -> float:
    """As lm-eval counts: white space at a prompt's end is the beginning of every answer."""
    ids, given = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt + answer, prompt.rstrip()))
    scores = llm(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(scores[place - 1, ids[place]]) for place in range(len(given), len(ids)))


def test_every_answer_is_as_likely_as_to_the_text_llm_inside(measured, text_llm, rows):
    right = []
    for row, sample in zip(rows, measured["choose"], strict=True):
        prompt = prompt_of(row, text_llm[1])
        expected = [log_likelihood(*text_llm, prompt, choice) for choice in row["choices"]]
        assert [float(score) for [[score, _]] in sample["resps"]] == pytest.approx(expected, abs=1e-3)
        right.append(expected.index(max(expected)) == row["answer"])
    assert measured["results"]["results"]["choose"]["acc,none"] == sum(right) / len(right)


@torch.no_grad()
def test_what_is_written_is_what_the_text_llm_inside_writes(measured, text_llm, rows):
    llm, tokenizer = text_llm
    written = []
    for row in rows:
        prompt = tokenizer(prompt_of(row, tokenizer), add_special_tokens=False, return_tensors="pt").input_ids
        output = llm.generate(prompt, max_new_tokens=40, do_sample=False)
        written.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    assert [sample["resps"] for sample in measured["write"]] == [[[text]] for text in written]
    assert len(set(written)) == len(rows)


def test_the_context_is_that_of_the_text_llm_inside(measured):
    assert measured["results"]["max_length"] == CONTEXT
