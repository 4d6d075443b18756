"""The page on which models answer side by side, apart from its widgets: tests need no Gradio."""

import dataclasses
import importlib

import numpy as np
import pytest
import soundfile
import yaml
from pages import ROOT

from demo import asking
from demo.asking import TEXT_LLM, Asked, Panel, parse_models, read_row, stream
from recipes.chat import Conversation

INSTRUCTION = "what is said"


@pytest.fixture(scope="module")
def panel(lsm_dir, plain_lsm_dir, llm_dir):
    """Two tiny models that listen and one that reads, whose answers are short."""
    panel = Panel.open({"ours": str(lsm_dir), "vanilla": str(plain_lsm_dir)}, str(llm_dir))
    return dataclasses.replace(panel, most_tokens=6)


@pytest.fixture
def wav(clip, tmp_path):
    """`wav(seconds)` writes a clip and returns its path."""

    def write(seconds: float, name: str = "clip.wav", **settings) -> str:
        soundfile.write(tmp_path / name, clip(seconds), 16_000, **settings)
        return str(tmp_path / name)

    return write


def test_each_model_answers_as_in_a_chat(panel, wav, lsm_dir, plain_lsm_dir):
    path = wav(1.3, subtype="FLOAT")
    *_, asked = panel.ask(path, INSTRUCTION)
    for name, folder in (("ours", lsm_dir), ("vanilla", plain_lsm_dir)):
        assert asked.answers[name] == Conversation(str(folder), path, max_new_tokens=6).ask(INSTRUCTION)


def test_one_model_answers_after_the_other(panel, wav):
    seen = [(list(asked.answers), asked.done) for asked in panel.ask(wav(1.3), INSTRUCTION, "what is said")]
    names = [names for names, _ in seen]
    assert names[0] == ["ours"] and names[-1] == ["ours", "vanilla", TEXT_LLM]
    assert names == sorted(names, key=len)
    assert [done for _, done in seen] == [False] * (len(seen) - 1) + [True]


def test_the_shipped_models_answer_about_the_example_word_by_word():
    models, reader = asking.shipped()
    texts, translation = [], "El fontanero vendió repentinamente el collar negro antes del desayuno."
    panel = Panel.open({"ours": models["ours"]}, reader)
    for asked in panel.ask(str(asking.EXAMPLE), "Translate what you hear into Spanish."):
        texts += [text for text in [asked.answers["ours"]] if text not in texts]
    assert asked.answers == {"ours": translation, TEXT_LLM: translation}
    assert asked.heard == "the plumber suddenly sold the black necklace before breakfast"
    assert len(texts) > 8 and all(translation.startswith(text.strip()) for text in texts)


def test_the_text_llm_reads_what_was_typed_or_else_what_the_first_model_heard(panel, wav):
    path = wav(1.3)
    *_, typed = panel.ask(path, INSTRUCTION, " the cook said ")
    assert (typed.row["transcript"], typed.heard) == ("the cook said", "")
    *_, heard = panel.ask(path, INSTRUCTION)
    [*_, transcribed] = stream(panel.models["ours"], read_row(path, asking.TRANSCRIBE), "audio", 6)
    assert heard.row["transcript"] == heard.heard == transcribed != ""
    for asked in (typed, heard):
        [expected] = panel.text_llm.respond([asked.row], "transcript", max_new_tokens=6, progress=False)
        assert asked.answers[TEXT_LLM] == expected.text


