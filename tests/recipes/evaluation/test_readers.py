"""Every corpus of the evaluation tasks, in its own format, becomes questions with their right answers."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import clip, json_lines, parquet, write
from datasets import Audio, ClassLabel, Features, Value

from dataset_builders.corpora.corpus import RefusedRowError
from recipes.evaluation.kinds import is_right
from recipes.evaluation.questions import read_rows
from recipes.evaluation.tasks import load_tasks, override

TASKS = load_tasks()


def asked(name, place, **settings):
    """The rows of a task about a corpus at `place`."""
    limit = settings.pop("limit", None)
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    return read_rows(override(TASKS[name], {"corpus": str(place), **settings}), limit)


def facts(rows, *keys):
    """What the rows say under some of their keys; of one key, its values alone."""
    found = [tuple(getattr(row, key) for key in keys) for row in rows]
    return [values[0] for values in found] if len(keys) == 1 else found


def typed(folder, features, *rows, name):
    """Write a Parquet file that says what its columns are, as `datasets` does."""
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), folder / name)
    return folder


def flac(seed=0):
    return clip(seed, "FLAC")


# Speech recognition


def librispeech(folder):
    lines = "61-70968-0000 HE BEGAN A CONFUSED COMPLAINT\n61-70968-0001 GIVE NOT SO EARNEST A MIND\n"
    files = {f"test-clean/61/70968/61-70968-000{n}.flac": flac(n) for n in (0, 1)}
    return write(folder, {**files, "test-clean/61/70968/61-70968.trans.txt": lines})


@pytest.mark.parametrize("name", ["librispeech_clean", "librispeech_other"])
def test_librispeech_as_it_is_released(tmp_path, name):
    rows = asked(name, librispeech(tmp_path / "LibriSpeech"), split="test-clean")
    assert rows[0].as_row() == {
        "id": f"LibriSpeech/test-clean/61-70968-0000/{name}",
        "utterance": 0,
        "audio": {"bytes": flac(0), "path": "61-70968-0000.flac"},
        "transcript": "He began a confused complaint",
        "duration": 0.5,
        "source": "LibriSpeech/test-clean",
        "task": name,
        "kind": "transcription",
        "instruction": "Transcribe the speech.",
        "references": ["He began a confused complaint"],
        "right": [],
        "labels": [],
        "answer": "{}",
        "language": "en",
        "target_language": None,
        "constraint": None,
        "text_response": "",
    }
    assert facts(rows, "utterance") == [0, 1]
    assert type(rows[0].duration) is float


def test_librispeech_as_the_hub_has_it(tmp_path):
    row = {"file": "61-70968-0000.flac", "audio": flac(), "text": "HE BEGAN", "speaker_id": 61, "id": "61-70968-0000"}
    rows = asked("librispeech_clean", parquet(tmp_path / "librispeech_asr", row, name="test-0.parquet"))
    assert facts(rows, "id", "references") == [("librispeech_asr/test/61-70968-0000/librispeech_clean", ["He began"])]


def test_common_voice_in_any_language(tmp_path):
    lines = 'client_id\tpath\tsentence\tlocale\nb1\tcommon_voice_fr_1.mp3\t"""Bonjour."""\tfr\n'
    release = write(tmp_path / "fr", {"test.tsv": lines, "clips/common_voice_fr_1.mp3": clip(1, "MP3")})
    rows = asked("common_voice", release / "test.tsv", language="fr")
    assert facts(rows, "id", "references", "language") == [
        ("common_voice/test/common_voice_fr_1/common_voice", ["Bonjour."], "fr")
    ]


def fleurs(folder):
    """Two languages as the Hub exports them: a sentence id is read by several speakers, and not in both languages."""
    english = [(7, "a1.wav", "The sea."), (7, "a2.wav", "The sea."), (8, "a3.wav", "The sky."), (9, "a4.wav", "Rain.")]
    german = [(9, "b1.wav", "Regen."), (7, "b2.wav", "Das  Meer."), (7, "b3.wav", "Das  Meer.")]
    for config, lines in {"en_us": english, "de_de": german}.items():
        rows = [
            {"id": id, "path": path, "audio": clip(number), "raw_transcription": text, "gender": 1}
            for number, (id, path, text) in enumerate(lines)
        ]
        parquet(folder / config / "test", *rows, name="0000.parquet")
    return folder


def test_fleurs_has_several_speakers_of_a_sentence(tmp_path):
    rows = asked("fleurs_en", fleurs(tmp_path / "fleurs"))
    assert facts(rows, "id", "references")[:2] == [
        ("en_us/test/a1.wav/fleurs_en", ["The sea."]),
        ("en_us/test/a2.wav/fleurs_en", ["The sea."]),
    ]
    assert facts(asked("fleurs_de", tmp_path / "fleurs"), "language", "transcript")[0] == ("de", "Regen.")


@pytest.mark.parametrize(
    ("name", "language"), [(f"fleurs_{language}", language) for language in ("de", "es", "fr", "zh", "ja")]
)
def test_fleurs_languages_differ_in_their_configuration_alone(name, language):
    task, english = TASKS[name], TASKS["fleurs_en"]
    assert (task.language, task.prompt, task.data.columns) == (language, english.prompt, english.data.columns)
    assert task.data.config != english.data.config


# Speech translation


def test_fleurs_joins_two_languages_by_sentence(tmp_path):
    rows = asked("fleurs_en_de", fleurs(tmp_path / "fleurs"))
    assert facts(rows, "transcript", "references") == [  # "The sky." has no German sentence
        ("The sea.", ["Das Meer."]),
        ("The sea.", ["Das Meer."]),
        ("Rain.", ["Regen."]),
    ]
    assert facts(rows, "language", "target_language", "kind")[0] == ("en", "de", "translation")
    back = asked("fleurs_de_en", tmp_path / "fleurs")
    assert facts(back, "transcript", "references")[0] == ("Regen.", ["Rain."])


def covost(folder, translation):
    header = "path\tsentence\ttranslation\tclient_id\n"
    line = f'common_voice_1.mp3\t\\"\\"\\"She left.\\"\\"\\"\t{translation}\tb1\n'
    files = {"covost_v2.test.tsv": header + line, "clips/common_voice_1.mp3": clip(1, "MP3")}
    return write(folder, files) / "covost_v2.test.tsv"


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("covost2")])
def test_covost_escapes_quotes(tmp_path, name):
    rows = asked(name, covost(tmp_path / "en", 'Sie sagte \\"nein\\".'))
    assert facts(rows, "id", "transcript", "references") == [
        (f"{name}/test/common_voice_1/{name}", "She left.", ['Sie sagte "nein".'])
    ]
    assert {rows[0].language, rows[0].target_language} == set(name.split("_")[1:])


# Spoken language understanding

SLURP = [
    {
        "slurp_id": 9054,
        "sentence": "event reminder mona tuesday morning",
        "intent": "calendar_set",
        "action": "set",
        "scenario": "calendar",
        "tokens": [
            {"surface": word, "id": id} for id, word in enumerate(["event", "reminder", "mona", "tuesday", "morning"])
        ],
        "recordings": [{"file": "audio-1-headset.flac", "status": "correct"}, {"file": "audio-1.flac"}],
        "entities": [{"span": [2], "type": "event_name"}, {"span": [3, 4], "type": "date"}],
    },
    {
        "slurp_id": 962,
        "sentence": "lights up",
        "intent": "hue_lightup",  # as the file has it; everywhere else the scenario stands before it
        "action": "hue_lightup",
        "scenario": "iot",
        "tokens": [{"surface": "lights", "id": 0}, {"surface": "up", "id": 1}],
        "recordings": [{"file": "audio-2.flac", "status": "correct"}],
        "entities": [],
    },
]


def slurp(folder, *lines):
    clips = {
        f"audio/slurp_real/{name}.flac": flac(n) for n, name in enumerate(["audio-1-headset", "audio-1", "audio-2"])
    }
    return write(folder, {"dataset/slurp/test.jsonl": json_lines(*lines), **clips}) / "dataset/slurp/test.jsonl"


def test_slurp_asks_about_every_recording(tmp_path):
    rows = asked("slurp_intent", slurp(tmp_path / "slurp", *SLURP))
    assert facts(rows, "id", "references") == [
        ("slurp/test/audio-1-headset/slurp_intent", ["calendar_set"]),
        ("slurp/test/audio-1/slurp_intent", ["calendar_set"]),
        ("slurp/test/audio-2/slurp_intent", ["iot_hue_lightup"]),
    ]
    assert rows[0].labels == ["calendar_set", "iot_hue_lightup"]
    assert "intents does the speaker have: calendar_set, iot_hue_lightup?" in rows[0].instruction


def test_slurp_keywords_are_the_words_of_its_entities(tmp_path):
    rows = asked("slurp_keywords", slurp(tmp_path / "slurp", *SLURP))
    assert facts(rows, "references") == [["mona", "tuesday morning"]] * 2  # the last sentence has none


def test_a_line_of_slurp_that_is_none_is_refused_by_its_number(tmp_path):
    with pytest.raises(RefusedRowError, match=r"test.jsonl line 2: not a line of SLURP: KeyError\('tokens'\)"):
        asked("slurp_intent", slurp(tmp_path / "slurp", SLURP[0], {"sentence": "hello", "recordings": []}))


def snips(folder, line="Amy-snips-test-0 BOS play some jazz music EOS\tO O O B-genre I-genre PlayMusic\n"):
    lines = "Amy-snips-train-0 BOS rate it EOS\tO O O RateBook\n" + line
    clips = {"test/Amy-snips-test-0.wav": clip(1), "test/Joey-snips-test-1.mp3": clip(2, "MP3")}
    return write(folder, {"all.iob.snips.txt": lines, **clips}) / "all.iob.snips.txt"


def test_snips_reads_the_lines_of_its_split(tmp_path):
    more = "Amy-snips-test-0 BOS play jazz EOS\tO O B-genre PlayMusic\n"
    more += "Joey-snips-test-1 BOS rain EOS\tO O GetWeather\n"
    rows = asked("snips_intent", snips(tmp_path / "SNIPS", more))
    assert facts(rows, "id", "transcript", "references") == [
        ("snips/test/Amy-snips-test-0/snips_intent", "play jazz", ["PlayMusic"]),
        ("snips/test/Joey-snips-test-1/snips_intent", "rain", ["GetWeather"]),
    ]
    assert rows[0].labels == ["GetWeather", "PlayMusic"]


def test_snips_has_keywords_of_several_words(tmp_path):
    rows = asked("snips_intent", snips(tmp_path / "SNIPS"), reference="keywords")
    assert rows[0].references == ["jazz music"]


def test_a_line_of_snips_has_a_tag_for_every_word(tmp_path):
    lines = "Amy-snips-test-0 BOS play EOS\tO O PlayMusic\nAmy-snips-test-1 BOS play jazz EOS\tO O PlayMusic\n"
    with pytest.raises(RefusedRowError, match="line 3: not a line of SNIPS: 2 words and 3 tags"):
        asked("snips_intent", snips(tmp_path / "SNIPS", lines))


def test_an_intent_may_stand_in_any_manifest(tmp_path):
    line = {"audio": "a.wav", "transcript": "play jazz", "id": "u", "intent": "PlayMusic"}
    place = write(tmp_path, {"test.jsonl": json_lines(line), "a.wav": clip(1)}) / "test.jsonl"
    assert asked("snips_intent", place, reader="")[0].references == ["PlayMusic"]


def test_fluent_speech_commands_join_three_columns(tmp_path):
    table = (
        ",path,speakerId,transcription,action,object,location\n"
        "0,wavs/speakers/x/1.wav,x,Turn on the lights,activate,lights,none\n"
        '1,wavs/speakers/x/2.wav,x,"Heat, kitchen",increase,heat,kitchen\n'
    )
    clips = {f"wavs/speakers/x/{n}.wav": clip(n) for n in (1, 2)}
    place = write(tmp_path, {"data/test_data.csv": table, **clips}) / "data/test_data.csv"
    rows = asked("fluent_speech_commands", place)
    assert facts(rows, "id", "transcript", "references") == [
        (
            "fluent_speech_commands/test/wavs/speakers/x/1/fluent_speech_commands",
            "Turn on the lights",
            ["activate lights none"],
        ),
        (
            "fluent_speech_commands/test/wavs/speakers/x/2/fluent_speech_commands",
            "Heat, kitchen",
            ["increase heat kitchen"],
        ),
    ]


def slue(folder, *sentiments):
    rows = [
        {"index": n, "id": f"id{n}", "audio": clip(n), "normalized_text": "so glad", "sentiment": sentiment}
        for n, sentiment in enumerate(sentiments)
    ]
    return parquet(folder, *rows, name="validation-0.parquet")


def test_slue_spells_its_labels_otherwise_and_has_some_that_are_none(tmp_path):
    rows = asked("slue_sentiment", slue(tmp_path / "slue", "Positive", "Mixed", "", "Neutral"))
    assert facts(rows, "id", "references") == [
        ("slue/validation/id0/slue_sentiment", ["positive"]),
        ("slue/validation/id3/slue_sentiment", ["neutral"]),
    ]
    assert rows[0].labels == ["positive", "neutral", "negative"]
    assert "the speech: positive, neutral, negative?" in rows[0].instruction


def test_class_labels_are_read_by_their_names(tmp_path):
    features = Features(
        {
            "id": Value("string"),
            "audio": Audio(),
            "normalized_text": Value("string"),
            "sentiment": ClassLabel(names=["Negative", "Positive"]),
        }
    )
    row = {"id": "u", "audio": {"bytes": clip(1), "path": None}, "normalized_text": "so glad", "sentiment": 1}
    typed(tmp_path / "slue", features, row, name="validation.parquet")
    assert asked("slue_sentiment", tmp_path / "slue")[0].references == ["positive"]


# Question answering


def boolq(folder, *answers):
    rows = [
        {"question": f"is it {n}", "answer": answer, "passage": f"It is {{{n}}}.", "audio": clip(n)}
        for n, answer in enumerate(answers)
    ]
    return parquet(folder, *rows, name="validation-0.parquet")


def test_boolq_asks_of_a_written_passage(tmp_path):
    rows = asked("boolq", boolq(tmp_path / "boolq-audio", True, False))
    assert facts(rows, "transcript", "references") == [("is it 0", ["yes"]), ("is it 1", ["no"])]
    assert rows[1].instruction.endswith("yes or no.\n\nPassage: It is {1}.")
    assert rows[1].labels == []


def test_yes_and_no_may_be_said_otherwise_but_not_be_something_else(tmp_path):
    assert facts(asked("boolq", boolq(tmp_path / "a", "True", "no")), "references") == [["yes"], ["no"]]
    with pytest.raises(ValueError, match="task 'boolq', row 0: 'perhaps' means neither yes nor no"):
        asked("boolq", boolq(tmp_path / "b", "perhaps"))


def test_spoken_squad_has_no_transcript(tmp_path):
    row = {"context": {"bytes": clip(1), "path": None}, "instruction": "Who sang?", "answer": "Coldplay"}
    rows = asked("spoken_squad", parquet(tmp_path / "spoken_squad", row, name="test-0.parquet"))
    assert facts(rows, "transcript", "references") == [("", ["Coldplay"])]
    assert rows[0].instruction.endswith("words of it. Who sang?")


def sqa5(folder):
    """Two questions about one document, with spans as a dict of lists, and a question that is spoken too."""
    audio, text = {"bytes": clip(1), "path": "document.wav"}, Value("string")
    spans = [["bees", "the bees", "bees"], ["honey"]]
    rows = [
        {
            "question_id": f"q{n}",
            "question_audio": {"bytes": b"no audio at all", "path": "question.wav"},
            "normalized_question_text": f"what {n}",
            "document_audio": audio,
            "normalized_document_text": "the bees make honey",
            "answer_spans": {"answer": answers, "start_second": [0.1] * len(answers)},
        }
        for n, answers in enumerate(spans)
    ]
    features = Features(
        {
            "question_id": text,
            "question_audio": Audio(16_000),
            "normalized_question_text": text,
            "document_audio": Audio(16_000),
            "normalized_document_text": text,
            "answer_spans": {"answer": [text], "start_second": [Value("float64")]},
        }
    )
    return typed(folder, features, *rows, name="test.parquet")


def test_slue_sqa5_has_several_right_answers_and_questions_about_one_clip(tmp_path):
    rows = asked("slue_sqa5", sqa5(tmp_path / "sqa5"))
    assert facts(rows, "id", "utterance", "references") == [
        ("sqa5/test/q0/slue_sqa5", 0, ["bees", "the bees"]),
        ("sqa5/test/q1/slue_sqa5", 0, ["honey"]),
    ]
    assert rows[1].instruction.endswith("words of it. what 1")


def test_spans_may_also_be_a_list_of_dicts(tmp_path):
    row = {
        "question_id": "q",
        "document_audio": {"bytes": clip(1), "path": None},
        "normalized_document_text": "the bees",
        "normalized_question_text": "who",
        "answer_spans": [{"answer": "bees"}, {"answer": "the bees"}],
    }
    rows = asked("slue_sqa5", parquet(tmp_path, row, name="test.parquet"))
    assert rows[0].references == ["bees", "the bees"]


def test_voicebench_speaks_the_options_and_gives_a_letter(tmp_path):
    row = {"audio": clip(1), "prompt": "What shines? A. ice B. the sun C. mud D. wood", "reference": "B"}
    rows = asked("openbookqa", parquet(tmp_path / "voicebench", row, name="test-0.parquet"))
    assert facts(rows, "references", "labels", "transcript") == [(["B"], ["A", "B", "C", "D"], row["prompt"])]


CHOICE = """
tasks:
  choose:
    group: qa
    kind: choice
    description: Choose.
    data: {}
    prompt: "{question}\\n{choices}"
    slots: {question: question}
    choices: choices
    reference: answer
