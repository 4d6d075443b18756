"""Model cards: what the Hub reads of them is valid, what they show runs, and no path of a machine gets into them."""

import re
import shutil

import numpy as np
import pytest
import soundfile
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, get_peft_model

from configuration_lsm import LsmConfig
from recipes.reporting import figures
from recipes.reporting.model_card import base_models_of, write_base_card
from recipes.reporting.training_card import ASK, plot_curves, write_trained_card

AUDIO, TEXT = "openai/whisper-small", "org/instruct-1b"
LOG = [
    {"step": 10, "max_steps": 30, "loss": 2.5, "learning_rate": 1e-3, "epoch": 0.1},
    {"step": 20, "max_steps": 30, "loss": 0.25, "learning_rate": 1e-3, "epoch": 0.2},
    {"step": 30, "max_steps": 30, "train_loss": 1.0, "train_runtime": 9.0},
]
FOLLOWING = [
    {"step": 10, "tasks": {"intent": 0.25}, "following": 0.25, "transcript_copy": 0.5, "wer": 1.5},
    {"step": 20, "tasks": {"intent": 0.875, "transcription": 0.5}, "following": 0.875, "transcript_copy": 0.0},
]


def card_of(folder):
    """The card as the Hub reads it, its metadata found sound."""
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "audio-text-to-text"
    assert data["tags"] == ["lsm", "speech", "custom_code"]
    for name in data.get("base_model", []) + data.get("datasets", []):
        validate_repo_id(name)
    assert ("base_model_relation" in data) <= ("base_model" in data)
    return card


def block(card, language):
    """What is between the first fences of a language."""
    return re.search(f"```{language}\n(.*?)```", card.text, re.DOTALL)[1]


@pytest.fixture
def write(tmp_path):
    """`write(…)` makes the card of a training, all but these arguments as usual, and reads it."""

    def write(folder="trained", **changed):
        usual = {
            "base_models": [AUDIO, TEXT],
            "datasets": ["org/speech-set"],
            "rows": {"transcription": 6, "intent": 4},
            "settings": {"llm": "full", "learning_rate": 1e-5},
            "log": LOG,
            "following": FOLLOWING,
            "adapter_of": None,
            "title": "An LSM",
        }
        write_trained_card(tmp_path / folder, **usual | changed)
        return card_of(tmp_path / folder)

    return write


@pytest.fixture
def local(tmp_path):
    """A checkpoint or data set in a folder of this machine."""
    (tmp_path / "someones" / "own").mkdir(parents=True)
    return tmp_path / "someones" / "own"


# Composed


def test_what_was_composed_is_linked_and_said_to_be_untrained(tmp_path):
    write_base_card(tmp_path / "base", AUDIO, TEXT, LsmConfig())
    card = card_of(tmp_path / "base")
    assert card.data.base_model == [AUDIO, TEXT]
    assert card.data.library_name == "transformers"
    assert card.data.license is None  # it is the parts' authors' to say
    assert "# base\n\n**Not trained yet.**" in card.text
    assert "2410.03798" in card.text


def test_parts_in_folders_are_named_and_not_linked(tmp_path, local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in (str(local), "someones/own"):  # which could be a Hub id, but a folder comes first
        write_base_card("base", AUDIO, text, LsmConfig())
        card = card_of(tmp_path / "base")
        assert card.data.base_model == [AUDIO]
        assert "`own` (a local folder)" in card.text
        assert "someones" not in str(card)
    write_base_card("base", str(local), str(local), LsmConfig())
    assert "base_model" not in card_of(tmp_path / "base").data.to_dict()


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "| window | 17 encoder frames (0.34 s), `fixed` |"),
        ({"window_mode": "proportional"}, "| window | a 90th of the longest clip in the batch, `proportional` |"),
        ({"queries_per_window": 3}, "| queries (speech tokens) per window | 3 |"),
        ({"qformer_config": {"num_hidden_layers": 5}}, "| Q-Former | 5 layers, hidden size 768, 12 heads, "),
        ({"responder": {"model": TEXT, "revision": "abc", "template": "t"}}, f"| LLM | `{TEXT}`, revision `abc` |"),
    ],
)
def test_the_settings_of_the_projector_are_shown(tmp_path, settings, shown):
    write_base_card(tmp_path, AUDIO, TEXT, LsmConfig(**settings))
    assert shown in card_of(tmp_path).text


def test_a_folder_that_is_still_being_made_goes_by_its_name_to_be(tmp_path):
    write_base_card(tmp_path / "base.partial", AUDIO, TEXT, LsmConfig())
    card = card_of(tmp_path / "base.partial")
    assert 'from_pretrained("base", ' in card.text and "--llm base " in card.text
    assert "partial" not in card.text


# Trained


