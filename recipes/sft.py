r"""Fine-tune an LSM on a self-powered set with TRL's SFTTrainer, so that it gives the responses from speech.

    # Check everything first, without a large download.
    python -m recipes.sft --config recipes/configs/whisper_large_v2_vicuna_7b.yaml --preflight true

    # The paper's training, on all GPUs of a machine
    accelerate launch recipes/sft.py --config recipes/configs/whisper_large_v2_vicuna_7b.yaml

    # Another LLM, other data, an adapter instead of the whole LLM: YAML keys, or the same names here
    accelerate launch recipes/sft.py --config recipes/configs/whisper_large_v2_vicuna_7b.yaml \
        --text Qwen/Qwen2.5-7B-Instruct --dataset_name YOU/self-powered-qwen --llm lora --output_dir checkpoints/qwen

The training may begin with an alignment of the projector (`--align_steps 3000`), which `recipes.align` does alone. The
audio tower is frozen, the projector is trained, and the LLM is trained (`--llm full`), adapted (`lora`, `qlora`) or
frozen (`frozen`). To resume an interrupted training, run the same command again.
"""

import logging
import sys
from pathlib import Path

# `accelerate launch recipes/sft.py` puts this file's folder on the path, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from language_models.extras import extra

with extra("train"):
    from accelerate import PartialState
    from transformers import set_seed
    from trl import ModelConfig

    from language_models.checkpoints import base_of
    from language_models.generation import context_of
    from recipes.listening.features import AudioFeatureStore, store_features
    from recipes.reporting.model_card import base_models_of
    from recipes.training.alignment import align, needs_alignment, validation_rows
    from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments, non_defaults
    from recipes.training.callbacks import FollowingCallback, LogCallback
    from recipes.training.checkpoints import contents_of, find_checkpoint, naming_last_checkpoint, settings_of
    from recipes.training.command_line import parse
    from recipes.training.costs import Costs
    from recipes.training.models import (
        check_model,
        compose_base,
        go_on_from,
        load_model,
        load_teacher,
    )
    from recipes.training.preflight import preflight
    from recipes.training.processes import leave_processes
    from recipes.training.rows import RowSizes, check_response_tasks, count_tasks, load_rows, stream_rows
    from recipes.training.trainer import LsmTrainer


def card_of(script_args, training_args, model_args, dataset) -> dict:
    """Return the arguments of the model card that are known before the training."""
    name = model_args.model_name_or_path
    return {
        "base_models": base_models_of(name) or [name],
        "datasets": [script_args.dataset_name],
        "rows": {} if script_args.dataset_streaming else count_tasks(dataset),
        "settings": {"llm": script_args.llm, "objective": training_args.objective}
        | non_defaults(script_args, training_args, model_args),
        "adapter_of": base_of(name, model_args.model_revision) if model_args.use_peft else None,
    }


def rows_of(script_args, training_args, model, processor, costs: Costs) -> tuple:
    """Load the training rows, their costs and the store of their features; costs and store are None for a stream."""
    check_response_tasks(training_args.response_tasks, script_args)
    if script_args.dataset_streaming:
        batch = training_args.per_device_train_batch_size * PartialState().num_processes
        return stream_rows(script_args, training_args.seed, model.config.responder, costs, processor, batch), None, None
    with PartialState().main_process_first():
        rows = load_rows(script_args, training_args.seed, model.config.responder)
        row_costs = costs.row(**RowSizes(processor, context_of(model.config)).measure_all(rows))
        store, rows = store_features(script_args.audio_feature_store, rows, model, processor)
    return rows, row_costs, store


def align_first(
    script_args, training_args, model_args, model, processor, dataset, store: AudioFeatureStore | None
) -> AudioFeatureStore | None:
    """Align the projector before the training, and return the store, which then has the held-out clips too.

    Raises:
        ValueError: the rows are a stream.
    """
    if script_args.dataset_streaming:
        raise ValueError(
            f"--align_steps {training_args.align_steps} needs all clips at once, so it does not work with "
            "--dataset_streaming: first run recipes.align on a part of the set and train its output; or train "
            "without alignment (--align_steps 0)."
        )
    with PartialState().main_process_first():
        store, validation = validation_rows(script_args, store, model, processor)
    align(
        model,
        processor,
        dataset,
        training_args,
        store=store,
        validation=validation,
        validation_steps=script_args.following_steps,
        identity=contents_of(script_args, model_args),
        main_process=PartialState().is_main_process,
    )
    return store


def train(script_args: LsmScriptArguments, training_args: LsmTrainingArguments, model_args: ModelConfig) -> None:
    settings = settings_of(script_args, training_args, model_args) | contents_of(script_args, model_args)
    settings["num_processes"] = PartialState().num_processes
    check_model(script_args, model_args)
    main_process = PartialState().is_main_process
    with PartialState().main_process_first():
        checkpoint = find_checkpoint(
            training_args.output_dir, settings, training_args.resume_from_checkpoint, main_process
        )
    # Model
    set_seed(training_args.seed)
    if script_args.text is not None:
        model_args.model_name_or_path = compose_base(script_args, training_args, model_args)
    model, processor = load_model(script_args, model_args)
    teacher = load_teacher(script_args, training_args, model_args)
    costs = Costs.of(
        model,
        script_args.llm,
        stored=script_args.audio_feature_store is not None,
        distill=training_args.objective == "distill",
    )

    dataset, row_costs, store = rows_of(script_args, training_args, model, processor, costs)

    # Training
    if checkpoint is None and needs_alignment(model, training_args):
        store = align_first(script_args, training_args, model_args, model, processor, dataset, store)
    model.config.projector_trained = True
    trainer = LsmTrainer(
        model,
        training_args,
        dataset,
        processor,
        model_args,
        costs,
        row_costs,
        store,
        teacher,
        callbacks=[LogCallback()],
        card=card_of(script_args, training_args, model_args, dataset),
        projector_only=script_args.projector_only,
    )
    if model_args.use_peft:
        go_on_from(trainer.model, model_args)
    if script_args.following_corpus:
        trainer.add_callback(FollowingCallback(trainer, script_args, processor, store))
    with naming_last_checkpoint(training_args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)

        # Save and share
        trainer.save_model(training_args.output_dir)
        trainer.save_state()
        trainer.create_model_card()
        if training_args.push_to_hub:
            trainer.push_to_hub()


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parse(LsmScriptArguments, LsmTrainingArguments, ModelConfig, description=__doc__)
    code = preflight(*arguments) if arguments[0].preflight else train(*arguments)
    leave_processes()
    sys.exit(code)


if __name__ == "__main__":
    main()
