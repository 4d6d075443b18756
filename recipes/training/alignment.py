"""Alignment: before the LLM is ever run, the projector learns to say the transcript in the LLM's own input embeddings.

The loss is CTC (Graves et al., 2006) over the word pieces of the transcript. A speech token is compared with what the
LLM already knows, the embeddings of its pieces, by cosines; only the blank is new. So the LLM later meets speech as
something that lies close to text, and learns to listen in a fraction of the steps. The LLM itself is not run, which
makes a step cheap enough for one CPU core.
"""

import itertools
import logging
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from recipes.evaluation.metrics import error_rate
from recipes.listening.collator import SpeechResponseCollator, render_prompt
from recipes.listening.features import AudioFeatureStore, audio_key
from recipes.training.callbacks import LOG, LogCallback
from recipes.training.checkpoints import WholeCheckpoints, find_checkpoint, naming_last_checkpoint, settings_of
from recipes.training.order import EpochSampler

logger = logging.getLogger(__name__)

FOLDER = "alignment"  # in the folder of the training that begins with it
OTHER_PIECES = 1500  # that a step is compared with besides the batch's own; a whole vocabulary costs many times as much
STEPS, WARMUP_STEPS = 3000, 100
MARK = "\ue000"  # of private use: no transcript has it
BLANK = 0


