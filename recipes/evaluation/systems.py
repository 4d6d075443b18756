"""Who answers, and what is given: the model under test, its baselines, and controls that take the listening away.

A control differs from the model in one thing. `shuffled` and `silence` take the speech away, and what is left is
guessing; `swapped` takes the instruction away, and what is left is habit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dataset_builders.instructions import TRANSCRIPTION, Task, draw_instruction


@dataclass(frozen=True)
class System:
    """One column of the tables.

    Args:
        name: its key in results.
        label: what it is, for readers.
        checkpoint: which one answers: `model`, `base`, `vanilla` or `paper`.
        hear: `audio`, `silence` or `transcript`, as in `SpeechLLM.respond`.
        change: what is done to the rows beforehand: `shuffled` clips, `swapped` instructions, or `recognised`
            transcripts (written by an ASR model).
    """

    name: str
    label: str
    checkpoint: str
    hear: str
    change: str | None = None

    @property
    def is_control(self) -> bool:
        return self.hear == "silence" or self.change in ("shuffled", "swapped")


SYSTEMS = {
    system.name: system
    for system in (
        System("text_llm", "text LLM, reads the transcript (ceiling)", "base", "transcript"),
        System("cascade", "cascade: ASR, then the text LLM", "base", "transcript", "recognised"),
        System("model", "the model", "model", "audio"),
        System("vanilla", "vanilla LSM (trained on transcription alone)", "vanilla", "audio"),
        System("paper", "LSM trained as in the paper (LLM in full, cross-entropy)", "paper", "audio"),
        System("model_reading", "the model, reads the transcript", "model", "transcript"),
        System("shuffled", "control: another sentence's clip", "model", "audio", "shuffled"),
        System("silence", "control: silence", "model", "silence"),
        System("swapped", "control: another task's instruction", "model", "audio", "swapped"),
    )
}


def shuffle_clips(rows: Sequence[dict]) -> list[dict]:
    """The rows, each with the clip of another utterance: rotated by about half, so none keeps its own.

    Raises:
        ValueError: one utterance alone.
    """
    clips = {row["utterance"]: row["audio"] for row in rows}
    utterances = sorted(clips)
    if len(utterances) < 2:
        raise ValueError("one clip alone cannot be shuffled; give at least two, or leave the system `shuffled` out.")
    shift = len(utterances) // 2
    other = dict(zip(utterances, utterances[shift:] + utterances[:shift], strict=True))
    return [row | {"audio": clips[other[row["utterance"]]]} for row in rows]


def swap_instructions(rows: Sequence[dict], pool: Mapping[str, Task]) -> list[dict]:
    """The rows, each with the instruction of the next row that has another task and another utterance, or of the
    instruction pool where there is none: transcription, and for a transcription task the intent."""
    swapped, several = [], len({row["task"] for row in rows}) > 1
    for place, row in enumerate(rows):
        others = (rows[(place + step) % len(rows)] for step in range(1, len(rows) if several else 1))
        differing = (
            other["instruction"]
            for other in others
            if other["task"] != row["task"] and other["utterance"] != row["utterance"]
        )
        instruction = next(differing, None)
        if instruction is None:
            task = "intent" if row["kind"] == TRANSCRIPTION else TRANSCRIPTION
            instruction = draw_instruction(pool, task, row["id"], 0, "held_out")
        swapped.append(row | {"instruction": instruction})
    return swapped


def transcription_rows(rows: Sequence[dict], pool: Mapping[str, Task]) -> list[dict]:
    """One row for every utterance, which asks for its transcription as the pool does: what a cascade hears."""
    first = {}
    for row in rows:
        first.setdefault(row["utterance"], row)
    return [
        row
        | {"task": TRANSCRIPTION, "kind": TRANSCRIPTION, "labels": []}
        | {"instruction": draw_instruction(pool, TRANSCRIPTION, row["id"], 0, "held_out")}
        for row in first.values()
    ]
