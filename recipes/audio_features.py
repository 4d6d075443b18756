"""Frozen audio tower output, computed once: the tower never changes, so epochs and models may share what it hears."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configuration_lsm import num_encoder_frames
from processing_lsm import LsmProcessor, load_audio

logger = logging.getLogger(__name__)


def audio_key(audio: dict) -> str:
    """What names a clip in a store: the hash of its file's bytes."""
    content = audio["bytes"] if audio.get("bytes") is not None else Path(audio["path"]).read_bytes()
    return hashlib.sha256(content).hexdigest()[:32]


class AudioFeatureStore:
    """Audio tower outputs on disk, by `audio_key`; memory-mapped, float16.

    Only clips of at most one chunk (30 s) can be stored.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.clips: dict[str, list[int]] = index["clips"]  # key: first frame, frames, samples
        self.frames = np.load(folder / "hidden_states.npy", mmap_mode="r")

    def __contains__(self, key: str) -> bool:
        return key in self.clips

    def num_samples(self, key: str) -> int:
        """Samples of the clip at 16 kHz."""
        return self.clips[key][2]

    def batch(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """`audio_hidden_states` `(clips, encoder_frames, d_audio)` float32 and `input_features_mask` `(clips, frames)`
        int64 (two mel frames per encoder frame), zero-padded to the longest, as the model takes them."""
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
        """Run every distinct clip through `model`'s audio tower; a whole store in `folder` is opened as it is.

        Args:
            folder: appears when whole.
            model: an LSM; its audio tower alone is used.
            audio: clips as `{"bytes", "path"}`.
            batch_size: clips encoded at a time.

        Raises:
            ValueError: a clip that cannot be read, or is longer than one chunk.
        """
        folder = Path(folder)
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write(partial, model, processor, audio, batch_size)
            os.replace(partial, folder)
        return cls(folder)


def _write(folder: Path, model, processor: LsmProcessor, audio: Iterable[dict], batch_size: int) -> None:
    distinct = {audio_key(clip): clip for clip in audio}
    waveforms = {key: load_audio(clip) for key, clip in tqdm(distinct.items(), desc="reading audio", unit="clip")}
    for key, waveform in waveforms.items():
        if len(processor.chunk_lengths(len(waveform))) > 1:
            raise ValueError(
                f"{distinct[key].get('path') or key} is {len(waveform) / 16_000:.1f} s long; stored features take "
                "clips of one chunk (30 s): train without --audio_feature_store."
            )
    keys = sorted(waveforms, key=lambda key: len(waveforms[key]))
    clips, pieces, start = {}, [], 0
    with torch.inference_mode(), tqdm(total=len(keys), desc="encoding audio", unit="clip") as progress:
        for first in range(0, len(keys), batch_size):
            batch = keys[first : first + batch_size]
            features = processor.audio_features([waveforms[key] for key in batch])
            features = {name: torch.from_numpy(value).to(model.device) for name, value in features.items()}
            mask = features["input_features_mask"] if model.config.audio_padding == "longest" else None
            hidden = model.model.audio_tower(features["input_features"], mask).last_hidden_state
            lengths = [num_encoder_frames(frames) for frames in features["input_features_mask"].sum(-1).tolist()]
            for key, states, frames in zip(batch, hidden.cpu(), lengths, strict=True):
                clips[key] = [start, frames, len(waveforms[key])]
                pieces.append(states[:frames].to(torch.float16).numpy())
                start += frames
            progress.update(len(batch))
    np.save(folder / "hidden_states.npy", np.concatenate(pieces))
    (folder / "index.json").write_text(json.dumps({"clips": clips}), encoding="utf-8")
