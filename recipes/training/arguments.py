"""Arguments of `recipes/sft.py` besides TRL's model arguments, given as YAML keys or as `--key value`."""

import logging
import math
import os
from dataclasses import MISSING, dataclass, fields
from enum import Enum

import torch
from transformers.hf_argparser import HfArg
from trl import ScriptArguments, SFTConfig

from language_models.checkpoints import has_fast_bf16
from recipes.evaluation.following import BY_FORM

logger = logging.getLogger(__name__)

MODES = ("full", "lora", "qlora", "frozen")
OBJECTIVES = ("response", "distill")
# Options of TRL that do not work with speech or have no effect, and what to use instead.
ROWS_TOGETHER = "clips are not packed; --train_sampling_strategy puts rows of similar cost together"
RESPONSES_ALONE = "the loss is always computed on the responses only"
HELD_OUT = "there is no evaluation set; --following_corpus asks held-out instructions during the training"
OWN_PROMPTS = "the LSM's processor writes the prompts; change the LLM's tokenizer and compose the LSM again"
REFUSED = {
    **dict.fromkeys(("packing", "eval_packing", "padding_free", "pad_to_multiple_of"), ROWS_TOGETHER),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), RESPONSES_ALONE),
    **dict.fromkeys(("eval_strategy", "do_eval", "eval_on_start", "load_best_model_at_end"), HELD_OUT),
    **dict.fromkeys(("chat_template_path", "eos_token", "pad_token", "dataset_text_field"), OWN_PROMPTS),
    "model_init_kwargs": "--dtype and --attn_implementation set how the model is loaded",
    "truncation_mode": "rows are never truncated",
    "shuffle_dataset": "--train_sampling_strategy sets the order of the rows",
    "dataset_num_proc": "the dataset is not preprocessed",
    "router_aux_loss_coef": "the auxiliary loss of a router is not computed",
    "load_in_4bit": "--llm qlora loads the LLM in 4 bits",
    "load_in_8bit": "--llm qlora loads the LLM in 4 bits",
}


def refuse_without_effect(args) -> None:
    """Refuse options of TRL that would stop the training later or have no effect. `args` are [`LsmTrainingArguments`],
    before their defaults are replaced, or a `ModelConfig`.

    Raises:
        ValueError: such an option was set. Names it and says what to use instead.
    """
    for option in fields(args):
        value = getattr(args, option.name)
        # `completion_only_loss=True` is allowed, because it is what happens anyway.
        allowed = (option.default, None, option.name == "completion_only_loss")
        if option.name in REFUSED and not any(value is other or value == other for other in allowed):
            raise ValueError(f"--{option.name} {value} has no effect here: {REFUSED[option.name]}. Leave it out.")


