"""Time a real LSM on a CPU, each stage against the same without what makes it fast, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.real_size --model checkpoints/lsm --set data/self-powered --dtype bfloat16

Three stages of `recipes/configs/quickstart_real.yaml`, on rows of a self-powered set:

- building: answers of at most 80 tokens. Without: a plain loop of `generate` over the same prompts sorted by length,
  in batches of 64, with torch's attention. Before: batches of one task in that loop, as the responder made them.
- training: a step of distillation, the LLM frozen and the features stored. Without: torch's attention; and float32,
  which a CPU got when nobody named a data type.
- storing: the audio tower's output of clips. Without: torch's attention.

Seconds are of the process on its cores, not of the clock, so that other jobs on the machine change them little. In
bfloat16 a few answers differ between any two ways; `same` says how many do not.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl import ModelConfig

from benchmarks.machine import describe
from dataset_builders.instructions import TRANSCRIPTION
from dataset_builders.publishing import load_self_powered
from dataset_builders.responders.exchange import Request
from dataset_builders.responders.local import LocalResponder
from language_models.attention import attend_fast
from language_models.command_line import parser_of
from language_models.generation import GREEDY, read_answers
from recipes.listening.collator import SpeechResponseCollator
from recipes.listening.features import AudioFeatureStore, audio_key
from recipes.training.arguments import LsmScriptArguments
from recipes.training.costs import Costs
from recipes.training.models import load_model
from recipes.training.objectives import distillation_loss, predicts
from recipes.training.throughput import Throughput

CPU = torch.device("cpu")
LOOP_BATCH, BATCH, MOST = 64, 16, 80
STAGES = ("training", "building", "storing")
Jobs = dict[str, Callable[[], object]]


def seconds_of(job: Callable[[], object]) -> tuple[float, object]:
    """Seconds of the process on its cores, and what the job gives."""
    start = time.process_time()
    found = job()
    return time.process_time() - start, found


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of products of 1024 × 1024 in the same seconds: the best of twenty."""
    left, right = torch.randn(2, 1024, 1024).to(dtype)
    return 2 * 1024**3 / min(seconds_of(lambda: left @ right)[0] for _ in range(20))


def with_attention(model, name: str, job: Callable[[], object]) -> Callable[[], object]:
    """The job after the model's attention has been set: `sdpa`, or what is chosen on a CPU."""

    def run():
        model.set_attn_implementation("sdpa")
        if name != "sdpa":
            attend_fast(model)
        return job()

    return run


def building(source: str, dtype: str, rows: list[dict]) -> Jobs:
    responder = LocalResponder(source, MOST, dtype=dtype)
    requests = [Request(row["instruction"], row["transcript"], row["task"]) for row in rows]
    model, tokenizer = responder.model, responder.processor.tokenizer

    @torch.inference_mode()
    def loop(by_task: bool) -> list[str]:
        prompts = responder.render(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.task if by_task else "", []).append(index)
        answers = [""] * len(requests)
        for group in groups.values():
            group.sort(key=lambda index: -len(prompts[index].tokens))
            size = len(group) if by_task else LOOP_BATCH
            for batch in (group[first : first + size] for first in range(0, len(group), size)):
                ids = {"input_ids": [prompts[index].tokens for index in batch]}
                inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
                output = model.generate(**inputs, **GREEDY, max_new_tokens=MOST)
                texts = read_answers(tokenizer, output[:, inputs.input_ids.shape[1] :].tolist())
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
        return answers

    return {
        "fast": with_attention(model, "fast", lambda: [reply.text for reply in responder.respond(requests)]),
        "loop": with_attention(model, "sdpa", lambda: loop(by_task=False)),
        "before": with_attention(model, "sdpa", lambda: loop(by_task=True)),
    }


