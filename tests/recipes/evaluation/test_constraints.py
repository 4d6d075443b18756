"""Demands on the form of an answer: what keeps to each, what does not, and what a transcript gets for nothing."""

from collections import Counter

import pytest

from recipes.evaluation.constraints import BASE_INSTRUCTIONS, CONSTRAINTS, draw_constraint, satisfied

TRANSCRIPT = (
    "he told the farmer that the old lamp in the attic was broken and nobody in the village knew how to mend it"
)

KEPT = {
    "upper_case": ["THE FARMER SOLD 3 LAMPS!", "É TARDE."],
    "lower_case": ["the farmer sold it, i think.", "it's 3 o'clock"],
    "at_most_words": ["A farmer sold his lamp.", "One two three four five six seven eight nine well-kept."],
    "at_least_words": ["word " * 50],
    "exactly_sentences": ["He left. Did she?", 'He said "no." She left!', "Dr. Hall paid 3.50 pounds. Then he left"],
    "bullets": ["- a farmer\n- a lamp\n- a sale", "- a\n\n- b\n\n- c"],
    "numbered_list": ["1. A farmer\n2. A lamp\n3. A sale", "1. a\n\n2. b\n\n3. c"],
    "json": ['{"answer": "a farmer"}', '```json\n{"answer": "a farmer"}\n```', '{\n  "answer": ["a", "b"]\n}'],
    "include_words": ["Perhaps the listener knows.", "LISTENER, perhaps."],
    "no_commas": ["The farmer sold a lamp; then he left."],
    "forbid_word": ["A farmer then sold his lamp to them."],
    "starts_with": ["In short, a farmer sold a lamp.", "In short: no."],
    "ends_with": ["He sold it. That is all.", "That is all."],
    "quoted": ['"A farmer sold his lamp."', "“A farmer sold his lamp.”"],
    "title": ["<<The Lamp>>\nA farmer sold it.", "<<The Lamp>>\n\nA farmer sold it."],
    "language_spanish": [
        "El agricultor vende la lámpara.",
        "Trata de un hombre que habla con su hija en la cocina.",
    ],
    "language_german": ["Der Bauer hat die Lampe verkauft.", "Es geht um einen Mann, der mit der Tochter spricht."],
    "language_french": ["Le fermier a vendu la lampe.", "L'homme parle d'une lampe qu'il a vendue dans le village."],
    "no_digits": ["He sold two lamps."],
    "no_repeated_words": ["A farmer sold his lamp."],
    "postscript": ["He sold it.\nP.S. The lamp was old.", "He sold it.\n\nP.S.: Nobody bid."],
}
BROKEN = {
    "upper_case": ["THE farmer", "123", "The Farmer"],
    "lower_case": ["I think so.", "123", "the Farmer"],
    "at_most_words": ["one two three four five six seven eight nine ten eleven", "..."],
    "at_least_words": ["word " * 49],
    "exactly_sentences": ["He left.", "He left. She left. All left.", "he left and she left", "3.50 pounds."],
    "bullets": ["- a\n- b", "- a\n- b\n- c\n- d", "* a\n* b\n* c", "Here:\n- a\n- b\n- c", "-a\n-b\n-c"],
    "numbered_list": ["1. a\n2. b", "1) a\n2) b\n3) c", "1. a\n2. b\n3. c\n4. d", "1. a 2. b 3. c"],
    "json": ['{"answer": "a", "why": "b"}', '{"Answer": "a"}', '["answer"]', "answer: a", 'Sure: {"answer": "a"}'],
    "include_words": ["Perhaps the listeners know.", "The listener knows."],
    "no_commas": ["First, he left.", "他走了，她也走了。"],
    "forbid_word": ["The farmer.", "He left THE lamp."],
    "starts_with": ["In shorter words", "in short, no", "Well: In short, no.", '"In short, no."'],
    "ends_with": ["That is all. Bye.", "that is all.", "That is all", "So that was That is all!"],
    "quoted": ['A "farmer" sold it.', '"A" and "B"', '"A farmer', '""', "'A farmer'"],
    "title": ["<<The Lamp>> A farmer sold it.", "<The Lamp>\nA farmer.", "A farmer.\n<<The Lamp>>", "<<The Lamp>>"],
    "language_spanish": ["The farmer sold the lamp.", "Der Bauer hat die Lampe verkauft.", "Sí.", "La."],
    "language_german": ["The farmer sold the lamp.", "El agricultor vende la lámpara.", "He was in the war."],
    "language_french": ["The farmer sold the lamp.", "El agricultor vende la lámpara.", "It's what he said."],
    "no_digits": ["He sold 2 lamps.", "٣"],
    "no_repeated_words": ["The farmer sold the lamp.", "Lamp, lamp", "..."],
    "postscript": ["P.S. The lamp was old.", "He sold it. P.S. It was old.", "He sold it.\nP.S.", "He sold it.\nPS It"],
}