def test_a_model_that_fails_ends_the_stream_with_its_error(panel, wav, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(panel.models["ours"].model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(panel.ask(wav(0.5), INSTRUCTION))


def test_the_picture_has_the_lines_of_the_chosen_model_and_of_the_text_llm(panel, wav, monkeypatch):
    *_, asked = panel.ask(wav(1.3), INSTRUCTION, "the cook said")
    drawn, plot = [], asking.plot_layers
    monkeypatch.setattr(asking, "plot_layers", lambda biases, stem: drawn.append(biases) or plot(biases, stem))
    picture = np.asarray(panel.picture(asked, "vanilla"))
    assert picture.shape[-1] == 3 and picture.std() > 0
    [biases] = drawn
    assert list(biases) == [TEXT_LLM, "vanilla"]
    for layer in biases["vanilla"]["layers"] + biases[TEXT_LLM]["layers"]:
        assert sum(layer.values()) == pytest.approx(1, abs=1e-4)


def test_an_answer_without_words_has_no_picture(panel, wav):
    with pytest.raises(ValueError, match="no answer of ours"):
        panel.picture(Asked(read_row(wav(0.5), INSTRUCTION), {"ours": ""}), "ours")


@pytest.mark.parametrize(
    ("path", "instruction", "said"),
    [
        (None, INSTRUCTION, "There is no clip yet."),
        ("clip.wav", "  ", "There is no instruction yet."),
        ("notes.wav", INSTRUCTION, "The clip cannot be read as audio"),
        ("nothing.wav", INSTRUCTION, "The audio is empty"),
        ("long.wav", INSTRUCTION, "The clip has 61 s; .* up to 60 s"),
    ],
)
def test_what_cannot_be_used_is_refused_in_plain_words(wav, tmp_path, path, instruction, said):
    wav(0.5)
    wav(61, "long.wav")
    wav(0, "nothing.wav")
    (tmp_path / "notes.wav").write_text("These are notes.")
    with pytest.raises(ValueError, match=said):
        read_row(path and str(tmp_path / path), instruction)


def test_a_file_that_is_too_large_is_not_read(wav, monkeypatch):
    path = wav(0.5)
    monkeypatch.setattr(asking, "LIMITS", asking.Limits(body=100))
    monkeypatch.setattr(asking, "read_clip", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match="too large"):
        read_row(path, INSTRUCTION)


def test_models_are_named():
    assert parse_models(["ours=a/b", " vanilla = runs/x=1"]) == {"ours": "a/b", "vanilla": "runs/x=1"}
    for entries in (["ours"], ["=a/b"], ["ours="], ["ours=a", "ours=b"], [f"{TEXT_LLM}=a"]):
        with pytest.raises(ValueError, match="expected NAME=FOLDER_OR_ID|is taken"):
            parse_models(entries)


def test_who_cannot_hear_is_refused(llm_dir):
    with pytest.raises(ValueError, match="deaf cannot hear; name an LSM"):
        Panel.open({"deaf": str(llm_dir)}, str(llm_dir))


def test_the_shipped_models_and_what_the_quickstart_trained_are_the_default(tmp_path, monkeypatch):
    models, reader = asking.shipped()
    assert next(iter(models)) == "ours" and models["ours"].endswith("assets/nano/lsm") and asking.EXAMPLE.is_file()
    assert reader.endswith("assets/nano/llm")
    (tmp_path / "runs" / "quickstart" / "training" / "paper").mkdir(parents=True)
    monkeypatch.setattr(asking, "ROOT", tmp_path)
    assert list(asking.shipped()[0]) == ["ours", "paper"]


@pytest.fixture
def page(panel, monkeypatch):
    pytest.importorskip("gradio", reason="the widgets need the extra demo")
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    return importlib.import_module("app").Page(panel)


def test_the_page_says_what_is_wrong_and_keeps_what_was_typed(page):
    *_, shown = page.ask(None, "<b>", "the cook said", None)
    assert shown[page.message] == '<p role="alert">There is no clip yet. Record or upload one, or take the example.</p>'
    assert shown[page.asked] is None and shown[page.transcript]["value"] == "the cook said"


def test_a_transcript_that_was_heard_is_heard_again_and_forgotten_with_its_clip(page, wav):
    *_, shown = page.ask(wav(1.3), INSTRUCTION, "", None)
    before = shown[page.asked]
    assert shown[page.transcript]["value"] == before.heard and "heard" in shown[page.transcript]["label"]
    *_, again = page.ask(wav(0.7), INSTRUCTION, before.heard, before)
    assert again[page.asked].heard == again[page.transcript]["value"]
    assert page.forget(before, before.heard)[page.transcript]["value"] == ""
    assert page.forget(before, "the cook said")[page.transcript]["value"] == "the cook said"
    assert page.draw(before, "vanilla")[page.picture].size > (0, 0) and page.draw(None, "ours") == {page.picture: None}


def test_a_space_gets_what_was_tested():
    _, head, _ = (ROOT / "demo" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    space = yaml.safe_load(head)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"{space['sdk']}=={space['sdk_version']}" in pins
    assert (ROOT / "demo" / space["app_file"]).is_file() and len(space["short_description"]) <= 60
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert f"python_requires = >={space['python_version']}" in setup
    for line in (ROOT / "demo" / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert f"    {line}\n" in setup
