"""Responders: LLMs that read requests (instruction and transcript) and write the responses.

A responder reads the prompt of the LSM, with the transcript in the place of the speech.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from dataset_builders.responders.exchange import Reply, Request
from language_models.checkpoints import base_of, open_model
from language_models.decoding import greedy_rows
from language_models.generation import ONE_ANSWER, changed_decoding, context_of, kv_bytes_per_token, read_answers
from language_models.identity import load_identity
from language_models.tokenizers import make_room
from processing_lsm import LsmProcessor

# A row is self-powered if these agree between its responder and the LSM that trains on it.
IDENTITY = ("model", "revision", "template")
MAX_NEW_TOKENS = 225  # as in the paper
KV_CACHE_BYTES = 8 * 2**30
MOST_ROWS = 256  # per batch; larger batches are not faster


class Prompt(NamedTuple):
    """A request as the LLM reads it."""

    text: str
    tokens: list[int]


class Responder:
    """Base class of responders, with the identity of the LLM and its prompts.

    Args:
        processor: the processor of the LSM, or `text_processor` for an LLM.
        identity: `model` and `revision` of the LLM and `template`, as in an LSM's `config.responder`.
        settings: the checkpoint's generation settings that change greedy decoding (`changed_decoding`).
        max_new_tokens: longest response, in tokens.
        max_prompt_tokens: longest prompt, in tokens; longer ones are not answered. By default, what leaves room for the
            response.
        context: number of positions of the LLM, None if unknown.
    """

    engine: str

    def __init__(
        self,
        processor: LsmProcessor,
        identity: dict,
        settings: dict,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_prompt_tokens: int | None = None,
        context: int | None = None,
    ):
        if max_new_tokens < 1 or (max_prompt_tokens is not None and max_prompt_tokens < 1):
            raise ValueError(f"{max_new_tokens=} and {max_prompt_tokens=} must be 1 or more.")
        if context is not None and context <= max_new_tokens:
            raise ValueError(f"{max_new_tokens=} leaves no room for a prompt; the LLM has {context} positions.")
        self.processor = processor
        self.identity = identity
        self.settings = settings
        self.max_new_tokens = max_new_tokens
        limits = [max_prompt_tokens, None if context is None else context - max_new_tokens]
        self.max_prompt_tokens = min((limit for limit in limits if limit is not None), default=None)

    @property
    def provenance(self) -> str:
        """JSON for the `responder` column: id and revision of the LLM, hash and settings of its template, decoding."""
        return json.dumps({**self.identity, "decoding": self.decoding}, sort_keys=True)

    @property
    def decoding(self) -> dict:
        return {"do_sample": False, "max_new_tokens": self.max_new_tokens, "engine": self.engine, **self.settings}

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Answer the requests, in order.

        Raises:
            ConnectionError: a server cannot be reached, or keeps failing.
            ValueError: a server refuses a request.
        """
        prompts = self.render(requests)
        replies = [Reply("", self._refusal(prompt) or "stop") for prompt in prompts]
        asked = [index for index, reply in enumerate(replies) if reply.finish == "stop"]
        for index, reply in zip(asked, self._generate([prompts[index] for index in asked]), strict=True):
            replies[index] = reply
        return replies

    def _refusal(self, prompt: Prompt) -> str | None:
        """Return why a prompt cannot be sent, a name in `filters.FILTERS`, or None."""
        limit = self.max_prompt_tokens
        return "prompt_too_long" if limit is not None and len(prompt.tokens) > limit else None

    def render(self, requests: Sequence[Request]) -> list[Prompt]:
        """Return the prompts of the LSM, with the transcript in the place of the speech."""
        processor = self.processor
        conversations = [processor.conversation(asked.instruction, transcript=asked.transcript) for asked in requests]
        texts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages in conversations]
        tokens = processor.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return [Prompt(text, ids) for text, ids in zip(texts, tokens, strict=True)]

    def _generate(self, prompts: list[Prompt]) -> list[Reply]:
        """Answer the prompts, in order."""
        raise NotImplementedError


