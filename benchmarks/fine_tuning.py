"""Measure how fast the recipe fine-tunes models of real size, with random weights, on a GPU.

    python -m benchmarks.fine_tuning --llm full lora frozen --batch 1 4 8 16 --seconds 5 15 30 --json fine_tuning.json
    python -m benchmarks.fine_tuning --preset tiny --batch 1 2 --seconds 2 --steps 3  # on a CPU: does it work at all?

Nothing is downloaded: a model with the preset's shapes is created on the device and learns from noise, with
instructions of 15 tokens and responses of 40, in the recipe's trainer (`recipes/training`), which logs these figures.
Settings that do not fit into memory are left out, with a line that says why. MFU counts only useful work
(`recipes/training/costs.py`), relative to the rate of a large matrix product here, and to `--peak-tflops` if given.
Worker processes read the clips, as in the recipe's configurations, so slow reading may not show in a few steps: "batch
read" is the time of one worker for a batch, and should be below the number of workers over the steps per second.
"""

import gc
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    TrainerCallback,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from trl import ModelConfig

from benchmarks.machine import describe, free_memory
from configuration_lsm import LsmConfig
from dataset_builders.corpora.audio import encode
from language_models.command_line import parser_of
from language_models.generation import context_of
from language_models.tokenizers import speech_processor
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN, LsmProcessor
from recipes.listening.collator import SpeechResponseCollator
from recipes.training.arguments import OBJECTIVES, LsmScriptArguments, LsmTrainingArguments
from recipes.training.costs import Costs
from recipes.training.memory import Target, estimate
from recipes.training.models import drop_audio_modules, prepare
from recipes.training.rows import RowSizes
from recipes.training.throughput import matmul_rate
from recipes.training.trainer import LsmTrainer

WARM_UP = 3  # steps: allocation, the optimizer's state, the choice of kernels
RATE = 16_000
INSTRUCTION, RESPONSE = 15, 39  # words, which are tokens; a response has one more token at its end
SPOKEN = 2.5  # words per second of the transcripts, which `distill` reads
WORDS = 200  # words of the vocabulary, without special tokens
WORKERS = 4  # as in the recipe's configurations

PRESETS = {
    "tiny": {
        "audio": {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128},
        "qformer": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
        "text": LlamaConfig(
            hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
        ),
    },
    "base_0.5b": {  # openai/whisper-base and Qwen/Qwen2.5-0.5B
        "audio": {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048},
        "qformer": {},
        "text": Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151_936,
            tie_word_embeddings=True,
        ),
    },
    "large_7b": {  # openai/whisper-large-v2 and lmsys/vicuna-7b-v1.5, which is LlamaConfig's default
        "audio": {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
        "qformer": {},
        "text": LlamaConfig(max_position_embeddings=4096, vocab_size=32_001),  # with the placeholder, as composed
    },
}
CHOICES = {
    "preset": tuple(PRESETS),
    "llm": ("full", "lora", "frozen"),
    "objective": OBJECTIVES,
    "checkpointing": ("true", "false"),
    "dtype": ("bfloat16", "float32"),
}
LEAST = {"batch": 1, "seconds": 0.1, "steps": 1, "workers": 0}


@dataclass(frozen=True)
class Setting:
    """The settings of a training that is measured."""

    llm: str
    objective: str
    checkpointing: str
    batch: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"--llm {self.llm} --objective {self.objective} --checkpointing {self.checkpointing} "
            f"--batch {self.batch} --seconds {self.seconds:g}"
        )


