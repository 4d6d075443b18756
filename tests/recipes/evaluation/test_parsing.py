"""What answers are taken to say, in the words of LLMs that answer freely, and when they say nothing."""

import pytest

from recipes.evaluation.parsing import (
    is_refusal,
    parse_choice,
    parse_count,
    parse_label,
    parse_list,
    parse_rating,
    parse_yes_no,
)

SENTIMENTS = ["positive", "negative", "neutral"]
INTENTS = ["play_music", "music", "answer_call", "alarm set"]
ANIMALS = ["the cat", "a dog", "the black cat", "no animal"]


# Labels


@pytest.mark.parametrize(
    "response",
    [
        "negative",
        "Negative.",
        "**Negative**",
        " NEGATIVE\n",
        '{"sentiment": "negative"}',
        "The sentiment is negative.",
        "The sentiment of the speech is Negative, since the speaker complains about the food.",
        "Sentiment: negative",
        "Negative\n\nThe speaker is unhappy with the service.",
        "The speaker sounds negative, even very negative.",
        "It is not positive but negative.",
        "The sentiment isn't positive. It's negative.",
        "The speech is neither positive nor neutral; negative.",
        "It is negative rather than positive.",
        "More negative than neutral",
        "Not positive or neutral, negative.",
        "It could be positive or negative, but the answer is negative.",
        "Of positive, negative and neutral, the label: negative",
        "Positive or neutral would need praise. The sentiment here is negative.",
        "Is it positive or negative? Answer: negative. That is clear.",
        "Sentiment: Negative. Explanation: the speech is less positive than neutral.",
    ],
)
def test_the_one_label_that_is_named_or_singled_out(response):
    assert parse_label(response, SENTIMENTS) == "negative"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "...",
        "The speaker complains about the food.",
        "Negatively speaking, I cannot tell.",
        "It is not positive.",
        "It's neither positive nor negative.",
        "The sentiment isn’t really negative.",
        "Positive, negative, neutral",
        "It is either positive or negative.",
        "Positive at first. Negative in the end.",
        "The first speaker is positive and the second is negative.",
        "The answer is positive or negative.",
    ],
)
def test_no_label_where_none_is_named_or_more_than_one(response):
    assert parse_label(response, SENTIMENTS) is None


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("Play music", "play_music"),
        ("The intent is play_music.", "play_music"),
        ("The speaker wants to play  music.", "play_music"),
        ("The intent is music", "music"),
        ("Play the music.", "music"),
        ("ALARM_SET", "alarm set"),
        ("answer-call", "answer_call"),
        ("The intent is answer call.", "answer_call"),
        ("musical", None),
        ("play music, or just music", None),
    ],
)
def test_a_label_within_a_longer_one_is_not_named_by_it(response, label):
    assert parse_label(response, INTENTS) == label


def test_a_label_may_itself_be_a_denial():
    assert parse_label("It is not positive.", ["positive", "not_positive"]) == "not_positive"
    assert parse_label("It is positive.", ["positive", "not_positive"]) == "positive"


def test_the_whole_response_comes_before_what_it_mentions():
    assert parse_label("no joy", ["joy", "no joy"]) == "no joy"
    assert parse_label("Joy or anger", ["joy", "anger", "joy or anger"]) == "joy or anger"


def test_synonyms_stand_for_their_label():
    synonyms = {"joy": ["happy", "happiness"], "anger": ["angry"]}
    assert parse_label("The speaker is happy.", ["joy", "anger"], synonyms) == "joy"
    assert parse_label("Happy, so joy.", ["joy", "anger"], synonyms) == "joy"
    assert parse_label("Happy and angry", ["joy", "anger"], synonyms) is None
    assert parse_label("The speaker is happy.", ["joy", "anger"]) is None


def test_labels_of_other_scripts_are_named_in_words_of_their_own():
    assert parse_label("答案：积极", ["积极", "消极"]) == "积极"
    assert parse_label("NEGATIV", ["negativ", "größer"]) == "negativ"
    assert parse_label("Die Antwort ist GRÖSSER.", ["negativ", "größer"]) == "größer"