class LocalResponder(Responder):
    """An LLM that transformers runs here. It reads text only, and decodes greedily.

    Args:
        llm: folder or Hub id of a causal LLM, of an LSM from `recipes/compose.py` whose LLM has not been trained, or of
            an adapter for either.
        max_new_tokens, max_prompt_tokens: as in `Responder`.
        kv_cache_bytes: most bytes for the keys and values of a batch. They limit its tokens (prompts and responses,
            including padding).
        dtype: data type of the LLM; `"auto"` is the checkpoint's.
        template_settings: as in [`LsmProcessor`], for a causal LLM. An LSM has its own.

    Raises:
        ValueError: an LSM does not name the LLM inside (`config.responder`), template settings were given for an LSM,
            or the limits leave no room.
    """

    engine = "transformers"

    def __init__(
        self,
        llm: str | Path,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_prompt_tokens: int | None = None,
        kv_cache_bytes: int = KV_CACHE_BYTES,
        dtype: str = "auto",
        template_settings: dict | None = None,
    ):
        processor, identity, config = load_identity(llm, template_settings)
        # An LSM must answer like the LLM that it was made of, so its adapter is left out.
        source = base_of(llm) if config.model_type == "lsm" else llm
        self.model = open_model(source, trust_remote_code=True, dtype=dtype)
        if config.model_type != "lsm":
            make_room(self.model, processor.tokenizer)
        if self.model.generation_config.eos_token_id is None:
            self.model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        self.model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu").eval()
        settings = changed_decoding(self.model.generation_config)
        super().__init__(processor, identity, settings, max_new_tokens, max_prompt_tokens, context_of(config))
        self.token_budget = kv_cache_bytes // kv_bytes_per_token(config, self.model.dtype.itemsize)

    def _generate(self, prompts: list[Prompt]) -> list[Reply]:
        replies = [Reply("")] * len(prompts)
        with tqdm(total=len(prompts), desc="responses", unit="row", leave=False) as progress:
            for batch in self._batches([len(prompt.tokens) for prompt in prompts]):
                answers = self._generate_batch([prompts[index].tokens for index in batch])
                for index, reply in zip(batch, answers, strict=True):
                    replies[index] = reply
                progress.update(len(batch))
        return replies

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Group the rows into batches of similar length within the token budget, longest rows first."""
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            batch = batches[-1] if batches else []
            longest = lengths[batch[0]] if batch else 0
            full = (len(batch) + 1) * (longest + self.max_new_tokens) > self.token_budget or len(batch) == MOST_ROWS
            if not batch or full:
                batches.append([])
            batches[-1].append(index)
        return batches

    @torch.inference_mode()
    def _generate_batch(self, rows: list[list[int]]) -> list[Reply]:
        tokenizer, end = self.processor.tokenizer, self.model.generation_config.eos_token_id
        inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(self.model.device)
        plain = None if self.settings else greedy_rows  # beams and penalties remember all rows of the batch
        output = self.model.generate(**inputs, **ONE_ANSWER, max_new_tokens=self.max_new_tokens, custom_generate=plain)
        answers = output[:, inputs.input_ids.shape[1] :]
        finished = torch.isin(answers, torch.tensor(end, device=answers.device)).any(dim=1).tolist()
        texts = read_answers(tokenizer, answers.tolist())
        return [Reply(text, "stop" if done else "length") for text, done in zip(texts, finished, strict=True)]


def foreign(provenance: str, responder: dict | None) -> list[str]:
    """Return the differences between a row's responder, as `Responder.provenance` writes it, and `config.responder` of
    the LSM that trains on the row; empty if the row is self-powered."""
    try:
        written = dict(json.loads(provenance))
    except (TypeError, ValueError):  # not JSON: another program wrote it
        written = {}
    mine = responder or {}
    return [
        f"{key}: {written.get(key)!r} wrote it, {mine.get(key)!r} would learn it"
        for key in IDENTITY
        if written.get(key) is None or written.get(key) != mine.get(key)
    ]
