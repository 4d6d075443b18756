"""Alignment: the projector learns to read the transcript as the LLM's own word pieces.

The loss is CTC (Graves et al., 2006) over the word pieces of the transcript. Each speech token is compared, by cosines,
with the reading embeddings of the pieces; only the blank is new. Speech then lies close to text, and the LLM learns to
listen in a fraction of the steps. The LLM itself is not run, so a step is cheap enough for one CPU core.
"""

import itertools
import logging
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from configuration_lsm import num_audio_tokens
from dataset_builders.corpora.opening import load_corpus
from dataset_builders.files import append_lines
from language_models.tokenizers import non_text_token_ids
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import LsmProcessor
from recipes.evaluation.metrics import error_rate, missed_by_occurrence, normalize_text
from recipes.listening.collator import SpeechResponseCollator, render_prompt
from recipes.listening.features import AudioFeatureStore, store_features
from recipes.training.callbacks import LOG, LogCallback
from recipes.training.checkpoints import WholeCheckpoints, find_checkpoint, naming_last_checkpoint, settings_of
from recipes.training.order import EpochSampler

logger = logging.getLogger(__name__)

FOLDER = "alignment"  # subfolder of the training's folder
NEAR_PIECES = 6  # for each of the batch's own
OTHER_PIECES = 1500  # pieces in a step besides the batch's own; the whole vocabulary would cost many times as much
STEPS, WARMUP_STEPS = 3000, 100
# By `reading_embeddings`. What starts from Whisper's decoder reads better after smaller steps.
LEARNING_RATES = {"text": 1e-3, "audio": 3e-4}
# Options of a training that its alignment shares.
SHARED = ("seed", "use_cpu", "bf16", "fp16", "logging_steps", "save_steps", "disable_tqdm")
SHARED += ("dataloader_num_workers", "dataloader_pin_memory")
MARK = "\ue000"  # a character for private use, which no transcript has
BLANK = 0


