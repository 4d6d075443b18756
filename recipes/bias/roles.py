"""Make batches of prompts with their responses, and find the role of each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import SpeechLLM

ROLES = ("instruction", "speech", "template", "response", "first")
TEXT_INPUTS = ("input_ids", "attention_mask")


@dataclass
class TeacherForcedBatch:
    """Prompts followed by their responses.

    Args:
        inputs: inputs of the model: `input_ids` `(batch, length)`, padded on the right, and those of the audio tower.
            There is no attention mask, because with causal attention no token sees the padding, and a mask would take a
            matrix of length times length.
        roles: `(batch, length)` int64, indices of `ROLES`; -1 is padding. The transcript in a text prompt is `speech`.
            The first token is always `first`, because it gets much attention whatever it says (an attention sink).
        starts: positions at which the responses begin.
        lengths: number of tokens of each prompt with its response.
    """

    inputs: dict[str, torch.Tensor]
    roles: torch.Tensor
    starts: list[int]
    lengths: list[int]

    def queries(self, row: int) -> slice:
        """Return the positions that predict the response, from the last token of the prompt to the response's last but
        one."""
        return slice(self.starts[row] - 1, self.lengths[row] - 1)


def teacher_forced(
    llm: SpeechLLM, rows: Sequence[dict], slot: str = "audio", store: AudioFeatureStore | None = None
) -> TeacherForcedBatch:
    """Return a batch of the rows' prompts and `response`s.

    Raises:
        ValueError: a response is empty, or the roles of a prompt's tokens cannot be found.
    """
    inputs = dict(llm.inputs(rows, slot, store))
    mask = inputs["attention_mask"].bool()
    sequences, roles, starts = [], [], []
    for row, ids, real in zip(rows, inputs["input_ids"], mask, strict=True):
        if not row["response"].strip():
            raise ValueError(f"row {row.get('id')!r} has an empty response; there is nothing to analyse.")
        prompt = ids[real].tolist()
        response = llm.response_ids(row)
        prompt_roles = expand(prompt, llm.spans(row, slot), llm.audio_token_id)
        sequences.append(prompt + response)
        starts.append(len(prompt))
        roles.append([ROLES.index("first"), *prompt_roles[1:], *[ROLES.index("response")] * len(response)])
    length = max(map(len, sequences))
    pad = llm.tokenizer.pad_token_id
    batch = {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
    batch["input_ids"] = torch.tensor([ids + [pad] * (length - len(ids)) for ids in sequences])
    padded = torch.tensor([row + [-1] * (length - len(row)) for row in roles])
    batch = {name: value.to(llm.model.device) for name, value in batch.items()}
    return TeacherForcedBatch(batch, padded.to(llm.model.device), starts, list(map(len, sequences)))


def expand(prompt: list[int], spans: list[tuple[int, str]], audio_token_id: int | None) -> list[int]:
    """Return the role of each token of a prompt, in which a clip has as many placeholders as it has speech tokens.
    `spans` are the ids and roles of the prompt without its placeholders, in order (`SpeechLLM.spans`). Raises
    ValueError if other ids differ."""
    texts = iter([(token, role) for token, role in spans if token != audio_token_id])
    roles = []
    for token in prompt:
        expected, role = (token, "speech") if token == audio_token_id else next(texts, (None, ""))
        if token != expected:
            raise ValueError(f"token {len(roles)} of the prompt is {token}, but {expected} in its text.")
        roles.append(ROLES.index(role))
    if next(texts, None) is not None:
        raise ValueError(f"the prompt ends after {len(roles)} tokens, but its text is longer.")
    return roles
