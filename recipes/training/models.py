"""Compose or load the LSM of a training, make the right parts trainable, and load its teacher."""

import json
import logging
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config

from configuration_lsm import LsmConfig
from dataset_builders.files import content_of, differences, whole
from dataset_builders.instructions import SELF_POWERED_TASKS, load_pool
from language_models.checkpoints import adapter_of, load_processor, open_model
from language_models.generation import valid_settings
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import LsmProcessor
from recipes.evaluation.following import held_out_rows
from recipes.listening.composing import compose
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments, refuse_without_effect

logger = logging.getLogger(__name__)

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
NEVER_IN_4_BITS = ["model.audio_tower", "model.projector", "lm_head"]
BASE, MADE_OF = "base", "made_of.json"
ADAPTED = ("lora", "qlora")
# Settings of an adapter: names in `ModelConfig`, and names in PEFT's configuration.
ADAPTER_SETTINGS = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}


def check_model(script_args: LsmScriptArguments, model_args: ModelConfig) -> None:
    """Check the model arguments before anything is composed or loaded.

    Raises:
        ValueError: an option of TRL has no effect, the settings differ from those of the adapter that the training
            starts from, or the pool has no held-out instructions for `following_corpus`.
    """
    refuse_without_effect(model_args)
    if script_args.following_corpus:
        held_out_rows([], SELF_POWERED_TASKS, pool=load_pool(script_args.pool))
    if model_args.use_peft and script_args.llm not in ADAPTED:
        raise ValueError(f"--use_peft {model_args.use_peft}, but --llm is {script_args.llm}; set lora or qlora.")
    model_args.use_peft = script_args.llm in ADAPTED
    adapter_settings(model_args)


def compose_base(script_args: LsmScriptArguments, training_args: LsmTrainingArguments, model_args: ModelConfig) -> str:
    """Compose the LSM from `audio` and `text` once, in the subfolder `base` of the training's folder. Returns its path.

    It is saved, because adapters name their base model, and because several processes load it.

    Raises:
        ValueError: an LSM was also named, `audio` and `text` cannot be combined, or `base` was composed of others.
    """
    if model_args.model_name_or_path is not None:
        raise ValueError(
            f"--model_name_or_path {model_args.model_name_or_path} and --text {script_args.text} are two models; name "
            "either an LSM, or --audio and --text to compose one."
        )
    folder, composition = Path(training_args.output_dir) / BASE, script_args.composition or {}
    parts = {name: getattr(script_args, name) for name in ("audio", "text")}
    parts = {name: content_of(source) or source for name, source in parts.items()}
    made_of = json.loads(json.dumps(parts | {"composition": composition}))
    with PartialState().main_process_first():
        if folder.is_dir():
            before = json.loads((folder / MADE_OF).read_text()) if (folder / MADE_OF).is_file() else {}
            if changed := differences(before, made_of):
                changes = "; ".join(f"{name} was {was}, now {now}" for name, (was, now) in changed.items())
                raise ValueError(
                    f"{folder} was composed from other parts ({changes}); delete it, so that it is composed again, or "
                    "name another --output_dir."
                )
        else:
            logger.info("composing %s and %s in %s", script_args.audio, script_args.text, folder)
            with whole(folder) as partial:
                compose(script_args.audio, script_args.text, str(partial), **composition)
                (partial / MADE_OF).write_text(json.dumps(made_of), encoding="utf-8")
    return str(folder)


def load_model(
    script_args: LsmScriptArguments, model_args: ModelConfig
) -> tuple[LsmForConditionalGeneration, LsmProcessor]:
    """Load the LSM with the right parts trainable, and its processor. `model_args` gets the adapter's settings.

    An adapter that the training starts from is merged if the training trains no adapter. Otherwise `go_on_from` copies
    its low-rank weights into the new one.

    Weights that learn are in float32, because the updates of small learning rates vanish in bfloat16; the others are in
    `model_args.dtype`.

    Raises:
        ValueError: no model is named, or tokenizer and LLM do not fit together.
    """
    name, revision, llm = model_args.model_name_or_path, model_args.model_revision, script_args.llm
    if name is None:
        raise ValueError("no model: give --model_name_or_path (an LSM), or --audio and --text to compose one.")
    settings = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if llm == "qlora":
        # 4-bit weights cannot be moved, so they are loaded on their device.
        device = {"": PartialState().local_process_index} if torch.cuda.is_available() else None
        settings |= {"quantization_config": quantization(model_args), "device_map": device}
    processor = load_processor(name, revision)
    settings |= {"trust_remote_code": True, "merge": llm not in ADAPTED}
    model = open_model(name, revision=revision, **settings)
    if script_args.projector_only and model.config.sources is None:
        raise ValueError(
            f"--projector_only: {name} does not name the encoder and the LLM that it was composed of; compose it again "
            "with recipes.compose."
        )
    model.generation_config = valid_settings(model.generation_config.to_diff_dict(), name)
    model.config.text_config.pad_token_id = processor.tokenizer.pad_token_id  # Trainer would do so with a warning
    if is_deepspeed_zero3_enabled():
        model._weight_conversions = None  # on saving, transformers would undo a renaming that it did not do on loading
    update_template(model.config, processor)
    check_vocabulary(processor, model.get_input_embeddings().num_embeddings, model.config.audio_token_id)
    prepare(model, llm, model_args)
    return model, processor


