"""Frozen audio tower output, computed once: the tower never changes, so epochs and models may share what it hears.

    python -m recipes.audio_features --model checkpoints/base --corpus CORPUS --splits train test --output features

`--audio_feature_store` of `recipes.sft` and `--audio-feature-store` of `recipes.evaluate` read the folder.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configuration_lsm import num_encoder_frames
from dataset_builders.asr_corpora import open_corpus
from dataset_builders.text_llm import load_processor, open_model
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import LsmProcessor, load_audio

INDEX, FRAMES = "index.json", "hidden_states.f16"
SPAN_BATCHES = 16  # that are sorted together: of 32 clips of 30 s, 1 GB


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
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.clips: dict[str, list[int]] = index["clips"]  # key: first frame, frames, samples
        self.frames = np.memmap(folder / FRAMES, np.float16, mode="r").reshape(-1, index["width"])

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
    """Clips are sorted by length within a span of so many that memory does not grow with the set."""
    clips: dict[str, list[int]] = {}
    span: dict[str, np.ndarray] = {}
    with (folder / FRAMES).open("wb") as file:
        for clip in tqdm(audio, desc="encoding audio", unit="clip"):
            key = audio_key(clip)
            if key not in clips and key not in span:
                span[key] = _load(clip, key, processor)
            if len(span) == SPAN_BATCHES * batch_size:
                _encode(file, clips, span, model, processor, batch_size)
                span = {}
        _encode(file, clips, span, model, processor, batch_size)
    width = model.config.audio_config.d_model
    (folder / INDEX).write_text(json.dumps({"width": width, "clips": clips}), encoding="utf-8")


def _load(clip: dict, key: str, processor: LsmProcessor) -> np.ndarray:
    waveform = load_audio(clip)
    if len(processor.chunk_lengths(len(waveform))) > 1:
        raise ValueError(
            f"{clip.get('path') or key} is {len(waveform) / 16_000:.1f} s long; stored features take clips of one "
            "chunk (30 s): train without --audio_feature_store."
        )
    return waveform


@torch.inference_mode()
def _encode(file, clips: dict, span: dict[str, np.ndarray], model, processor: LsmProcessor, batch_size: int) -> None:
    """Append what the tower makes of the clips in `span`, and note in `clips` where it stands."""
    start = file.tell() // (2 * model.config.audio_config.d_model)
    keys = sorted(span, key=lambda key: len(span[key]))
    for first in range(0, len(keys), batch_size):
        batch = keys[first : first + batch_size]
        features = processor.audio_features([span[key] for key in batch])
        features = {name: torch.from_numpy(value).to(model.device) for name, value in features.items()}
        mask = features["input_features_mask"] if model.config.audio_padding == "longest" else None
        hidden = model.model.audio_tower(features["input_features"], mask).last_hidden_state
        lengths = [num_encoder_frames(frames) for frames in features["input_features_mask"].sum(-1).tolist()]
        for key, states, frames in zip(batch, hidden.cpu(), lengths, strict=True):
            file.write(states[:frames].to(torch.float16).numpy().tobytes())
            clips[key] = [start, frames, len(span[key])]
            start += frames


def store_features(folder: str, dataset, model, processor) -> tuple[AudioFeatureStore, object]:
    """The tower's output for all clips, and the rows with `audio_key` instead of their audio."""
    clips = (row["audio"] for row in dataset.select_columns("audio") if row["audio"])
    store = AudioFeatureStore.build(folder, model, processor, clips)
    dataset = dataset.map(lambda row: {"audio_key": row["audio"] and audio_key(row["audio"])}, remove_columns="audio")
    if missing := sum(key is not None and key not in store for key in dataset["audio_key"]):
        raise ValueError(
            f"{folder} was made for other clips: it lacks {missing} of {len(dataset)}. Delete it or name another "
            "--audio_feature_store."
        )
    return store, dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an LSM with the tower: folder or Hub id")
    parser.add_argument("--corpus", required=True, help="as dataset_builders.self_powered build takes it")
    parser.add_argument("--splits", nargs="+", default=["train"], help="of the corpus")
    parser.add_argument("--output", required=True, help="folder of the store")
    parser.add_argument("--batch-size", type=int, default=32, help="clips at a time")
    args = parser.parse_args()
    model = open_model(args.model, LsmForConditionalGeneration, merge=False).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    clips = (utterance["audio"] for split in args.splits for utterance in open_corpus(args.corpus, split))
    processor = load_processor(args.model)
    store = AudioFeatureStore.build(args.output, model, processor, clips, args.batch_size)
    print(f"{args.output}: {len(store.clips)} clips, {len(store.frames)} frames")


if __name__ == "__main__":
    main()
