"""Load, check and mix the training rows, without decoding their audio."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets
from datasets import get_dataset_config_names as config_names
from tqdm import tqdm

from configuration_lsm import num_encoder_frames, num_mel_frames
from dataset_builders.instructions import TRANSCRIPTION, draw_fraction, parse_weights
from dataset_builders.publishing import load_self_powered
from dataset_builders.responders.local import foreign
from processing_lsm import LsmProcessor
from recipes.listening.collator import render_prompt
from recipes.training.arguments import LsmScriptArguments
from recipes.training.costs import Costs
from recipes.training.order import MEGA_BATCHES, group

NEEDED = {"id", "audio", "transcript", "task", "instruction", "response", "duration", "responder"}
AUDIO = ["audio", "duration"]  # columns that are None in text rows
SMALL = ["id", "instruction", "response", "transcript", "duration"]


def load_rows(args: LsmScriptArguments, seed: int, responder: dict | None) -> Dataset:
    """Load the training rows of a whole set. Rows without audio have their transcript in the place of the speech.

    Args:
        args: arguments that name the set and the mix.
        seed: seed that decides which rows are left out.
        responder: `config.responder` of the LSM, which must have written the rows.

    Raises:
        ValueError: the set lacks a column, a row has no response or no speech, another LLM wrote a row, or no row is
            left.
    """
    dataset = load_self_powered(args.dataset_name, args.dataset_config, args.dataset_train_split)
    check_columns(dataset.features, args.dataset_name)
    if not args.allow_foreign_responses:
        for provenance in dataset.unique("responder"):
            refuse_foreign(provenance, responder)
    dataset = mix(dataset, args.tasks, args.transcription_ratio, seed)
    check_rows(dataset)
    return with_text_rows(dataset, args.text_ratio, seed)


def check_columns(features: Features | None, name: str) -> None:
    """Raise ValueError if the columns are not those of a self-powered set."""
    if missing := NEEDED - set(features or ()):
        raise ValueError(
            f"{name} has no column {', '.join(sorted(missing))}; it has {', '.join(features or ()) or 'none'}. "
            "Expected what `python -m dataset_builders.self_powered build` (or `import`) writes."
        )


def refuse_foreign(provenance: str, responder: dict | None) -> None:
    """Refuse responses that another LLM wrote, or that were written for another prompt template.

    Raises:
        ValueError: the responses are foreign. Says what differs and what to do.
    """
    if differences := foreign(provenance, responder):
        raise ValueError(
            f"the responses are foreign to this LSM ({'; '.join(differences)}): build the set with this LSM, or "
            "train on it anyway with --allow_foreign_responses true."
        )


def check_rows(dataset: Dataset) -> None:
    """Raise ValueError at the first row without a response or without speech."""
    for rows in tqdm(_scan(dataset), desc="checking rows", unit="k rows", leave=False):
        for id, response, duration in zip(rows["id"], rows["response"], rows["duration"], strict=True):
            check_row({"id": id, "response": response, "duration": duration})


def check_row(row: dict) -> dict:
    """Check a row and return it.

    Raises:
        ValueError: the response is empty, or the clip is too short for a speech token.
    """
    if not row["response"].strip():
        raise ValueError(f"row {row['id']!r} has an empty response; expected text to learn.")
    if not row["duration"] > 0:
        raise ValueError(f"row {row['id']!r} has a clip of {row['duration']} s; expected more than 0 s of speech.")
    return row


def _scan(dataset: Dataset) -> Iterator[dict[str, list]]:
    return dataset.select_columns(SMALL).iter(1000)


def task_weights(tasks: Sequence[str] | None, transcription_ratio: float | None) -> dict[str, float] | None:
    """Return the weights in `--tasks intent=2 keyword`; None if no task has a weight.

    Raises:
        ValueError: a weight is not positive and finite, or transcription has both a weight and a ratio.
    """
    if not tasks or not any("=" in task for task in tasks):
        return None
    weights = parse_weights(tasks)
    for task, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"task {task!r} has the weight {weight}; expected a finite number above 0.")
    if transcription_ratio is not None and any(task.startswith(f"{TRANSCRIPTION}=") for task in tasks):
        raise ValueError("transcription has a weight in --tasks and a --transcription_ratio; give one of them.")
    if transcription_ratio is not None:
        weights.pop(TRANSCRIPTION, None)
    return weights


def mix(dataset: Dataset, tasks: list[str] | None, transcription_ratio: float | None, seed: int) -> Dataset:
    """Return the rows of `tasks` in proportion to their weights, with at most `transcription_ratio` transcription rows
    per other row.

    No row is repeated; rows are left out until the proportions fit. Seed and id decide which ones.

    Raises:
        ValueError: no row is left, or a named task has no rows.
    """
    task_of, weights = dataset["task"], task_weights(tasks, transcription_ratio)
    named = None if tasks is None else set(parse_weights(tasks))
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(task_of):
        if named is None or task in named:
            rows.setdefault(task, []).append(row)
    if missing := (named or set()) - set(rows):
        raise ValueError(f"the set has no rows of {sorted(missing)}; it has {sorted(set(task_of))}.")
    if weights:
        unit = min(len(rows[task]) / weight for task, weight in weights.items())
        wanted = {task: round(unit * weight) for task, weight in weights.items()}
    else:
        wanted = {task: len(positions) for task, positions in rows.items()}
    if transcription_ratio is not None and TRANSCRIPTION in rows:
        others = sum(count for task, count in wanted.items() if task != TRANSCRIPTION)
        wanted[TRANSCRIPTION] = min(round(transcription_ratio * others), len(rows[TRANSCRIPTION]))
    kept, ids = [], None
    for task, count in wanted.items():
        if count < len(rows[task]):
            ids = ids or dataset["id"]
            rows[task].sort(key=lambda row: draw_fraction(seed, task, ids[row]))
        kept += rows[task][:count]
    if not kept:
        raise ValueError(f"no row of {sorted(set(task_of))} is left for {tasks=}, {transcription_ratio=}.")
    return dataset.select(sorted(kept))


def with_text_rows(dataset: Dataset, text_ratio: float, seed: int) -> Dataset:
    """Add text rows: a share `text_ratio` of the rows, except transcriptions, again without audio."""
    rows = zip(dataset["id"], dataset["task"], strict=True)
    read = [row for row, (id, task) in enumerate(rows) if is_read_too(id, task, text_ratio, seed)]
    return concatenate_datasets([dataset, dataset.select(read).remove_columns(AUDIO)]) if read else dataset


def is_read_too(id: str, task: str, text_ratio: float, seed: int) -> bool:
    """Return whether a row is also trained on as a text row."""
    return task != TRANSCRIPTION and draw_fraction(seed, "text", id) < text_ratio


def count_tasks(dataset: Dataset) -> dict[str, int]:
    """Count the rows of each task; text rows are counted separately."""
    rows = zip(dataset["task"], dataset["duration"], strict=True)
    counts = Counter(task if duration is not None else f"{task} (read)" for task, duration in rows)
    return dict(sorted(counts.items()))


class RowSizes:
    """Measures rows without decoding audio: texts are tokenised, and the length of a clip comes from `duration`. The
    LLM has `context` positions, None if unknown."""

    def __init__(self, processor: LsmProcessor, context: int | None = None):
        self.processor, self.context = processor, context
        bare = render_prompt(processor, {"instruction": ""})
        self.template = len(processor.tokenizer(bare, add_special_tokens=False).input_ids) - 1  # the placeholder

    def _tokens(self, texts: list[str]) -> list[int]:
        texts = [self.processor.as_text(text) for text in texts]
        return [len(ids) for ids in self.processor.tokenizer(texts, add_special_tokens=False).input_ids]

    def measure(self, rows: dict[str, list]) -> dict[str, np.ndarray]:
        """Return `frames` (of the encoder), `speech_tokens`, `tokens` (all) and `labels` of rows given as columns, each
        `(rows,)` int64.

        Raises:
            ValueError: a row has more tokens than the LLM has positions.
        """
        durations = np.array([duration or 0 for duration in rows["duration"]])
        samples = np.round(durations * self.processor.feature_extractor.sampling_rate).astype(int).clip(min=1)
        has_audio = durations > 0
        frames = np.array([num_encoder_frames(num_mel_frames(int(length))) for length in samples]) * has_audio
        speech = np.array([self.processor.num_audio_tokens([int(length)])[0] for length in samples]) * has_audio
        labels = np.array(self._tokens(rows["response"])) + 1
        slot = np.where(has_audio, speech, self._tokens(rows["transcript"]))
        tokens = self.template + np.array(self._tokens(rows["instruction"])) + slot + labels
        if self.context is not None and tokens.max() > self.context:
            raise ValueError(
                f"row {rows['id'][tokens.argmax()]!r} takes {tokens.max()} tokens, but the LLM has {self.context} "
                "positions; leave it out of the set."
            )
        return {"frames": frames, "speech_tokens": speech, "tokens": tokens, "labels": labels}

    def measure_all(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """As `measure`, for a whole set."""
        parts = [self.measure(rows) for rows in tqdm(_scan(dataset), desc="measuring rows", unit="k rows", leave=False)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def stream_rows(
    args: LsmScriptArguments, seed: int, responder: dict | None, costs: Costs, processor: LsmProcessor, batch_size: int
) -> IterableDataset:
    """Stream the training rows of a set, without end.

    Tasks are mixed by weight (equal by default) and shuffled within `shuffle_buffer` rows, in an order that depends on
    the seed. Batches, of the rows of a step on all devices, have rows of similar cost, as in a whole set.

    Raises:
        ValueError: as in `load_rows`, but a bad row is found only when it is read.
    """
    tasks = task_names(args)
    weights = {**dict.fromkeys(tasks, 1.0), **(task_weights(args.tasks, args.transcription_ratio) or {})}
    if args.transcription_ratio is not None and TRANSCRIPTION in weights:
        weights[TRANSCRIPTION] = args.transcription_ratio * (sum(weights.values()) - weights[TRANSCRIPTION])
    shares = [weights[task] / sum(weights.values()) for task in tasks]
    streams = [open_stream(args, task).repeat(None) for task in tasks]
    rows = interleave_datasets(streams, probabilities=shares, seed=seed).shuffle(seed, buffer_size=args.shuffle_buffer)
    sizes = RowSizes(processor)

    def check(row: dict) -> dict:
        if not args.allow_foreign_responses:
            refuse_foreign(row["responder"], responder)
        return check_row(row)

    def arrange(rows: dict[str, list]) -> dict[str, list]:
        pairs = zip(rows["id"], rows["task"], strict=True)
        read = [row for row, (id, task) in enumerate(pairs) if is_read_too(id, task, args.text_ratio, seed)]
        rows = {
            name: values + [None if name in AUDIO else values[row] for row in read] for name, values in rows.items()
        }
        random = np.random.default_rng((seed, *rows["id"][0].encode()))
        order = random.permutation(len(rows["id"]))
        order = order[group(costs.row(**sizes.measure(rows))[order], batch_size, random)]
        return {name: [values[row] for row in order] for name, values in rows.items()}

    return rows.map(check).map(arrange, batched=True, batch_size=MEGA_BATCHES * batch_size)


def task_names(args: LsmScriptArguments) -> list[str]:
    """Return the tasks of the training; each is a configuration of the set."""
    if args.tasks:
        return list(parse_weights(args.tasks))
    if args.dataset_config != "all":
        return [args.dataset_config]
    return [name for name in config_names(args.dataset_name) if name != "all"]


def check_response_tasks(response_tasks: Sequence[str] | None, args: LsmScriptArguments) -> None:
    """Raise ValueError if `response_tasks` has a task that is not trained."""
    if response_tasks and (unknown := set(response_tasks) - set(task_names(args))):
        raise ValueError(
            f"--response_tasks {' '.join(sorted(unknown))}: the training has no rows of this task; expected some of "
            f"{', '.join(sorted(task_names(args)))}."
        )


def open_stream(args: LsmScriptArguments, task: str) -> IterableDataset:
    """Open a stream of a task's rows, and check its columns."""
    stream = load_self_powered(args.dataset_name, task, args.dataset_train_split, streaming=True)
    check_columns(stream.features, args.dataset_name)
    return stream