@pytest.mark.parametrize(
    ("labels", "synonyms", "message"),
    [
        ([], None, "no labels to look for"),
        (["a"], {"b": ["c"]}, "'b' has synonyms but is not a label"),
        (["on_off", "On off"], None, "'On off' names both 'on_off' and 'On off'"),
        (["joy", "anger"], {"joy": ["strong"], "anger": ["strong"]}, "'strong' names both 'joy' and 'anger'"),
        (["+", "minus"], None, "'\\+' has a name without letters"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, synonyms, message):
    with pytest.raises(ValueError, match=message):
        parse_label("a", labels, synonyms)


# Yes and no


@pytest.mark.parametrize(
    "response",
    [
        "Yes",
        "yes.",
        "**Yes**, the speaker mentions it.",
        "True",
        "Correct!",
        "Answer: yes",
        "The answer is yes.",
        "The correct answer is: Yes",
        "Yes, there is no doubt about it.",
        "It is true that the farmer sold it.",
        "That's correct.",
        "The statement is definitely true.",
        "That is not false.",
        "I would say yes.",
        "Yes or no? Yes.",
        "True or false: true",
        "Well, yes, he did.",
        "No doubt: yes.",
    ],
)
def test_yes_in_many_words(response):
    assert parse_yes_no(response) == "yes"


@pytest.mark.parametrize(
    "response",
    [
        "No",
        "no, he did not",
        "No, that is true elsewhere.",
        "No evidence is given that it is true.",
        "False.",
        "Incorrect",
        "Not true.",
        "It is not true.",
        "That isn't correct.",
        "It’s false.",
        "The claim is incorrect, as he said.",
        "The correct answer is no.",
        "Answer: No",
        "I would say no.",
        "I believe the answer is no because what the speaker says is true.",
        "The speaker says that this is false.",
        "nope",
    ],
)
def test_no_in_many_words(response):
    assert parse_yes_no(response) == "no"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "maybe",
        "Yes and no.",
        "Yes or no",
        "I cannot tell whether it is true or false.",
        "The speaker tells a true story.",
        "There is no rain in the story.",
        "I have no idea.",
        "No idea.",
        "Some say it is true, others say it is false.",
        "Nothing of that kind was known yesterday.",
    ],
)
def test_neither_where_the_response_says_neither_or_both(response):
    assert parse_yes_no(response) is None


# Choices


@pytest.mark.parametrize(
    "response",
    [
        "B",
        "b",
        "(B)",
        "[b]",
        "B.",
        "b)",
        "**B**",
        "B) a dog",
        "b) a dog",
        "B. a dog",
        "B: a dog",
        "B - a dog",
        "B\nThe speaker mentions a dog.",
        "Option B",
        "option b",
        "Option B: a dog",
        "The answer is B",
        "The answer is (b).",
        "The correct answer is B) a dog.",
        "The correct answer is option B.",
        "the answer is b.",
        "Answer: B",
        "ANSWER: B",
        "**Answer:** B",
        "I think it is (B), because the speaker barks.",
        "A dog barks, so I choose B.",
        "I hear barking, so B it is.",
        "(B) since (C) is wrong",
        "The answer is B, not C.",
        "Not A but B",
        "A is wrong, so it must be B.",
        "Either A or B; the answer is B.",
        "A) the cat\nB) a dog\nC) the black cat\nThe answer is B.",
        "$\\boxed{B}$",
        "a dog",
        "A dog.",
        "It is a dog.",
        "The speaker talks about a dog.",
        "It is not the cat, it is a dog.",
    ],
)
def test_a_choice_by_its_letter_or_by_the_text_of_one_option(response):
    assert parse_choice(response, ANIMALS) == "B"


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A", "A"),
        ("a", "A"),
        ("(a)", "A"),
        ("a.", "A"),
        ("A. the cat", "A"),
        ("The answer is A", "A"),
        ("the answer is a.", "A"),
        ("Option A is right", "A"),
        ("the black cat", "C"),
        ("The speaker has the black cat.", "C"),
        ("No animal", "D"),
    ],
)
def test_the_first_letter_and_the_longer_text(response, letter):
    assert parse_choice(response, ANIMALS) == letter


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I cannot tell.",
        "I heard a sound.",
        "A bird is heard.",
        "The answer is a bird.",
        "E",
        "The answer is E.",
        "A or B",
        "A, B",
        "A, B and C are all said.",
        "The answer is C or D.",
        "It's not B.",
        "Either (B) or (C)",
        "The answer is A. No, the answer is B.",
        "A) the cat\nB) a dog\nC) the black cat",
        "the cat and a dog",
        "Vitamin-rich food",
        "It's the speaker's own.",
    ],
)
def test_no_choice_where_none_is_made_or_more_than_one(response):
    assert parse_choice(response, ANIMALS) is None


def test_numbers_are_options_like_any_other():
    assert parse_choice("13", ["3", "13", "30"]) == "B"
    assert parse_choice("He has 30 lamps.", ["3", "13", "30"]) == "C"


def test_options_alike_are_chosen_by_letter_alone():
    assert parse_choice("C", ["C", "C++", "Rust"]) == "C"
    assert parse_choice("Rust", ["C#", "C++", "Rust"]) == "C"
    assert parse_choice("c is named", ["C#", "C++", "Rust"]) is None
    assert parse_choice("The sum", ["+", "-"]) is None


def test_the_pronoun_is_no_ninth_option():
    options = [f"thing {n}" for n in range(10)]
    assert parse_choice("I would choose J", options) == "J"
    assert parse_choice("I do not know.", options) is None


