"""Store the output of the frozen audio tower on disk. It never changes, so epochs and models can share it.

`recipes.store_features` builds a store; `--audio_feature_store` of `recipes.align` and `recipes.sft` reads it and adds
the clips that it lacks, and `--audio-feature-store` of `recipes.evaluate` reads it.
"""

import fcntl
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from configuration_lsm import LsmConfig, num_encoder_frames
from dataset_builders.corpora.audio import decode
from dataset_builders.files import append_lines, differences, partial_of, read_lines
from processing_lsm import LsmProcessor, load_audio

logger = logging.getLogger(__name__)

CLIPS, FRAMES = "clips.jsonl", "hidden_states.f16"
SPAN_BATCHES = 16  # batches that are sorted together; with 32 clips of 30 s each, 1 GB
# Clips are padded to a multiple of this number of mel frames (1 s), because oneDNN compiles kernels for every new shape
# and keeps them in memory.
SHAPES = 100


def audio_key(audio: dict) -> str:
    """Return the key of a clip in a store: the hash of its file's bytes."""
    content = audio["bytes"] if audio.get("bytes") is not None else Path(audio["path"]).read_bytes()
    return hashlib.sha256(content).hexdigest()[:32]


def load_clip(row: dict, use: str = "used", rate: int = 16_000) -> np.ndarray:
    """Return the waveform `(samples,)` float32 at `rate` Hz of a row's `audio`, which may be anything that `load_audio`
    takes.

    Raises:
        ValueError: the clip cannot be read or is cut off. Names the row and says what to do.
    """
    audio = row["audio"]
    try:
        of_file = isinstance(audio, dict) and "array" not in audio
        return decode(audio, rate) if of_file else load_audio(audio, target_rate=rate)
    except ValueError as error:
        raise ValueError(
            f"row {row.get('id')!r} has a clip that cannot be {use}: {str(error).rstrip('.')}. Leave the row out, or "
            "repair its file and build the set again; a build without --trust-headers leaves such files out."
        ) from error


class AudioFeatureStore:
    """Outputs of an audio tower on disk by `audio_key`, memory-mapped in float16.

    Only clips of at most one chunk (30 s) can be stored. `clips.jsonl` has a line about the encoder, then a line for
    each clip with its key, encoder frames and samples. A build appends a line after the clip's frames are on disk, so
    an interrupted build can continue, and a store can grow while others read it.

    Raises:
        ValueError: the folder is not a store, or has an older format that does not name the encoder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / CLIPS).is_file():
            raise ValueError(
                f"{folder} is not a feature store, or has an older format that does not name its encoder; delete it, "
                "so that it is built again, or name another folder."
            )
        self.encoder, self.clips = _read_clips(self.folder)
        shape = sum(frames for _, frames, _ in self.clips.values()), self.encoder["width"]
        self.frames = np.memmap(self.folder / FRAMES, np.float16, mode="r", shape=shape)

    def check(self, model) -> "AudioFeatureStore":
        """Return this store after checking that it fits the model.

        Raises:
            ValueError: the store was built with another encoder, or with another padding.
        """
        now = encoder_identity(model)
        if changed := differences({name: self.encoder[name] for name in now}, now):
            names = ", ".join(f"{name} {was}, not {now}" for name, (was, now) in changed.items())
            raise ValueError(
                f"{self.folder} was built with another model ({names}); delete it, so that it is built again, or "
                "name another feature store."
            )
        return self

    def __contains__(self, key: str) -> bool:
        return key in self.clips

    def num_samples(self, key: str) -> int:
        """Return the number of samples of the clip at 16 kHz."""
        return self.clips[key][2]

    def batch(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the audio inputs of the model, padded with zeros to the longest clip: `audio_hidden_states` `(clips,
        encoder_frames, d_audio)` float32 and `input_features_mask` `(clips, frames)` int64, two mel frames per encoder
        frame."""
        spans = [self.clips[key] for key in keys]
        longest = max(frames for _, frames, _ in spans)
        hidden = torch.zeros(len(spans), longest, self.frames.shape[1])
        mask = torch.zeros(len(spans), 2 * longest, dtype=torch.long)
        for row, (start, frames, _) in enumerate(spans):
            hidden[row, :frames] = torch.from_numpy(self.frames[start : start + frames].astype(np.float32))
            mask[row, : 2 * frames] = 1
        return {"audio_hidden_states": hidden, "input_features_mask": mask}

    @classmethod
    def build(cls, folder: str | Path, model, processor: LsmProcessor, audio: Iterable[dict], batch_size: int = 32):
        """Run every distinct clip that is not in the store yet through `model`'s audio tower. An interrupted build is
        continued, and a complete store grows. If it has all clips, nothing is written, so it may be read-only.

        Args:
            folder: folder of the store; a new one appears when the store is complete.
            model: an LSM, of which only the audio tower is used.
            processor: the LSM's processor.
            audio: clips as `{"bytes", "path"}`.
            batch_size: number of clips that are encoded together.

        Raises:
            ValueError: a clip cannot be read or is longer than one chunk, or another encoder built the store.
        """
        folder = Path(folder)
        store = cls(folder).check(model) if folder.exists() else None
        missing = (clip for clip in audio if store is None or audio_key(clip) not in store)
        first = list(itertools.islice(missing, 1))
        if store is not None and not first:
            return store
        missing = itertools.chain(first, missing)
        place = partial_of(folder) if store is None else folder
        place.mkdir(parents=True, exist_ok=True)
        with (place / CLIPS).open("a", encoding="utf-8") as index:
            fcntl.flock(index, fcntl.LOCK_EX)  # another process may be building it
            built_by_another = store is None and folder.exists()
            if not built_by_another:
                _write(place, index, encoder_identity(model), model, processor, missing, batch_size)
                if store is None:
                    os.replace(place, folder)
        if built_by_another:  # perhaps of other clips
            return cls.build(folder, model, processor, missing, batch_size)
        return cls(folder).check(model)


