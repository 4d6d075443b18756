"""Who is asked, and how controls take from the rows what they take away."""

from dataclasses import replace

import pytest

from dataset_builders.instructions import TRANSCRIPTION, load_pool
from dataset_builders.nano.tasks import POOL_PATH
from recipes.evaluation.pages import STYLES
from recipes.evaluation.questions import read_rows
from recipes.evaluation.systems import SYSTEMS, shuffle_clips, swap_instructions, transcription_rows
from recipes.evaluation.tasks import load_tasks, override
from recipes.listening.speech_llm import SLOTS

TASKS, POOL = load_tasks(), load_pool(POOL_PATH)


@pytest.fixture
def read(corpus_dir):
    """`read(task)`: its rows about eight clips of noise with sentences of the nano language."""
    return lambda name, **more: read_rows(override(TASKS[name], {"corpus": str(corpus_dir), "split": "train"}), **more)


# The systems


def test_a_system_is_known_by_its_name_and_has_its_look_in_pictures():
    assert [system.name for system in SYSTEMS.values()] == list(SYSTEMS)
    assert set(SYSTEMS) == set(STYLES)


def test_systems_are_given_what_can_be_given_and_a_checkpoint_that_there_can_be():
    assert {system.checkpoint for system in SYSTEMS.values()} == {"model", "base", "vanilla", "paper"}
    assert {system.slot for system in SYSTEMS.values()} == set(SLOTS)
    assert {system.change for system in SYSTEMS.values()} == {None, "shuffled", "swapped", "recognised"}
    assert all(system.slot == "transcript" for system in SYSTEMS.values() if system.checkpoint == "base")


def test_controls_take_the_listening_or_the_instruction_away_from_the_model():
    controls = [name for name, system in SYSTEMS.items() if system.is_control]
    assert controls == ["shuffled", "silence", "swapped"]
    assert {SYSTEMS[name].checkpoint for name in controls} == {"model"}


# Clips


@pytest.mark.parametrize("limit", [8, 5, 3, 2])
def test_shuffling_leaves_no_clip_at_home_and_all_else_as_it_was(read, limit):
    rows = read("nano", limit=limit)
    shuffled = shuffle_clips(rows)
    for row, other in zip(rows, shuffled, strict=True):
        assert other.audio["bytes"] != row.audio["bytes"]
        assert replace(other, audio=row.audio) == row
    clips = [{row.audio["bytes"] for row in some} for some in (rows, shuffled)]
    assert clips[0] == clips[1]


def test_all_questions_about_a_clip_get_the_same_other_clip(read):
    rows = read("nano")
    heard = {}
    for row, other in zip(rows, shuffle_clips(rows), strict=True):
        heard.setdefault(row.utterance, set()).add(other.audio["bytes"])
    assert {len(clips) for clips in heard.values()} == {1}
    assert len(set.union(*heard.values())) == 8


def test_one_clip_cannot_be_shuffled(read):
    with pytest.raises(ValueError, match="at least two, or leave the system `shuffled` out"):
        shuffle_clips(read("nano", limit=1))


# Instructions


def test_swapping_gives_every_row_the_wording_of_another_task_and_leaves_all_else(read):
    rows = read("nano")
    swapped = swap_instructions(rows, POOL)
    for row, other in zip(rows, swapped, strict=True):
        assert other.instruction not in (*POOL[row.task].seen, *POOL[row.task].held_out)
        assert other.instruction in {one.instruction for one in rows}
        assert replace(other, instruction=row.instruction) == row


@pytest.mark.parametrize(
    ("name", "instead"), [("nano_intent", TRANSCRIPTION), ("nano_format", TRANSCRIPTION), ("nano_asr", "intent")]
)
def test_where_all_rows_ask_the_same_another_task_of_the_pool_is_asked(read, name, instead):
    swapped = swap_instructions(read(name), POOL)
    assert {row.instruction for row in swapped} <= set(POOL[instead].held_out)
    assert swapped == swap_instructions(read(name), POOL)


def test_a_cascade_hears_every_clip_once(read):
    rows = read("nano")
    heard = transcription_rows(rows, POOL)
    assert [row.utterance for row in heard] == list(range(8))
    assert [row.audio for row in heard] == [row.audio for row in rows[::2]]
    assert {row.instruction for row in heard} <= set(POOL[TRANSCRIPTION].held_out)
    assert len({row.id for row in heard}) == 8
