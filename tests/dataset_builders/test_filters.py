"""Filters: which responses are dropped and why, and which similar ones are kept."""

import pytest

from dataset_builders.filters import FILTERS, check_names, judge, reason_to_drop
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Task, load_pool
from dataset_builders.responders.exchange import Reply, Request

POOL = load_pool()
SAID = "the farmer sold the lamp yesterday"


def dropped(text, task="continuation", said=SAID, finish="stop", off=()):
    return reason_to_drop(POOL[task], said, Reply(text, finish), off)


# The reasons


REPLIES = {
    "prompt_too_long": Reply("", "prompt_too_long"),
    "special_token": Reply("", "special_token"),
    "truncated": Reply("He went on and on and", "length"),
    "empty": Reply(""),
    "unfinished": Reply("He went on and on and"),
    "copy": Reply("The farmer sold the lamp, yesterday!"),
    "refusal": Reply("As an AI, I cannot hear speech."),
}


@pytest.mark.parametrize("reason", REPLIES)
def test_each_reason_drops_and_can_be_turned_off(reason):
    reply = REPLIES[reason]
    assert reason_to_drop(POOL["continuation"], SAID, reply) == reason
    # Several reasons may apply: a cut response is also unfinished, and the response to an unsent prompt is also empty.
    after = {
        "prompt_too_long": "empty",
        "special_token": "empty",
        "truncated": "unfinished",
        "empty": "unfinished",
    }.get(reason)
    assert reason_to_drop(POOL["continuation"], SAID, reply, off={reason}) == after
    assert reason_to_drop(POOL["continuation"], SAID, reply, off=set(FILTERS)) is None


def test_a_prompt_that_is_too_long_cannot_be_kept():
    with pytest.raises(ValueError, match="cannot be switched off; set a larger max_prompt_tokens"):
        check_names(["prompt_too_long"])


def test_the_first_reason_in_the_order_of_the_table_is_the_one_that_counts():
    assert list(REPLIES) == [name for name in FILTERS if name not in ("duplicate", "judged")]
    reply, off = Reply("", "prompt_too_long"), []
    while reason := reason_to_drop(POOL["continuation"], "", reply, off):
        off.append(reason)
    assert off == ["prompt_too_long", "empty", "unfinished", "copy"]  # "" is the bare transcript of ""


def test_white_space_is_no_text():
    assert dropped(" \n", "keyword") == "empty"


def test_a_good_response_has_no_reason():
    assert dropped("Then she bought it back.") is None


def test_names_that_no_filter_has_are_refused_with_those_there_are():
    check_names(set(FILTERS) - {"prompt_too_long"})
    check_names([])
    with pytest.raises(ValueError, match="unknown filter 'refusals'; expected one of .*'refusal'"):
        check_names(["empty", "refusals"])


# The pool's switches


@pytest.mark.parametrize("task", SELF_POWERED_TASKS)
def test_labels_and_lists_need_no_full_stop(task):
    labels = task in ("keyword", "intent", "sentiment")
    assert dropped("farmer, lamp", task) == (None if labels else "unfinished")
    assert dropped("Farmer, lamp.", task) is None


@pytest.mark.parametrize("task", SELF_POWERED_TASKS)
def test_only_repetition_may_say_the_transcript_again(task):
    assert dropped("The farmer sold the lamp yesterday.", task) == (None if task == "repetition" else "copy")
    assert dropped("Yesterday the farmer sold the lamp.", task) is None


@pytest.mark.parametrize(
    ("said", "response"),
    [
        ("YOU'RE LATE", "You’re late!"),
        ("two words", "**Two  words.**"),
        ("ÉTÉ", "été."),
        ("你好 吗", "你好,吗?"),
        ("नमस्ते", "“नमस्ते।”"),
    ],
)
def test_a_copy_is_one_whatever_its_case_marks_and_script(said, response):
    assert dropped(response, said=said) == "copy"


def test_marks_that_are_letters_count_in_a_copy():
    assert dropped("की।", said="का") is None  # two vowel signs of one consonant


def test_a_users_task_is_filtered_by_its_own_switches():
    strict = Task("song", "Sing.", ("Sing.",), ("Do sing.",))
    free = Task("song", "Sing.", ("Sing.",), ("Do sing.",), ends_like_a_sentence=False, may_copy_transcript=True)
    for text, reason in {"la la la": "unfinished", "So it goes.": "copy"}.items():
        assert reason_to_drop(strict, "so it goes", Reply(text)) == reason
        assert reason_to_drop(free, "so it goes", Reply(text)) is None


@pytest.mark.parametrize("said", [SAID, "i'm sorry but i can't", "and so", "", "no text provided"])
def test_transcription_is_never_dropped(said):
    assert reason_to_drop(POOL[TRANSCRIPTION], said, Reply(said)) is None