def training(source: str, dtype: str, rows: list[dict], folder: Path, found: dict) -> Jobs:
    model, processor = load_model(
        LsmScriptArguments(dataset_name="-", llm="frozen"), ModelConfig(model_name_or_path=source, dtype=dtype)
    )
    store = AudioFeatureStore.build(folder / "features", model, processor, (row["audio"] for row in rows))
    keyed = [{**row, "audio_key": audio_key(row["audio"])} for row in rows]
    batch = SpeechResponseCollator(processor, store, teacher=True)(keyed)
    throughput = Throughput(Costs.of(model, "frozen", stored=True, distill=True), model.config.audio_token_id)
    throughput.see(batch)
    found["flops"] = float(throughput.counted[-1])
    teacher = {name.removeprefix("teacher_"): batch.pop(name) for name in list(batch) if "teacher_" in name}
    model.train()

    def ask(labels: torch.Tensor, **inputs) -> torch.Tensor:
        return model(**inputs, logits_to_keep=predicts(labels), use_cache=False).logits

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            with torch.no_grad():
                wanted = ask(**teacher)
            loss = distillation_loss(ask(**batch), wanted, 2.0)
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    return {name: with_attention(model, name, step) for name in ("fast", "sdpa")}


def storing(source: str, dtype: str, rows: list[dict], folder: Path) -> Jobs:
    settings = ModelConfig(model_name_or_path=source, dtype=dtype)
    model, processor = load_model(LsmScriptArguments(dataset_name="-", llm="frozen"), settings)
    names: Iterator[int] = iter(range(10**6))

    def store() -> int:
        clips = (row["audio"] for row in rows)
        return len(AudioFeatureStore.build(folder / f"store-{next(names)}", model, processor, clips).clips)

    return {name: with_attention(model, name, store) for name in ("fast", "sdpa")}


def measure(source: str, rows: Dataset, dtype: str, count: int, rounds: int, stages: Sequence[str] = STAGES) -> dict:
    """Of every stage and way, `seconds` by round, and the `ratios` to the fast way with their median and range."""
    result: dict = {"machine": describe(CPU), "dtype": dtype, "rows": count, "stages": {}}
    texts = rows.select_columns(["task", "instruction", "transcript"])
    asked = [row for row in texts if row["task"] != TRANSCRIPTION]
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            more: dict = {}
            if stage == "building":
                jobs = building(source, dtype, asked[:count])
            elif stage == "training":
                some = list(rows.select(range(BATCH)))
                jobs = training(source, dtype, some, Path(folder), more)
                if dtype == "bfloat16":
                    jobs["float32"] = training(source, "float32", some, Path(folder), {})["sdpa"]
            else:
                jobs = storing(source, dtype, list(rows.select(range(count))), Path(folder))
            seconds: dict[str, list[float]] = {name: [] for name in jobs}
            last = {}
            for turn in range(rounds):
                names = [*list(jobs)[turn % len(jobs) :], *list(jobs)[: turn % len(jobs)]]
                for name in names:
                    spent, last[name] = seconds_of(jobs[name])
                    seconds[name].append(spent)
            more["seconds"], more["ratios"] = seconds, {}
            for name in set(jobs) - {"fast"}:
                ratios = [slow / fast for slow, fast in zip(seconds[name], seconds["fast"], strict=True)]
                more["ratios"][name] = [statistics.median(ratios), min(ratios), max(ratios)]
            if stage == "building":
                more["same"] = sum(mine == theirs for mine, theirs in zip(last["fast"], last["loop"], strict=True))
            if "flops" in more:
                rate = matrix_rate(getattr(torch, dtype))
                more["of_matrix_rate"] = {name: more["flops"] / min(spent) / rate for name, spent in seconds.items()}
            result["stages"][stage] = more
            print(stage, json.dumps(more), flush=True)
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of an LSM")
    parser.add_argument("--set", required=True, help="self-powered set of this LSM, folder or Hub id")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="what is measured")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="data type of the weights")
    parser.add_argument("--rows", type=int, default=64, help="number of answers and of clips")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of every way")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = load_self_powered(options.set, "all", "train").shuffle(seed=0)
    found = measure(options.model, rows, options.dtype, options.rows, options.rounds, options.stages)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