def cases(table):
    return [(name, response) for name, responses in table.items() for response in responses]


@pytest.mark.parametrize(("name", "response"), cases(KEPT))
def test_an_answer_that_keeps_to_the_constraint_whatever_white_space_is_around_it(name, response):
    assert satisfied(name, response)
    assert satisfied(name, f"\n {response} \n\n")


@pytest.mark.parametrize(("name", "response"), cases(BROKEN))
def test_an_answer_that_does_not(name, response):
    assert not satisfied(name, response)


def test_the_examples_are_of_every_constraint():
    assert list(KEPT) == list(BROKEN) == list(CONSTRAINTS)
    assert all(constraint.name == name for name, constraint in CONSTRAINTS.items())


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("response", ["", " \n\t"])
def test_an_empty_answer_keeps_to_none(name, response):
    assert satisfied(name, response) is False


def test_a_verbatim_transcript_gets_only_what_it_cannot_help():
    def kept(text):
        return {name for name in CONSTRAINTS if satisfied(name, text)}

    assert kept(TRANSCRIPT) == {"lower_case", "no_commas", "no_digits"}
    assert kept(TRANSCRIPT.capitalize() + ".") == {"no_commas", "no_digits"}
    assert kept(TRANSCRIPT.upper()) == {"upper_case", "no_commas", "no_digits"}


def test_an_unknown_constraint_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="unknown constraint 'rhyme'; there are .*'upper_case'"):
        satisfied("rhyme", "A lamp, damp.")


# Instructions


def test_every_request_speaks_of_the_speech_and_every_demand_is_a_sentence():
    about = ("the speech", "the speaker", "what is said", "what you hear")
    assert all(any(words in base for words in about) for base in BASE_INSTRUCTIONS)
    sentences = [*BASE_INSTRUCTIONS, *(constraint.instruction for constraint in CONSTRAINTS.values())]
    assert all(sentence[0].isupper() and sentence[-1] == "." for sentence in sentences)
    assert len(set(sentences)) == len(sentences)


def test_an_instruction_is_a_request_and_the_demand_of_its_constraint():
    instruction, constraint = draw_constraint("corpus/17")
    base = instruction.removesuffix(" " + constraint.instruction)
    assert base in BASE_INSTRUCTIONS
    assert CONSTRAINTS[constraint.name] is constraint


def test_the_draw_is_a_function_of_seed_and_id():
    assert draw_constraint("a", 1) == draw_constraint("a", 1)
    assert len({draw_constraint("a", seed)[0] for seed in range(20)}) > 5
    assert draw_constraint("a") == draw_constraint("a", 0)


def test_every_constraint_and_request_is_drawn_about_as_often_as_the_others():
    drawn = [draw_constraint(f"u/{n}") for n in range(2100)]
    names = Counter(constraint.name for _, constraint in drawn)
    assert set(names) == set(CONSTRAINTS)
    assert min(names.values()) > 60 and max(names.values()) < 150
    assert len({instruction for instruction, _ in drawn}) == len(CONSTRAINTS) * len(BASE_INSTRUCTIONS)