@dataclass(frozen=True)
class Sweep:
    """The options of the command line, which decide the trainings that are measured.

    Raises:
        ValueError: an option is invalid. Names it.
    """

    preset: str = "large_7b"
    llm: tuple[str, ...] = CHOICES["llm"]
    objective: tuple[str, ...] = ("response",)
    checkpointing: tuple[str, ...] = ("true",)
    batch: tuple[int, ...] = (1, 4, 8, 16)
    seconds: tuple[float, ...] = (5, 15, 30)
    steps: int = 8
    dtype: str = "bfloat16"
    peak_tflops: float | None = None
    workers: int = WORKERS if torch.cuda.is_available() else 0  # on a CPU, the training needs all cores

    def __post_init__(self):
        for name, choices in CHOICES.items():
            for value in self._values(name):
                if value not in choices:
                    raise ValueError(f"--{name} {value!r} cannot be measured; expected {' or '.join(choices)}.")
        for name, least in LEAST.items():
            for value in self._values(name):
                if not least <= value < math.inf:
                    raise ValueError(f"--{name} {value} must be {least} or more, and finite.")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(
                f"--peak-tflops {self.peak_tflops} must be more than 0, and finite; leave it out if unknown."
            )

    def _values(self, name: str) -> tuple:
        value = getattr(self, name)
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    def settings(self) -> Iterator[Setting]:
        names = ("llm", "objective", "checkpointing", "batch", "seconds")
        return itertools.starmap(Setting, itertools.product(*(getattr(self, name) for name in names)))


