"""Score a checkpoint on held-out clips: does it follow instructions, does it transcribe, does it merely copy?

    python -m recipes.evaluate --model DIR_OR_ID --corpus CORPUS --split test --output DIR

Every clip is asked one task in a wording that no training row has, and its transcription. Answers are checked by
`--checker`, a module with `is_correct(task, transcript, response)`. `--hear` picks what the model is given: the clip
(`audio`), the transcript in its slot (`transcript`, the text LLM's ceiling), another sentence's clip (`shuffled`) or
`silence`; the last two separate listening from guessing. Writes `predictions.parquet` and `scores.json`.
"""

import argparse
import importlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jiwer
import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from dataset_builders.asr_corpora import load_corpus
from dataset_builders.building import draw_rows
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, load_pool
from processing_lsm import LsmProcessor, load_audio
from recipes.audio_features import AudioFeatureStore, audio_key
from recipes.collator import render_prompt

logger = logging.getLogger(__name__)

HEARD = ("audio", "transcript", "shuffled", "silence")
COPY_WER = 0.2  # an answer this close to the transcript is a copy of it
Checker = Callable[[str, str, str], bool]


def load_checker(module: str) -> Checker:
    """The `is_correct(task, transcript, response)` of a module named by its import path.

    Raises:
        ValueError: the module has none.
    """
    found = getattr(importlib.import_module(module), "is_correct", None)
    if found is None:
        raise ValueError(f"{module} has no is_correct(task, transcript, response); name a module that has.")
    return found


