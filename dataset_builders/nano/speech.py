"""The nano corpus: sentences of the nano language, spoken by espeak-ng.

    python -m dataset_builders.nano.speech --output runs/quickstart/corpus --train 6000 --test 1200
    python -m dataset_builders.nano.speech --output runs/noisy --test 300 --snr 10

Row i of a split is a function of (seed, split, i) alone. Splits share no sentence (`grammar.split_of`) and the
test voices' variants are never heard in training. A voice is a language with a variant; pitch and speed vary on top.
With `--snr` every clip lies in white noise, which is drawn from (seed, split, i), too: at another ratio it is the same
noise, louder or softer. Written as `OUTPUT/SPLIT.parquet`, loadable with `load_dataset`.
"""

import argparse
import functools
import io
import logging
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from language_models.extras import extra

with extra("nano"):
    import numpy as np
    import pyarrow.parquet as pq
    from datasets import Audio, Dataset, Features, Value

    from dataset_builders.files import whole
    from dataset_builders.nano.espeak import SAMPLING_RATE, speak
    from dataset_builders.nano.grammar import SPLITS, sample_sentence

logger = logging.getLogger(__name__)

_LANGUAGES = ("en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-x-gbclan", "en-029")
_VARIANTS = (
    *(
        "f1",
        "f3",
        "f4",
        "m1",
        "m2",
        "m4",
        "m5",
        "m6",
        "m8",
        "Alex",
        "Alicia",
        "Andy",
        "Annie",
        "Denis",
        "Gene",
        "Jacky",
    ),
    *("Lee", "Mario", "Michael", "Mike", "Reed", "adam", "aunty", "belinda", "benjamin", "caleb", "david", "ed"),
    *(
        "edward",
        "grandma",
        "grandpa",
        "ian",
        "iven",
        "john",
        "klatt",
        "linda",
        "max",
        "paul",
        "quincy",
        "rob",
        "robert",
    ),
    *("shelby", "steph", "travis", "victor", "zac"),
)
TRAIN_VOICES = tuple(f"{language}+{variant}" for language in _LANGUAGES for variant in _VARIANTS)
TEST_VOICES = ("en-us+f2", "en-us+m3", "en-gb-x-rp+f5", "en-us+m7")
FEATURES = Features(
    {
        "id": Value("string"),
        "audio": {"bytes": Value("binary"), "path": Value("string")},
        "transcript": Value("string"),
        "duration": Value("float32"),  # seconds
        "voice": Value("string"),
    }
)
LOADS = 2000  # utterances that one process speaks
_BYTES_PER_CLIP = 100_000  # 3 s of 16 kHz PCM16


def sample_utterance(seed: int, split: str, index: int, most_words: int | None = None) -> dict:
    """Utterance `index` of `split`: transcript, voice, and `audio` float32 `(samples,)` at 16 kHz.

    With `most_words`, one to so many words out of the sentence are spoken instead of the whole.

    Raises:
        ValueError: unknown split.
        ImportError: espeak-ng is not installed; says what to install.
    """
    rng = random.Random(f"nano speech {seed} {split} {index}")
    transcript = str(sample_sentence(rng, split))
    if most_words is not None:
        words, count = transcript.split(), rng.randint(1, most_words)
        start = rng.randrange(len(words) - count + 1)
        transcript = " ".join(words[start : start + count])
    voice = rng.choice(TEST_VOICES if split == "test" else TRAIN_VOICES)
    audio = speak(transcript, voice, words_per_minute=rng.randint(160, 200), pitch=rng.randint(35, 65))
    return {"transcript": transcript, "voice": voice, "audio": audio}


def in_noise(audio: np.ndarray, snr: float, seed: int, split: str, index: int) -> np.ndarray:
    """The clip `(samples,)` with white noise whose power over the whole clip is `snr` dB below the clip's own; the sum
    is made softer where it would leave [-1, 1]."""
    noise = np.random.default_rng(list(f"nano noise {seed} {split} {index}".encode())).normal(size=len(audio))
    power = np.mean(audio.astype(float) ** 2) / np.mean(noise**2)
    mixed = audio + np.sqrt(power / 10 ** (snr / 10)) * noise
    return (mixed / max(1.0, np.abs(mixed).max())).astype(np.float32)


def row_id(seed: int, split: str, index: int, snr: float | None = None) -> str:
    return f"nano-{split}-{seed}-{index:06d}" + ("" if snr is None else f"-{snr:g}dB")