def prepare(model: LsmForConditionalGeneration, llm: str, model_args: ModelConfig) -> None:
    """Freeze the LLM unless `llm` is `full`, convert trainable weights to float32, and set the adapter options of
    `model_args`."""
    if llm != "full":
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model_args.use_peft = llm in ADAPTED
    if model_args.use_peft:
        model_args.lora_target_modules = model_args.lora_target_modules or LORA_TARGETS
        model_args.lora_modules_to_save = list(dict.fromkeys(["projector", *(model_args.lora_modules_to_save or ())]))


def adapter_settings(model_args: ModelConfig) -> PeftConfig | None:
    """Return the settings of the adapter that is trained: those of the adapter that the training starts from, or those
    of `model_args`. None if no adapter is trained.

    Raises:
        ValueError: `model_args` differs from the adapter that the training starts from.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    new = get_peft_config(model_args)
    if new is None or name is None or adapter_of(name, revision) is None:
        if new is not None and revision != "main":
            new.revision = revision
        return new
    adapter, default = PeftConfig.from_pretrained(name, revision=revision), ModelConfig()
    if adapter.peft_type != PeftType.LORA:
        raise ValueError(f"{name} is an adapter of type {adapter.peft_type.value}; only LoRA can be trained further.")
    adapter.inference_mode = False
    for option, setting in ADAPTER_SETTINGS.items():
        value = getattr(model_args, option)
        if value != getattr(default, option) and value != getattr(adapter, setting):
            raise ValueError(
                f"--{option} is {value}, but the adapter {name} has {getattr(adapter, setting)} and keeps it; leave "
                f"--{option} out, or start from an LSM without an adapter."
            )
    return adapter


def go_on_from(model: PeftModel, model_args: ModelConfig) -> None:
    """Copy the low-rank weights of the adapter that the training starts from, if there is one, into a model with a new
    adapter. The model already has its `modules_to_save`."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if adapter_of(name, revision) is not None:
        saved = load_peft_weights(name, device="cpu", revision=revision)
        changes = {key: value for key, value in saved.items() if "lora_" in key}
        set_peft_model_state_dict(model, get_peft_model_state_dict(model) | changes)


def quantization(model_args: ModelConfig) -> BitsAndBytesConfig:
    """Return the settings of QLoRA (arXiv 2305.14314): only the LLM's layers in 4 bits, computing in bfloat16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
        llm_int8_skip_modules=NEVER_IN_4_BITS,
    )


def update_template(config: LsmConfig, processor: LsmProcessor) -> None:
    """Set the responder's template hash to the processor's, because the template may have changed since composing."""
    if config.responder is not None:
        config.responder = {**config.responder, "template": processor.template_hash}


def check_vocabulary(processor: LsmProcessor, embeddings: int, audio_token_id: int | None) -> None:
    """Raise ValueError if the tokenizer does not belong to this LLM."""
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= embeddings:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the LLM has {embeddings} embeddings: they belong to different "
            "models; compose the LSM again with recipes/compose.py."
        )
    if processor.audio_token_id != audio_token_id:
        raise ValueError(
            f"{processor.audio_token} is {processor.audio_token_id} in the tokenizer, but {audio_token_id} in the "
            "model: they belong to different models; compose the LSM again with recipes/compose.py."
        )


def load_teacher(
    script_args: LsmScriptArguments, training_args: LsmTrainingArguments, model_args: ModelConfig
) -> LsmForConditionalGeneration | None:
    """Load a second copy of the LLM as the teacher, without audio tower and projector. Returns None if the model itself
    can be the teacher, because its LLM is frozen or has an adapter."""
    if training_args.objective != "distill" or script_args.llm != "full":
        return None
    dtype = torch.bfloat16 if training_args.bf16 else torch.float32
    teacher = open_model(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=True, dtype=dtype
    )
    return drop_audio_modules(teacher)


def drop_audio_modules(model: LsmForConditionalGeneration) -> LsmForConditionalGeneration:
    """Remove all but the LLM from a model, and freeze it."""
    for name, _ in list(model.model.named_children()):
        if name != "language_model":
            delattr(model.model, name)
    return model.requires_grad_(False).eval()