def load_lsm(model: str | Path, dtype: str = "auto"):
    """A checkpoint and its processor, on the GPU if there is one, ready to generate."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, dtype=dtype)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def held_out_rows(corpus: Dataset, tasks: Sequence[str], seed: int = 0) -> list[dict]:
    """Evaluation rows: every clip with one of `tasks` and with transcription, in held-out wordings, and its audio."""
    weights = {**dict.fromkeys(tasks, 1.0), TRANSCRIPTION: math.inf}
    draw = Draw(load_pool(), weights, min(2, len(weights)), seed, "held_out")
    return draw_rows([utterance | {"row": row} for row, utterance in enumerate(corpus)], draw)


def shuffle_clips(rows: list[dict]) -> list[dict]:
    """The rows, each with the clip of another sentence: rotated by about half, so none keeps its own."""
    utterances = sorted({row["row"] for row in rows})
    if len(utterances) < 2:
        raise ValueError("one clip alone cannot be shuffled; give at least two.")
    clip = {row["row"]: row["audio"] for row in rows}
    shift = len(utterances) // 2
    other = dict(zip(utterances, utterances[shift:] + utterances[:shift], strict=True))
    return [row | {"audio": clip[other[row["row"]]]} for row in rows]


@torch.inference_mode()
def respond(
    model,
    processor: LsmProcessor,
    rows: Sequence[dict],
    hear: str = "audio",
    store: AudioFeatureStore | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    progress: bool = True,
) -> list[str]:
    """Greedy answers, in order.

    Args:
        rows: `instruction` and `audio`, and `transcript` when that is heard.
        hear: `audio`, `transcript` or `silence` (as long as the clip); shuffle the rows for `shuffled`.
        store: the audio tower's output for clips it was run on before; other clips are encoded here.
    """
    responses: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].get("transcript", "")))
    for start in tqdm(range(0, len(order), batch_size), desc="answers", unit="batch", disable=not progress):
        batch = order[start : start + batch_size]
        inputs = _inputs(processor, [rows[index] for index in batch], hear, store).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        responses |= zip(batch, (text.strip() for text in texts), strict=True)
    return [responses[index] for index in range(len(rows))]


def _inputs(processor: LsmProcessor, rows: list[dict], hear: str, store: AudioFeatureStore | None):
    prompts = [render_prompt(processor, row, "transcript" if hear == "transcript" else "audio") for row in rows]
    settings = {"add_special_tokens": False, "padding_side": "left", "padding": True, "return_tensors": "pt"}
    if hear == "transcript":
        return processor.tokenizer(prompts, **settings)
    keys = [audio_key(row["audio"]) for row in rows] if store is not None and hear == "audio" else []
    if keys and all(key in store for key in keys):
        prompts = processor.expand_audio_tokens(prompts, [store.num_samples(key) for key in keys])
        inputs = processor.tokenizer(prompts, **settings)
        inputs.update(store.batch(keys))
        return inputs
    clips = [load_audio(row["audio"]) for row in rows]
    if hear == "silence":
        clips = [np.zeros_like(clip) for clip in clips]
    return processor(text=prompts, audio=clips, **settings)


def is_copy(transcript: str, response: str) -> bool:
    """Whether a response is the transcript: word error rate below 0.2 after normalisation."""
    normalize = BasicTextNormalizer()
    said, answered = normalize(transcript).strip(), normalize(response).strip()
    return bool(said) and jiwer.wer(said, answered) < COPY_WER


def score(rows: Sequence[dict], responses: Sequence[str], checker: Checker) -> dict:
    """Following rate, transcript copy rate and word error rate.

    Returns:
        `following`: mean over the self-powered tasks of the share right; `tasks`: that share for every task asked;
        `transcript_copy`: share of answers to tasks other than repetition and transcription that are the transcript;
        `wer`: of the transcription rows. A figure without rows is left out.
    """
    right: dict[str, list[bool]] = {}
    copies, spoken, written = [], [], []
    normalize = BasicTextNormalizer()
    for row, response in zip(rows, responses, strict=True):
        right.setdefault(row["task"], []).append(checker(row["task"], row["transcript"], response))
        if row["task"] == TRANSCRIPTION:
            spoken.append(normalize(row["transcript"]).strip())
            written.append(normalize(response).strip())
        elif row["task"] != "repetition":
            copies.append(is_copy(row["transcript"], response))
    tasks = {task: float(np.mean(hits)) for task, hits in sorted(right.items())}
    followed = [share for task, share in tasks.items() if task in SELF_POWERED_TASKS]
    scores = {"tasks": tasks}
    if followed:
        scores["following"] = float(np.mean(followed))
    if copies:
        scores["transcript_copy"] = float(np.mean(copies))
    if spoken:
        scores["wer"] = jiwer.wer(spoken, written)
    return scores


def predictions(name: str, rows: Sequence[dict], responses: Sequence[str], checker: Checker) -> list[dict]:
    """One record per answer: `id`, `model`, `task`, `instruction`, `transcript`, `response`, `correct`."""
    return [
        {key: row[key] for key in ("id", "task", "instruction", "transcript")}
        | {"model": name, "response": response, "correct": checker(row["task"], row["transcript"], response)}
        for row, response in zip(rows, responses, strict=True)
    ]


def evaluate(model, processor, rows: list[dict], checker: Checker, hear: str = "audio", name: str = "model", **options):
    """Answer and score: `(scores, records)` as in `score` and `predictions`; `options` go to `respond`.

    Raises:
        ValueError: unknown `hear`.
    """
    if hear not in HEARD:
        raise ValueError(f"cannot hear {hear!r}; expected one of {HEARD}.")
    given = shuffle_clips(rows) if hear == "shuffled" else rows
    responses = respond(model, processor, given, "audio" if hear == "shuffled" else hear, **options)
    return score(rows, responses, checker), predictions(name, rows, responses, checker)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True, help="Hub id or folder of an ASR corpus")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(SELF_POWERED_TASKS))
    parser.add_argument("--hear", choices=HEARD, default="audio")
    parser.add_argument("--checker", default="dataset_builders.nano_tasks")
    parser.add_argument("--limit", type=int, help="clips at most")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = held_out_rows(load_corpus(args.corpus, args.split, limit=args.limit), args.tasks, args.seed)
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    model, processor = load_lsm(args.model)
    checker, name = load_checker(args.checker), Path(args.model).name
    scores, records = evaluate(model, processor, rows, checker, args.hear, name, **options)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(records).to_parquet(str(output / "predictions.parquet"))
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
