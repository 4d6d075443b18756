"""Prompts with their responses, as one batch to be read in a single pass, and what every token of it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import SpeechLLM

ROLES = ("instruction", "speech", "template", "response", "first")
TEXT_INPUTS = ("input_ids", "attention_mask")


@dataclass
class TeacherForcedBatch:
    """Prompts followed by the responses that are to be explained.

    Args:
        inputs: of the model: `input_ids` `(batch, length)`, padded on the right, and what the audio tower takes. There
            is no attention mask: behind causal attention nothing sees the padding, and without a mask no matrix of
            length times length is made.
        roles: `(batch, length)` int64, indices of `ROLES`; -1 is padding. The transcript of a text prompt is `speech`;
            the very first token is `first`, whatever it says: attention sinks there.
        starts: where the responses begin.
        lengths: of prompt and response.
    """

    inputs: dict[str, torch.Tensor]
    roles: torch.Tensor
    starts: list[int]
    lengths: list[int]

    def queries(self, row: int) -> slice:
        """The positions that predict the response: from the prompt's last token to the response's last but one."""
        return slice(self.starts[row] - 1, self.lengths[row] - 1)


def teacher_forced(
    llm: SpeechLLM, rows: Sequence[dict], slot: str = "audio", store: AudioFeatureStore | None = None
) -> TeacherForcedBatch:
    """A batch whose answers are the rows' `response`.

    Raises:
        ValueError: an empty response, or a prompt whose tokens cannot be told apart.
    """
    inputs = dict(llm.inputs(rows, slot, store))
    mask = inputs["attention_mask"].bool()
    sequences, roles, starts = [], [], []
    for row, ids, real in zip(rows, inputs["input_ids"], mask, strict=True):
        if not row["response"].strip():
            raise ValueError(f"row {row.get('id')!r} has an empty response; there is nothing to explain.")
        prompt = ids[real].tolist()
        response = llm.response_ids(row, slot)
        named = expand(prompt, llm.spans(row, slot), llm.audio_token_id)
        sequences.append(prompt + response)
        starts.append(len(prompt))
        roles.append([ROLES.index("first"), *named[1:], *[ROLES.index("response")] * len(response)])
    length = max(map(len, sequences))
    pad = llm.tokenizer.pad_token_id
    batch = {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
    batch["input_ids"] = torch.tensor([ids + [pad] * (length - len(ids)) for ids in sequences])
    padded = torch.tensor([row + [-1] * (length - len(row)) for row in roles])
    batch = {name: value.to(llm.model.device) for name, value in batch.items()}
    return TeacherForcedBatch(batch, padded.to(llm.model.device), starts, list(map(len, sequences)))


def expand(prompt: list[int], spans: list[tuple[int, str]], audio_token_id: int | None) -> list[int]:
    """Roles of a prompt in which every clip takes as many tokens as the model hears of it.

    Raises:
        ValueError: the processor wrote another prompt than the one that was taken apart.
    """
    texts = iter([(token, role) for token, role in spans if token != audio_token_id])
    roles = []
    for token in prompt:
        expected, role = (token, "speech") if token == audio_token_id else next(texts, (None, ""))
        if token != expected:
            raise ValueError(f"token {len(roles)} of the prompt is {token}, its text says {expected}.")
        roles.append(ROLES.index(role))
    if next(texts, None) is not None:
        raise ValueError(f"the prompt ends after {len(roles)} tokens, its text goes on.")
    return roles