def test_a_whole_model_is_a_finetune_of_what_it_was_made_of(write):
    data = write().data
    assert (data.base_model, data["base_model_relation"]) == ([AUDIO, TEXT], "finetune")
    assert (data.library_name, data.datasets) == ("transformers", ["org/speech-set"])


def test_an_adapter_is_one_of_the_lsm_that_it_is_loaded_onto(write):
    card = write(adapter_of="org/lsm-base")
    assert (card.data.base_model, card.data["base_model_relation"]) == (["org/lsm-base"], "adapter")
    assert card.data.library_name == "peft"
    assert "An adapter for the LSM `org/lsm-base`: a frozen Whisper encoder" in card.text
    assert f"Made of `{AUDIO}` and `{TEXT}`" in card.text


def test_an_adapter_of_an_lsm_in_a_folder_is_one_of_what_that_was_made_of(write, local):
    card = write(adapter_of=str(local))
    assert (card.data.base_model, card.data["base_model_relation"]) == ([AUDIO, TEXT], "adapter")
    assert 'AutoModelForCausalLM.from_pretrained("own", ' in card.text


def test_where_nothing_is_on_the_hub_nothing_is_linked(write, local):
    data = write(base_models=[str(local)], datasets=[str(local)]).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets"} & set(data)


def test_no_path_and_no_token_gets_into_the_card(write, local, tmp_path):
    data = local / "rows.jsonl"
    data.touch()
    card = write(
        base_models=[AUDIO, str(local)],
        datasets=["org/speech-set", str(data)],
        adapter_of=str(local),
        settings={
            "model_name_or_path": str(local),
            "dataset_name": "org/speech-set",
            "output_dir": tmp_path / "never" / "made",
            "files": [str(data), "../beside", "~/at/home", "/elsewhere/a folder/"],
            "nested": {"corpus": "a/relative/path"},
            "lora_target_modules": r".*language_model.*\.(q_proj|v_proj)",
            "server": "http://localhost:8000/v1",
            "hub_token": "hf_secret",
        },
    )
    assert yaml.safe_load(block(card, "yaml")) == {
        "model_name_or_path": "own",
        "dataset_name": "org/speech-set",
        "output_dir": "made",
        "files": ["rows.jsonl", "beside", "home", "a folder"],
        "nested": {"corpus": "path"},
        "lora_target_modules": r".*language_model.*\.(q_proj|v_proj)",
        "server": "http://localhost:8000/v1",
    }
    for secret in (str(tmp_path), "someones", "elsewhere", "hf_secret"):
        assert secret not in str(card)


def test_settings_read_back_as_they_were(write):
    settings = {"tasks": ["intent", "transcription"], "learning_rate": 1e-5, "bf16": True, "ratio": None, "why": "é"}
    assert yaml.safe_load(block(write(settings=settings), "yaml")) == settings


def test_the_rows_of_each_task_are_counted(write):
    table = "| task | rows |\n| --- | --- |\n| intent | 4 |\n| transcription | 6 |\n| all | 10 |"
    assert table in write().text


def test_the_last_figures_are_shown(write):
    text = write().text
    assert "at step 20:\n\n| figure | value |" in text
    for line in ("| following rate | 87.5 % |", "| transcript copies | 0.0 % |", "| intent, right | 87.5 % |"):
        assert line in text
    assert "word error rate" not in text  # the last look has none
    assert "Loss per response token: 0.25 at step 20 of 30." in text


def test_where_nothing_was_measured_the_card_says_so(write, tmp_path):
    card = write(log=[], following=[], settings={}, rows={}, datasets=[], base_models=[])
    assert "## Results\n\nNone were measured" in card.text
    assert "training.png" not in card.text and "## Settings" not in card.text
    assert [file.name for file in (tmp_path / "trained").iterdir()] == ["README.md"]


def test_the_same_training_has_the_same_card_and_picture(write, tmp_path):
    for folder in ("once/lsm", "again/lsm", "again/lsm"):  # the last over what is there
        write(folder)
    once, again = ({file.name: file.read_bytes() for file in (tmp_path / f).rglob("*.*")} for f in ("once", "again"))
    assert set(once) == {"README.md", "training.png", "training.svg"}
    assert once == again