# Ends


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "Is it so?",
        "Never!",
        "And then …",
        "And then...",
        "这是真的。",
        "本当ですか？",
        "यह सच है।",
        "هل هذا صحيح؟",
        "یہ سچ ہے۔",
        "Սա ճիշտ է։",
        "እውነት ነው።",
        "Είναι αλήθεια;",
        "มันเป็นความจริง",
    ],
)
def test_a_sentence_ends_in_the_mark_of_its_script(text):
    assert dropped(text) is None


@pytest.mark.parametrize(
    "text",
    [
        'He said "yes."',
        "He said “yes.”",
        "Er sagte „Ja.“",
        "Il dit « oui. »",
        "彼は「はい。」",
        "(So it was.)",
        "[So it was.]",
        "**So it was.**",
        "_So it was._",
        "`So it was.`",
        "So it was.\n\n",
        "It was 'so.'",
    ],
)
def test_quotes_brackets_and_markdown_may_close_after_the_mark(text):
    assert dropped(text) is None


@pytest.mark.parametrize(
    "text", ["and then he", "farmer, lamp,", "Here is a list:", "He said (no", "3.5", "So. And", "这是"]
)
def test_what_stops_in_the_middle_is_unfinished(text):
    assert dropped(text) == "unfinished"


# Refusals


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I am very sorry, but as a language model I have no ears.",
        "I’m sorry, but I cannot assist with that request.",
        "I'm afraid I don't have access to the speech.",
        "I'm sorry, but could you please provide the speech?",
        "I'm sorry, but the speech does not contain enough information.",
        "Sorry, I can't do that.",
        "Unfortunately, I am not able to listen to audio.",
        "I apologize, but I am unable to continue the speech.",
        "I apologise for the confusion, but I need more context.",
        "As an AI language model, I do not have feelings.",
        "As a text-based assistant, I only read.",
        "I'm just an AI.",
        "I am unable to process audio.",
        "I cannot hear the speech.",
        "I can't help with that.",
        "I don't have the ability to play sounds.",
        "I do not have any information about the speaker.",
        "Please provide the speech you would like me to continue.",
        "Could you please share the text of the speech?",
        "Can you provide more context?",
        "It seems like you haven't provided the speech.",
        "You forgot to include the audio.",
        "No speech was provided.",
        "There is no transcript given.",
        "  I'M SORRY, BUT I CANNOT DO THAT.",
    ],
)
def test_refusals_and_requests_for_the_speech_are_dropped(text):
    assert dropped(text) == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        "He said that he was sorry, but he could not come.",
        "\"I'm sorry, but I can't,\" she said.",  # words of a story
        "I'm sorry to hear that, but life goes on.",
        "I am afraid I must go now.",
        "Sorry I am late, said the farmer.",
        "I can't help laughing at the lamp.",
        "I cannot help but wonder who bought it.",
        "I don't have any money left.",
        "Please send help.",
        "Could you send him to me?",
        "As the sun rose, the farmer left.",
        "As aid came, they rested.",
        "I am an old farmer.",
        "You have not lived.",
        "It seems like you know the farmer.",
        "No text could say it better.",
        "There is no speech without a speaker.",
    ],
)
def test_speakers_may_be_sorry_afraid_and_in_need(text):
    assert dropped(text) is None


def test_a_refusal_later_in_the_response_is_part_of_the_story():
    assert dropped("He looked at me. I'm sorry, but I cannot help you, he said.") is None


# The judge


class Judge:
    """Answers with given texts, and records the requests."""

    def __init__(self, *texts):
        self.texts, self.asked = texts, []

    def respond(self, requests):
        self.asked.extend(requests)
        return [Reply(text) for text in self.texts]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("4", 4),
        ("4/5", 4),
        ("5 out of 5", 5),
        ("I would give it a 3.", 3),
        ("**Score:** 2", 2),
        ("On a scale from 1 to 5: 4", 4),
        ("Score (1-5): 3", 3),
        ("", None),
        ("very good", None),
        ("0", None),
        ("6", None),
        ("10", None),
        ("in 2024", None),
    ],
)
def test_the_score_is_the_first_number_from_1_to_5_if_there_is_one(text, score):
    assert judge(Judge(text).respond, [Request("Sing.", SAID)], ["La."]) == [score]


def test_the_judge_reads_instruction_response_and_transcript():
    responder = Judge("5", "none", "1")
    requests = [Request(f"Sing {{{n}}}.", f"said {n}", "song") for n in range(3)]
    assert judge(responder.respond, requests, ["La.", "{Le}.", "Li."]) == [5, None, 1]
    assert [request.transcript for request in responder.asked] == ["said 0", "said 1", "said 2"]
    assert "Sing {1}." in responder.asked[1].instruction and "{Le}." in responder.asked[1].instruction


def test_no_responses_to_judge_give_no_requests():
    assert judge(Judge().respond, [], []) == []
