"""The nano corpus: sentences of the nano language, spoken by espeak-ng.

    python -m dataset_builders.nano.speech --output runs/quickstart/corpus --train 6000 --test 1200
    python -m dataset_builders.nano.speech --output runs/noisy --test 300 --snr 10

Row i of a split depends only on (seed, split, i). Splits have no sentence in common (`grammar.split_of`), and no
training voice has the variant of a test voice. A voice is a language with a variant; pitch and speed also vary. `--snr`
adds white noise, which also depends only on (seed, split, i): another ratio makes the same noise louder or softer. The
rows are written to `OUTPUT/SPLIT.parquet`, which `load_dataset` reads.
"""

import functools
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

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("nano"):
    import numpy as np
    import pyarrow.parquet as pq
    from datasets import Audio, Dataset, Features, Value

    from dataset_builders.corpora.audio import encode
    from dataset_builders.files import whole
    from dataset_builders.nano.espeak import SAMPLING_RATE, speak
    from dataset_builders.nano.grammar import SPLITS, sample_sentence

logger = logging.getLogger(__name__)

_LANGUAGES = ("en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-x-gbclan", "en-029")
_VARIANTS = (
    "f1 f3 f4 m1 m2 m4 m5 m6 m8 Alex Alicia Andy Annie Denis Gene Jacky Lee Mario Michael Mike Reed adam aunty "
    "belinda benjamin caleb david ed edward grandma grandpa ian iven john klatt linda max paul quincy rob "
    "robert shelby steph travis victor zac"
)
TRAIN_VOICES = tuple(f"{language}+{variant}" for language in _LANGUAGES for variant in _VARIANTS.split())
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
LOADS = 2000  # utterances that one process synthesises
_BYTES_PER_CLIP = 100_000  # 3 s of 16 kHz PCM16


def sample_utterance(seed: int, split: str, index: int, most_words: int | None = None) -> dict:
    """Return utterance `index` of `split`: `transcript`, `voice`, and `audio` float32 `(samples,)` at 16 kHz.

    If `most_words` is given, the utterance is a part of the sentence, with 1 to `most_words` words.

    Raises:
        ValueError: the split is unknown.
        ImportError: espeak-ng is not installed. Says what to install.
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
    """Return a clip `(samples,)` with white noise, whose power is `snr` dB below that of the clip. If the sum would
    exceed [-1, 1], it is made softer."""
    noise = np.random.default_rng(list(f"nano noise {seed} {split} {index}".encode())).normal(size=len(audio))
    power = np.mean(audio.astype(float) ** 2) / np.mean(noise**2)
    mixed = audio + np.sqrt(power / 10 ** (snr / 10)) * noise
    return (mixed / max(1.0, np.abs(mixed).max())).astype(np.float32)


def row_id(seed: int, split: str, index: int, snr: float | None = None) -> str:
    return f"nano-{split}-{seed}-{index:06d}" + ("" if snr is None else f"-{snr:g}dB")


def row(seed: int, split: str, index: int, snr: float | None = None) -> dict:
    """Return utterance `index` of `split` as a row of `FEATURES`. The audio is a FLAC file, with noise at a
    signal-to-noise ratio of `snr` dB if this is given."""
    utterance = sample_utterance(seed, split, index)
    if snr is not None:
        utterance["audio"] = in_noise(utterance["audio"], snr, seed, split, index)
    flac = encode(utterance["audio"], SAMPLING_RATE, "FLAC", "PCM_16")
    id = row_id(seed, split, index, snr)
    return {
        "id": id,
        "audio": {"bytes": flac, "path": f"{id}.flac"},
        "transcript": utterance["transcript"],
        "duration": np.float32(len(utterance["audio"]) / SAMPLING_RATE),
        "voice": utterance["voice"],
    }


class Speaker:
    """Returns rows of `split` one by one. After each 2000 rows, a new process takes over, because espeak-ng leaks about
    3 KB for each utterance."""

    def __init__(self, seed: int, split: str):
        self.seed, self.split = seed, split
        self.spoken, self.process = 0, None

    def row(self, index: int) -> dict:
        """Return a row, as the function `row` does.

        Raises:
            ChildProcessError: the other process died. Its own messages say why.
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
            raise ChildProcessError(f"the speech synthesis ended with exit code {self.process.wait()}") from error

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


def serve(seed: int, split: str) -> None:
    """Read an index from each line of the input, and write the pickled row to the output, until the input ends."""
    for line in sys.stdin:
        pickle.dump(row(seed, split, int(line)), sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _rows(indices: list[int], seed: int, split: str, snr: float | None) -> Iterator[dict]:
    for index in indices:
        yield row(seed, split, index, snr)


def build(
    output: str | Path, sizes: dict[str, int], seed: int = 0, num_proc: int = 1, snr: float | None = None
) -> Path:
    """Write `OUTPUT/SPLIT.parquet` for each split in `sizes`, with as many rows, and a signal-to-noise ratio of `snr`
    dB if this is given. A split that is already whole is kept. Rows do not depend on the number of processes.

    Raises:
        ValueError: a split is unknown, a size is below 1, or the ratio is not finite.
        OSError: the disk has too little space for the corpus.
    """
    output = Path(output)
    for split, size in sizes.items():
        if split not in SPLITS or size < 1:
            raise ValueError(
                f"cannot build {size} rows of split {split!r}; expected at least 1 row of one of {SPLITS}."
            )
    if snr is not None and not math.isfinite(snr):
        raise ValueError(f"the signal-to-noise ratio is {snr} dB; expected a finite number, or None for no noise.")
    output.mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()) * _BYTES_PER_CLIP * 2, shutil.disk_usage(output).free
    if free < needed:
        raise OSError(
            f"{output} has {free / 2**20:.0f} MiB free, but the corpus needs about {needed / 2**20:.0f} MiB; free some "
            "space, name another --output, or ask for fewer rows."
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
    parser = parser_of(__doc__)
    parser.add_argument("--output", required=True, help="folder of the corpus")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=0, metavar="ROWS", help=f"number of rows of split {split}")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--num-proc", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--snr", type=float, metavar="DB", help="add white noise at this signal-to-noise ratio (dB)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    build(args.output, sizes, args.seed, args.num_proc, args.snr)


if __name__ == "__main__":
    main()