class AlignmentModel(nn.Module):
    """What learns in the alignment, the projector and the reader, and the rest of the LSM, which does not.

    Args:
        lsm: its audio tower and its embeddings are used; the LLM's layers are not.
        pieces: `(pieces,)` int64, the ids that a transcript may have.
    """

    def __init__(self, lsm: LsmForConditionalGeneration, pieces: torch.Tensor):
        super().__init__()
        self.projector = lsm.model.projector
        self.pieces = pieces
        # In a tuple, so that checkpoints hold what learns alone.
        self._lsm = (lsm,)

    @property
    def lsm(self) -> LsmForConditionalGeneration:
        return self._lsm[0]

    def log_probs(
        self, pieces: torch.Tensor, chunks: torch.Tensor, shift: int = 0, **audio
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read in a batch of clips, see [`forward`] for the arguments.

        Returns:
            Log-probabilities `(tokens, 1 + pieces)` of the blank and of the ids `pieces`, for all speech tokens one
            after the other; and how many each clip has `(clips,)`.
        """
        heard, frames = self.lsm.model.encode_audio(**audio)
        if shift:
            heard = torch.cat([heard[:, :1].expand(-1, shift, -1), heard], dim=1)
            frames = [length + shift for length in frames]
        speech = self.projector(heard, frames)
        counts = torch.tensor(num_audio_tokens(frames, **self.lsm.config.windowing))
        lengths = torch.stack([clip.sum() for clip in counts.split(chunks.tolist())])
        embeddings = self.lsm.get_input_embeddings().weight
        pieces = embeddings[pieces.to(embeddings.device)].detach()
        return self.projector.reader.logits(speech, pieces).log_softmax(-1), lengths

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
        """
        Args:
            labels: `(sum of label_lengths,)` int64, the transcripts' pieces one after the other, as places in `pieces`
                plus one.
            label_lengths: `(clips,)` int64, pieces of every clip.
            chunks: `(clips,)` int64, how many rows of audio every clip has.
            pieces: `(choices,)` int64, ids of the word pieces to choose from.
            shift: encoder frames by which the clips begin later, so that windows are cut elsewhere; as if the first
                frame had lasted longer.
            input_features, input_features_mask, audio_hidden_states: as in [`LsmForConditionalGeneration`].

        Returns:
            `loss`: the mean over clips of the CTC loss per piece.
        """
        audio = {"input_features_mask": input_features_mask, "audio_hidden_states": audio_hidden_states}
        log_probs, lengths = self.log_probs(pieces, chunks, shift, input_features=input_features, **audio)
        return {"loss": ctc_loss(log_probs, lengths, labels, label_lengths)}

    @torch.no_grad()
    def read(self, chunks: torch.Tensor, **audio) -> list[list[int]]:
        """The greedy reading of every clip as ids: the likeliest piece of each speech token, repeats merged, blanks
        dropped."""
        log_probs, lengths = self.log_probs(self.pieces, chunks, **audio)
        readings = []
        for clip in log_probs.argmax(-1).split(lengths.tolist()):
            merged = torch.unique_consecutive(clip)
            readings.append(self.pieces[merged[merged != BLANK].cpu() - 1].tolist())
        return readings


def ctc_loss(
    log_probs: torch.Tensor, speech_lengths: torch.Tensor, labels: torch.Tensor, label_lengths: torch.Tensor
) -> torch.Tensor:
    """The mean over clips of the CTC loss per piece.

    Args:
        log_probs: `(tokens, 1 + pieces)` of all clips one after the other, the blank's first.
        speech_lengths, label_lengths: `(clips,)` int64, speech tokens and pieces of every clip.
        labels: `(sum of label_lengths,)` int64, places in the last axis of `log_probs`.
    """
    lengths = speech_lengths.to(log_probs.device)
    places = torch.arange(int(speech_lengths.max()), device=lengths.device)[:, None] + lengths.cumsum(0) - lengths
    # What a clip has too much is another clip's, and no part of its loss. Not `pad_sequence`, whose backward copies the
    # whole batch once per clip.
    by_clip = log_probs.index_select(0, places.clamp(max=len(log_probs) - 1).flatten()).unflatten(0, places.shape)
    losses = nn.functional.ctc_loss(by_clip, labels, speech_lengths, label_lengths, blank=BLANK, reduction="none")
    return (losses / label_lengths.to(losses.device)).mean()


def known_pieces(processor: LsmProcessor, embeddings: int) -> torch.Tensor:
    """`(pieces,)` int64: the ids that stand for text."""
    never = set(non_text_token_ids(processor.tokenizer, embeddings))
    return torch.tensor([id for id in range(embeddings) if id not in never])


class Slot:
    """Word pieces of transcripts as they stand in the prompt: what comes before may change how the first one begins.

    Args:
        processor: of the LSM.
    """

    def __init__(self, processor: LsmProcessor):
        self.tokenizer, self.as_text = processor.tokenizer, processor.as_text
        self.before, self.after = render_prompt(
            processor, {"instruction": "Listen.", "transcript": MARK}, "transcript"
        ).split(MARK)

    def pieces(self, transcripts: Sequence[str]) -> list[list[int]]:
        """The ids of every transcript; none for a transcript without text."""
        transcripts = [self.as_text(transcript.strip()) for transcript in transcripts]
        if not self.tokenizer.is_fast:  # such tokenizers do not say which characters a token covers
            return self.tokenizer(transcripts, add_special_tokens=False).input_ids
        texts = [self.before + transcript + self.after for transcript in transcripts]
        tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        found = []
        for transcript, ids, spans in zip(transcripts, tokens.input_ids, tokens.offset_mapping, strict=True):
            first, last = len(self.before), len(self.before) + len(transcript)
            pairs = zip(ids, spans, strict=True)
            found.append([id for id, (start, end) in pairs if start < last and end > first and transcript])
        return found


def speech_tokens_needed(pieces: Sequence[int]) -> int:
    """The speech tokens that CTC needs at least: one for every piece, and a blank between two that are the same."""
    return len(pieces) + sum(a == b for a, b in itertools.pairwise(pieces))


def alignment_rows(dataset: Dataset, processor: LsmProcessor, embeddings: int) -> Dataset:
    """The clips of a set, each once, with the `pieces` of their transcripts and their `speech_tokens`.

    Clips that cannot be aligned are left out, and how many, why, is said in the log.

    Args:
        dataset: with `audio` or `audio_key`, `source`, `transcript` and `duration`; several rows may have one clip.
        processor: of the LSM.
        embeddings: that the LLM has.

    Raises:
        ValueError: no clip is left.
    """
    columns = dataset.select_columns(
        [name for name in ("source", "transcript", "duration") if name in dataset.features]
    )
    clips = {key: row for row, key in enumerate(zip(*columns[:].values(), strict=True)) if key[-1] is not None}
    audio = [name for name in ("audio", "audio_key") if name in dataset.features]
    dataset = dataset.select(sorted(clips.values())).select_columns([*audio, "transcript", "duration"])
    slot, allowed = Slot(processor), set(known_pieces(processor, embeddings).tolist())
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
            "%d of %d clips have more word pieces than speech tokens and are left out of the alignment: a smaller "
            "--window-frames or more --queries-per-window of recipes.listening.composing would give them more tokens.",
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
        counts: `(vocabulary,)` float: how often each id is drawn to be chosen from besides the batch's own; 0 for those
            that are no text.
        others: how many are drawn. Which ones is a function of the batch, so that a resumed training draws the same.
    """

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    others: int = OTHER_PIECES

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        audio, num_samples = self._audio(rows)
        pieces = torch.tensor([id for row in rows for id in row["pieces"]])
        own, labels = pieces.unique(return_inverse=True)
        return {
            "labels": labels + 1,
            "label_lengths": torch.tensor([len(row["pieces"]) for row in rows]),
            "chunks": torch.tensor([len(self.processor.chunk_lengths(samples)) for samples in num_samples]),
            "pieces": torch.cat([own, self._draw(own, zlib.crc32(pieces.numpy().tobytes()))]),
            **audio,
        }

    def _draw(self, own: torch.Tensor, seed: int) -> torch.Tensor:
        counts = self.counts.clone()
        counts[own] = 0
        drawn = min(self.others, int((counts > 0).sum()))
        if not drawn:
            return own[:0]
        return torch.multinomial(counts, drawn, generator=torch.Generator().manual_seed(seed))


class AlignmentTrainer(WholeCheckpoints, Trainer):
    """Trainer of an [`AlignmentModel`], in batches of clips of like length."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "the alignment needs the projector whole on each device: run recipes.align without FSDP and DeepSpeed "
                "first, and this training from what it wrote; or train without alignment (--align_steps 0)."
            )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over clips

    def compute_loss(self, model, inputs, **kwargs):
        """Windows are cut elsewhere at every step, the same on all devices and in a training that goes on: cut as they
        come, a training set of hours is learned by heart."""
        step = random.Random(f"{self.args.seed} {self.state.global_step}")
        shift = step.randrange(self.model.lsm.config.window_frames)
        return super().compute_loss(model, {**inputs, "shift": shift}, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        batch = self.args.train_batch_size * self.accelerator.num_processes
        self.sampler = EpochSampler(len(self.train_dataset), self.args.seed, self.train_dataset["duration"], batch)
        return self.sampler


class _Epochs(TrainerCallback):
    """Tells the sampler its epoch; a resumed training would begin with the first one again."""

    def __init__(self, trainer: AlignmentTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.set_epoch(int(state.epoch + 1e-6))


class ReadingCallback(TrainerCallback):
    """Every so many steps, the word error rate of the greedy reading; to the alignment's `log.jsonl`.

    Args:
        model: what learns.
        collator: of the training; `rows` have what it takes.
        rows: as [`alignment_rows`] gives them.
        every: steps between two readings; the last step has one, too.
    """

    def __init__(self, model: AlignmentModel, collator: AlignmentCollator, rows: Dataset, every: int):
        self.model, self.collator, self.rows, self.every = model, collator, rows, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and (
            state.global_step % self.every == 0 or state.global_step == state.max_steps
        ):
            rate = reading_error_rate(self.model, self.collator, self.rows)
            logger.info("step %d of the alignment: WER of the reading %.1f %%", state.global_step, 100 * rate)
            record = {"step": state.global_step, "max_steps": state.max_steps, "reading_wer": rate}
            append_lines(Path(args.output_dir) / LOG, [record])


def reading_error_rate(
    model: AlignmentModel, collator: AlignmentCollator, rows: Dataset, batch_size: int = 32
) -> float:
    """The word error rate of the greedy reading, after Whisper's normaliser."""
    tokenizer, device, was_training = collator.processor.tokenizer, model.projector.reader.scale.device, model.training
    model.eval()
    readings: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        audio = {name: batch[name].to(device) for name in batch if name.startswith(("input_features", "audio_"))}
        readings += tokenizer.batch_decode(model.read(batch["chunks"], **audio))
    model.train(was_training)
    return error_rate(rows["transcript"], readings)[1].value


def validation_rows(args, store: AudioFeatureStore | None) -> Dataset | None:
    """The clips of `--following_corpus`, whose reading is measured; None if there is none.

    Args:
        args: [`LsmScriptArguments`].
        store: of their features, if there is one.
    """
    if not args.following_corpus:
        return None
    dataset = load_corpus(args.following_corpus, args.following_split, limit=args.following_limit)
    if store is None or not all(audio_key(row["audio"]) in store for row in dataset):
        return dataset
    return dataset.map(lambda row: {"audio_key": audio_key(row["audio"])}, remove_columns="audio")


def piece_counts(rows: Dataset, pieces: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """`(vocabulary,)` float: how often each id occurs in the transcripts, plus one; 0 for ids that are no text."""
    counts = torch.zeros(vocabulary)
    counts[pieces] = 1.0
    found = np.bincount([id for ids in rows["pieces"] for id in ids], minlength=vocabulary)
    return counts + torch.from_numpy(found).float()


def needs_alignment(model: LsmForConditionalGeneration, args) -> bool:
    """Whether a training begins with the alignment; how many steps it then takes is written into `args`.

    Args:
        model: the LSM. A projector that has learned already, or is a plain map, is left alone, unless `args` asks for
            it.
        args: [`LsmTrainingArguments`].

    Raises:
        ValueError: `args` asks for the alignment of a plain map.
    """
    if args.align_steps is None:
        args.align_steps = 0 if model.config.projector_trained or not model.config.pieces_per_token else STEPS
    if args.align_steps and not model.config.pieces_per_token:
        raise ValueError(
            f"--align_steps {args.align_steps}, but the LSM's projector is a plain map (pieces_per_token is 0), which "
            "reads no word pieces: compose the LSM with --pieces-per-token 8, or train it with --align_steps 0."
        )
    if not args.align_steps and not model.config.projector_trained and model.config.pieces_per_token:
        logger.warning(
            "The projector is to read word pieces, which it never learned: align it first (--align_steps 3000), or "
            "compose the LSM with --pieces-per-token 0, a plain map."
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
    """Align the model's projector; an interrupted alignment goes on, and a finished one is read from its folder.

    Args:
        model: the LSM; its projector is changed.
        processor: its own.
        dataset: the training's rows, see [`alignment_rows`].
        args: [`LsmTrainingArguments`], of which the `align_*` settings are used, and where
            and on what it runs. Checkpoints and log are in `OUTPUT_DIR/alignment`.
        store: of the clips' features.
        validation: clips whose reading is measured, as `dataset`.
        validation_steps: steps between two measurements.
        identity: what else the alignment is a function of: what model and set hold.
        main_process: whether this process writes.

    Raises:
        ValueError: no clip can be aligned, or the folder holds an alignment with other settings.
    """
    settings = alignment_arguments(args)
    anew = "false" if (args.resume_from_checkpoint or "").lower() == "false" else None
    embeddings = model.get_input_embeddings().weight.shape[0]
    rows = alignment_rows(dataset, processor, embeddings)
    clips = {"clips": zlib.crc32(repr((rows["pieces"][:], rows["speech_tokens"][:])).encode())}
    made_of = settings_of(settings) | (identity or {}) | clips
    checkpoint = find_checkpoint(settings.output_dir, made_of, anew, main_process)
    pieces = known_pieces(processor, embeddings)
    collator = AlignmentCollator(processor, store, counts=piece_counts(rows, pieces, embeddings))
    if model.device != settings.device:  # weights in 4 bits are where they stay
        model.to(settings.device)
    aligned = AlignmentModel(model, pieces)
    model.config.projector_trained = True
    trainer = AlignmentTrainer(
        model=aligned, args=settings, train_dataset=rows, data_collator=collator, callbacks=[LogCallback()]
    )
    trainer.add_callback(_Epochs(trainer))
    if validation is not None:
        held_out = alignment_rows(validation, processor, embeddings)
        trainer.add_callback(ReadingCallback(aligned, collator, held_out, validation_steps))
    if checkpoint is not None and checkpoint.endswith(f"-{settings.max_steps}"):
        trainer._load_from_checkpoint(checkpoint)
    else:
        with naming_last_checkpoint(settings.output_dir):
            trainer.train(resume_from_checkpoint=checkpoint)
    return aligned


def alignment_arguments(args) -> TrainingArguments:
    """Settings of the alignment that a training begins with."""
    return TrainingArguments(
        output_dir=str(Path(args.output_dir) / FOLDER),
        max_steps=args.align_steps,
        learning_rate=args.align_learning_rate,
        per_device_train_batch_size=args.align_batch_size,
        warmup_steps=min(WARMUP_STEPS, math.ceil(args.align_steps / 10)),
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        seed=args.seed,
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=args.save_steps,
        save_total_limit=1,
        dataloader_num_workers=args.dataloader_num_workers,
        dataloader_pin_memory=args.dataloader_pin_memory,
        remove_unused_columns=False,
        disable_tqdm=args.disable_tqdm,
        report_to="none",
    )
