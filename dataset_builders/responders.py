"""Who answers: a responder reads (instruction, transcript) and writes the response.

It renders the LSM's own prompt, with the transcript in the slot where the LSM will have the speech.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor

logger = logging.getLogger(__name__)

# What must agree between a row's responder and the LSM that trains on it, for the row to be self-powered.
IDENTITY = ("model", "revision", "template")


class LocalResponder:
    """The LLM inside an LSM folder, answering greedily from text alone.

    Args:
        model: an LSM, as `recipes/compose.py` writes it: folder or Hub id. Its LLM must not have been trained since.
        max_new_tokens: longest response.
        token_budget: padded tokens (prompt and response) of one batch; rows are sorted by length.

    Raises:
        ValueError: the checkpoint does not say which LLM is inside (`config.responder`).
    """

    def __init__(self, model: str | Path, max_new_tokens: int = 225, token_budget: int = 16_384):
        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        self.model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.max_new_tokens = max_new_tokens
        self.token_budget = token_budget
        if self.model.config.responder is None:
            raise ValueError(f"{model} does not say which LLM is inside; compose it with recipes/compose.py.")

    @property
    def provenance(self) -> str:
        """JSON for the `responder` column: LLM id and revision, template hash, decoding settings."""
        decoding = {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return json.dumps({**self.model.config.responder, "decoding": decoding}, sort_keys=True)

    @torch.inference_mode()
    def respond(self, requests: Sequence[tuple[str, str]]) -> list[str | None]:
        """Answer `(instruction, transcript)` pairs, in order; None where the answer was cut at `max_new_tokens`."""
        tokenizer = self.processor.tokenizer
        prompts = [
            self.processor.apply_chat_template(
                self.processor.conversation(instruction, transcript=transcript), add_generation_prompt=True
            )
            for instruction, transcript in requests
        ]
        tokens = tokenizer(prompts, add_special_tokens=False).input_ids
        responses: list[str | None] = [None] * len(requests)
        with tqdm(total=len(requests), desc="responses", unit="row") as progress:
            for batch in self._batches([len(row) for row in tokens]):
                for index, response in zip(batch, self._generate([tokens[index] for index in batch]), strict=True):
                    responses[index] = response
                progress.update(len(batch))
        return responses

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Row indices in batches of similar length within the token budget, longest first: memory fails early."""
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            longest = lengths[batches[-1][0]] if batches else 0
            if not batches or (len(batches[-1]) + 1) * (longest + self.max_new_tokens) > self.token_budget:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _generate(self, rows: list[list[int]]) -> list[str | None]:
        tokenizer, end = self.processor.tokenizer, self.model.generation_config.eos_token_id
        inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answers = output[:, inputs.input_ids.shape[1] :]
        finished = torch.isin(answers, torch.tensor(end, device=answers.device)).any(dim=1).tolist()
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() if done else None for text, done in zip(texts, finished, strict=True)]


def foreign(provenance: str, responder: dict | None) -> list[str]:
    """What differs between a row's `responder` column and an LSM's `config.responder`: empty if self-powered.

    Args:
        provenance: the row's `responder`, as `LocalResponder.provenance` writes it.
        responder: `config.responder` of the LSM that would train on it.
    """
    try:
        written = dict(json.loads(provenance))
    except (TypeError, ValueError):  # another program's column
        written = {}
    mine = responder or {}
    return [
        f"{key}: {written.get(key)!r} wrote it, {mine.get(key)!r} would learn it"
        for key in IDENTITY
        if written.get(key) is None or written.get(key) != mine.get(key)
    ]
