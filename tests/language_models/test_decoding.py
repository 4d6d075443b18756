"""Greedy decoding without the rows that have ended: the same answers for less work."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from language_models.decoding import greedy_rows

PROMPTS, MOST = 6, 12


@pytest.fixture(scope="module")
def llm(llm_dir):
    return AutoModelForCausalLM.from_pretrained(llm_dir).eval()


@pytest.fixture(scope="module")
def prompts():
    """Padded on the left, each of another length."""
    torch.manual_seed(3)
    mask = torch.ones(PROMPTS, 9, dtype=torch.long)
    for row in range(PROMPTS):
        mask[row, :row] = 0
    return {"input_ids": torch.randint(5, 40, mask.shape) * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def settings(llm, prompts):
    """Tokens that some of the answers come to, as their ends: one answer ends at once, others later or never."""
    written = llm.generate(**prompts, max_new_tokens=MOST, do_sample=False)[:, 9:]
    ends = [int(written[0, 0]), int(written[2, 4]), int(written[4, 7])]
    return {"max_new_tokens": MOST, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}


@pytest.mark.parametrize("more", [{}, {"suppress_tokens": [7, 11]}, {"min_new_tokens": 3}, {"use_cache": False}])
def test_answers_are_those_of_generate(llm, prompts, settings, more):
    expected = llm.generate(**prompts, **settings, **more)
    assert torch.equal(llm.generate(**prompts, **settings, **more, custom_generate=greedy_rows), expected)


def test_a_row_that_has_ended_is_not_run_again(llm, prompts, settings, monkeypatch):
    rows, forward = [], llm.forward

    def counting(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(llm, "forward", counting)
    written = llm.generate(**prompts, **settings, custom_generate=greedy_rows)[:, 9:]
    lengths = [int(torch.isin(row, torch.tensor(settings["eos_token_id"])).long().argmax()) for row in written]
    assert rows[0] == PROMPTS and rows[-1] < PROMPTS
    assert rows == sorted(rows, reverse=True)
    assert len(set(lengths)) > 2
    rows.clear()
    llm.generate(**prompts, **settings)
    assert set(rows) == {PROMPTS}