@dataclass
class LsmScriptArguments(ScriptArguments):
    """Arguments for the LSM and the rows that it is trained on."""

    audio: str | None = HfArg(
        default=None,
        help="Hub id or folder of the Whisper of a new LSM; `audio` and `text` replace `model_name_or_path`.",
    )
    text: str | None = HfArg(default=None, help="Hub id or folder of the LLM of a new LSM.")
    composition: dict | None = HfArg(
        default=None, help="More options of `recipes.compose` (YAML: `window_frames: 17`, ...)."
    )
    llm: str = HfArg(
        default="frozen", help="How the LLM is trained: frozen (only the projector is trained), lora, qlora or full."
    )
    dataset_config: str = HfArg(default="all", help="Configuration of the set: a task, or `all`.")
    tasks: list[str] | None = HfArg(
        default=None,
        help="Train on the rows of these tasks only. `intent=2` gives a task a weight: rows are left out until "
        "the shares fit.",
    )
    transcription_ratio: float | None = HfArg(
        default=None, help="Transcription rows per row of another task, at most; if unset, all are kept."
    )
    text_ratio: float = HfArg(
        default=0.0, help="Rows with the transcript in place of the speech, per row with speech: the LLM keeps reading."
    )
    projector_only: bool = HfArg(
        default=False,
        help="Save the projector alone in the end, for `--llm frozen`; loading joins it to its encoder and LLM.",
    )
    allow_foreign_responses: bool = HfArg(
        default=False, help="Train on rows that another LLM or prompt template wrote."
    )
    shuffle_buffer: int = HfArg(default=2000, help="Size, in rows, of the buffer that shuffles a streamed set.")
    audio_feature_store: str | None = HfArg(
        default=None,
        help="Folder for the frozen tower's output, computed once and shared by runs. Clips that it lacks are added.",
    )
    following_corpus: str | None = HfArg(
        default=None, help="ASR corpus about whose clips the model is asked held-out instructions during the training."
    )
    following_split: str = HfArg(default="validation", help="Split of `following_corpus`.")
    following_limit: int = HfArg(default=64, help="Number of clips of `following_corpus`.")
    following_steps: int = HfArg(default=200, help="Steps between two evaluations on `following_corpus`.")
    pool: str | None = HfArg(
        default=None,
        help="YAML file of tasks and their wordings, of which the held-out ones are asked about "
        "`following_corpus`; by default dataset_builders/instructions.yaml.",
    )
    checker: str = HfArg(default=BY_FORM, help="Module whose function `is_correct` scores the answers.")
    preflight: bool = HfArg(default=False, help="Check everything, run two steps on random weights, and stop.")
    target: dict | None = HfArg(
        default=None,
        help="The machine of the training, for a preflight on another one (YAML: `devices`, `memory_gib`, ...).",
    )

    def __post_init__(self):
        if self.llm not in MODES:
            raise ValueError(f"--llm {self.llm!r} is unknown; expected one of {', '.join(MODES)}.")
        for name, least in {"transcription_ratio": 0, "text_ratio": 0, "shuffle_buffer": 1}.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"--{name} {value} must be {least} or more, and finite.")
        if self.projector_only and self.llm != "frozen":
            raise ValueError(f"--projector_only needs an LLM that stays as it is, but --llm is {self.llm}; set frozen.")
        if (self.audio is None) != (self.text is None):
            raise ValueError(f"--audio is {self.audio} and --text is {self.text}; a new LSM needs both, so give both.")
        if self.dataset_streaming and self.audio_feature_store is not None:
            raise ValueError("--audio_feature_store needs all clips at once; leave it out, or --dataset_streaming.")
        if self.dataset_name is None:
            raise ValueError("--dataset_name is missing; expected a self-powered set, folder or Hub id.")


