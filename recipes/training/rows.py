"""The rows that are learned: opened, checked and mixed, their audio not decoded."""

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
HEARD = ["audio", "duration"]  # what a row that is read, not heard, lacks
SMALL = ["id", "instruction", "response", "transcript", "duration"]


def load_rows(args: LsmScriptArguments, seed: int, responder: dict | None) -> Dataset:
    """The training rows of a whole set. Those without audio have their transcript in its slot.

    Args:
        args: which set, and how it is mixed.
        seed: of what is left out.
        responder: the LSM's own, whose rows alone are taken.

    Raises:
        ValueError: a set without the columns, rows that cannot be learned from or that another LLM wrote, and a mix
            without rows.
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
    """Refuse a set that is not one."""
    if missing := NEEDED - set(features or ()):
        raise ValueError(
            f"{name} has no column {', '.join(sorted(missing))}; it has {', '.join(features or ()) or 'none'}. "
            "Expected what `python -m dataset_builders.self_powered build` (or `import`) writes."
        )


def refuse_foreign(provenance: str, responder: dict | None) -> None:
    """Refuse answers that this very LLM did not write for this very prompt.

    Raises:
        ValueError: says what differs, and how to train on them all the same.
    """
    if differences := foreign(provenance, responder):
        raise ValueError(
            f"the responses are foreign to this LSM ({'; '.join(differences)}): build the set with this LSM, or "
            "train on it all the same with --allow_foreign_responses true."
        )


def check_rows(dataset: Dataset) -> None:
    """Refuse rows without a response to learn or without speech: how many, and which is the first."""
    for rows in tqdm(_scan(dataset), desc="checking rows", unit="k rows", leave=False):
        for id, response, duration in zip(rows["id"], rows["response"], rows["duration"], strict=True):
            check_row({"id": id, "response": response, "duration": duration})


def check_row(row: dict) -> dict:
    """The row itself.

    Raises:
        ValueError: it has an empty response, or a clip without speech tokens.
    """
    if not row["response"].strip():
        raise ValueError(f"row {row['id']!r} has an empty response; expected text to learn.")
    if not row["duration"] > 0:
        raise ValueError(f"row {row['id']!r} has a clip of {row['duration']} s; it would have no speech token.")
    return row


def _scan(dataset: Dataset) -> Iterator[dict[str, list]]:
    return dataset.select_columns(SMALL).iter(1000)


def task_weights(tasks: Sequence[str] | None, transcription_ratio: float | None) -> dict[str, float] | None:
    """The weights that `--tasks intent=2 keyword` gives; None if no task has one.

    Raises:
        ValueError: weights that are no shares, or two wishes for transcriptions.
    """
    if not tasks or not any("=" in task for task in tasks):
        return None
    weights = parse_weights(tasks)
    for task, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"task {task!r} cannot weigh {weight}; expected a finite number of more than 0.")
    if transcription_ratio is not None and any(task.startswith(f"{TRANSCRIPTION}=") for task in tasks):
        raise ValueError("transcription has a weight in --tasks and a --transcription_ratio; give one of them.")
    if transcription_ratio is not None:
        weights.pop(TRANSCRIPTION, None)
    return weights


def mix(dataset: Dataset, tasks: list[str] | None, transcription_ratio: float | None, seed: int) -> Dataset:
    """The rows of `tasks`, in shares of their weights, with at most `transcription_ratio` transcriptions per other row.

    Nothing is repeated: rows are left out until the shares fit; which, is a function of seed and id.

    Raises:
        ValueError: nothing is left, or a weighted task has no rows.
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
        most = min(len(rows[task]) / weight for task, weight in weights.items())
        wanted = {task: round(most * weight) for task, weight in weights.items()}
    else:
        wanted = {task: len(found) for task, found in rows.items()}
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
    """The rows, and `text_ratio` of them (transcriptions aside) once more without audio: to be read, not heard."""
    rows = zip(dataset["id"], dataset["task"], strict=True)
    read = [row for row, (id, task) in enumerate(rows) if is_read_too(id, task, text_ratio, seed)]
    return concatenate_datasets([dataset, dataset.select(read).remove_columns(HEARD)]) if read else dataset


def is_read_too(id: str, task: str, text_ratio: float, seed: int) -> bool:
    return task != TRANSCRIPTION and draw_fraction(seed, "text", id) < text_ratio


def count_tasks(dataset: Dataset) -> dict[str, int]:
    """Rows of every task; rows that are read, not heard, stand apart."""
    rows = zip(dataset["task"], dataset["duration"], strict=True)
    counts = Counter(task if duration is not None else f"{task} (read)" for task, duration in rows)
    return dict(sorted(counts.items()))


