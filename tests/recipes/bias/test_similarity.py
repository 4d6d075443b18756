"""CKA and token similarity, also of speech and transcript inside a model."""

import itertools

import pytest
import torch

from recipes.bias import similarity
from recipes.bias.similarity import best_match, cka, cka_interval, measure, token_states


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(view, seed=0):
    """Return the view after a rotation."""
    return view @ torch.linalg.qr(noise(view.shape[1], view.shape[1], seed=seed))[0]


# CKA


def test_rotation_scale_and_shift_do_not_change_the_similarity():
    view = noise(12, 7)
    for other in (view, turned(view), 0.01 * turned(view), turned(view) + 5):
        assert cka(view, other) == pytest.approx(1, abs=1e-5)


def test_it_is_symmetric_and_takes_views_of_different_widths():
    one, wide = noise(12, 7), noise(12, 30, seed=1)
    wide[:, :7] += one
    assert cka(one, wide) == pytest.approx(cka(wide, one), abs=1e-12)
    assert 0.1 < cka(one, wide) < 0.9


@pytest.mark.parametrize("width", [4, 64, 1024])
def test_unrelated_views_are_unlike_whatever_their_width(width):
    """The biased estimate is near 1 for all wide views."""
    found = [cka(noise(20, width, seed=2 * seed), noise(20, width, seed=2 * seed + 1)) for seed in range(30)]
    assert abs(sum(found) / len(found)) < 0.05
    left, right = (view - view.mean(0) for view in (noise(20, width), noise(20, width, seed=1)))
    biased = (left.T @ right).norm() ** 2 / ((left.T @ left).norm() * (right.T @ right).norm())
    assert width == 4 or biased > 0.5


