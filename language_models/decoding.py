"""Greedy decoding in which an answer that has ended costs nothing more."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Layers of a cache of which rows can be taken out; the state of others (Mamba) would keep all rows.
BY_ROW = (DynamicLayer, DynamicSlidingWindowLayer)
LEFT = 7 / 8  # of the rows at most still write when the others leave: leaving copies the cache


def greedy_rows(
    model: PreTrainedModel, input_ids: torch.Tensor, logits_processor, stopping_criteria, generation_config, **kwargs
) -> torch.Tensor:
    """Decode greedily, as `generate` does with one beam, but take rows that have ended out of the batch and the cache.

    `generate` itself keeps all rows until the last one ends, so that one long answer of 64 makes the others cost as
    much. For `model.generate(..., custom_generate=greedy_rows)`, which prepares the arguments, and for settings without
    beams and penalties: those remember every row of the batch.

    Returns:
        `(batch, longest)` int64 like `generate`: prompts and answers, padded on the right.
    """
    kwargs.pop("synced_gpus", None)
    whole: list[torch.Tensor] = [input_ids[:0]] * len(input_ids)
    rows, writes, cache, first = torch.arange(len(whole)), torch.ones(len(whole), dtype=torch.bool), None, True
    while writes.any():
        inputs = model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=first, next_sequence_length=None if cache is None else 1, **kwargs
        )
        outputs, first = model(**inputs, return_dict=True), False
        kwargs, cache = model._update_model_kwargs_for_generation(outputs, kwargs), outputs.past_key_values
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
        ends = stopping_criteria(input_ids, None).cpu() & writes
        for row in ends.nonzero()[:, 0].tolist():
            whole[rows[row]] = input_ids[row]
        writes = writes & ~ends
        by_row = cache is None or all(type(layer) in BY_ROW for layer in cache.layers)
        if by_row and 0 < writes.sum() <= LEFT * len(writes):
            left = writes.nonzero()[:, 0].to(input_ids.device)
            if cache is not None:
                cache.batch_select_indices(left)
            kwargs = {
                name: value[left] if torch.is_tensor(value) and len(value) == len(writes) else value
                for name, value in kwargs.items()
            }
            input_ids, rows, writes = input_ids[left], rows[writes], writes[writes]
    pad = generation_config.pad_token_id
    return nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=0 if pad is None else pad)
