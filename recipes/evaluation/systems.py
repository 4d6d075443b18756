"""The systems of an evaluation: the model, its baselines, and controls.

A control is the model with one change to its input. With `shuffled` and `silence`, it does not get the right speech, so
its right answers are guesses. With `swapped`, it does not get the right instruction, so they are habit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dataset_builders.instructions import TRANSCRIPTION, Task, draw_instruction
from recipes.evaluation.rows import Question


@dataclass(frozen=True)
class System:
    """A system: a checkpoint and what it gets. It is a column of the tables."""

    name: str  # key in the results
    label: str  # description for readers
    checkpoint: str  # the checkpoint that answers: `model`, `base`, `vanilla`, `paper` or `asr`
    slot: str  # what is in the place of the speech, as in `SpeechLLM.respond`: `audio`, `silence` or `transcript`
    change: str | None = None  # change of the rows: `shuffled` clips, `swapped` instructions, `recognised` transcripts

    @property
    def is_control(self) -> bool:
        return self.slot == "silence" or self.change in ("shuffled", "swapped")


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


def shuffle_clips(rows: Sequence[Question]) -> list[Question]:
    """Return the rows with the clips of other utterances, which are rotated by about half of all utterances.

    Raises:
        ValueError: there is only one utterance.
    """
    clips = {row.utterance: row.audio for row in rows}
    utterances = sorted(clips)
    if len(utterances) < 2:
        raise ValueError("a single clip cannot be shuffled; use at least two, or leave the system `shuffled` out.")
    shift = len(utterances) // 2
    other = dict(zip(utterances, utterances[shift:] + utterances[:shift], strict=True))
    return [replace(row, audio=clips[other[row.utterance]]) for row in rows]


def swap_instructions(rows: Sequence[Question], pool: Mapping[str, Task]) -> list[Question]:
    """Return the rows with instructions of other tasks: that of the next row with another task and another utterance,
    or, if there is none, one of the pool (transcription, or intent for the rows of a transcription task)."""
    swapped, several = [], len({row.task for row in rows}) > 1
    for place, row in enumerate(rows):
        others = (rows[(place + step) % len(rows)] for step in range(1, len(rows) if several else 1))
        differing = (
            other.instruction for other in others if other.task != row.task and other.utterance != row.utterance
        )
        instruction = next(differing, None)
        if instruction is None:
            task = "intent" if row.kind == TRANSCRIPTION else TRANSCRIPTION
            instruction = draw_instruction(pool, task, row.id, 0, "held_out")
        swapped.append(replace(row, instruction=instruction))
    return swapped


def transcription_rows(rows: Sequence[Question], pool: Mapping[str, Task]) -> list[Question]:
    """Return one row for each utterance with a transcription instruction from the pool, for a cascade's ASR model."""
    first: dict[int, Question] = {}
    asked: dict = {"task": TRANSCRIPTION, "kind": TRANSCRIPTION, "labels": [], "text_response": ""}
    for row in rows:
        first.setdefault(row.utterance, row)
    return [
        replace(row, **asked, instruction=draw_instruction(pool, TRANSCRIPTION, row.id, 0, "held_out"))
        for row in first.values()
    ]