class AlignmentModel(nn.Module):
    """The model of the alignment. The projector and its reader learn; the rest of the LSM is frozen.

    Args:
        lsm: the LSM, of which the audio tower and the embeddings are used, but not the LLM's layers.
        pieces: `(pieces,)` int64, the ids that a transcript may have.
    """

    def __init__(self, lsm: LsmForConditionalGeneration, pieces: torch.Tensor):
        super().__init__()
        self.projector = lsm.model.projector
        self.pieces = pieces
        # In a tuple, so that checkpoints contain only the trained parameters.
        self._lsm = (lsm,)

    @property
    def lsm(self) -> LsmForConditionalGeneration:
        return self._lsm[0]

    def log_probs(
        self, pieces: torch.Tensor, chunks: torch.Tensor, shift: int = 0, **audio
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of a batch of clips; see [`forward`] for the arguments.

        Returns:
            Log-probabilities `(tokens, 1 + pieces)` of the blank and of the ids `pieces` for the speech tokens of all
            clips, one clip after the other, and the number of speech tokens of each clip `(clips,)`.
        """
        states, frames = self.lsm.model.encode_audio(**audio)
        if shift:
            states = torch.cat([states[:, :1].expand(-1, shift, -1), states], dim=1)
            frames = [length + shift for length in frames]
        speech = self.projector(states, frames)
        counts = torch.tensor(num_audio_tokens(frames, **self.lsm.config.windowing))
        lengths = torch.stack([clip.sum() for clip in counts.split(chunks.tolist())])
        vectors = self.lsm.model.get_reading_embeddings().weight
        vectors = vectors[pieces.to(vectors.device)].detach()
        return self.projector.reader.logits(speech, vectors).log_softmax(-1), lengths

    def forward(
        self,
        labels: torch.Tensor,
        label_lengths: torch.Tensor,
        chunks: torch.Tensor,
        pieces: torch.Tensor,
        shift: int = 0,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the loss of a batch of clips.

        Args:
            labels: `(sum of label_lengths,)` int64, the pieces of all transcripts, one transcript after the other, as
                indices of `pieces` plus one.
            label_lengths: `(clips,)` int64, number of pieces of each clip.
            chunks: `(clips,)` int64, number of rows of audio of each clip.
            pieces: `(choices,)` int64, ids of the word pieces to choose from.
            shift: how often the first encoder frame is repeated, so that the windows are cut at other places.
            input_features, input_features_mask, audio_hidden_states: as in [`LsmForConditionalGeneration`].

        Returns:
            `loss`: the mean over clips of the CTC loss per piece.
        """
        audio = {"input_features_mask": input_features_mask, "audio_hidden_states": audio_hidden_states}
        log_probs, lengths = self.log_probs(pieces, chunks, shift, input_features=input_features, **audio)
        return {"loss": ctc_loss(log_probs, lengths, labels, label_lengths)}

    @torch.no_grad()
    def read(self, chunks: torch.Tensor, **audio) -> list[list[int]]:
        """Return the greedy CTC decoding of each clip as ids: the most likely piece of each speech token, without
        repetitions and blanks."""
        log_probs, lengths = self.log_probs(self.pieces, chunks, **audio)
        readings = []
        for clip in log_probs.argmax(-1).split(lengths.tolist()):
            merged = torch.unique_consecutive(clip)
            readings.append(self.pieces[merged[merged != BLANK].cpu() - 1].tolist())
        return readings


def ctc_loss(
    log_probs: torch.Tensor, speech_lengths: torch.Tensor, labels: torch.Tensor, label_lengths: torch.Tensor
) -> torch.Tensor:
    """Return the mean over clips of the CTC loss per piece.

    Args:
        log_probs: `(tokens, 1 + pieces)` of all clips, one clip after the other; the blank comes first.
        speech_lengths, label_lengths: `(clips,)` int64, number of speech tokens and of pieces of each clip.
        labels: `(sum of label_lengths,)` int64, indices in the last axis of `log_probs`.
    """
    lengths = speech_lengths.to(log_probs.device)
    places = torch.arange(int(speech_lengths.max()), device=lengths.device)[:, None] + lengths.cumsum(0) - lengths
    # Short clips are padded with tokens of the next clips, which CTC ignores. The backward pass of `pad_sequence` would
    # copy the whole batch once per clip.
    by_clip = log_probs.index_select(0, places.clamp(max=len(log_probs) - 1).flatten()).unflatten(0, places.shape)
    losses = nn.functional.ctc_loss(by_clip, labels, speech_lengths, label_lengths, blank=BLANK, reduction="none")
    return (losses / label_lengths.to(losses.device)).mean()


def text_pieces(processor: LsmProcessor, embeddings: int) -> torch.Tensor:
    """Return the ids of tokens with text, `(pieces,)` int64."""
    without_text = set(non_text_token_ids(processor.tokenizer, embeddings))
    return torch.tensor([id for id in range(embeddings) if id not in without_text])


class Slot:
    """Tokenises transcripts as they are in the prompt, because the text before them may change the first word piece.

    Args:
        processor: the LSM's processor.
    """

    def __init__(self, processor: LsmProcessor):
        self.tokenizer, self.as_text = processor.tokenizer, processor.as_text
        self.before, self.after = render_prompt(
            processor, {"instruction": "Listen.", "transcript": MARK}, "transcript"
        ).split(MARK)

    def pieces(self, transcripts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each transcript; an empty list for a transcript without text."""
        transcripts = [self.as_text(transcript.strip()) for transcript in transcripts]
        if not self.tokenizer.is_fast:  # such tokenizers do not say which characters a token covers
            return self.tokenizer(transcripts, add_special_tokens=False).input_ids
        texts = [self.before + transcript + self.after for transcript in transcripts]
        tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        pieces = []
        for transcript, ids, spans in zip(transcripts, tokens.input_ids, tokens.offset_mapping, strict=True):
            first, last = len(self.before), len(self.before) + len(transcript)
            pairs = zip(ids, spans, strict=True)
            pieces.append([id for id, (start, end) in pairs if start < last and end > first and transcript])
        return pieces


def speech_tokens_needed(pieces: Sequence[int]) -> int:
    """Return the least number of speech tokens for CTC: one for each piece, and a blank between two equal pieces."""
    return len(pieces) + sum(a == b for a, b in itertools.pairwise(pieces))


def alignment_rows(dataset: Dataset, processor: LsmProcessor, embeddings: int) -> Dataset:
    """Return the clips of a set, each once, with the `pieces` of their transcripts and their `speech_tokens`.

    Clips that cannot be aligned are left out; the log says how many and why.

    Args:
        dataset: rows with `audio` or `audio_key`, `source`, `transcript` and `duration`; several may have the same
            clip.
        processor: the LSM's processor.
        embeddings: number of embeddings of the LLM.

    Raises:
        ValueError: no clip is left.
    """
    columns = dataset.select_columns(
        [name for name in ("source", "transcript", "duration") if name in dataset.features]
    )
    clips = {key: row for row, key in enumerate(zip(*columns[:].values(), strict=True)) if key[-1] is not None}
    audio = [name for name in ("audio", "audio_key") if name in dataset.features]
    dataset = dataset.select(sorted(clips.values())).select_columns([*audio, "transcript", "duration"])
    slot, allowed = Slot(processor), set(text_pieces(processor, embeddings).tolist())
    rate = processor.feature_extractor.sampling_rate

    def measure(rows: dict[str, list]) -> dict[str, list]:
        pieces = [[id for id in ids if id in allowed] for ids in slot.pieces(rows["transcript"])]
        samples = [max(1, round(duration * rate)) for duration in rows["duration"]]
        return {"pieces": pieces, "speech_tokens": [processor.num_audio_tokens([length])[0] for length in samples]}

    dataset = dataset.map(measure, batched=True, desc="measuring clips")
    pairs = list(zip(dataset["pieces"], dataset["speech_tokens"], strict=True))
    fit = [row for row, (pieces, tokens) in enumerate(pairs) if pieces and speech_tokens_needed(pieces) <= tokens]
    empty = sum(not pieces for pieces, _ in pairs)
    if crowded := len(pairs) - len(fit) - empty:
        logger.warning(
            "%d of %d clips have more word pieces than speech tokens and are left out of the alignment; to use them, "
            "compose the LSM with a smaller --window-frames or more --queries-per-window.",
            crowded,
            len(pairs),
        )
    if empty:
        logger.warning("%d of %d clips have a transcript without text and are left out.", empty, len(pairs))
    if not fit:
        raise ValueError(
            f"none of {len(pairs)} clips can be aligned: {crowded} have more word pieces than speech tokens, {empty} "
            "have no text. Compose the LSM with a smaller --window-frames."
        )
    return dataset.select(fit)


@dataclass
class AlignmentCollator(SpeechResponseCollator):
    """Rows of [`alignment_rows`] → the arguments of [`AlignmentModel.forward`].

    Args:
        weights: `(vocabulary,)` float, for drawing ids besides the batch's own; see [`piece_weights`].
        near: `(vocabulary, n)` int64, ids that are to be told apart from each of the batch's own; see [`near_pieces`].
        others: number of ids to draw. The draw depends only on the batch, so that a resumed training draws the same.
    """

    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    near: torch.Tensor | None = None
    others: int = OTHER_PIECES

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        audio, num_samples = self._audio(rows)
        pieces = torch.tensor([id for row in rows for id in row["pieces"]])
        own, labels = pieces.unique(return_inverse=True)
        others = self._draw(own, zlib.crc32(pieces.numpy().tobytes()))
        if self.near is not None:
            others = torch.cat([others, self.near[own].flatten()]).unique()
            others = others[~torch.isin(others, own)]
        return {
            "labels": labels + 1,
            "label_lengths": torch.tensor([len(row["pieces"]) for row in rows]),
            "chunks": torch.tensor([len(self.processor.chunk_lengths(samples)) for samples in num_samples]),
            "pieces": torch.cat([own, others]),
            **audio,
        }

    def _draw(self, own: torch.Tensor, seed: int) -> torch.Tensor:
        weights = self.weights.clone()
        weights[own] = 0
        drawn = min(self.others, int((weights > 0).sum()))
        if not drawn:
            return own[:0]
        return torch.multinomial(weights, drawn, generator=torch.Generator().manual_seed(seed))


class AlignmentTrainer(WholeCheckpoints, Trainer):
    """Trainer of an [`AlignmentModel`], with batches of clips of similar length."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "the alignment needs the whole projector on each device, which FSDP and DeepSpeed divide: first run "
                "recipes.align without them, then train its output; or train without alignment (--align_steps 0)."
            )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over clips

    def compute_loss(self, model, inputs, **kwargs):
        """Cut the windows at another place in every step (the same on all devices and after resuming), because
        otherwise the projector would memorise a training set of a few hours."""
        step = random.Random(f"{self.args.seed} {self.state.global_step}")
        shift = step.randrange(self.model.lsm.config.window_frames)
        return super().compute_loss(model, {**inputs, "shift": shift}, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        batch = self.args.train_batch_size * self.accelerator.num_processes
        self.sampler = EpochSampler(len(self.train_dataset), self.args.seed, self.train_dataset["duration"], batch)
        return self.sampler


class _Epochs(TrainerCallback):
    """Sets the sampler's epoch, because a resumed training would otherwise begin with the first one again."""

    def __init__(self, trainer: AlignmentTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.set_epoch(int(state.epoch + 1e-6))


class ReadingCallback(TrainerCallback):
    """Measures the word error rate of the greedy decoding every few steps, and the words that are missed by how often
    the training has them, and writes both to the alignment's `log.jsonl`.

    Args:
        model: the model that is trained.
        collator: the collator of the training.
        rows: held-out clips from [`alignment_rows`].
        every: steps between two measurements; the last step is also measured.
        transcripts: those of the training.
    """

    def __init__(
        self,
        model: AlignmentModel,
        collator: AlignmentCollator,
        rows: Dataset,
        every: int,
        transcripts: Iterable[str],
    ):
        self.model, self.collator, self.rows, self.every = model, collator, rows, every
        self.transcripts = transcripts

    @cached_property
    def occurrences(self) -> Counter:
        """Number of occurrences of each word in the training. Only the process that writes the log counts them."""
        return Counter(word for text in self.transcripts for word in normalize_text(text, "en").split())

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and (
            state.global_step % self.every == 0 or state.global_step == state.max_steps
        ):
            texts = self.rows["transcript"][:], read_clips(self.model, self.collator, self.rows)
            rate = error_rate(*texts)[1].value
            logger.info("step %d of the alignment: WER %.1f %% on held-out clips", state.global_step, 100 * rate)
            measured = {"reading_wer": rate, "missed_words": missed_by_occurrence(*texts, self.occurrences)}
            record = {"step": state.global_step, "max_steps": state.max_steps, **measured}
            append_lines(Path(args.output_dir) / LOG, [record])


def read_clips(model: AlignmentModel, collator: AlignmentCollator, rows: Dataset, batch_size: int = 32) -> list[str]:
    """Return the greedy decoding of each clip."""
    tokenizer, device, was_training = collator.processor.tokenizer, model.projector.reader.scale.device, model.training
    model.eval()
    readings: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        audio = {name: batch[name].to(device) for name in batch if name.startswith(("input_features", "audio_"))}
        readings += tokenizer.batch_decode(model.read(batch["chunks"], **audio))
    model.train(was_training)
    return readings


def validation_rows(
    args, store: AudioFeatureStore | None, model: LsmForConditionalGeneration, processor: LsmProcessor
) -> tuple[AudioFeatureStore | None, Dataset | None]:
    """Return the store, which now has the clips of `--following_corpus` too, and these clips, on which the WER is
    measured; the unchanged store and None if the option is unset.

    Args:
        args: [`LsmScriptArguments`].
        store: store of the audio tower's output, if there is one.
        model: the LSM, whose audio tower fills the store.
        processor: the LSM's processor.

    Raises:
        ValueError: a clip cannot be stored, as in [`AudioFeatureStore.build`].
    """
    if not args.following_corpus:
        return store, None
    dataset = load_corpus(args.following_corpus, args.following_split, limit=args.following_limit)
    return store_features(args.audio_feature_store, dataset, model, processor)


def piece_weights(rows: Dataset, pieces: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return the weights with which the other pieces of a step are drawn, `(vocabulary,)` float: half by their share in
    the transcripts, half alike, because the reader must also learn not to choose pieces that no transcript has; 0 for
    ids without text."""
    occurrences = np.bincount([id for ids in rows["pieces"] for id in ids], minlength=vocabulary)
    weights = torch.from_numpy(occurrences / occurrences.sum()).float()
    weights[pieces] += 1 / len(pieces)
    return weights


@torch.no_grad()
def near_pieces(rows: Dataset, pieces: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the ids of `pieces` whose vectors are nearest to that of each id, `(vocabulary, 1 + NEAR_PIECES)` int64,
    with itself among them; for ids that do not occur in `rows`, itself alone. Other spellings of a word, with a capital
    or without a space, are near, and a draw from all pieces hardly ever has them."""
    vectors = vectors.detach().float()
    vectors = nn.functional.normalize(vectors - vectors[pieces].mean(0), dim=-1)
    count = min(1 + NEAR_PIECES, len(pieces))
    near = torch.arange(len(vectors))[:, None].repeat(1, count)
    occurring = {id for clip in rows["pieces"] for id in clip}
    for ids in torch.tensor(sorted(occurring)).split(1024):
        near[ids] = pieces[(vectors[ids] @ vectors[pieces].T).topk(count).indices.cpu()]
    return near


def needs_alignment(model: LsmForConditionalGeneration, args) -> bool:
    """Return whether a training begins with the alignment. If `args.align_steps` is None, it is set here.

    Args:
        model: the LSM. By default, a projector is not aligned if it was trained before, or has no reader.
        args: [`LsmTrainingArguments`].

    Raises:
        ValueError: `args` asks for alignment, but the projector has no reader.
    """
    if args.align_steps is None:
        args.align_steps = 0 if model.config.projector_trained or not model.config.pieces_per_token else STEPS
    if args.align_steps and not model.config.pieces_per_token:
        raise ValueError(
            f"--align_steps is {args.align_steps}, but the LSM's projector has no reader of word pieces "
            "(pieces_per_token is 0): compose the LSM with --pieces-per-token 8, or train it with --align_steps 0."
        )
    if not args.align_steps and not model.config.projector_trained and model.config.pieces_per_token:
        logger.warning(
            "The projector's reader of word pieces was never trained: align it first (--align_steps 3000), or compose "
            "the LSM without a reader (--pieces-per-token 0)."
        )
    return args.align_steps > 0


def align(
    model: LsmForConditionalGeneration,
    processor: LsmProcessor,
    dataset: Dataset,
    args,
    *,
    store: AudioFeatureStore | None = None,
    validation: Dataset | None = None,
    validation_steps: int = 200,
    identity: dict | None = None,
    main_process: bool = True,
) -> AlignmentModel:
    """Align the model's projector. An interrupted alignment is resumed, and a finished one is loaded from its folder.

    Args:
        model: the LSM, whose projector is changed.
        processor: the LSM's processor.
        dataset: rows of the training, see [`alignment_rows`].
        args: [`LsmTrainingArguments`]. The alignment uses `align_*`, and the settings of device, logs and checkpoints.
            Its checkpoints and log are in `OUTPUT_DIR/alignment`.
        store: store of the audio tower's output.
        validation: held-out clips, with the columns of `dataset`, on which the WER is measured.
        validation_steps: steps between two measurements.
        identity: fingerprints of the model and the set, which must be the same when an alignment is resumed.
        main_process: whether this process writes.

    Raises:
        ValueError: no clip can be aligned, or the folder holds an alignment with other settings.
    """
    if args.align_learning_rate is None:
        args.align_learning_rate = LEARNING_RATES[model.config.reading_embeddings]
    settings = alignment_arguments(args)
    resume = "false" if (args.resume_from_checkpoint or "").lower() == "false" else None
    embeddings = model.get_input_embeddings().weight.shape[0]
    rows = alignment_rows(dataset, processor, embeddings)
    clips = {"clips": zlib.crc32(repr((rows["pieces"][:], rows["speech_tokens"][:])).encode())}
    made_of = settings_of(settings) | (identity or {}) | clips
    checkpoint = find_checkpoint(settings.output_dir, made_of, resume, main_process)
    pieces = text_pieces(processor, embeddings)
    if model.device != settings.device:  # weights in 4 bits are already there and cannot be moved
        model.to(settings.device)
    near = near_pieces(rows, pieces, model.model.get_reading_embeddings().weight)
    collator = AlignmentCollator(processor, store, weights=piece_weights(rows, pieces, embeddings), near=near)
    aligned = AlignmentModel(model, pieces)
    model.config.projector_trained = True
    trainer = AlignmentTrainer(
        model=aligned, args=settings, train_dataset=rows, data_collator=collator, callbacks=[LogCallback()]
    )
    trainer.add_callback(_Epochs(trainer))
    if validation is not None:
        held_out = alignment_rows(validation, processor, embeddings)
        trainer.add_callback(ReadingCallback(aligned, collator, held_out, validation_steps, rows["transcript"]))
    if checkpoint is not None and checkpoint.endswith(f"-{settings.max_steps}"):
        trainer._load_from_checkpoint(checkpoint)
    else:
        with naming_last_checkpoint(settings.output_dir):
            trainer.train(resume_from_checkpoint=checkpoint)
    return aligned


def alignment_arguments(args) -> TrainingArguments:
    """Return the settings of the alignment from those of the training."""
    return TrainingArguments(
        output_dir=str(Path(args.output_dir) / FOLDER),
        max_steps=args.align_steps,
        learning_rate=args.align_learning_rate,
        per_device_train_batch_size=args.align_batch_size,
        warmup_steps=min(WARMUP_STEPS, math.ceil(args.align_steps / 10)),
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_nan_inf_filter=False,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        **{name: getattr(args, name) for name in SHARED},
    )