def row(seed: int, split: str, index: int, snr: float | None = None) -> dict:
    """Utterance `index` of `split` as a row of `FEATURES`, its audio as the bytes of a FLAC file, with noise at a
    signal-to-noise ratio of `snr` dB if that is given."""
    import soundfile

    utterance = sample_utterance(seed, split, index)
    if snr is not None:
        utterance["audio"] = in_noise(utterance["audio"], snr, seed, split, index)
    flac = io.BytesIO()
    soundfile.write(flac, utterance["audio"], SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    id = row_id(seed, split, index, snr)
    return {
        "id": id,
        "audio": {"bytes": flac.getvalue(), "path": f"{id}.flac"},
        "transcript": utterance["transcript"],
        "duration": np.float32(len(utterance["audio"]) / SAMPLING_RATE),
        "voice": utterance["voice"],
    }


class Speaker:
    """Rows of `split` one by one, in any number: most are spoken in a process that is changed for a new one now and
    then, since espeak-ng loses some 3 KB with every voice that it loads."""

    def __init__(self, seed: int, split: str):
        self.seed, self.split = seed, split
        self.spoken, self.process = 0, None

    def row(self, index: int) -> dict:
        """As the function `row`.

        Raises:
            ChildProcessError: the other process died; its own messages say why.
        """
        if self.spoken == LOADS:
            self.close()
            code = f"from dataset_builders.nano import speech; speech.serve({self.seed}, {self.split!r})"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, "-c", code]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self.spoken = 0
        self.spoken += 1
        if self.process is None:
            return row(self.seed, self.split, index)
        try:
            self.process.stdin.write(f"{index}\n".encode())
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (OSError, EOFError) as error:
            raise ChildProcessError(f"the process that speaks ended with {self.process.wait()}") from error

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


def serve(seed: int, split: str) -> None:
    """Answer numbers, a line each, with pickled rows, until there are no more or whoever asks is gone."""
    for line in sys.stdin:
        pickle.dump(row(seed, split, int(line)), sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _rows(indices: list[int], seed: int, split: str, snr: float | None) -> Iterator[dict]:
    for index in indices:
        yield row(seed, split, index, snr)


def build(
    output: str | Path, sizes: dict[str, int], seed: int = 0, num_proc: int = 1, snr: float | None = None
) -> Path:
    """Write `OUTPUT/SPLIT.parquet` for every split in `sizes`; a split that is already whole is kept.

    Args:
        output: folder, created if missing.
        sizes: rows per split.
        seed: of every draw.
        num_proc: worker processes; the rows do not depend on it.
        snr: signal-to-noise ratio in dB of every clip; no noise if None.

    Raises:
        ValueError: unknown split, a size below 1, or a ratio that is no number.
        OSError: the disk has no room for the corpus.
    """
    output = Path(output)
    for split, size in sizes.items():
        if split not in SPLITS or size < 1:
            raise ValueError(
                f"cannot build {size} rows of split {split!r}; expected at least 1 row of one of {SPLITS}."
            )
    if snr is not None and not math.isfinite(snr):
        raise ValueError(f"a signal-to-noise ratio of {snr} dB cannot be; expected a number, or None for no noise.")
    output.mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()) * _BYTES_PER_CLIP * 2, shutil.disk_usage(output).free
    if free < needed:
        raise OSError(
            f"{output} has {free / 2**20:.0f} MiB free and the corpus needs about {needed / 2**20:.0f} MiB: free some "
            "space, name another --output or ask for fewer rows."
        )
    for split, size in sizes.items():
        target = output / f"{split}.parquet"
        if _is_whole(target, split, size, seed, snr):
            logger.info("%s is complete", target)
            continue
        _build_split(target, split, size, seed, num_proc, snr)
    return output


def _is_whole(target: Path, split: str, size: int, seed: int, snr: float | None) -> bool:
    if not target.exists():
        return False
    ids = pq.read_table(target, columns=["id"])["id"].to_pylist()
    return ids == [row_id(seed, split, index, snr) for index in range(size)]


def _build_split(target: Path, split: str, size: int, seed: int, num_proc: int, snr: float | None) -> None:
    dataset = Dataset.from_generator(
        functools.partial(_rows, seed=seed, split=split, snr=snr),
        gen_kwargs={"indices": list(range(size))},
        features=FEATURES,
        num_proc=min(num_proc, size),
        cache_dir=str(target.parent / ".cache"),
    )
    with whole(target) as partial:
        dataset.cast_column("audio", Audio(SAMPLING_RATE, decode=False)).to_parquet(str(partial))
    shutil.rmtree(target.parent / ".cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=0, metavar="ROWS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-proc", type=int, default=os.cpu_count())
    parser.add_argument("--snr", type=float, metavar="DB", help="add white noise at this signal-to-noise ratio (dB)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    build(args.output, sizes, args.seed, args.num_proc, args.snr)


if __name__ == "__main__":
    main()