# The curve


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, none of them written."""
    caught = []
    monkeypatch.setattr(figures, "save", lambda figure, stem: caught.append(figure) or [stem])
    return caught


def curves(figure):
    """Points of each panel's line, by the panel's label."""
    return {axes.get_ylabel(): axes.lines[0].get_xydata().tolist() for axes in figure.get_axes()}


def test_loss_and_following_are_drawn_beside_each_other(drawn):
    plot_curves(LOG, FOLLOWING, "stem")
    points = {"loss per response token": [[10, 2.5], [20, 0.25]], "following rate": [[10, 0.25], [20, 0.875]]}
    assert curves(drawn[0]) == points


@pytest.mark.parametrize(("log", "following"), [(LOG, []), ([], FOLLOWING), (LOG, [{"step": 1, "wer": 0.5}])])
def test_what_was_not_measured_has_no_panel(drawn, log, following):
    plot_curves(log, following, "stem")
    assert list(curves(drawn[0])) == (["loss per response token"] if log else ["following rate"])


def test_without_a_figure_nothing_is_drawn(drawn):
    assert plot_curves(LOG[2:], [{"step": 1, "wer": 0.5}], "stem") == drawn == []


def test_of_a_training_that_was_killed_and_went_on_each_step_counts_once(write, drawn):
    log = [{"step": step, "max_steps": 9, "loss": loss} for step, loss in [(1, 5.0), (2, 4.0), (3, 9.0), (2, 3.0)]]
    plot_curves(log, [], "stem")
    assert curves(drawn[0])["loss per response token"] == [[1, 5.0], [2, 3.0]]
    assert "Loss per response token: 3 at step 2 of 9." in write(log=log).text


@pytest.mark.parametrize(("losses", "scale"), [([2.0, 0.1], "log"), ([2.9, 2.1], "linear"), ([0.0, 1.0], "linear")])
def test_the_loss_has_a_scale_on_which_it_can_be_read(drawn, losses, scale):
    plot_curves([{"step": step, "loss": loss} for step, loss in enumerate(losses)], [], "stem")
    drawn[0].draw_without_rendering()
    (axes,) = drawn[0].get_axes()
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


def test_a_loss_that_is_no_number_does_not_stop_the_card(write):
    assert (
        "Loss per response token: nan at step 1" in write(log=[{"step": 1, "max_steps": 2, "loss": float("nan")}]).text
    )


# Use


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """`answer(code)` is what it prints where the folders of a card and a clip are."""
    soundfile.write(tmp_path / "speech.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    monkeypatch.chdir(tmp_path)

    def answer(code, **names):
        exec(code, names)
        return capsys.readouterr().out

    return answer


def test_the_code_of_a_card_loads_the_model_and_asks_it(write, answer, lsm_dir, lsm, processor, tmp_path):
    shutil.copytree(lsm_dir, tmp_path / "trained")
    assert answer(block(write(), "python")) == answer(ASK, model=lsm, processor=processor)


def test_the_code_of_an_adapters_card_asks_the_adapted_model(write, answer, lsm_dir, lsm, processor, tmp_path):
    """PEFT writes a card, too, with the path of the base in it: ours replaces that."""
    base = shutil.copytree(lsm_dir, tmp_path / "base")
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=r".*language_model.*_proj", init_lora_weights=False)
    model = get_peft_model(type(lsm).from_pretrained(base), settings).eval()
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    assert str(base) in (tmp_path / "trained" / "README.md").read_text()
    card = write(adapter_of=str(base))
    assert str(base) not in str(card)
    answered = answer(block(card, "python"))
    assert answered == answer(ASK, model=model, processor=processor)
    assert answered != answer(ASK, model=lsm, processor=processor)


# What a card says that a model was made of


def test_training_passes_on_what_compose_wrote(tmp_path):
    write_base_card(tmp_path, AUDIO, TEXT, LsmConfig())
    assert base_models_of(tmp_path) == base_models_of(str(tmp_path)) == [AUDIO, TEXT]


def test_one_base_model_is_a_list_of_one_and_a_path_is_none(tmp_path):
    for written, read in ((TEXT, [TEXT]), ("/home/someone/base", []), (f"[{TEXT}, {tmp_path}]", [TEXT])):
        (tmp_path / "README.md").write_text(f"---\nbase_model: {written}\n---\n")
        assert base_models_of(tmp_path) == read


def test_a_folder_without_a_card_and_a_card_without_a_head_name_no_base_model(tmp_path):
    assert base_models_of(tmp_path) == []
    (tmp_path / "README.md").write_text("# A model\n")
    assert base_models_of(tmp_path) == []


def test_a_head_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: [\n---\n")
    with pytest.raises(ValueError, match=f"the metadata in the card of {tmp_path} is not valid YAML"):
        base_models_of(tmp_path)


def test_a_card_is_read_on_the_hub_or_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, card in {"with": f"---\nbase_model: {TEXT}\n---\n", "without": None}.items():
        folder, commit = tmp_path / f"models--org--{name}", "0" * 40
        for file, content in {"refs/main": commit, f"snapshots/{commit}/README.md": card}.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (folder / file).write_text(content)
    assert base_models_of("org/with") == [TEXT]
    assert base_models_of("org/without") == base_models_of("org/never-downloaded") == []


def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Repo id must"):
        base_models_of(tmp_path / "never" / "made")
