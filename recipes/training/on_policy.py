"""On-policy distillation: what is learned from is what the LSM itself answers (GKD, arXiv 2306.13649)."""

import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_lsm import AUDIO_INPUTS
from processing_lsm import LsmProcessor

LONGER = 8  # tokens that an answer may have more than the longest response of the batch


def with_own_answers(
    model, processor: LsmProcessor, inputs: dict, teacher: dict, rows: torch.Tensor | None
) -> tuple[dict, dict]:
    """A batch of the collator in which the model's own answers stand in the place of the responses.

    Args:
        model: the LSM, with or without an adapter, not wrapped.
        processor: its own.
        inputs: of the model that hears, `labels` included.
        teacher: of the LLM that reads, `labels` included: the same rows, or some of them.
        rows: `(batch,)` bool, which these are; the others keep their responses. None for all.
    """
    responses = [row[row != -100] for row in inputs["labels"]]
    rows = torch.ones(len(responses), dtype=torch.bool) if rows is None else rows.cpu()
    own = _answer(model, processor, inputs, max(map(len, responses)) + LONGER)
    learned = [own[row] if taught else responses[row] for row, taught in enumerate(rows)]
    pad = processor.tokenizer.pad_token_id
    if rows.any():
        teacher = _with_responses(teacher, [learned[row] for row in rows.nonzero()[:, 0]], pad)
    return _with_responses(inputs, learned, pad), teacher


def _prompts(batch: dict) -> list[torch.Tensor]:
    starts = (batch["labels"] != -100).int().argmax(dim=1).tolist()
    return [ids[:start] for ids, start in zip(batch["input_ids"], starts, strict=True)]


@torch.no_grad()
def _answer(model, processor: LsmProcessor, inputs: dict, most: int) -> list[torch.Tensor]:
    """What the model says, `(tokens,)` for every row: sampled at temperature 1, of at most so many tokens."""
    prompts, end = _prompts(inputs), processor.tokenizer.eos_token_id
    # `generate` takes prompts that are padded on the left
    ids = pad_sequence(prompts, True, processor.tokenizer.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, padding_side="left")
    audio = {name: inputs[name] for name in AUDIO_INPUTS if name in inputs}
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": most}
    ends = {"eos_token_id": end, "pad_token_id": processor.tokenizer.pad_token_id}
    ends["suppress_tokens"] = [processor.audio_token_id]  # there is no clip for it
    training = model.training
    model.eval()
    try:
        written = model.generate(input_ids=ids, attention_mask=mask, **audio, **sampling, **ends)[:, ids.shape[1] :]
    finally:
        model.train(training)
    return [row[: (row == end).int().argmax() + 1] if (row == end).any() else row for row in written]


def _with_responses(batch: dict, responses: list[torch.Tensor], pad: int) -> dict:
    prompts = _prompts(batch)
    pairs = list(zip(prompts, responses, strict=True))
    return {
        **batch,
        "input_ids": pad_sequence([torch.cat(pair) for pair in pairs], True, pad),
        "attention_mask": pad_sequence([torch.ones_like(torch.cat(pair)) for pair in pairs], True, 0),
        "labels": pad_sequence([torch.cat([torch.full_like(a, -100), b]) for a, b in pairs], True, -100),
    }