@dataclass
class LsmTrainingArguments(SFTConfig):
    """TRL's training arguments, with more options and with defaults for speech."""

    objective: str = HfArg(
        default="distill",
        help="distill: KL to the same LLM reading the transcript. response: cross-entropy on the rows' "
        "responses, as in the paper.",
    )
    temperature: float = HfArg(default=2.0, help="Temperature of both distributions in `distill`.")
    distill_top_k: int | None = HfArg(
        default=None,
        help="For `distill`: learn the k likeliest tokens of the reading LLM, and all others as one; if unset, "
        "all tokens.",
    )
    response_tasks: list[str] | None = HfArg(
        default=None, help="With `distill`: tasks whose rows are learned by cross-entropy instead."
    )
    align_steps: int | None = HfArg(
        default=None,
        help="Steps of the alignment before the training: the projector learns with CTC to read speech "
        "as the LLM's own word pieces. 0 for none; if unset, 3000 for a projector that was never trained.",
    )
    align_learning_rate: float | None = HfArg(
        default=None,
        help="Learning rate of the alignment; if unset, 1e-3, or 3e-4 for an LSM that reads with the words of "
        "Whisper's decoder, from which its projector starts.",
    )
    align_batch_size: int = HfArg(default=16, help="Clips on each device in a step of the alignment.")
    global_batch_size: int | None = HfArg(
        default=None, help="Rows of one step on all devices together; it sets `gradient_accumulation_steps`."
    )
    projector_learning_rate: float | None = HfArg(
        default=None, help="Learning rate of the projector; `learning_rate` if unset."
    )
    peak_tflops: float | None = HfArg(
        default=None, help="Peak rate of one device, for MFU; if unset, the rate of a large matrix product is measured."
    )
    train_sampling_strategy: str = HfArg(
        default="group_by_length", help="group_by_length (rows of similar cost), random or sequential."
    )
    # A NaN is shown and stops the training, where transformers would log the average of the losses before it.
    logging_nan_inf_filter: bool = HfArg(default=False, help="Hide losses that are NaN or infinite.")

    def __post_init__(self):
        refuse_without_effect(self)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective {self.objective!r} is unknown; expected one of {', '.join(OBJECTIVES)}.")
        for name, least in {"align_steps": 0, "align_batch_size": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name} {value} must be {least} or more.")
        if not self.temperature > 0:
            raise ValueError(f"--temperature {self.temperature} must be more than 0.")
        self._check_distillation()
        self.max_length = None  # a truncated prompt would have fewer placeholders than its clip has tokens
        for name in ("checkpointing", "checkpointing_kwargs"):  # TRL uses the older name
            if getattr(self, f"activation_{name}", ...) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        self.remove_unused_columns = False  # the collator needs them
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        if self.bf16 is None and not self.fp16:  # TRL's default is True, even where it is slower
            self.bf16 = has_fast_bf16()
        if self.bf16 and not torch.accelerator.is_available():
            if not has_fast_bf16():
                logger.warning("--bf16 true: this CPU is faster without it.")
            self.use_cpu = True  # otherwise transformers refuses bf16 on a CPU
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # elsewhere torch warns in every epoch
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = accumulation(
                self.global_batch_size, self.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", "1"))
            )
        super().__post_init__()

    def _check_distillation(self) -> None:
        for name, default in {"loss_type": "nll", "label_smoothing_factor": 0.0}.items():
            if getattr(self, name) != default and self.objective == "distill":
                raise ValueError(
                    f"--{name} {getattr(self, name)} is for --objective response, but --objective is distill. "
                    f"Leave --{name} out."
                )
        if self.distill_top_k is not None and self.distill_top_k < 1:
            raise ValueError(f"--distill_top_k {self.distill_top_k} must be 1 or more; leave it out for all tokens.")
        for name in ("distill_top_k", "response_tasks"):
            if getattr(self, name) and self.objective != "distill":
                raise ValueError(
                    f"--{name} {getattr(self, name)} is for distillation, but --objective is {self.objective}; choose "
                    f"distill, or leave --{name} out."
                )


def accumulation(global_batch_size: int, per_device: int, devices: int) -> int:
    """Return the gradient accumulation steps that give `global_batch_size` rows per optimizer step.

    Raises:
        ValueError: `global_batch_size` is not a multiple of the rows on all devices.
    """
    steps, rest = divmod(global_batch_size, per_device * devices)
    if rest or not steps:
        raise ValueError(
            f"--global_batch_size {global_batch_size} is not a multiple of {per_device} rows on {devices} devices; "
            "choose another --per_device_train_batch_size."
        )
    return steps


# Fields that always differ from the defaults of their dataclass.
DERIVED = {"max_length", "remove_unused_columns", "dataset_kwargs", "logging_dir", "accelerator_config", "use_peft"}
DERIVED |= {"lora_target_modules", "lora_modules_to_save", "debug", "dataloader_pin_memory", "report_to"}
DERIVED |= {"activation_checkpointing", "activation_checkpointing_kwargs"}


def non_defaults(*arguments) -> dict:
    """Return the settings that differ from their defaults, as in a config file."""
    settings = {}
    for part in arguments:
        for field_ in fields(part):
            default = field_.default_factory() if field_.default_factory is not MISSING else field_.default
            value = getattr(part, field_.name)
            value = value.value if isinstance(value, Enum) else value
            default = default.value if isinstance(default, Enum) else default
            if field_.init and field_.name not in DERIVED and value != default:
                settings[field_.name] = value
    return {name: value for name, value in settings.items() if isinstance(value, str | int | float | list | dict)}
