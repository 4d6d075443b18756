"""Who answers, and what is given: the model under test, its baselines, and controls that take the listening away.

A control differs from the model in one thing. `shuffled` and `silence` take the speech away, and what is left is
guessing; `swapped` takes the instruction away, and what is left is habit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dataset_builders.instructions import TRANSCRIPTION, Task, draw_instruction
from recipes.evaluation.rows import Question


@dataclass(frozen=True)
class System:
    """One column of the tables."""

    name: str  # its key in results
    label: str  # what it is, for readers
    checkpoint: str  # which one answers: `model`, `base`, `vanilla`, `paper` or `asr`
    slot: str  # what stands where the speech belongs, as in `SpeechLLM.respond`: `audio`, `silence` or `transcript`
    change: str | None = None  # to the rows: `shuffled` clips, `swapped` instructions or `recognised` transcripts

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
    """The rows, each with the clip of another utterance: rotated by about half, so none keeps its own.

    Raises:
        ValueError: one utterance alone.
    """
    clips = {row.utterance: row.audio for row in rows}
    utterances = sorted(clips)
    if len(utterances) < 2:
        raise ValueError("one clip alone cannot be shuffled; give at least two, or leave the system `shuffled` out.")
    shift = len(utterances) // 2
    other = dict(zip(utterances, utterances[shift:] + utterances[:shift], strict=True))
    return [replace(row, audio=clips[other[row.utterance]]) for row in rows]


def swap_instructions(rows: Sequence[Question], pool: Mapping[str, Task]) -> list[Question]:
    """The rows, each with the instruction of the next row that has another task and another utterance, or of the
    instruction pool where there is none: transcription, and for a transcription task the intent."""
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
    """One row for every utterance, which asks for its transcription as the pool does: what a cascade hears."""
    first: dict[int, Question] = {}
    asked: dict = {"task": TRANSCRIPTION, "kind": TRANSCRIPTION, "labels": [], "text_response": ""}
    for row in rows:
        first.setdefault(row.utterance, row)
    return [
        replace(row, **asked, instruction=draw_instruction(pool, TRANSCRIPTION, row.id, 0, "held_out"))
        for row in first.values()
    ]
