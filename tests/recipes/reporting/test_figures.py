"""The figures of the reports: each number is drawn, missing ones are not, and the files are reproducible."""

import copy
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from recipes.evaluation.pages import STYLES
from recipes.reporting import figures
from recipes.reporting.figures import (
    LINES,
    PARTS,
    plot_bars,
    plot_composition,
    plot_layers,
    plot_similarity,
    plot_study,
)


def bias(layers=4, instruction=0.2):
    shares = {"instruction": instruction, "speech": 0.4, "template": 0.2, "response": 0.1, "first": 0.3 - instruction}
    rows = [dict(shares) for _ in range(layers)]
    intervals = [{part: [share - 0.01, share + 0.01] for part, share in shares.items()} for _ in range(layers)]
    measures = ("layers", "per_token", "attention")
    return {**dict.fromkeys(measures, rows), "intervals": dict.fromkeys(measures, intervals), "following": None}


def similarity(levels=("input", "layer 1", "layer 2"), tokens=("the", " cat"), maps=("input", "layer 1", "layer 2")):
    curves = {name: [0.1 * i for i in range(len(levels))] for name in ("cka", "cosine", "cosine_other")}
    intervals = {name: [[value - 0.1, value + 0.1] for value in curves[name]] for name in ("cka", "cosine")}
    drawn = {name: (np.eye(6, len(tokens)) + i).tolist() for i, name in enumerate(maps)}
    example = {"id": "u1", "transcript": "the cat", "tokens": list(tokens), "maps": drawn}
    return {"levels": list(levels), **curves, "intervals": intervals, "examples": [example]}


SCORES = {
    "text_llm": {"intent": {"value": 0.9, "low": 0.8, "high": 0.95}, "copies": {"value": 0.0, "low": 0.0, "high": 0.1}},
    "vanilla": {"intent": {"value": 0.1, "low": 0.05, "high": 0.2}, "copies": None},
}


def bars(stem, scores=SCORES, order=("intent", "copies")):
    return plot_bars(scores, stem, order, STYLES, "share of answers", "Who does what is asked?")


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that are drawn, without writing them."""
    caught = []
    monkeypatch.setattr(figures, "save", lambda figure, stem: caught.append(figure) or [])
    return caught


def curves(axes):
    """Return the lines of a panel that show numbers, by label."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# Files

