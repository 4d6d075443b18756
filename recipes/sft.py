"""Teach an LSM to give the responses from speech: fine-tuning on a self-powered set, with TRL's SFTTrainer.

    accelerate launch recipes/sft.py --config recipes/configs/nano_self_powered.yaml \
        --model_name_or_path runs/quickstart/base --dataset_name runs/quickstart/self_powered --output_dir runs/mine

Without a GPU add `--use_cpu true --bf16 false` (bf16 `true` where the CPU has it): TRL asks for bf16 by default.

The audio tower stays frozen, the projector is trained, the LLM is trained (`--llm full`), adapted (`lora`, with TRL's
`--lora_*`) or left alone (`frozen`). Rows that another LLM or prompt template wrote are refused.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoProcessor, TrainerCallback
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from dataset_builders.asr_corpora import load_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, draw_fraction
from dataset_builders.publishing import load_self_powered
from dataset_builders.responders import foreign
from recipes.audio_features import AudioFeatureStore, audio_key
from recipes.collator import SpeechResponseCollator
from recipes.evaluation.following import held_out_rows, load_checker, score
from recipes.speech_llm import Lsm

logger = logging.getLogger(__name__)

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class LsmScriptArguments(ScriptArguments):
    """What TRL's own arguments do not say."""

    dataset_config: str = field(default="all", metadata={"help": "Configuration of the set: a task, or `all`."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Keep rows of these tasks; all if unset."})
    transcription_ratio: float | None = field(
        default=None, metadata={"help": "Transcription rows per other row; as they come if unset."}
    )
    llm: str = field(default="full", metadata={"help": "What becomes of the LLM: full, lora or frozen."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; `learning_rate` if unset."}
    )
    allow_foreign_responses: bool = field(
        default=False, metadata={"help": "Train on rows that another LLM or prompt template wrote."}
    )
    audio_feature_store: str | None = field(
        default=None, metadata={"help": "Folder for the frozen tower's output, computed once and shared by runs."}
    )
    following_corpus: str | None = field(
        default=None, metadata={"help": "ASR corpus whose clips are asked held-out wordings while training."}
    )
    following_split: str = field(default="validation", metadata={"help": "Split of `following_corpus`."})
    following_limit: int = field(default=64, metadata={"help": "Clips of `following_corpus`."})
    following_steps: int = field(default=200, metadata={"help": "Steps between two looks at `following_corpus`."})
    checker: str = field(
        default="dataset_builders.nano_tasks", metadata={"help": "Module whose is_correct scores the answers."}
    )

    def __post_init__(self):
        if self.llm not in ("full", "lora", "frozen"):
            raise ValueError(f"--llm {self.llm!r} is unknown; expected full, lora or frozen.")
        if self.transcription_ratio is not None and self.transcription_ratio < 0:
            raise ValueError(f"--transcription_ratio {self.transcription_ratio} must not be negative.")


def select_rows(dataset: Dataset, tasks: list[str] | None, transcription_ratio: float | None, seed: int) -> Dataset:
    """The rows of `tasks`, with at most `transcription_ratio` transcription rows per other row.

    Raises:
        ValueError: nothing is left.
    """
    task_of = dataset["task"]
    kept = [row for row, task in enumerate(task_of) if tasks is None or task in tasks]
    if transcription_ratio is not None:
        others = [row for row in kept if task_of[row] != TRANSCRIPTION]
        transcriptions = [row for row in kept if task_of[row] == TRANSCRIPTION]
        ids = dataset["id"]
        transcriptions.sort(key=lambda row: draw_fraction(seed, "transcription", ids[row]))
        kept = sorted(others + transcriptions[: round(transcription_ratio * len(others))])
    if not kept:
        raise ValueError(f"no row of {sorted(set(task_of))} is left for {tasks=}, {transcription_ratio=}.")
    return dataset.select(kept)


def refuse_foreign(dataset: Dataset, responder: dict | None) -> None:
    """Refuse rows whose answers this very LLM did not write for this very prompt.

    Raises:
        ValueError: says what differs, and how to train on them all the same.
    """
    for provenance in dataset.unique("responder"):
        if differences := foreign(provenance, responder):
            raise ValueError(
                f"the responses are foreign to this LSM ({'; '.join(differences)}): build the set with this LSM, or "
                "train on it all the same with --allow_foreign_responses true."
            )


class LsmTrainer(SFTTrainer):
    """SFTTrainer whose projector, new and random, may learn at a rate of its own."""

    projector_learning_rate: float | None = None

    def get_optimizer_param_groups(self):
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool], list] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(("projector" in name, name in decayed), []).append(parameter)
        rates = {True: self.projector_learning_rate or self.args.learning_rate, False: self.args.learning_rate}
        return [
            {"params": parameters, "lr": rates[projector], "weight_decay": self.args.weight_decay * decay}
            for (projector, decay), parameters in groups.items()
        ]

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(self.get_optimizer_param_groups(), **settings)
        return self.optimizer


def append_line(file: Path, record: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


class LogCallback(TrainerCallback):
    """Append what the trainer logs (loss, rates, ...) to `log.jsonl`, as it happens."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            record = {"step": state.global_step, "max_steps": state.max_steps, **(logs or {})}
            append_line(Path(args.output_dir) / "log.jsonl", record)


class FollowingCallback(TrainerCallback):
    """Every so many steps let the model answer held-out instructions, and append the scores to `following.jsonl`."""

    def __init__(self, script_args: LsmScriptArguments, processor, store: AudioFeatureStore | None):
        corpus = load_corpus(
            script_args.following_corpus, script_args.following_split, limit=script_args.following_limit
        )
        self.rows = held_out_rows(corpus, SELF_POWERED_TASKS)
        self.checker = load_checker(script_args.checker)
        self.processor, self.store, self.every = processor, store, script_args.following_steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if not due or not state.is_world_process_zero:
            return
        replies = Lsm(model, self.processor).respond(self.rows, store=self.store, progress=False)
        model.train()
        answers = [reply.text for reply in replies]
        record = {"step": state.global_step, **score(self.rows, answers, self.checker)}
        append_line(Path(args.output_dir) / "following.jsonl", record)


def load_model(script_args: LsmScriptArguments, model_args: ModelConfig):
    """The LSM with what is to be trained thawed, and its processor."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        trust_remote_code=True,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    )
    if script_args.llm == "frozen":
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    model_args.use_peft = script_args.llm == "lora"
    if model_args.use_peft:
        model_args.lora_target_modules = model_args.lora_target_modules or LORA_TARGETS
        model_args.lora_modules_to_save = model_args.lora_modules_to_save or ["projector"]
    return model, processor


def load_rows(script_args: LsmScriptArguments, seed: int, responder: dict | None) -> Dataset:
    """The training rows, checked and mixed; their audio not decoded."""
    dataset = load_self_powered(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
    if not script_args.allow_foreign_responses:
        refuse_foreign(dataset, responder)
    return select_rows(dataset, script_args.tasks, script_args.transcription_ratio, seed)


def main(script_args: LsmScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    # Model
    model, processor = load_model(script_args, model_args)

    # Dataset
    dataset = load_rows(script_args, training_args.seed, model.config.responder)
    store = None
    if script_args.audio_feature_store:
        audio = (row["audio"] for row in dataset.select_columns("audio"))
        store = AudioFeatureStore.build(script_args.audio_feature_store, model, processor, audio)
        dataset = dataset.map(lambda row: {"audio_key": audio_key(row["audio"])}, remove_columns="audio")
        if missing := sum(key not in store for key in dataset["audio_key"]):
            raise ValueError(
                f"{script_args.audio_feature_store} was made for other clips: it lacks {missing} of {len(dataset)}. "
                "Delete it or name another --audio_feature_store."
            )

    # Training
    training_args.max_length = None  # a cut prompt has fewer placeholders than its clip has tokens
    training_args.remove_unused_columns = False
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer = LsmTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        data_collator=SpeechResponseCollator(processor, store),
        processing_class=processor.tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[LogCallback()],
    )
    trainer.projector_learning_rate = script_args.projector_learning_rate
    if script_args.following_corpus:
        trainer.add_callback(FollowingCallback(script_args, processor, store))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    processor.save_pretrained(training_args.output_dir)
    trainer.save_state()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((LsmScriptArguments, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
