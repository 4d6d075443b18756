"""Answers on disk: what a killed run leaves, and that nobody is asked twice."""

import json
from dataclasses import fields, replace

import pyarrow.parquet as pq
import pytest

from dataset_builders.responders.exchange import Reply
from recipes.evaluation.answers import FEATURES, answer, to_parquet
from recipes.evaluation.rows import Answer, Question

ROWS = [
    Question(f"u{place}", place, {"bytes": b"clip"}, "said", duration, "here", "intent", "oracle", "Do.")
    for place, duration in enumerate([1.0, 3.0, 2.0, 5.0, 4.0])
]
PREDICTION = {
    "task": "nano",
    "system": "model",
    "id": "u0",
    "part": "intent",
    "instruction": "Do.",
    "transcript": "so",
    "references": ["a", "b"],
    "response": "So.",
    "constrained": None,
    "correct": None,
    "finished": True,
    "seconds": 0.5,
    "log_likelihood": -3.5,
    "tokens": 7,
    "judgement": None,
}


class Echo:
    """Answers with the row's id, and remembers what it was asked, batch by batch; dies before batch `until`."""

    def __init__(self, until=None):
        self.batches, self.until = [], until

    def __call__(self, rows):
        if len(self.batches) == self.until:
            raise KeyboardInterrupt
        self.batches.append([row.id for row in rows])
        return [Reply(f"{row.id}!") for row in rows], [None] * len(rows)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "answers" / "task" / "model.jsonl"


def ids_in(file):
    return [json.loads(line)["id"] for line in file.read_text().splitlines()]


def test_answers_come_in_the_order_of_the_rows(file):
    records = answer(ROWS, Echo(), file, 2)
    assert [record.id for record in records] == ["u0", "u1", "u2", "u3", "u4"]
    assert [record.response for record in records] == ["u0!", "u1!", "u2!", "u3!", "u4!"]


def test_the_longest_clips_are_asked_first_and_together(file):
    echo = Echo()
    answer(ROWS, echo, file, 2)
    assert echo.batches == [["u3", "u4"], ["u1", "u2"], ["u0"]]


def test_a_record_says_whether_the_model_came_to_an_end_and_how_long_it_took(file):
    def respond(rows):
        return [Reply("whole"), Reply("cut", "length")], ["yes", None]

    records = answer(ROWS[:2], respond, file, 2)
    assert {record.id: record.finished for record in records} == {"u1": True, "u0": False}
    assert {record.id: record.constrained for record in records} == {"u1": "yes", "u0": None}
    assert all(record.seconds >= 0 for record in records)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert list(lines[0]) == [*(field.name for field in fields(Answer)), "row"]


def test_every_batch_is_on_disk_before_the_next_is_asked(file):
    echo = Echo()

    def respond(rows):
        before = [id for batch in echo.batches for id in batch]
        assert (ids_in(file) if file.exists() else []) == before
        return echo(rows)

    answer(ROWS, respond, file, 2)
    assert ids_in(file) == ["u3", "u4", "u1", "u2", "u0"]


def test_what_was_answered_before_the_kill_is_not_asked_again(file):
    with pytest.raises(KeyboardInterrupt):
        answer(ROWS, Echo(until=2), file, 2)
    assert ids_in(file) == ["u3", "u4", "u1", "u2"]
    again = Echo()
    records = answer(ROWS, again, file, 2)
    assert again.batches == [["u0"]]
    assert [record.response for record in records] == ["u0!", "u1!", "u2!", "u3!", "u4!"]
    assert answer(ROWS, Echo(until=0), file, 2) == records


@pytest.mark.parametrize("torn", [1, 30, -1])  # all but the end of the line
def test_a_line_that_a_kill_tore_is_dropped_and_asked_again(file, torn):
    answer(ROWS, Echo(), file, 1)
    *whole, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole) + last[:torn])
    again = Echo()
    records = answer(ROWS, again, file, 1)
    assert again.batches == [["u0"]]
    assert [record.response for record in records] == ["u0!", "u1!", "u2!", "u3!", "u4!"]
    assert sorted(ids_in(file)) == ["u0", "u1", "u2", "u3", "u4"]


def test_a_line_torn_within_a_character_is_dropped_too(file):
    def respond(rows):
        return [Reply("ñandú") for _ in rows], [None] * len(rows)

    answer(ROWS[:2], respond, file, 1)
    content = file.read_bytes()
    file.write_bytes(content[: content.rfind("ú".encode()) + 1])
    assert [record.response for record in answer(ROWS[:2], respond, file, 1)] == ["ñandú", "ñandú"]


@pytest.mark.parametrize("text", ["one\ntwo", "one\u2028two", "one\u2029two", "one\x85two\x0b\x1c", "| a \\ b |", ""])
def test_an_answer_may_hold_anything_that_looks_like_the_end_of_a_line(file, text):
    def respond(rows):
        return [Reply(text) for _ in rows], [text] * len(rows)

    first = answer(ROWS, respond, file, 2)
    assert {record.response for record in first} == {text}
    assert answer(ROWS, Echo(until=0), file, 2) == first


def test_rows_may_be_more_or_fewer_than_the_file_holds(file):
    answer(ROWS[:2], Echo(), file, 2)
    more = Echo()
    answer(ROWS, more, file, 4)
    assert more.batches == [["u3", "u4", "u2"]]
    assert [record.id for record in answer(ROWS[3:], Echo(until=0), file, 2)] == ["u3", "u4"]


@pytest.mark.parametrize(
    "change", [{"transcript": "edited"}, {"instruction": "another"}, {"audio": {"bytes": b"another", "path": None}}]
)
def test_a_row_that_was_edited_is_asked_again(file, change):
    answer(ROWS, Echo(), file, 2)
    edited, again = [replace(ROWS[0], **change), *ROWS[1:]], Echo()
    answer(edited, again, file, 2)
    assert again.batches == [[ROWS[0].id]]
    answer(edited, Echo(until=0), file, 2)


def test_as_many_answers_as_questions_or_nothing_is_written(file):
    with pytest.raises(ValueError, match="zip"):
        answer(ROWS, lambda rows: ([Reply("one")], [None] * len(rows)), file, 2)
    assert not file.exists()


# Parquet


def test_predictions_have_these_columns_and_keep_what_is_unknown(tmp_path):
    others = {"constrained": "The intent is love.", "correct": True, "seconds": None, "references": []}
    to_parquet([dict(reversed(PREDICTION.items())), {**PREDICTION, **others}], tmp_path / "predictions.parquet")
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert table.column_names == list(FEATURES)
    assert table.to_pylist() == [PREDICTION, {**PREDICTION, **others}]
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.parquet"]


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path):
    to_parquet([PREDICTION], tmp_path / "predictions.parquet")
    with pytest.raises(ValueError, match="long"):
        to_parquet([{**PREDICTION, "seconds": "long"}], tmp_path / "predictions.parquet")
    assert pq.read_table(tmp_path / "predictions.parquet").to_pylist() == [PREDICTION]