def encoder_identity(model) -> dict:
    """Return what determines the tower's output: `encoder`, a hash of its weights (the same for every dtype), `padding`
    and `width`. There is no `encoder` if the devices share its weights (DeepSpeed's ZeRO-3)."""
    identity = {"padding": model.config.audio_padding, "width": model.config.audio_config.d_model}
    tower = hashlib.sha256()
    for name, weights in sorted(model.model.audio_tower.state_dict().items()):
        if not weights.numel():
            return identity
        tower.update(name.encode())
        tower.update(weights.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return identity | {"encoder": f"sha256:{tower.hexdigest()[:16]}"}


def _read_clips(folder: Path) -> tuple[dict, dict[str, tuple[int, int, int]]]:
    """Return the line about the encoder; and first frame, number of frames and number of samples of each clip by its
    key. Lines that a killed build left incomplete are ignored, and so are clips without frames in the file."""
    encoder, *lines = read_lines(folder / CLIPS) or [{}]
    clips, start = {}, 0
    available = (folder / FRAMES).stat().st_size // (2 * encoder["width"]) if encoder else 0
    for key, frames, samples in lines:
        if start + frames > available:
            break
        clips[key] = start, frames, samples
        start += frames
    return encoder, clips


def _write(folder: Path, index, encoder: dict, model, processor: LsmProcessor, audio: Iterable[dict], batch_size: int):
    """Write the store. Clips are sorted by length within spans of limited size, so that memory does not grow with the
    set. The clips of an interrupted build with the same encoder are kept."""
    clips: dict[str, tuple[int, int, int]] = {}
    if (folder / FRAMES).exists():
        before, clips = _read_clips(folder)
        if any(before.get(name) != value for name, value in encoder.items()):
            logger.warning("%s was begun with another encoder; building it again", folder)
            clips = {}
    with (folder / FRAMES).open("ab") as file:
        file.truncate(2 * encoder["width"] * sum(frames for _, frames, _ in clips.values()))
        lines = (folder / CLIPS).read_bytes().splitlines(keepends=True)[: len(clips) + 1 if clips else 0]
        index.truncate(sum(map(len, lines)))
        if not lines:
            append_lines(folder / CLIPS, [encoder])
        span: dict[str, np.ndarray] = {}

        def encode():
            before = len(clips)
            _encode(file, clips, span, model, processor, batch_size)
            file.flush()
            os.fsync(file.fileno())
            new = itertools.islice(clips.items(), before, None)
            append_lines(folder / CLIPS, ([key, *clip[1:]] for key, clip in new))
            span.clear()

        for clip in tqdm(audio, desc="encoding audio", unit="clip"):
            key = audio_key(clip)
            if key not in clips and key not in span:
                span[key] = _load(clip, key, processor)
            if len(span) == SPAN_BATCHES * batch_size:
                encode()
        encode()


def _load(clip: dict, key: str, processor: LsmProcessor) -> np.ndarray:
    waveform = load_clip({"id": clip.get("id") or clip.get("path") or key, "audio": clip})
    if len(processor.chunk_lengths(len(waveform))) > 1:
        raise ValueError(
            f"{clip.get('path') or key} is {len(waveform) / 16_000:.1f} s long, but a feature store takes at most one "
            "chunk (30 s); train without --audio_feature_store."
        )
    return waveform


@torch.inference_mode()
def _encode(file, clips: dict, span: dict[str, np.ndarray], model, processor: LsmProcessor, batch_size: int) -> None:
    """Append the tower's output for the clips in `span` to the file, and add its positions to `clips`."""
    start = file.tell() // (2 * model.config.audio_config.d_model)
    keys = sorted(span, key=lambda key: len(span[key]))
    for first in range(0, len(keys), batch_size):
        batch = keys[first : first + batch_size]
        features = processor.audio_features([span[key] for key in batch])
        longest = features["input_features"].shape[-1]
        more = min(-(-longest // SHAPES) * SHAPES, processor.feature_extractor.nb_max_frames) - longest
        features = {
            name: nn.functional.pad(torch.from_numpy(value), (0, more)).to(model.device)
            for name, value in features.items()
        }
        mask = features["input_features_mask"] if model.config.audio_padding == "longest" else None
        hidden = model.model.audio_tower(features["input_features"], mask).last_hidden_state
        lengths = [num_encoder_frames(frames) for frames in features["input_features_mask"].sum(-1).tolist()]
        for key, states, frames in zip(batch, hidden.cpu(), lengths, strict=True):
            file.write(states[:frames].to(torch.float16).numpy().tobytes())
            clips[key] = start, frames, len(span[key])
            start += frames


def store_features(folder: str | None, dataset, model, processor) -> tuple[AudioFeatureStore | None, object]:
    """Store the tower's output for the clips that the store lacks, and return the store and the rows with `audio_key`
    instead of `audio`. If `folder` is None, return None and the unchanged rows."""
    if folder is None:
        return None, dataset
    # `datasets` caches the keys, so that a further run need not read the files.
    keyed = dataset.map(lambda row: {"audio_key": row["audio"] and audio_key(row["audio"])}, remove_columns="audio")
    stored = AudioFeatureStore(folder) if Path(folder).exists() else ()
    missing = [place for place, key in enumerate(keyed["audio_key"]) if key is not None and key not in stored]
    rows = dataset.select_columns(sorted({"id", "audio"} & set(dataset.column_names))).select(missing)
    clips = ({**row["audio"], "id": row.get("id")} for row in rows)
    return AudioFeatureStore.build(folder, model, processor, clips), keyed


def warn_of_language(config: LsmConfig, corpus: str, language: str | None) -> None:
    """Log a warning if a corpus is in a language (ISO 639) that the encoder does not know. Whisper checkpoints whose
    names end with `.en` know only English."""
    name = (config.sources or {}).get("audio", {}).get("model", "")
    if language is None or not (language != "en" if name.endswith(".en") else language not in LANGUAGES):
        return
    logger.warning(
        "%s is in %r, a language that the encoder %s does not know; take another Whisper, or expect many errors.",
        corpus,
        language,
        name or "(unknown)",
    )
