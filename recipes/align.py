r"""Align an LSM's projector with its LLM's words. After that, the LSM can already answer questions about speech.

    # On the clips of a self-powered set, or of an ASR corpus, which has no responses
    python -m recipes.align --model_name_or_path checkpoints/base --dataset_name data/self_powered \
        --output_dir checkpoints/aligned
    python -m recipes.align --model_name_or_path checkpoints/base --corpus librispeech \
        --dataset_train_split train.clean.100 --output_dir checkpoints/aligned

    # The output can be used for chat, or trained further by `recipes.sft`.
    python -m recipes.chat --model checkpoints/aligned --audio clip.wav

The projector learns to read the transcript's word pieces, with CTC (`recipes/training/alignment.py`), without running
the LLM. `recipes.sft --align_steps 3000` does alignment and training in one command. To resume an interrupted
alignment, run the same command again.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

# `accelerate launch recipes/align.py` puts this file's folder on the path, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from language_models.extras import extra

with extra("train"):
    from accelerate import PartialState
    from datasets import Audio, Dataset
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub import HfApi
    from transformers import set_seed
    from trl import ModelConfig

    from dataset_builders.corpora.corpus import FEATURES, Corpus
    from dataset_builders.corpora.opening import open_corpus
    from dataset_builders.files import read_lines
    from recipes.listening.features import store_features, warn_of_language
    from recipes.reporting.model_card import base_models_of
    from recipes.reporting.training_card import write_trained_card
    from recipes.training.alignment import FOLDER, SHARED, STEPS, align, needs_alignment, validation_rows
    from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments, non_defaults
    from recipes.training.callbacks import LOG
    from recipes.training.checkpoints import contents_of
    from recipes.training.command_line import parse
    from recipes.training.models import check_model, compose_base, load_model
    from recipes.training.processes import leave_processes
    from recipes.training.rows import load_rows

# Options of `recipes.sft` that an alignment takes besides those of [`AlignArguments`].
TAKEN = {*SHARED, "align_steps", "align_learning_rate", "align_batch_size", "output_dir", "resume_from_checkpoint"}
TAKEN |= {"model_name_or_path", "model_revision", "dtype", "attn_implementation", "trust_remote_code"}
TAKEN |= {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "save_total_limit"}
TAKEN |= {"fsdp", "fsdp_config", "deepspeed"}  # `AlignmentTrainer` says what to do
NOT_TAKEN = ("llm", "text_ratio", "pool", "checker", "preflight", "target")  # of [`AlignArguments`]
INSTEAD = {
    "learning_rate": "align_learning_rate",
    **dict.fromkeys(("max_steps", "num_train_epochs"), "align_steps"),
    **dict.fromkeys(("per_device_train_batch_size", "global_batch_size"), "align_batch_size"),
}


@dataclass
class AlignArguments(LsmScriptArguments):
    """Arguments for the LSM and the clips of an alignment."""

    corpus: str | None = field(
        default=None,
        metadata={
            "help": "ASR corpus, as `dataset_builders.self_powered build` takes it; instead of a `dataset_name`."
        },
    )

    def __post_init__(self):
        if self.corpus is not None and self.dataset_name is not None:
            raise ValueError(f"--corpus {self.corpus} and --dataset_name {self.dataset_name} are two sets; name one.")
        self.dataset_name = self.dataset_name or self.corpus
        super().__post_init__()


def refuse_without_effect(script_args, training_args, model_args) -> None:
    """Refuse options of `recipes.sft` that an alignment does not take.

    Raises:
        ValueError: such an option was set. Names it and says what to use instead.
    """
    given = {name: value for name, value in non_defaults(script_args).items() if name in NOT_TAKEN}
    given |= {name: value for name, value in non_defaults(training_args, model_args).items() if name not in TAKEN}
    if given:
        name, value = next(iter(given.items()))
        way_out = f"give --{INSTEAD[name]}" if name in INSTEAD else "leave it out; it is an option of recipes.sft"
        raise ValueError(f"--{name} {value} has no effect on an alignment: {way_out}.")


def push(folder: Path, args: LsmTrainingArguments) -> None:
    """Push the aligned LSM to the Hub, under the name of its folder if `args` have no `hub_model_id`."""
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or folder.resolve().name
    repo = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    ignored = [f"{FOLDER}/checkpoint-*", f"{FOLDER}/checkpoint-*/**"]
    api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=ignored, commit_message="Alignment")


def load_clips(args: AlignArguments, seed: int) -> Dataset:
    """Load the clips with their transcripts.

    Raises:
        ValueError: as in `load_rows`, or an utterance of the corpus cannot be used.
    """
    if args.corpus is None:
        args.allow_foreign_responses = True  # responses are not learned here
        return load_rows(args, seed, None)
    source = {"corpus": args.corpus, "split": args.dataset_train_split}
    # The revision is part of the key in the cache of `datasets`; it is not used otherwise.
    revision = opened_corpus(args).revision
    try:
        clips = Dataset.from_generator(_utterances, features=FEATURES, gen_kwargs=source | {"revision": revision})
    except DatasetGenerationError as error:  # says nothing about the utterance
        raise error.__cause__ or error from None
    return clips.cast_column("audio", Audio(16_000, decode=False))


def opened_corpus(args: AlignArguments) -> Corpus | None:
    """Open the corpus of `--corpus`; None if the clips come from a self-powered set."""
    return None if args.corpus is None else open_corpus(args.corpus, args.dataset_train_split)


def _utterances(corpus: str, split: str, revision: str | None):
    yield from open_corpus(corpus, split)


def run(script_args: AlignArguments, training_args: LsmTrainingArguments, model_args: ModelConfig) -> None:
    main_process, output = PartialState().is_main_process, Path(training_args.output_dir)
    training_args.align_steps = training_args.align_steps or STEPS  # 0 steps make no sense here
    check_model(script_args, model_args)
    set_seed(training_args.seed)
    if script_args.text is not None:
        model_args.model_name_or_path = compose_base(script_args, training_args, model_args)
    model, processor = load_model(script_args, model_args)
    needs_alignment(model, training_args)
    if (corpus := opened_corpus(script_args)) is not None:
        warn_of_language(model.config, script_args.corpus, corpus.language)
    with PartialState().main_process_first():
        clips = load_clips(script_args, training_args.seed)
        store, clips = store_features(script_args.audio_feature_store, clips, model, processor)
        store, validation = validation_rows(script_args, store, model, processor)
    align(
        model,
        processor,
        clips,
        training_args,
        store=store,
        validation=validation,
        validation_steps=script_args.following_steps,
        identity=contents_of(script_args, model_args, corpus),
        main_process=main_process,
    )
    if main_process:
        model.save_pretrained(output, projector_only=script_args.projector_only)
        processor.save_pretrained(output)
        write_trained_card(
            output,
            title=output.name,
            base_models=base_models_of(model_args.model_name_or_path) or [model_args.model_name_or_path],
            datasets=[script_args.dataset_name],
            rows={"alignment": len(clips)},
            settings=non_defaults(script_args, training_args, model_args),
            log=[line for line in read_lines(output / FOLDER / LOG) if "loss" in line],
            following=[],
            adapter_of=None,
        )
        if training_args.push_to_hub:
            push(output, training_args)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parse(AlignArguments, LsmTrainingArguments, ModelConfig, description=__doc__)
    refuse_without_effect(*arguments)
    run(*arguments)
    leave_processes()


if __name__ == "__main__":
    main()