PLOTS = {
    "layers": lambda stem: plot_layers({"vanilla LSM": bias(), "self-powered LSM": bias(7)}, stem),
    "composition": lambda stem: plot_composition(bias(), stem, "vanilla LSM"),
    "similarity": lambda stem: plot_similarity(similarity(), stem),
    "bars": bars,
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_a_figure_is_written_in_both_formats_and_always_the_same(tmp_path, plot):
    first = plot(tmp_path / "new" / "a.b")
    assert first == [tmp_path / "new" / "a.b.png", tmp_path / "new" / "a.b.svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(first[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<dc:date>" not in first[1].read_bytes()
    for once, again in zip(first, plot(tmp_path / "again"), strict=True):
        assert once.read_bytes() == again.read_bytes()


def test_a_figure_is_half_a_page_wide(drawn):
    for plot in PLOTS.values():
        plot("stem")
    assert {figure.get_figwidth() for figure in drawn} == {3.5}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_no_text_is_cut_off(drawn, plot):
    plot("stem")
    drawn[0].draw_without_rendering()
    room = drawn[0].bbox.padded(1)
    labels = [axis.label for axes in drawn[0].get_axes() for axis in (axes.xaxis, axes.yaxis)]
    shown = [*drawn[0].legends, *labels]
    for box in (artist.get_window_extent() for artist in shown):
        assert box.width == 0 or (room.contains(box.x0, box.y0) and room.contains(box.x1, box.y1))


def test_text_stays_text_and_is_never_taken_for_a_formula(tmp_path):
    tokens = ("$5", " and", " $6", " 猫", "\x1b", "<b>&")
    _, svg = plot_similarity(similarity(tokens=tokens), tmp_path / "a")
    words = [element.text.strip() for element in ElementTree.parse(svg).findall(".//{*}text") if element.text]
    assert {"$5", "and", "$6", "猫", "�", "<b>&"} <= set(words)


def test_the_first_three_looks_grow_lighter_in_grey():
    greys = [np.dot(to_rgb(style["color"]), (0.299, 0.587, 0.114)) for style in list(LINES.values())[:3]]
    assert np.diff(greys).min() > 0.1


def test_no_two_looks_differ_in_colour_only():
    assert len({(style["linestyle"], style["marker"]) for style in LINES.values()}) == len(LINES)
    hatched = [(hatch, sum(to_rgb(color)) > 1.5) for _, color, hatch in PARTS.values()]
    assert len(set(hatched)) == len(PARTS)


# Layers


def test_each_measure_is_drawn_on_the_instruction_and_on_the_speech(drawn):
    plot_layers({"text LLM (reads the transcript)": bias(), "vanilla LSM": bias(instruction=0.05)}, "stem")
    panels = drawn[0].get_axes()
    assert [axes.get_title() for axes in panels[:2]] == ["on the instruction", "on the speech or transcript"]
    labels = ["share of saliency", "saliency per token\n(average token = 1)", "share of attention"]
    assert [axes.get_ylabel() for axes in panels[::2]] == labels
    for axes, height in zip(panels, [0.05, 0.4] * 3, strict=True):
        assert curves(axes)["vanilla LSM"].get_ydata().tolist() == [height] * 4
        assert curves(axes)["vanilla LSM"].get_xdata().tolist() == [1, 2, 3, 4]
        assert len(axes.collections) == 2  # bands
    assert legend(drawn[0]) == ["text LLM (reads the transcript)", "vanilla LSM"]
    assert panels[-1].get_xlabel() == "layer"


def test_models_of_different_depth_share_an_axis_of_relative_depth(drawn):
    plot_layers({"a": bias(4), "b": bias(8)}, "stem")
    lines = curves(drawn[0].get_axes()[0])
    assert lines["a"].get_xdata().tolist() == [0.25, 0.5, 0.75, 1]
    assert len(lines["b"].get_xdata()) == 8
    assert drawn[0].get_axes()[-1].get_xlabel() == "depth (1 = last layer)"


def test_a_model_keeps_its_look_whoever_stands_beside_it(drawn):
    plot_layers({"vanilla LSM": bias()}, "stem")
    plot_layers({"my own": bias(), "self-powered LSM": bias(), "vanilla LSM": bias()}, "stem")
    alone, beside = (curves(figure.get_axes()[0]) for figure in drawn)
    assert alone["vanilla LSM"].get_marker() == beside["vanilla LSM"].get_marker() == LINES["vanilla"]["marker"]
    assert len({line.get_marker() for line in beside.values()}) == 3


def test_more_models_than_looks_are_drawn(drawn):
    plot_layers({f"model {i}": bias() for i in range(8)}, "stem")
    assert len(curves(drawn[0].get_axes()[0])) == 8


def test_what_was_not_measured_is_left_out_of_the_layers(drawn):
    lacking = copy.deepcopy(bias())
    lacking |= {"attention": None, "intervals": None}
    lacking["per_token"][1]["speech"] = None
    plot_layers({"a": lacking}, "stem")
    panels = drawn[0].get_axes()
    assert len(panels) == 4  # no row for attention
    assert np.isnan(curves(panels[3])["a"].get_ydata()).tolist() == [False, True, False, False]
    assert not any(axes.collections for axes in panels)


@pytest.mark.parametrize("biases", [{}, {"a": bias(), "b": {"layers": []}}, {"a": {}}])
def test_models_without_layers_are_refused(biases):
    with pytest.raises(ValueError, match=r"layers per model: .*expected at least one model"):
        plot_layers(biases, "stem")


# Composition


@pytest.mark.parametrize("layers", [1, 4, 32])
def test_the_five_shares_are_stacked_up_to_one(drawn, layers):
    plot_composition(bias(layers), "stem", "vanilla LSM")
    (axes,) = drawn[0].get_axes()
    assert axes.get_title() == "vanilla LSM"
    assert [len(container) for container in axes.containers] == [layers] * 5
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
    assert tops == pytest.approx([1] * layers)
    assert legend(drawn[0]) == [label for label, _, _ in PARTS.values()]


def test_a_composition_without_layers_is_refused():
    with pytest.raises(ValueError, match="'vanilla LSM' has no layers"):
        plot_composition({}, "stem", "vanilla LSM")


# Similarity


def test_three_curves_run_over_the_levels_and_three_maps_show_a_sentence(drawn):
    plot_similarity(similarity(), "stem")
    left, *maps, bar = drawn[0].get_axes()
    assert list(curves(left)) == ["CKA", "cosine, same sentence", "cosine, another sentence"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["input", "layer 1", "layer 2"]
    assert len(left.collections) == 2  # the third curve has no interval
    assert [axes.get_title() for axes in maps] == ["input", "layer 1", "layer 2"]
    assert [axes.images[0].get_array().shape for axes in maps] == [(6, 2)] * 3
    assert len({axes.images[0].get_clim() for axes in maps}) == 1
    assert [label.get_text() for label in maps[-1].get_xticklabels()] == ["the", "cat"]
    assert bar.get_xlabel() == "cosine"


def test_of_many_maps_the_first_a_middle_and_the_last_are_shown(drawn):
    names = ["input", *(f"layer {i}" for i in range(1, 33))]
    plot_similarity(similarity(levels=names, maps=names, tokens=["a"] * 40), "stem")
    left, *maps, _ = drawn[0].get_axes()
    assert [axes.get_title() for axes in maps] == ["input", "layer 16", "layer 32"]
    assert len(curves(left)["CKA"].get_xdata()) == 33
    assert len(left.get_xticklabels()) <= 9
    assert len(maps[-1].get_xticklabels()) <= 14


@pytest.mark.parametrize("examples", [None, [], [{"tokens": [], "maps": {}}]])
def test_without_an_example_only_the_curves_are_drawn(drawn, examples):
    plot_similarity({**similarity(), "examples": examples, "cosine_other": None}, "stem")
    (left,) = drawn[0].get_axes()
    assert list(curves(left)) == ["CKA", "cosine, same sentence"]


def test_numbers_that_do_not_fit_together_are_refused(drawn):
    with pytest.raises(ValueError, match="cka has 1 values; expected one for each of 3 levels"):
        plot_similarity({**similarity(), "cka": [0.5]}, "stem")
    wrong = similarity()
    wrong["examples"][0]["tokens"] = ["the"]
    with pytest.raises(ValueError, match=re.escape("map of input has shape (6, 2); expected (speech tokens, 1)")):
        plot_similarity(wrong, "stem")


# Bars


def test_a_bar_stands_for_each_score_and_its_whisker_for_the_interval(drawn):
    bars("stem")
    (axes,) = drawn[0].get_axes()
    text, vanilla = (container for container in axes.containers if hasattr(container, "patches"))
    assert [bar.get_height() for bar in text] == [0.9, 0.0]
    assert [bar.get_height() for bar in vanilla] == [0.1]  # no bar for what is missing
    ends = vanilla.errorbar.lines[2][0].get_segments()[0][:, 1]
    assert ends.tolist() == pytest.approx([0.05, 0.2])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["intent", "copies"]
    assert legend(drawn[0]) == [STYLES["text_llm"][0], STYLES["vanilla"][0]]
    assert (axes.get_ylabel(), axes.get_title()) == ("share of answers", "Who does what is asked?")


def test_bars_of_a_group_stand_in_the_order_of_the_styles_and_do_not_overlap(drawn):
    bars("stem", dict(reversed(SCORES.items())))
    axes = drawn[0].get_axes()[0]
    text, vanilla = (container.patches[0] for container in axes.containers if hasattr(container, "patches"))
    assert text.get_height() == 0.9
    assert text.get_x() + text.get_width() == pytest.approx(vanilla.get_x())


def test_groups_and_systems_without_scores_are_left_out(drawn):
    scores = {"vanilla": {"intent": {"value": 0.5, "low": None, "high": None}}, "silence": {"intent": {"value": None}}}
    bars("stem", scores, order=("keyword", "intent"))
    (axes,) = drawn[0].get_axes()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["intent"]
    assert legend(drawn[0]) == [STYLES["vanilla"][0]]


def test_an_interval_that_is_missing_leaves_a_bar_without_a_whisker(tmp_path):
    paths = bars(tmp_path / "a", {"vanilla": {"intent": {"value": 0.5}}}, order=["intent"])
    assert all(path.stat().st_size for path in paths)


def test_bars_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="no style for 'whisper'; expected one of text_llm, "):
        bars("stem", {"whisper": {}})
    with pytest.raises(ValueError, match="no system has a score for keyword; expected some of intent, copies"):
        bars("stem", order=["keyword"])


# A study

STUDY = {
    "ours": {"trained": {"value": 0.97, "low": 0.95, "high": 0.99}, "steps": {"value": 125, "low": 100, "high": 150}},
    "vanilla": {"trained": {"value": 0.0, "low": 0.0, "high": 0.02}, "steps": None},
}
PANELS = {"trained": "trained kinds", "steps": "steps to 90 %"}


def test_a_study_has_a_line_for_every_row_and_a_panel_for_every_figure(drawn):
    plot_study(STUDY, PANELS, "stem", counts=["steps"], ceilings={"trained": {"value": 1.0}, "steps": None})
    (figure,) = drawn
    shares, steps = figure.axes
    assert [label.get_text() for label in shares.get_yticklabels()] == ["ours", "vanilla"]
    assert shares.get_ylim()[0] > shares.get_ylim()[1]  # the first row is the highest
    points = [(*line.get_xdata(), *line.get_ydata()) for line in shares.lines if line.get_marker() == "o"]
    whiskers = [list(line.get_xdata()) for line in shares.lines if len(line.get_xdata()) == 2]
    assert points == [(97, 0), (0, 1)]
    assert whiskers == [[95, 99], [0, 2], [100, 100]]  # the last is the ceiling
    assert [(*line.get_xdata(), *line.get_ydata()) for line in steps.lines if line.get_marker() == "o"] == [(125, 0)]


def test_layers_of_a_study_stand_beside_their_rows_and_may_be_of_any_number(drawn):
    layers = {"ours": [{"instruction": 0.2, "speech": 0.5}], "vanilla": [{"instruction": 0.1, "speech": 0.6}] * 2}
    plot_study(STUDY, PANELS, "stem", ["steps"], layers=layers)
    instruction, speech = (axes.images[0].get_array() for axes in drawn[0].axes[2:])
    np.testing.assert_allclose(instruction.filled(np.nan), [[0.2, np.nan], [0.1, 0.1]])
    np.testing.assert_allclose(speech.filled(np.nan), [[0.5, np.nan], [0.6, 0.6]])
    plot_study(STUDY, PANELS, "stem", ["steps"], layers={"ours": layers["ours"], "vanilla": []})
    np.testing.assert_allclose(drawn[1].axes[2].images[0].get_array().filled(np.nan), [[0.2], [np.nan]])


def test_a_study_without_rows_is_refused():
    with pytest.raises(ValueError, match="no row"):
        plot_study({}, PANELS, "stem")