def make_processor() -> LsmProcessor:
    """Return a processor whose vocabulary is `w0`, `w1`, ...; other words, as in the template, are unknown tokens."""
    special = ["<unk>", "<s>", "</s>", AUDIO_TOKEN]
    words = special + [f"w{index}" for index in range(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return speech_processor(WhisperFeatureExtractor(feature_size=80), fast)


def make_config(preset: str, processor: LsmProcessor) -> LsmConfig:
    shapes = PRESETS[preset]
    return LsmConfig(
        audio_config=WhisperConfig(**shapes["audio"], decoder_layers=1),
        qformer_config=shapes["qformer"],
        text_config=shapes["text"].to_dict(),
        audio_token_id=processor.audio_token_id,
    )


def make_rows(count: int, seconds: float) -> list[dict]:
    """Return rows of a set whose clips are noise of this length."""
    random = np.random.default_rng(0)

    def say(words: int) -> str:
        return " ".join(f"w{index}" for index in random.integers(WORDS, size=words))

    rows = []
    for index in range(count):
        clip = encode(0.1 * random.standard_normal(round(seconds * RATE)))
        rows.append(
            {
                "id": f"noise-{index}",
                "audio": {"bytes": clip, "path": None},
                "instruction": say(INSTRUCTION),
                "transcript": say(max(1, round(SPOKEN * seconds))),
                "response": say(RESPONSE),
                "duration": seconds,
            }
        )
    return rows


class Clock(TrainerCallback):
    """Makes the trainer log after the warm-up and at the end.

    It waits for the device before a log, because otherwise the work that is not finished would not be counted.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARM_UP, state.max_steps):
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            control.should_log = True
        return control


class Bench:
    """Measures the settings of a sweep, one after the other, on one device. Several GPUs, among which the trainer would
    divide the batch, are a ValueError."""

    def __init__(self, sweep: Sweep, folder: str):
        if torch.cuda.device_count() > 1:
            raise ValueError(
                f"{torch.cuda.device_count()} GPUs are visible; expected one. Set CUDA_VISIBLE_DEVICES=0, for example."
            )
        self.sweep, self.folder = sweep, folder
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.processor = make_processor()
        with torch.device("meta"):
            self.shapes = LsmForConditionalGeneration(make_config(sweep.preset, self.processor))
        self.row_sizes = RowSizes(self.processor, context_of(self.shapes.config))
        self.memory = free_memory(self.device)
        self.peak = None
        half = self._arguments(next(sweep.settings()))[1].bf16  # as the recipe decides
        self.precision = torch.bfloat16 if half else torch.float32
        self.peak = matmul_rate(self.device, self.precision)  # measured once, for all settings

    def run(self) -> dict:
        """Return the figures of all settings that fit into memory, and why the others were left out."""
        results, left_out = [], []
        for setting in self.sweep.settings():
            self._free()
            needed = self.estimate(setting)
            if needed > self.memory:
                left_out.append(f"{setting}: needs an estimated {needed:.1f} GiB of {self.memory:.1f}")
            elif (figures := self._try(setting)) is None:
                left_out.append(f"{setting}: out of memory, estimated {needed:.1f} GiB of {self.memory:.1f}")
            else:
                results.append({**asdict(setting), **figures, "estimated_memory_gib": round(needed, 2)})
                print(f"{setting}: {figures['steps_per_second']:.3g} steps/s", flush=True)
                continue
            print(f"left out: {left_out[-1]}", flush=True)
        self._free()
        return {"machine": self.describe(), "sweep": asdict(self.sweep), "results": results, "left_out": left_out}

    def _try(self, setting: Setting) -> dict[str, float] | None:
        try:
            return self.train(setting)
        except torch.cuda.OutOfMemoryError:
            return None  # returned from a method, so that the frames of the error do not keep the model alive

    def _free(self) -> None:
        gc.collect()  # trainer and callbacks refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def describe(self) -> str:
        """Return the machine, the versions, the date, and the rate of a matrix product."""
        precision = str(self.precision).removeprefix("torch.")
        return f"{describe(self.device)}; a matrix product reaches {self.peak / 1e12:.3g} TFLOP/s in {precision}"

    def _arguments(self, setting: Setting) -> tuple[LsmScriptArguments, LsmTrainingArguments, ModelConfig]:
        training_args = LsmTrainingArguments(
            output_dir=self.folder,
            max_steps=WARM_UP + self.sweep.steps,
            per_device_train_batch_size=setting.batch,
            objective=setting.objective,
            gradient_checkpointing=setting.checkpointing == "true",
            peak_tflops=self.peak and self.peak / 1e12,
            dataloader_num_workers=self.sweep.workers,
            train_sampling_strategy="sequential",
            use_cpu=self.device.type == "cpu",
            logging_strategy="no",  # `Clock` makes the trainer log
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model_args = ModelConfig(dtype=self.sweep.dtype)
        return LsmScriptArguments(llm=setting.llm, dataset_name="noise"), training_args, model_args

    def estimate(self, setting: Setting) -> float:
        """Return the estimate of the preflight in GiB."""
        sizes = self._measure(make_rows(1, setting.seconds))
        return sum(estimate(self.shapes, *self._arguments(setting), Target(), sizes).values())

    def _measure(self, rows: list[dict]) -> dict[str, int]:
        """Return the numbers of frames, tokens and labels of a row; all rows have the same."""
        sizes = self.row_sizes.measure({name: [row[name] for row in rows[:1]] for name in rows[0]})
        return {name: int(values[0]) for name, values in sizes.items()}

    def _model(self, dtype: str | torch.dtype) -> LsmForConditionalGeneration:
        torch.manual_seed(0)
        with torch.device(self.device):
            return LsmForConditionalGeneration._from_config(make_config(self.sweep.preset, self.processor), dtype=dtype)

    def _teacher(self, setting: Setting) -> LsmForConditionalGeneration | None:
        """Return a teacher as `recipes.training.models.load_teacher` does, with random weights."""
        if setting.objective != "distill" or setting.llm != "full":
            return None
        teacher = self._model(self.precision)
        return drop_audio_modules(teacher)

    def train(self, setting: Setting) -> dict[str, float]:
        """Train, and return the figures of the timed steps."""
        _, training_args, model_args = self._arguments(setting)
        rows = make_rows(setting.batch * training_args.max_steps, setting.seconds)
        collate = SpeechResponseCollator(self.processor, teacher=setting.objective == "distill")
        start = perf_counter()
        collate(rows[: setting.batch])
        reading = perf_counter() - start
        model = self._model(self.sweep.dtype)
        prepare(model, setting.llm, model_args)
        trainer = LsmTrainer(
            model,
            training_args,
            Dataset.from_list(rows),
            self.processor,
            model_args,
            Costs.of(model, setting.llm, distill=setting.objective == "distill"),
            teacher=self._teacher(setting),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        _, timed = (line for line in trainer.state.log_history if "tokens_per_second" in line)
        return self._figures(setting, timed, self._measure(rows)["tokens"]) | {"reading_seconds": reading}

    def _figures(self, setting: Setting, logged: dict, tokens: int) -> dict[str, float]:
        names = ("tokens_per_second", "audio_seconds_per_second", "mfu", "peak_memory_gib")
        # All rows have the same number of tokens, so the trainer's rate of tokens gives that of steps.
        figures = {"steps_per_second": logged["tokens_per_second"] / tokens / setting.batch}
        figures |= {name: logged[name] for name in names}
        if self.sweep.peak_tflops is not None:
            figures["mfu_of_given"] = logged["mfu"] * self.peak / self.sweep.peak_tflops / 1e12
        return figures


def measure(sweep: Sweep) -> dict:
    """Measure all settings. Returns `machine`, `sweep`, `results` (a dict for each setting) and `left_out` (a line for
    each setting)."""
    with tempfile.TemporaryDirectory() as folder:
        return Bench(sweep, folder).run()


def table(measured: dict) -> str:
    """Return the result of `measure` as a Markdown table."""
    sweep, cuda = measured["sweep"], not measured["machine"].startswith("CPU")
    columns = {
        "LLM": lambda row: row["llm"],
        "objective": lambda row: row["objective"],
        "checkpointing": lambda row: "yes" if row["checkpointing"] == "true" else "no",
        "batch": lambda row: f"{row['batch']}",
        "clip": lambda row: f"{row['seconds']:g} s",
        "steps/s": lambda row: f"{row['steps_per_second']:.3g}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "audio s/s": lambda row: f"{row['audio_seconds_per_second']:.1f}",
        "MFU": lambda row: f"{100 * row['mfu']:.1f} %",
        f"MFU of {sweep['peak_tflops'] or 0:g} TFLOP/s": lambda row: f"{100 * row['mfu_of_given']:.1f} %",
        # Without a GPU, it is the peak of the process, including all earlier settings.
        "peak memory" if cuda else "peak of process": lambda row: f"{row['peak_memory_gib']:.1f} GiB",
        "estimated": lambda row: f"{row['estimated_memory_gib']:.1f} GiB",
        "batch read": lambda row: f"{row['reading_seconds']:.2g} s",
    }
    if sweep["peak_tflops"] is None:
        columns = {name: show for name, show in columns.items() if not name.startswith("MFU of")}
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[show(row) for show in columns.values()] for row in measured["results"]]
    title = f"Preset {sweep['preset']}, {sweep['dtype']}, {sweep['steps']} steps, {sweep['workers']} workers: "
    left_out = [f"\nLeft out: {line}." for line in measured["left_out"]]
    return "\n".join([f"{title}{measured['machine']}.\n", *(f"| {' | '.join(line)} |" for line in lines), *left_out])


def main() -> None:
    parser = parser_of(__doc__)
    default = Sweep()
    parser.add_argument("--preset", default=default.preset, help=f"sizes of the model: {' or '.join(PRESETS)}")
    parser.add_argument("--llm", nargs="+", default=default.llm, help="how the LLM is trained: full, lora or frozen")
    parser.add_argument(
        "--objective", nargs="+", default=default.objective, help="objectives of the training: response, distill"
    )
    parser.add_argument(
        "--checkpointing", nargs="+", default=default.checkpointing, help="gradient checkpointing: true, false"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=default.batch, help="number of rows per step")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=default.seconds, help="length of the clips, in seconds"
    )
    parser.add_argument(
        "--steps", type=int, default=default.steps, help=f"number of timed steps, after {WARM_UP} for warm-up"
    )
    parser.add_argument(
        "--dtype", default=default.dtype, help="dtype of frozen weights; trained weights are in float32"
    )
    parser.add_argument("--peak-tflops", type=float, help="nominal peak rate of the device, for a second MFU")
    parser.add_argument("--workers", type=int, default=default.workers, help="number of processes that read clips")
    parser.add_argument("--json", help="file for the figures")
    options = vars(parser.parse_args())
    file = options.pop("json")
    measured = measure(Sweep(**options))
    print(f"\n{table(measured)}")
    if file:
        Path(file).write_text(json.dumps(measured, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