def hsic_of_quadruples(left, right):
    """Compute the unbiased estimate by its definition, over all quadruples of different examples."""
    one, other = left.double() @ left.double().T, right.double() @ right.double().T
    terms = [
        one[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        for i, j, q, r in itertools.permutations(range(len(left)), 4)
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("examples", [4, 5, 7])
def test_it_equals_its_definition(examples):
    left, right = noise(examples, 3), noise(examples, 5, seed=1) + 1
    right[:, :3] += left
    cross, one, other = (hsic_of_quadruples(*pair) for pair in ((left, right), (left, left), (right, right)))
    assert cka(left, right) == pytest.approx(float(cross / (one * other).sqrt()), abs=1e-9)


def test_what_all_examples_share_does_not_drown_what_they_differ_in():
    """The states of LLMs have a few huge dimensions, which are the same for all texts."""
    view, other = noise(12, 7).double(), noise(12, 7, seed=1).double()
    shared = torch.zeros(7, dtype=torch.double)
    shared[2] = 1e6
    assert cka(view + shared, other + shared) == pytest.approx(cka(view, other), abs=1e-6)


def test_a_constant_view_has_no_similarity():
    assert cka(torch.full((8, 5), 0.1), noise(8, 5)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("left", "right"), [(3, 3), (8, 7), (0, 0)])
def test_it_needs_the_same_examples_twice(left, right):
    with pytest.raises(ValueError, match=f"4 or more; got {left} and {right}"):
        cka(noise(left, 5), noise(right, 5))


# Its interval


@pytest.mark.parametrize("examples", [8, 25, 60])
def test_the_interval_is_around_the_value(examples):
    left = noise(examples, 6)
    right = left + noise(examples, 6, seed=1)
    low, high = cka_interval(left, right)
    assert low < cka(left, right) < high
    assert (low + high) / 2 == pytest.approx(cka(left, right), abs=1e-6)


def test_more_examples_make_it_narrower():
    def width(examples):
        left = noise(examples, 6)
        low, high = cka_interval(left, left + noise(examples, 6, seed=1))
        return high - low

    assert width(400) < width(40) / 2


def test_the_interval_has_about_its_nominal_coverage():
    """Of the intervals of 25 samples, only a few may miss the value of a large sample."""
    mixing = noise(4, 4, seed=99)

    def sample(examples, seed):
        left = noise(examples, 4, seed=seed)
        return left, left @ mixing + 2 * noise(examples, 4, seed=seed + 1000)

    truth = cka(*sample(1500, 5))
    intervals = [cka_interval(*sample(60, seed)) for seed in range(25)]
    assert sum(low <= truth <= high for low, high in intervals) >= 21


# Tokens


def test_every_text_token_finds_the_speech_token_most_like_it():
    speech = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    text = torch.tensor([[0.0, 5.0], [1.0, 1.0]])
    mean, cosines = best_match(speech, text)
    half = 0.5**0.5
    torch.testing.assert_close(cosines, torch.tensor([[0.0, half], [1.0, half], [0.0, -half]]))
    assert mean == pytest.approx((1 + half) / 2)


# Inside a model


@pytest.fixture
def eight(answered):
    """Return eight rows. The second four have the clips of the first four, but other texts."""
    others = [row | {"id": f"{row['id']}b", "transcript": row["transcript"][::-1]} for row in answered]
    return [*answered, *others]


@torch.no_grad()
@pytest.mark.parametrize(("name", "slot"), [("lsm", "audio"), ("lsm", "transcript"), ("qwen2_audio", "audio")])
def test_states_are_those_of_what_is_heard_at_every_level(open_llm, answered, name, slot):
    llm = open_llm(name)
    states = token_states(llm, answered, slot, batch_size=3)
    for row, found in zip(answered, states, strict=True):
        inputs = llm.inputs([row], slot)
        hidden = torch.stack(llm.model(**inputs, output_hidden_states=True).hidden_states)[:, 0]
        speech = torch.tensor([role == "speech" for _, role in llm.spans(row, slot)])
        if slot == "audio":
            speech = inputs["input_ids"][0] == llm.audio_token_id
        torch.testing.assert_close(found, hidden[:, speech], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lsm", "audioflamingo3"])
def test_every_level_has_its_figures(open_llm, eight, name):
    llm = open_llm(name)
    found = measure(llm, eight, batch_size=3)
    layers = llm.model.config.get_text_config().num_hidden_layers
    assert found["levels"] == ["input", *(f"layer {layer}" for layer in range(1, layers + 1))]
    assert found["intervals"].keys() == {"cka", "cosine", "cosine_other"} <= found.keys()
    for figure, bounds in found["intervals"].items():
        assert len(bounds) == len(found[figure]) == layers + 1
        assert all(low <= value <= high for (low, high), value in zip(bounds, found[figure], strict=True))
        assert all(-1 - 1e-6 <= value <= 1 + 1e-6 for value in found[figure])


def test_examples_map_every_token_at_the_input_the_middle_and_the_end(open_llm, eight):
    llm = open_llm("lsm")
    examples = measure(llm, eight)["examples"]
    assert [example["id"] for example in examples] == ["0", "1"]
    for example, row in zip(examples, eight, strict=False):
        assert example["transcript"] == "".join(example["tokens"]) == row["transcript"]
        assert list(example["maps"]) == ["input", "layer 1", "layer 2"]
        clip = (llm.inputs([row])["input_ids"] == llm.audio_token_id).sum()
        for rows in example["maps"].values():
            assert len(rows) == clip and {len(line) for line in rows} == {len(example["tokens"])}


def test_all_rows_are_read_with_one_instruction(open_llm, eight):
    """With different instructions, these would also make the states of speech and text similar."""
    one = [row | {"instruction": eight[0]["instruction"]} for row in eight]
    several = [row | {"instruction": f"{index} times"} for index, row in enumerate(eight)]
    several[0]["instruction"] = eight[0]["instruction"]
    assert measure(open_llm("lsm"), several) == measure(open_llm("lsm"), one)
    assert several[1]["instruction"] == "1 times"  # the rows themselves are not changed


def test_the_same_states_on_both_sides_are_wholly_alike(open_llm, eight, monkeypatch):
    """If speech and text have the same states, CKA and cosine are 1 at each level, and another sentence is less
    similar."""
    monkeypatch.setattr(similarity, "token_states", lambda llm, rows, slot, *_: token_states(llm, rows, "transcript"))
    found = measure(open_llm("text"), eight)
    assert found["cka"] == pytest.approx([1.0] * 3, abs=1e-5)
    assert found["cosine"] == pytest.approx([1.0] * 3, abs=1e-5)
    assert max(found["cosine_other"]) < 0.99
