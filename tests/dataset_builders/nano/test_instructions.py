"""The instructions of the nano pool use words that the nano LLM knows."""

import re

import pytest

from dataset_builders.instructions import digest_of, draw_instruction, load_pool
from dataset_builders.nano.tasks import POOL_PATH, UNSEEN_TASKS

POOL = load_pool(POOL_PATH)
TRAINED = ["continuation", "repetition", "keyword", "intent", "sentiment", "translation", "transcription"]
REPLY = "reply"  # the only task without an instruction
ASKED = [*TRAINED, *UNSEEN_TASKS]
DECISIVE = {
    "continuation": r"next|continu",
    "repetition": r"other words|another form|new form|rephrase|restate|own way",
    "keyword": r"keywords",
    "intent": r"intent|purpose",
    "sentiment": r"sentiment|mood|feeling",
    "translation": r"spanish",
    "transcription": r"transcri|word for word|\bdown\b",
    "question_who": r"\bwho\b|\bperson\b",
    "question_what": r"\bthing\b|\bobject\b",
    "question_circumstance": r"\bwhere or when\b|\bplace or time\b",
    "question_deed": r"\bdeed\b",
    "spanish_who": r"\bcharacter\b",
    "numbered": r"\bnumber",
}
# It asks for an answer in Spanish, as `translation` does, but about another thing.
DECISIVE_OF_OTHERS = {"spanish_who": {"translation"}}
STOPWORDS = set(
    re.findall(r"\w+", "a an the and or of in to at for with it its is are was do does did i you me that what")
)


def content_words(line):
    return set(re.findall(r"[a-z]+", line.lower())) - STOPWORDS


def lines_of(task):
    return POOL[task].seen + POOL[task].held_out


def test_the_pool_has_the_agreed_tasks_and_sizes():
    assert list(POOL) == [*ASKED, REPLY]
    for name in ASKED:
        task = POOL[name]
        assert (len(task.seen), len(task.held_out)) == ((6, 3) if name in UNSEEN_TASKS else (18, 6))
        assert task.held_out_task == (name in UNSEEN_TASKS)
    assert POOL[REPLY].seen == POOL[REPLY].held_out == ("",)
    assert not POOL[REPLY].held_out_task
    assert min(len(lines_of(task)) for task in TRAINED) >= 20


def test_the_switches_are_the_ones_its_filters_need():
    assert [name for name, task in POOL.items() if task.may_copy_transcript] == ["repetition"]
    free = [name for name, task in POOL.items() if not task.ends_like_a_sentence]
    assert free == ["keyword", "intent", "sentiment", "numbered"]
    assert [name for name, task in POOL.items() if task.without_instruction] == [REPLY]
    assert {name: task.slots for name, task in POOL.items() if task.slots} == {
        "translation": (("language", ("Spanish",)),)
    }


@pytest.mark.parametrize("task", ASKED)
def test_a_line_is_one_short_sentence_about_the_speech(task):
    for line in lines_of(task):
        assert line[0].isupper() and line[-1] in ".?:", line
        assert 4 <= len(line.split()) <= 12, line
        assert re.search(r"the speech|the speaker|what is said|you hear", line), line


def test_seen_and_held_out_are_disjoint_and_no_line_is_shared_by_tasks():
    lines = [line.lower() for task in ASKED for line in lines_of(task)]
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("task", ASKED)
def test_a_held_out_line_has_no_new_content_word(task):
    seen = set().union(*map(content_words, POOL[task].seen))
    for line in POOL[task].held_out:
        assert content_words(line) <= seen, f"{line}: {content_words(line) - seen}"


@pytest.mark.parametrize("task", ASKED)
def test_every_line_holds_the_decisive_word_of_its_task_and_of_no_other(task):
    for line in lines_of(task):
        found = {name for name, words in DECISIVE.items() if re.search(words, line.lower())}
        assert found == {task, *DECISIVE_OF_OTHERS.get(task, ())}, line


def test_the_wordings_are_those_of_the_nano_llm_and_of_all_published_figures():
    assert digest_of(POOL) == "7522c2064873a65c"
    assert draw_instruction(POOL, "translation", "utt-1", seed=7) == "Put what the speaker says into Spanish."