class RowSizes:
    """Measures rows without decoding anything: texts are tokenised, and a clip is as long as its `duration` says."""

    def __init__(self, processor: LsmProcessor, context: int | None = None):
        """
        Args:
            processor: of the LSM.
            context: positions that the LLM has, None if unknown.
        """
        self.processor, self.context = processor, context
        bare = render_prompt(processor, {"instruction": ""})
        self.template = len(processor.tokenizer(bare, add_special_tokens=False).input_ids) - 1  # the placeholder

    def _tokens(self, texts: list[str]) -> list[int]:
        texts = [self.processor.as_text(text) for text in texts]
        return [len(ids) for ids in self.processor.tokenizer(texts, add_special_tokens=False).input_ids]

    def measure(self, rows: dict[str, list]) -> dict[str, np.ndarray]:
        """`frames` (of the encoder), `speech_tokens`, `tokens` (all) and `labels` of the rows of columns; int64 each.

        Raises:
            ValueError: a row that the LLM has too few positions for.
        """
        durations = np.array([duration or 0 for duration in rows["duration"]])
        samples = np.round(durations * self.processor.feature_extractor.sampling_rate).astype(int).clip(min=1)
        heard = durations > 0
        frames = np.array([num_encoder_frames(num_mel_frames(int(length))) for length in samples]) * heard
        speech = np.array([self.processor.num_audio_tokens([int(length)])[0] for length in samples]) * heard
        labels = np.array(self._tokens(rows["response"])) + 1
        slot = np.where(heard, speech, self._tokens(rows["transcript"]))
        tokens = self.template + np.array(self._tokens(rows["instruction"])) + slot + labels
        if self.context is not None and tokens.max() > self.context:
            raise ValueError(
                f"row {rows['id'][tokens.argmax()]!r} takes {tokens.max()} tokens, but the LLM has {self.context} "
                "positions; leave it out of the set."
            )
        return {"frames": frames, "speech_tokens": speech, "tokens": tokens, "labels": labels}

    def measure_all(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """As `measure`, of a whole set."""
        parts = [self.measure(rows) for rows in tqdm(_scan(dataset), desc="measuring rows", unit="k rows", leave=False)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def stream_rows(
    args: LsmScriptArguments, seed: int, responder: dict | None, costs: Costs, processor: LsmProcessor, batch_size: int
) -> IterableDataset:
    """The training rows of a set that is read while it is learned from, over and over.

    Tasks come in shares of their weights (equal ones, unless `tasks` has others), each in an order that the seed
    decides, shuffled within `shuffle_buffer` rows; rows of like cost make batches, as in a whole set.

    Args:
        args, seed, responder: as in `load_rows`.
        costs: of the model that learns.
        processor: its own.
        batch_size: rows of one step's batches on all devices.

    Raises:
        ValueError: as in `load_rows`; what a row lacks is found when it comes.
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

    def lay_out(rows: dict[str, list]) -> dict[str, list]:
        pairs = zip(rows["id"], rows["task"], strict=True)
        read = [row for row, (id, task) in enumerate(pairs) if is_read_too(id, task, args.text_ratio, seed)]
        rows = {
            name: values + [None if name in HEARD else values[row] for row in read] for name, values in rows.items()
        }
        random = np.random.default_rng((seed, *rows["id"][0].encode()))
        order = random.permutation(len(rows["id"]))
        order = order[group(costs.row(**sizes.measure(rows))[order], batch_size, random)]
        return {name: [values[row] for row in order] for name, values in rows.items()}

    return rows.map(check).map(lay_out, batched=True, batch_size=MEGA_BATCHES * batch_size)


def task_names(args: LsmScriptArguments) -> list[str]:
    """The tasks that are learned; each is a configuration of the set."""
    if args.tasks:
        return list(parse_weights(args.tasks))
    if args.dataset_config != "all":
        return [args.dataset_config]
    return [name for name in config_names(args.dataset_name) if name != "all"]


def check_response_tasks(response_tasks: Sequence[str] | None, args: LsmScriptArguments) -> None:
    """Refuse tasks that no row is of."""
    if response_tasks and (unknown := set(response_tasks) - set(task_names(args))):
        raise ValueError(
            f"--response_tasks {' '.join(sorted(unknown))}: no row that is learned is of such a task; expected some of "
            f"{', '.join(sorted(task_names(args)))}."
        )


def open_stream(args: LsmScriptArguments, task: str) -> IterableDataset:
    """One task's rows, as they come; their columns checked."""
    stream = load_self_powered(args.dataset_name, task, args.dataset_train_split, streaming=True)
    check_columns(stream.features, args.dataset_name)
    return stream
