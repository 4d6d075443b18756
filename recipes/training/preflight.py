"""Check, before any large download, whether a training works, whether it fits into memory, and how long it takes."""

import copy
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset_builder
from huggingface_hub import HfApi, constants
from transformers import PrinterCallback
from trl import ModelConfig

from language_models.checkpoints import base_of, load_config, load_processor
from language_models.generation import context_of
from modeling_lsm import LsmForConditionalGeneration
from recipes.listening.collator import SpeechResponseCollator, render_prompt, render_response
from recipes.listening.composing import compose
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments
from recipes.training.costs import Costs, count, count_frozen_audio
from recipes.training.memory import Target, estimate
from recipes.training.models import check_model, check_vocabulary, drop_audio_modules, prepare, update_template
from recipes.training.rows import RowSizes, check_response_tasks, check_row, open_stream, refuse_foreign, task_names
from recipes.training.throughput import GIB
from recipes.training.trainer import LsmTrainer

PEEKED = 64  # rows that are checked, of all tasks together
ASSUMED_MFU = 0.35  # if it cannot be measured; a usual value for 7 B parameters on one machine
STEPS = 2
SMALL = 2e12  # most FLOPs for a CPU


class Preflight:
    """Checks a training. Each check returns its result, or raises an error that says why the training would fail."""

    def __init__(self, script_args: LsmScriptArguments, training_args: LsmTrainingArguments, model_args: ModelConfig):
        self.script_args, self.training_args, self.model_args = script_args, training_args, model_args
        self.target = Target(**script_args.target) if script_args.target else Target.here(training_args)
        self.failed: list[str] = []

    def run(self) -> bool:
        """Run the checks and return whether all passed. Checks that depend on a failed one are skipped."""
        checks = {
            "model": (self.model, None),
            "download": (self.download, None),
            "template": (self.template, "model"),
            "data": (self.data, "model"),
            "labels": (self.labels, "data"),
            "memory": (self.memory, "data"),
            "two steps": (self.two_steps, "labels"),
            "time": (self.time, "two steps"),
        }
        for name, (check, needed) in checks.items():
            if needed in self.failed:
                self.failed.append(name)
                self._print(f"  --    {name:<10} needs {needed}")
            else:
                self._check(name, check)
        verdict = f"NOT READY: {', '.join(self.failed)}" if self.failed else "READY"
        self._print(f"\n{verdict}")
        return not self.failed

    def _check(self, name: str, check: Callable[[], str]) -> None:
        """Run a check and print its result or its error."""
        try:
            self._print(f"  ok    {name:<10} {check()}")
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            self.failed.append(name)
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._print(f"  FAIL  {name:<10} {kind}{error}")

    @staticmethod
    def _print(line: str) -> None:
        if PartialState().is_main_process:
            print(line, flush=True)

    def model(self) -> str:
        """Build the model on the meta device, and load its processor."""
        script_args, name = self.script_args, self.model_args.model_name_or_path
        check_model(script_args, self.model_args)
        if script_args.text is not None:
            if name is not None:
                raise ValueError(f"--model_name_or_path {name} and --text {script_args.text} are two models; name one.")
            options = script_args.composition or {}
            self.shapes, self.processor = compose(script_args.audio, script_args.text, weights=False, **options)
        elif name is None:
            raise ValueError("no model: give --model_name_or_path (an LSM), or --audio and --text to compose one.")
        else:
            revision = self.model_args.model_revision
            self.processor = load_processor(name, revision)
            config = load_config(name, revision, trust_remote_code=True)
            with torch.device("meta"):
                self.shapes = LsmForConditionalGeneration(config)
        embeddings = self.shapes.get_input_embeddings().num_embeddings
        update_template(self.shapes.config, self.processor)
        check_vocabulary(self.processor, embeddings, self.shapes.config.audio_token_id)
        self.costs = Costs.of(
            self.shapes,
            script_args.llm,
            stored=script_args.audio_feature_store is not None,
            distill=self.training_args.objective == "distill",
        )
        parts = {
            "audio tower and its words (frozen)": count_frozen_audio(self.shapes),
            "projector (learns)": count(self.shapes.model.projector),
            f"LLM ({script_args.llm})": count(self.shapes.model.language_model) + count(self.shapes.lm_head),
        }
        return ", ".join(f"{part} {weights / 1e6:,.1f} M" for part, weights in parts.items())

    def download(self) -> str:
        """Check access to the weights on the Hub, and the free disk space."""
        models = (self.script_args.audio, self.script_args.text, self.model_args.model_name_or_path)
        parts = dict.fromkeys(part for name in models if name for part in (name, base_of(name)))
        names = [name for name in parts if not Path(name).exists()]
        if not names:
            return "nothing: all weights are on this machine"
        total, api = 0, HfApi()
        for name in names:
            api.auth_check(name)
            files = api.model_info(name, files_metadata=True).siblings
            weights = [file for file in files if file.rfilename.endswith(".safetensors")]
            weights = weights or [file for file in files if file.rfilename.endswith(".bin")]
            total += sum(file.size or 0 for file in weights)
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < total:
            raise ValueError(f"{', '.join(names)} need {total / 1e9:.1f} GB, but {cache} has {free / 1e9:.1f} GB left.")
        return f"{total / 1e9:.1f} GB at most ({', '.join(names)}), {free / 1e9:.0f} GB free"

    def template(self) -> str:
        """Check that the chat template continues its own prompts."""
        row = {"id": "template", "instruction": "What is said?", "transcript": "Hello.", "response": "Yes."}
        prompt = render_prompt(self.processor, row)
        return repr(prompt + render_response(self.processor, row, prompt))

    def data(self) -> str:
        """Check columns, responses and responders of the first rows, without loading the rest."""
        args, self.rows, totals = self.script_args, [], []
        tasks = task_names(args)
        check_response_tasks(self.training_args.response_tasks, args)
        for task in tasks:  # one by one, because a stream of all tasks begins with rows of one task
            for row in open_stream(args, task).take(max(1, PEEKED // len(tasks))):
                self.rows.append(check_row(row))
                if not args.allow_foreign_responses:
                    refuse_foreign(row["responder"], self.shapes.config.responder)
            totals.append(_rows_in(args.dataset_name, task, args.dataset_train_split))
        if not self.rows:
            raise ValueError(f"{args.dataset_name} has no rows in split {args.dataset_train_split!r}.")
        self.sizes = RowSizes(self.processor, context_of(self.shapes.config)).measure(
            {name: [row[name] for row in self.rows] for name in self.rows[0]}
        )
        self.total = None if None in totals else sum(totals)
        seconds = np.mean([row["duration"] for row in self.rows])
        return (
            f"{self.total or 'unknown number of'} rows; of {len(self.rows)}: {seconds:.1f} s and "
            f"{self.sizes['tokens'].mean():.0f} tokens on average, tasks {', '.join(tasks)}"
        )

    def labels(self) -> str:
        """Collate one batch and decode its labels."""
        collate = SpeechResponseCollator(self.processor, teacher=self.training_args.objective == "distill")
        batch = collate(self.rows[: min(4, len(self.rows))])
        labels = batch["labels"][0]
        text = self.processor.tokenizer.decode(labels[labels != -100])
        speech = int((batch["input_ids"][0] == self.processor.audio_token_id).sum())
        return f"{self.rows[0]['id']}: {speech} speech tokens, learns {text!r}"

    def memory(self) -> str:
        """Estimate from shapes whether the largest batch fits into memory."""
        largest = {name: int(values.max()) for name, values in self.sizes.items()}
        args = (self.script_args, self.training_args, self.model_args)
        self.parts = estimate(self.shapes, *args, self.target, largest)
        total = sum(self.parts.values())
        available = self.target.memory_gib or _memory_here()
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.parts.items())
        devices = f"each of {self.target.devices} ({self.target.sharding})"
        result = f"{total:.1f} GiB of {available:.0f} on {devices}: {parts}"
        if total > available:
            raise ValueError(
                f"{result}. Use a smaller --per_device_train_batch_size, --llm lora or qlora, or fsdp2 or zero3."
            )
        return result

    def two_steps(self) -> str:
        """Run two steps of the real trainer on the most expensive rows, with random weights of the same shapes."""
        cuda = torch.cuda.is_available()
        config, note = copy.deepcopy(self.shapes.config), ""
        config.text_config.pad_token_id = self.processor.tokenizer.pad_token_id  # Trainer would do so with a warning
        costs = self.costs.row(**self.sizes)
        batch = self.training_args.per_device_train_batch_size
        here = self.target == Target.here(self.training_args) and sum(self.parts.values()) < _memory_here()
        if not here or not (cuda or STEPS * batch * costs.max() < SMALL):
            config.text_config.num_hidden_layers = 1  # one layer of the same width, to see whether it works
            config.audio_config.encoder_layers = 1
            if getattr(config.text_config, "layer_types", None):
                config.text_config.layer_types = config.text_config.layer_types[:1]
            note = " (with one layer each of tower and LLM and batches of one row, as the whole is too large here)"
        self.whole = not note
        device = torch.device("cuda", PartialState().local_process_index) if cuda else torch.device("cpu")
        dtype = None if self.model_args.dtype in (None, "auto") else getattr(torch, self.model_args.dtype)
        teacher = None
        with torch.device(device):
            model = LsmForConditionalGeneration._from_config(config, **({"dtype": dtype} if dtype else {}))
            if self.training_args.objective == "distill" and self.script_args.llm == "full":
                teacher = drop_audio_modules(LsmForConditionalGeneration._from_config(config, dtype=torch.bfloat16))
        mode = "lora" if self.script_args.llm == "qlora" else self.script_args.llm
        prepare(model, mode, self.model_args)
        args = _short(self.training_args, whole=self.whole)
        costliest = np.argsort(-costs, kind="stable")[: STEPS * args.per_device_train_batch_size * self.target.devices]
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir = folder
            trainer = LsmTrainer(
                model,
                args,
                Dataset.from_list([self.rows[index] for index in costliest]),
                self.processor,
                self.model_args,
                Costs.of(model, mode, distill=args.objective == "distill"),
                teacher=teacher,
            )
            trainer.remove_callback(PrinterCallback)
            start = time.monotonic()
            trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
        self.logged = logs[-1] | {"flops_per_second": logs[-1]["mfu"] * trainer.throughput.peak * self.target.devices}
        losses = ", ".join(f"{line['loss']:.3f}" for line in logs)
        return f"losses {losses} in {time.monotonic() - start:.1f} s, {self.logged['peak_memory_gib']} GiB{note}"

    def time(self) -> str:
        """Estimate the time of the training: its FLOPs over the rate of the two steps."""
        args = self.training_args
        if self.total is None and args.max_steps <= 0:
            return "unknown: the set does not say how many rows it has"
        world = args.per_device_train_batch_size * self.target.devices * args.gradient_accumulation_steps
        world = args.global_batch_size or world
        rows = args.max_steps * world if args.max_steps > 0 else args.num_train_epochs * self.total
        flops = float(self.costs.row(**self.sizes).mean() * rows)
        if self.target.peak_tflops:
            mfu = self.logged["mfu"] if self.whole else ASSUMED_MFU
            rate = self.target.peak_tflops * 1e12 * mfu * self.target.devices
            how = f"{'measured' if self.whole else 'assumed'} MFU {mfu:.2f} of {self.target.peak_tflops:g} TFLOP/s"
        elif self.whole:
            rate, how = self.logged["flops_per_second"], "as measured"
        else:
            return f"{flops:.2e} FLOPs; set peak_tflops of --target to estimate the time"
        steps = int(np.ceil(rows / world))
        minutes = flops / rate / 60
        duration = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
        return f"{duration} for {steps} steps, {flops:.2e} FLOPs, {how}"


def _rows_in(name: str, task: str, split: str) -> int | None:
    """Return the number of rows of a task in a set, without reading them; None if it is unknown."""
    if Path(name).is_dir():
        files = Path(name).glob(f"data/{task}/{split}-*.parquet")
        return sum(pq.read_metadata(file).num_rows for file in files)
    info = (load_dataset_builder(name, task).info.splits or {}).get(split)
    return None if info is None else info.num_examples


def _memory_here() -> float:
    """Return the memory of a GPU, or of this machine if it has none, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return psutil.virtual_memory().total / GIB


def _short(training_args: LsmTrainingArguments, whole: bool) -> LsmTrainingArguments:
    """Return the arguments for two steps that write and report nothing."""
    args = copy.deepcopy(training_args)
    args.max_steps, args.logging_steps, args.save_strategy, args.eval_strategy = STEPS, 1, "no", "no"
    args.report_to, args.push_to_hub, args.gradient_accumulation_steps, args.disable_tqdm = [], False, 1, True
    args.train_sampling_strategy = "sequential"
    if not whole:
        args.per_device_train_batch_size = 1
    return args


def preflight(script_args: LsmScriptArguments, training_args: LsmTrainingArguments, model_args: ModelConfig) -> int:
    """Print the result of each check and a verdict. Returns 0 if the training is ready, 1 if not."""
    return 0 if Preflight(script_args, training_args, model_args).run() else 1
