"""Saliency without attention matrices equals its definition, which is computed with autograd through eager
attention."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GraniteConfig, MistralConfig

from modeling_lsm import without_blanks
from recipes.bias import saliency
from recipes.bias.roles import ROLES, teacher_forced
from recipes.listening.collator import SpeechResponseCollator
from recipes.listening.speech_llm import Lsm, load

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
LOUD = {"num_hidden_layers": 2, "initializer_range": 0.2}
WINDOW = 8
FIGURES = ("layers", "per_token", "attention")


@pytest.fixture(scope="module")
def write_llm(llm_dir, tmp_path_factory):
    """Return a function that writes a text LLM of a configuration, with the tiny tokenizer."""

    def write(config):
        torch.manual_seed(0)
        folder, tokenizer = tmp_path_factory.mktemp("llm"), AutoTokenizer.from_pretrained(llm_dir)
        config.update({"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load(folder)

    return write


@pytest.fixture(scope="module")
def windowed(write_llm):
    """Make an LLM whose tokens see only the last eight tokens."""
    return write_llm(MistralConfig(**SIZES, **LOUD, sliding_window=WINDOW))


@pytest.fixture(scope="module")
def scaled(write_llm):
    """Make an LLM with another scale of the attention scores."""
    return write_llm(GraniteConfig(**SIZES, **LOUD, attention_multiplier=0.7))


@pytest.fixture
def find(open_llm, windowed, scaled):
    return lambda name: {"mistral": windowed, "granite": scaled}.get(name) or open_llm(name)


@torch.no_grad()
def visible_tokens(llm, batch, row) -> list[bool]:
    """Return which tokens of a row the LLM may attend to: all but the blanks of an LSM."""
    ids = batch.inputs["input_ids"]
    mask = torch.ones_like(ids)
    if isinstance(llm, Lsm) and "input_features" in batch.inputs:
        audio = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
        speech = llm.model.get_audio_features(**audio).pooler_output
        mask = without_blanks(mask, speech, ids == llm.audio_token_id)
    return mask[row].bool().tolist()


def by_hand(llm, row, slot):
    """Compute the result of `measure` for one row from attention matrices and their gradients."""
    eager = copy.deepcopy(llm.model)
    eager.set_attn_implementation("eager")
    batch = teacher_forced(llm, [row], slot)
    ids, start = batch.inputs["input_ids"], batch.starts[0]
    output = eager(**batch.inputs, output_attentions=True, use_cache=False)
    logits = output.logits[0, start - 1 : -1].clone()
    logits[:, eager.generation_config.suppress_tokens or []] = -torch.inf
    loss = torch.nn.functional.cross_entropy(logits, ids[0, start:])
    window = llm.model.config.get_text_config().__dict__.get("sliding_window") or ids.shape[1]
    layers, visible = [], visible_tokens(llm, batch, 0)
    for attention, gradient in zip(output.attentions, torch.autograd.grad(loss, output.attentions), strict=True):
        rows = slice(start - 1, ids.shape[1] - 1)
        map_, attended = (attention * gradient)[0].sum(0).abs()[rows], attention[0].mean(0)[rows].mean(0)
        figures = {name: dict.fromkeys(ROLES, 0.0) for name in FIGURES}
        seen = dict.fromkeys(ROLES, 0)
        for query, place in enumerate(range(rows.start, rows.stop)):
            for key in filter(visible.__getitem__, range(max(0, place - window + 1), place + 1)):
                role = ROLES[batch.roles[0, key]]
                figures["layers"][role] += map_[query, key].item()
                seen[role] += 1
        total, average = sum(figures["layers"].values()), sum(figures["layers"].values()) / sum(seen.values())
        for role, salient in figures["layers"].items():
            figures["per_token"][role] = salient / seen[role] / average if seen[role] else 0.0
            figures["layers"][role] = salient / total
            figures["attention"][role] = attended[batch.roles[0] == ROLES.index(role)].sum().item()
        layers.append(figures)
    return layers


CASES = [
    *((name, slot) for name in ("lsm", "qwen2_audio", "audioflamingo3") for slot in ("audio", "transcript")),
    ("text", "transcript"),
    ("mistral", "transcript"),
    ("granite", "transcript"),
]


@pytest.mark.parametrize(("name", "slot"), CASES)
def test_a_padded_batch_has_the_saliency_of_each_row_by_the_definition(find, answered, name, slot):
    llm = find(name)
    batch = teacher_forced(llm, answered, slot)
    assert len(set(batch.lengths)) == len(set(batch.starts)) == len(answered)
    measured = saliency.measure(llm, batch)
    for row, found in zip(answered, measured, strict=True):
        expected = by_hand(llm, row, slot)
        assert len(found) == len(expected) == llm.model.config.get_text_config().num_hidden_layers
        for layer, wanted in zip(found, expected, strict=True):
            assert layer.keys() == wanted.keys()
            for figure in FIGURES:
                assert layer[figure] == pytest.approx(wanted[figure], abs=1e-5, rel=1e-5), figure


@pytest.mark.parametrize(("name", "slot"), CASES)
def test_shares_are_of_one_whole(find, answered, name, slot):
    for layers in saliency.measure(find(name), teacher_forced(find(name), answered, slot)):
        for layer in layers:
            for figure in ("layers", "attention"):
                assert sum(layer[figure].values()) == pytest.approx(1, abs=1e-5)
                assert min(layer[figure].values()) >= 0


def test_a_token_is_measured_by_the_average_of_those_that_are_seen(open_llm, answered):
    """The mean of the figures per token, weighted by how often each role is seen, is 1."""
    batch = teacher_forced(open_llm("lsm"), answered)
    for row, layers in enumerate(saliency.measure(open_llm("lsm"), batch)):
        queries, seen = batch.queries(row), dict.fromkeys(ROLES, 0)
        visible = visible_tokens(open_llm("lsm"), batch, row)
        for place in range(queries.start, queries.stop):
            for key in filter(visible.__getitem__, range(place + 1)):
                seen[ROLES[batch.roles[row, key]]] += 1
        for layer in layers:
            weighted = {role: layer["per_token"][role] * seen[role] / sum(seen.values()) for role in ROLES}
            assert weighted == pytest.approx(layer["layers"], abs=1e-5)
            assert sum(weighted.values()) == pytest.approx(1, abs=1e-5)


def test_a_role_without_tokens_has_no_share(open_llm, answered):
    """If the response is only its end, no token of the response is seen."""
    llm = open_llm("qwen2_audio")
    batch = teacher_forced(llm, [answered[0] | {"response": llm.tokenizer.eos_token}])
    batch.lengths = [batch.starts[0] + 1]
    for layer in saliency.measure(llm, batch)[0]:
        assert {layer[figure]["response"] for figure in FIGURES} == {0.0}
        assert layer["layers"]["speech"] > 0


def test_a_row_weighs_the_same_beside_a_longer_one(checkpoints, answered):
    """The loss is a sum over rows, so that other rows do not scale the gradients of a row."""
    llm = load(checkpoints["lsm"])
    llm.model.double()  # so that differences are not rounding errors

    def gradients(rows):
        batch, found = teacher_forced(llm, rows), {}
        with (
            torch.enable_grad(),
            saliency.recording(
                llm, batch, lambda layer, row, attention, gradient, _: found.update({(layer, row): gradient})
            ),
        ):
            saliency.response_loss(llm, batch).backward()
        return found

    alone, records = gradients(answered[2:3]), gradients(answered)
    for layer in (0, 1):
        torch.testing.assert_close(records[layer, 2], alone[layer, 0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "slot"), [("lsm", "audio"), ("text", "transcript")])
def test_the_placeholder_that_is_never_written_has_no_part_in_the_loss(checkpoints, answered, name, slot):
    """Its row in the head is random each time a text LLM is opened."""
    llm = load(checkpoints[name])
    batch = teacher_forced(llm, answered, slot)
    expected = saliency.measure(llm, batch)
    with torch.no_grad():
        llm.model.get_output_embeddings().weight[llm.processor.audio_token_id] = 10
    assert saliency.measure(llm, batch) == expected


@torch.no_grad()
def test_the_loss_is_the_training_loss_but_for_the_placeholder(checkpoints, processor, answered):
    llm = load(checkpoints["lsm"])
    llm.model.generation_config.suppress_tokens = None
    expected = sum(llm.model(**SpeechResponseCollator(processor)([row])).loss for row in answered)
    torch.testing.assert_close(saliency.response_loss(llm, teacher_forced(llm, answered)), expected, atol=1e-4, rtol=0)


# State of the model


def state(llm):
    """Return all state that `measure` changes and must restore."""
    modules = dict(llm.model.named_modules())
    return {
        "trained": {name: parameter.requires_grad for name, parameter in llm.model.named_parameters()},
        "gradients": [name for name, parameter in llm.model.named_parameters() if parameter.grad is not None],
        "attention": {
            name: module.config._attn_implementation for name, module in modules.items() if hasattr(module, "config")
        },
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in modules.items()
        },
        "recordings": len(saliency._recordings),
    }


@pytest.mark.parametrize(("name", "slot"), [("lsm", "audio"), ("text", "transcript"), ("qwen2_audio", "audio")])
def test_a_model_is_restored_afterwards(open_llm, answered, name, slot):
    llm = open_llm(name)
    frozen = next(parameter for parameter in llm.model.get_decoder().parameters())
    frozen.requires_grad_(False)
    try:
        batch = teacher_forced(llm, answered, slot)
        before, logits = state(llm), llm.model(**batch.inputs).logits
        saliency.measure(llm, batch)
        assert state(llm) == before
        assert not before["gradients"] and not frozen.requires_grad
        assert saliency.ATTENTION not in before["attention"].values()
        assert torch.equal(llm.model(**batch.inputs).logits, logits)
    finally:
        frozen.requires_grad_(True)


def test_a_model_is_restored_after_an_error(open_llm, answered, monkeypatch):
    llm = open_llm("lsm")
    batch, before = teacher_forced(llm, answered), state(llm)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    for where in ("_shares", "response_loss"):
        with monkeypatch.context() as patch:
            patch.setattr(saliency, where, fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                saliency.measure(llm, batch)
        assert state(llm) == before
    decoder = llm.model.get_decoder()
    switch = decoder.set_attn_implementation
    with monkeypatch.context() as patch:
        refuse = lambda name: fail() if name == saliency.ATTENTION else switch(name)  # noqa: E731
        patch.setattr(decoder, "set_attn_implementation", refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            saliency.measure(llm, batch)
    assert state(llm) == before
    assert len(saliency.measure(llm, batch)) == len(answered)


def test_it_is_measured_where_gradients_are_off(open_llm, answered):
    batch = teacher_forced(open_llm("lsm"), answered[:1])
    with torch.no_grad():
        off = saliency.measure(open_llm("lsm"), batch)
    assert off == saliency.measure(open_llm("lsm"), batch)


# Models that cannot be analysed


def test_attention_with_a_soft_cap_is_refused(write_llm, answered):
    llm = write_llm(Gemma2Config(**SIZES, **LOUD, head_dim=8))
    batch, before = teacher_forced(llm, answered, "transcript"), state(llm)
    with pytest.raises(ValueError, match="Gemma2Attention has softcap"):
        saliency.measure(llm, batch)
    assert state(llm) == before


def test_an_llm_that_records_nothing_is_refused(open_llm, answered, monkeypatch):
    llm = open_llm("text")
    batch = teacher_forced(llm, answered, "transcript")
    monkeypatch.setattr(type(llm.model.get_decoder()), "set_attn_implementation", lambda *_: None)
    with pytest.raises(ValueError, match=f"no attention of {llm.name} could be recorded"):
        saliency.measure(llm, batch)


@pytest.mark.parametrize("name", ["lsm", "qwen2_audio", "audioflamingo3"])
def test_shares_in_bfloat16_are_about_those_in_float32(checkpoints, open_llm, answered, name):
    llm = load(checkpoints[name], dtype="bfloat16")
    rounded = saliency.measure(llm, teacher_forced(llm, answered))
    exact = saliency.measure(open_llm(name), teacher_forced(open_llm(name), answered))
    for found, wanted in zip(rounded, exact, strict=True):
        for layer, expected in zip(found, wanted, strict=True):
            assert sum(layer["layers"].values()) == pytest.approx(1, abs=1e-5)
            assert layer["attention"] == pytest.approx(expected["attention"], abs=0.03)
            assert layer["layers"] == pytest.approx(expected["layers"], abs=0.1)


# Memory


class Sizes(TorchDispatchMode):
    """Records the shapes of all tensors that are created."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.shapes += [one.shape for one in torch.utils._pytree.tree_leaves(made) if isinstance(one, torch.Tensor)]
        return made


def test_memory_grows_with_the_length_of_the_prompt_and_not_with_its_square(open_llm):
    llm, largest, lengths = open_llm("text"), [], []
    for words in (200, 400):
        row = {"instruction": "!" * words, "transcript": "what is said", "response": "so it is"}
        batch = teacher_forced(llm, [row], "transcript")
        with Sizes() as sizes:
            saliency.measure(llm, batch)
        (length,) = batch.lengths
        assert words < length < words + 60
        assert not [shape for shape in sizes.shapes if sum(side >= words for side in shape) > 1]
        largest.append(max(shape.numel() for shape in sizes.shapes))
        lengths.append(length)
    assert largest[1] / largest[0] <= 2.3


def test_eager_attention_takes_memory_of_the_squared_length(open_llm):
    """The test above would notice eager attention."""
    eager = copy.deepcopy(open_llm("text").model)
    eager.set_attn_implementation("eager")
    with Sizes() as sizes:
        eager(torch.ones(1, 200, dtype=torch.long))
    assert [shape for shape in sizes.shapes if sum(side >= 200 for side in shape) > 1]
