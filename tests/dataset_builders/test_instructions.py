"""What the instruction pool promises, and what a draw from it promises."""

import math
import re
from collections import Counter

import pytest
import yaml

from dataset_builders.instructions import draw_fraction, draw_instruction, draw_task, load_pool

POOL = load_pool()
TRAINED = ["continuation", "repetition", "keyword", "intent", "sentiment", "translation", "transcription"]
QUESTIONS = ["question_who", "question_what", "question_circumstance"]
DECISIVE = {
    "continuation": r"next|continu",
    "repetition": r"other words|another form|new form|rephrase|restate|own way",
    "keyword": r"keywords",
    "intent": r"intent|purpose",
    "sentiment": r"sentiment|mood|feeling",
    "translation": r"spanish",
    "transcription": r"transcri|word for word|\bdown\b",
}
STOPWORDS = set(
    re.findall(r"\w+", "a an the and or of in to at for with it its is are was do does did i you me that what")
)


def content_words(line):
    return set(re.findall(r"[a-z]+", line.lower())) - STOPWORDS


def lines_of(task):
    return POOL[task].seen + POOL[task].held_out


def test_the_pool_has_the_agreed_tasks_and_sizes():
    assert list(POOL) == TRAINED + QUESTIONS
    for name, task in POOL.items():
        assert (len(task.seen), len(task.held_out)) == ((6, 3) if name in QUESTIONS else (18, 6))
        assert task.held_out_task == (name in QUESTIONS)


@pytest.mark.parametrize("task", POOL)
def test_a_line_is_one_short_sentence_about_the_speech(task):
    for line in lines_of(task):
        assert line[0].isupper() and line[-1] in ".?:", line
        assert 4 <= len(line.split()) <= 12, line
        assert re.search(r"the speech|the speaker|what is said|you hear", line), line


def test_seen_and_held_out_are_disjoint_and_no_line_is_shared_by_tasks():
    lines = [line.lower() for task in POOL for line in lines_of(task)]
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("task", POOL)
def test_a_held_out_line_has_no_new_content_word(task):
    seen = set().union(*map(content_words, POOL[task].seen))
    for line in POOL[task].held_out:
        assert content_words(line) <= seen, f"{line}: {content_words(line) - seen}"


@pytest.mark.parametrize("task", TRAINED)
def test_every_line_holds_the_decisive_word_of_its_task_and_of_no_other(task):
    for line in lines_of(task):
        assert [name for name, words in DECISIVE.items() if re.search(words, line.lower())] == [task], line


def test_draws_are_the_same_everywhere_and_always():
    assert draw_fraction(0, "a", "b") == 0.47619746888297887
    assert draw_instruction(POOL, "translation", "utt-1", seed=7) == "Put what the speaker says into Spanish."


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    ids = [f"utt-{n}" for n in range(50)]
    forward = {id: draw_instruction(POOL, "keyword", id, seed=1) for id in ids}
    backward = {id: draw_instruction(POOL, "keyword", id, seed=1) for id in reversed(ids)}
    assert forward == backward
    assert draw_task({"a": 1, "b": 2}, "x", 0) == draw_task({"b": 2, "a": 1}, "x", 0)


def test_seed_id_and_parts_each_matter():
    assert len({draw_fraction(0, "a"), draw_fraction(1, "a"), draw_fraction(0, "b"), draw_fraction(0, "a", "")}) == 4


def test_fractions_are_uniform_and_every_line_is_drawn():
    fractions = [draw_fraction(3, str(n)) for n in range(2000)]
    assert min(fractions) >= 0 and max(fractions) < 1
    assert math.isclose(sum(fractions) / 2000, 0.5, abs_tol=0.03)
    for split in ("seen", "held_out"):
        drawn = {draw_instruction(POOL, "intent", str(n), 0, split) for n in range(500)}
        assert drawn == set(getattr(POOL["intent"], split))


def test_tasks_are_drawn_by_weight():
    counts = Counter(draw_task({"a": 6, "b": 3, "c": 1, "never": 0}, str(n), seed=0) for n in range(3000))
    assert {task: round(count / 300) for task, count in counts.items()} == {"a": 6, "b": 3, "c": 1}


def test_an_unknown_task_or_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'singing'.*'continuation'"):
        draw_instruction(POOL, "singing", "x", 0)
    with pytest.raises(ValueError, match="'test'.*'held_out'"):
        draw_instruction(POOL, "intent", "x", 0, split="test")


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": math.nan}, {"a": math.inf}])
def test_weights_that_allow_no_draw_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        draw_task(weights, "x", 0)


GOOD = {"description": "d", "seen": ["Sing."], "held_out": ["Do sing."]}


@pytest.mark.parametrize(
    ("block", "trouble"),
    [
        ({"description": "d", "seen": ["Sing."]}, "missing key 'held_out'"),
        (GOOD | {"heldout": []}, "unknown key 'heldout'"),
        (GOOD | {"seen": []}, "`seen` must be a list that is not empty"),
        (GOOD | {"seen": "Sing."}, "`seen` must be a list"),
        (GOOD | {"seen": [{"Sing": "now"}]}, "expected a sentence"),
        (GOOD | {"seen": ["Sing.", "sing."]}, "duplicate, in song.seen and song.seen"),
        (GOOD | {"held_out": ["Sing."]}, "duplicate, in song.seen and song.held_out"),
        (GOOD | {"held_out_task": "yes please"}, "`held_out_task` must be true or false"),
        (None, "expected a mapping"),
    ],
)
def test_a_bad_task_is_refused_naming_file_task_and_trouble(tmp_path, block, trouble):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"tasks": {"song": block}}))
    with pytest.raises(ValueError, match=f"mine.yaml: task 'song': .*{re.escape(trouble)}"):
        load_pool(path)


@pytest.mark.parametrize("text", ["", "- a", "task: {}", "tasks: {}", "tasks: [unclosed"])
def test_a_file_that_is_no_pool_is_refused_by_name(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="mine.yaml"):
        load_pool(path)


def test_a_user_adds_a_task_without_code(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"tasks": {"song": GOOD}}))
    assert draw_instruction(load_pool(path), "song", "x", 0) == "Sing."