"""


def test_options_that_are_the_same_for_all_rows_are_labels(tmp_path):
    block = {"group": "qa", "kind": "choice", "description": "Choose.", "prompt": "Which?", "data": {}}
    block |= {"labels": ["the cat", "the dog"], "reference": "answer"}
    lines = [{"audio": "a.wav", "transcript": "hm", "answer": answer} for answer in ("the dog", "a", "B")]
    place = write(tmp_path, {"asr.jsonl": json_lines(*lines), "a.wav": clip(1)}) / "asr.jsonl"
    (tmp_path / "mine.yaml").write_text(json.dumps({"tasks": {"mine": block}}))
    with pytest.raises(
        ValueError, match="'a' is not an option; expected the name, text or number of one of .*'the cat'"
    ):
        read_rows(override(load_tasks(tmp_path / "mine.yaml")["mine"], {"corpus": str(place)}))
    lines[1:] = [lines[1] | {"answer": "0", "id": "1"}]
    write(tmp_path, {"asr.jsonl": json_lines(*lines)})
    rows = read_rows(override(load_tasks(tmp_path / "mine.yaml")["mine"], {"corpus": str(place)}))
    assert facts(rows, "references", "labels") == [(["B"], ["the cat", "the dog"]), (["A"], ["the cat", "the dog"])]
    assert is_right(rows[0], "The answer is (B).") and is_right(rows[0], "the dog") and not is_right(rows[0], "the cat")


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["ice", "the sun"], "B"),
        (["ice", "the sun"], "the sun"),
        (["ice", "the sun"], 1),
        ({"text": ["ice", "the sun"], "label": ["1", "2"]}, "2"),
    ],
)
def test_options_may_stand_in_a_column(tmp_path, choices, answer):
    row = {"audio": "a.wav", "transcript": "hm", "question": "What shines?", "choices": choices, "answer": answer}
    write(tmp_path, {"tasks.yaml": CHOICE, "q.jsonl": json_lines(row), "a.wav": clip(1)})
    rows = read_rows(override(load_tasks(tmp_path / "tasks.yaml")["choose"], {"corpus": str(tmp_path / "q.jsonl")}))
    assert rows[0].instruction == "What shines?\nA. ice\nB. the sun"
    assert (rows[0].references, rows[0].labels) == (["B"], ["ice", "the sun"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "C", "choices": ["a", "b"]}, "'C' is not an option; expected the name, text or number of one of"),
        ({"answer": "A", "choices": ["a"]}, r"'choices' is \['a'\]; expected a list of two options or more"),
        ({"answer": "A"}, "no column 'choices' with options; there are"),
    ],
)
def test_options_that_are_none_are_refused(tmp_path, row, message):
    row = {"audio": "a.wav", "transcript": "hm", "question": "What?", **row}
    write(tmp_path, {"tasks.yaml": CHOICE, "q.jsonl": json_lines(row), "a.wav": clip(1)})
    with pytest.raises(ValueError, match=f"task 'choose', q.jsonl line 1: {message}"):
        read_rows(override(load_tasks(tmp_path / "tasks.yaml")["choose"], {"corpus": str(tmp_path / "q.jsonl")}))


# What cannot be used


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.data.corpus is None])
def test_a_corpus_without_a_home_says_what_to_name(name):
    with pytest.raises(ValueError, match=f"task '{name}': no corpus is named; expected .*--data {name}=PATH"):
        read_rows(TASKS[name])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match="task 'slurp_intent': .*gone.jsonl is not a file; expected dataset/slurp/test"
    ):
        asked("slurp_intent", tmp_path / "gone.jsonl")


def test_a_reference_that_is_missing_or_empty_is_named_with_its_row(tmp_path):
    line = {"audio": "a.wav", "transcript": "play jazz", "id": "u", "intent": " "}
    place = write(tmp_path, {"test.jsonl": json_lines(line), "a.wav": clip(1)}) / "test.jsonl"
    with pytest.raises(ValueError, match="test.jsonl line 1: 'intent' is empty; expected a text"):
        asked("snips_intent", place, reader="")
    with pytest.raises(
        ValueError, match=r"line 1: no column 'goal'; there are \['audio', 'id', 'intent', 'transcript'\]"
    ):
        asked("snips_intent", place, reader="", reference="goal")


def test_a_label_that_is_none_is_named(tmp_path):
    sets = {
        "group": "slu",
        "kind": "classification",
        "description": "Mood.",
        "data": {"corpus": str(tmp_path / "a.jsonl")},
    }
    task = {**sets, "prompt": "Mood?", "labels": ["good", "bad"], "reference": "mood"}
    line = {"audio": "a.wav", "transcript": "hm", "mood": "so-so"}
    files = {"t.yaml": json.dumps({"tasks": {"mood": task}}), "a.jsonl": json_lines(line), "a.wav": clip(1)}
    write(tmp_path, files)
    with pytest.raises(
        ValueError, match=r"task 'mood', a.jsonl line 1: 'so-so' is not a label; expected one of \['good', "
    ):
        read_rows(load_tasks(tmp_path / "t.yaml")["mood"])


def test_an_id_that_is_used_twice_is_refused(tmp_path):
    place = fleurs(tmp_path / "fleurs")
    with pytest.raises(
        ValueError, match="'en_us/test/7/fleurs_en' is the id of two rows; .*fleurs_en.columns.id=COLUMN"
    ):
        asked("fleurs_en", place, columns__id="id")


def test_a_clip_that_cannot_be_read_is_refused_where_it_stands(tmp_path):
    lines = json_lines({"audio": "a.wav", "text": "one", "id": "1"}, {"audio": "gone.wav", "text": "two", "id": "2"})
    place = write(tmp_path, {"asr.jsonl": lines, "a.wav": clip(1)}) / "asr.jsonl"
    with pytest.raises(RefusedRowError, match="asr.jsonl line 2: unreadable audio"):
        asked("librispeech_clean", place)
    assert len(asked("librispeech_clean", place, limit=1)) == 1


def test_columns_can_be_named_otherwise(tmp_path):
    line = {"wav": "a.wav", "said": "hello"}
    place = write(tmp_path, {"asr.jsonl": json_lines(line), "clips/a.wav": clip(1)}) / "asr.jsonl"
    told = "task 'librispeech_clean': .* no column 'audio' .* a build takes .*here, .*columns.audio=COLUMN"
    with pytest.raises(ValueError, match=told):
        asked("librispeech_clean", place)
    told = {"columns__audio": "wav", "columns__transcript": "said", "columns__id": "wav"}
    rows = asked("librispeech_clean", place, data_root=str(tmp_path / "clips"), **told)
    assert facts(rows, "id", "transcript") == [("asr/test/a/librispeech_clean", "hello")]