@pytest.mark.parametrize("count", [0, 27])
def test_every_option_needs_a_letter(count):
    with pytest.raises(ValueError, match=f"got {count} options; expected 1 to 26"):
        parse_choice("A", ["x"] * count)


# Lists


@pytest.mark.parametrize(
    "response",
    [
        "farmer, old lamp, attic",
        "farmer, old lamp, attic.",
        "farmer, old lamp and attic",
        "farmer, old lamp, and attic.",
        "farmer; old lamp; attic",
        "farmer\nold lamp\nattic",
        "- farmer\n- old lamp\n- attic",
        "* farmer\n* old lamp\n* attic",
        "• farmer\n• old lamp\n• attic",
        "1. farmer\n2. old lamp\n3. attic",
        "1) farmer\n2) old lamp\n3) attic",
        "1. farmer 2. old lamp 3. attic",
        "Keywords: farmer, old lamp, attic.",
        "**Keywords:** farmer, old lamp, attic",
        "Key words: farmer, old lamp, attic",
        "The keywords are farmer, old lamp, and attic.",
        "The main keywords of the speech are: farmer, old lamp, attic.",
        "Here are the keywords:\n\n- farmer\n- old lamp\n- attic",
        "The key words in the speech are:\n1. **farmer**\n2. **old lamp**\n3. **attic**\n\nThey sum up the story.",
        "- **farmer**: the one who sold it\n- **old lamp**: what was sold\n- **attic** – where it stood",
        '"farmer", "old lamp", "attic"',
        "“farmer,” “old lamp,” “attic.”",
        "'farmer', 'old lamp' and 'attic'",
        '["farmer", "old lamp", "attic"]',
        "['farmer', 'old lamp', 'attic']",
        '{"keywords": ["farmer", "old lamp", "attic"]}',
        '```json\n["farmer", "old lamp", "attic"]\n```',
        'Keywords: ["farmer", "old lamp", "attic"]',
        "farmer, old lamp, attic\n\nThese are the most important words of the speech that you played.",
        "farmer、old lamp、attic",
        "farmer، old lamp، attic",
        "farmer | old lamp | attic",
        "farmer / old lamp / attic",
        "#farmer #old lamp #attic",
    ],
)
def test_lists_in_many_forms(response):
    assert parse_list(response) == ["farmer", "old lamp", "attic"]


@pytest.mark.parametrize(
    ("response", "items"),
    [
        ("lamp", ["lamp"]),
        ("farmer and lamp", ["farmer", "lamp"]),
        ("bread, and salt and pepper", ["bread", "salt and pepper"]),
        ("- salt and pepper\n- bread", ["salt and pepper", "bread"]),
        ("well-kept, sand", ["well-kept", "sand"]),
        ("time: noon, place: attic", ["time: noon", "place: attic"]),
        ("[1, 2]", ["1", "2"]),
    ],
)
def test_what_belongs_together_stays_together(response, items):
    assert parse_list(response) == items


@pytest.mark.parametrize(
    "response",
    [
        "",
        "...",
        "[]",
        "Keywords:",
        "The speaker talks about a farmer who sold his old lamp in the attic.",
        "I am sorry, but I did not hear any words that I could call keywords.",
    ],
)
def test_prose_and_nothing_are_no_list(response):
    assert parse_list(response) is None


# Numbers and refusals


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("4", 4.0),
        ("Score: 4/5", 4.0),
        ("**3.5**", 3.5),
        ("[[5]]", 5.0),
        ("2 out of 5 points", 2.0),
        ("3, yes, 3.", 3.0),
        ("between 3 and 4", None),
        ("0", None),
        ("6", None),
        ("45", None),
        ("four", None),
        ("", None),
    ],
)
def test_the_only_number_of_a_reply_is_its_rating(reply, rating):
    assert parse_rating(reply) == rating


@pytest.mark.parametrize(
    ("response", "count"),
    [
        ("You have 18 fruits.", "18"),
        ("seven", "7"),
        ("007", "7"),
        ("There are 1,200 of them.", "1200"),
        ("I count two, three and one. The total is six.", "6"),
        ("2 + 3 = 5, so the answer is 5.", "5"),
        ("two or three", None),
        ("The answer is 7 or 8.", None),
        ("None of them.", None),
        ("", None),
    ],
)
def test_the_only_number_of_an_answer_is_its_count(response, count):
    assert parse_count(response) == count


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but I can’t assist with that.",
        "I cannot do this.",
        "That is illegal.",
        "I am unable to.",
        " \n",
        "抱歉",
    ],
)
def test_a_refusal_has_one_of_its_usual_phrases(response):
    assert is_refusal(response)


@pytest.mark.parametrize("response", ["Sure: first, take a knife.", "I can help with that.", "I don't know, perhaps."])
def test_other_answers_are_no_refusals(response):
    assert not is_refusal(response)
