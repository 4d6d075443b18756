"""The rows of a bias analysis, and their responses."""

from collections import Counter

import pytest
from datasets import Dataset

from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, load_pool
from dataset_builders.responders.exchange import Reply
from recipes.bias import rows as module
from recipes.bias.rows import load_rows, with_targets

# Rows


def test_a_self_powered_set_brings_its_responses(set_dir, rows):
    found = load_rows(str(set_dir), "train", 100)
    kept = {row["id"]: row for row in rows if row["task"] != TRANSCRIPTION}
    assert {row["id"]: row for row in found} == kept
    assert len(found) == len(kept) == 8
    assert all(row["response"].startswith("So ") and row["audio"]["bytes"] for row in found)


def test_an_asr_corpus_gets_tasks_in_held_out_wordings_and_no_response(corpus_dir):
    found, pool = load_rows(str(corpus_dir), "train", 100), load_pool()
    assert len(found) == 8
    for row in found:
        assert row["task"] in SELF_POWERED_TASKS
        assert row["instruction"] in pool[row["task"]].held_out
        assert row["audio"]["bytes"] and row["transcript"] and "response" not in row


@pytest.mark.parametrize("kind", ["set_dir", "corpus_dir"])
def test_rows_are_at_most_the_limit_and_always_the_same(request, kind):
    folder = str(request.getfixturevalue(kind))
    few, again = load_rows(folder, "train", 3), load_rows(folder, "train", 3)
    assert len(few) == 3 and few == again
    every = [row["id"] for row in load_rows(folder, "train", 100)]
    assert {row["id"] for row in few} < set(every)


def test_only_the_tasks_asked_for_are_there(set_dir, corpus_dir):
    tasks = Counter(row["task"] for row in load_rows(str(set_dir), "train", 100))
    assert len(tasks) > 1
    for task, number in tasks.items():
        assert [row["task"] for row in load_rows(str(set_dir), "train", 100, [task])] == [task] * number
    assert {row["task"] for row in load_rows(str(corpus_dir), "train", 100, ["intent"])} == {"intent"}


@pytest.fixture
def stocked(set_dir, monkeypatch):
    """Make a set with this number of rows per task. Only its folder is a real one."""

    def make(**numbers):
        held = [{"id": f"{task}/{n}", "task": task} for task, number in numbers.items() for n in range(number)]
        monkeypatch.setattr(module, "load_self_powered", lambda *_: Dataset.from_list(held))

    return make


def drawn(set_dir, limit, tasks, seed=0):
    return Counter(row["task"] for row in load_rows(str(set_dir), "train", limit, tasks, seed))


def test_a_limit_is_shared_evenly_by_the_tasks(stocked, set_dir):
    tasks = ["intent", "keyword", "repetition", "sentiment"]
    stocked(**dict.fromkeys(tasks, 20))
    assert drawn(set_dir, 8, tasks) == dict.fromkeys(tasks, 2)
    assert drawn(set_dir, 5, tasks) == {"intent": 2, "keyword": 1, "repetition": 1, "sentiment": 1}
    assert drawn(set_dir, 3, tasks) == {"intent": 1, "keyword": 1, "repetition": 1}


def test_tasks_with_more_rows_replace_those_with_too_few(stocked, set_dir):
    stocked(intent=1, keyword=20, repetition=20)
    assert drawn(set_dir, 9, ["intent", "keyword", "repetition"]) == {"intent": 1, "keyword": 4, "repetition": 4}


def test_another_seed_takes_other_rows(stocked, set_dir):
    stocked(intent=50)
    one, other = ({row["id"] for row in load_rows(str(set_dir), "train", 10, ["intent"], seed)} for seed in (0, 1))
    assert one != other


def test_data_without_a_row_of_the_tasks_is_refused(set_dir):
    with pytest.raises(ValueError, match=r"\(train\) has no row of \['question_who'\]"):
        load_rows(str(set_dir), "train", 10, ["question_who"])


# Responses


class Parrot:
    """Answers with its prompt."""

    def __init__(self):
        self.asked = []

    def respond(self, rows, slot, **options):
        self.asked.append((len(rows), slot, options))
        return [Reply(row["transcript"]) for row in rows]


ASKED = [{"id": "0", "transcript": "one"}, {"id": "1", "transcript": "two"}]


def responses(rows):
    return {row["id"]: row["response"] for row in rows}


def test_responses_of_the_rows_are_kept(set_dir):
    rows, parrot = load_rows(str(set_dir), "train", 3), Parrot()
    assert with_targets(rows, parrot, "response", ["other"] * 3) == rows
    assert not parrot.asked


def test_without_responses_the_model_answers_the_transcript():
    parrot = Parrot()
    found = with_targets(ASKED, parrot, "response", ["other"] * 2, batch_size=4)
    assert responses(found) == {"0": "one", "1": "two"}
    assert parrot.asked == [(2, "transcript", {"batch_size": 4})]
    assert "response" not in ASKED[0]


def test_own_answers_replace_the_responses():
    parrot, rows = Parrot(), [row | {"response": "given"} for row in ASKED]
    assert responses(with_targets(rows, parrot, "own", ["a", "b"])) == {"0": "a", "1": "b"}
    assert not parrot.asked


def test_rows_with_an_empty_response_are_left_out():
    assert responses(with_targets(ASKED, Parrot(), "own", [" \n", "b"])) == {"1": "b"}
    with pytest.raises(ValueError, match="all 2 responses are empty"):
        with_targets(ASKED, Parrot(), "own", ["", " "])


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="unknown target 'gold'; expected one of .*own"):
        with_targets(ASKED, Parrot(), "gold", ["", ""])
