"""Continuous batches: answers of many requests are written together, and each enters and leaves when it is ready.

The model answers whoever waits while others are being answered: after each step, rows that have ended leave the batch
and its cache, and new prompts are read and join it, padded on the left. So an answer is that of its prompt alone.
"""

import contextlib
import ctypes
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import BatchFeature, DynamicCache, PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from language_models.generation import GREEDY, read_answers
from modeling_lsm import LsmForConditionalGeneration, without_blanks
from processing_lsm import FEATURES
from recipes.listening.features import SHAPES

logger = logging.getLogger(__name__)

PREFILL_FRAMES = 12_000  # mel frames of the prompts that are read together, between two steps: 120 s of speech
HALF_CHARACTER = "\ufffd"  # what a tokenizer decodes bytes to that the next token completes
IDLE = 1.0  # seconds without a request after which memory is given back


class BusyError(RuntimeError):
    """The queue is full."""


@dataclass
class Event:
    """Something that happened to a request: more `text`, its end (`finish` is `stop`, `length` or `error`), or both.
    `tokens` is the number of tokens that were written so far."""

    text: str = ""
    finish: str | None = None
    tokens: int = 0


@dataclass(eq=False)
class Job:
    """A request to the model."""

    inputs: BatchFeature  # output of the processor for one prompt, with tensors on the CPU
    emit: Callable[[Event], None]  # called in the engine's thread
    max_tokens: int  # of the answer
    temperature: float = 0.0  # 0 for greedy decoding
    top_p: float = 1.0  # only the most probable tokens with this total probability are drawn
    seed: int | None = None  # of the random numbers; None for other numbers each time
    stop: Sequence[str] = ()  # texts at whose first occurrence the answer ends; it does not contain them
    cancelled: bool = False  # whether the client has left
    tokens: list[int] = field(default_factory=list)  # that were written so far
    written: str = ""  # the text that was emitted so far

    def __post_init__(self):
        self.generator = torch.Generator()
        if self.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.seed)

    @property
    def frames(self) -> int:
        """Number of mel frames of the clips."""
        features = self.inputs.get("input_features")
        return 0 if features is None else features.shape[0] * features.shape[-1]

    def choose(self, logits: torch.Tensor) -> int:
        """Draw the next token, given its logits `(vocabulary,)` float32."""
        scores = (logits - logits.max()).double()  # so that no temperature, however small, makes them infinite
        scores = TemperatureLogitsWarper(self.temperature)(None, scores[None])
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        return int(torch.multinomial(scores[0].softmax(-1).cpu(), 1, generator=self.generator))

    def take(self, token: int, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> bool:
        """Add a token, emit what can be read of it, and return whether the answer has ended."""
        self.tokens.append(token)
        text = read_answers(tokenizer, [self.tokens])[0]
        stop = min((place for word in self.stop if (place := text.find(word)) >= 0), default=None)
        finish = "stop" if token in ends or stop is not None else None
        if finish is None and len(self.tokens) >= self.max_tokens:
            finish = "length"
        if stop is not None:
            text = text[:stop]
        elif finish is None:  # the end of what is known may still change
            text = text[: max(0, len(text) - max(map(len, self.stop), default=0))]
            text = "" if text.endswith(HALF_CHARACTER) else text
        new = text.removeprefix(self.written) if text.startswith(self.written) else ""
        self.written += new
        if new or finish:
            self.emit(Event(new, finish, len(self.tokens)))
        return finish is not None


@dataclass(eq=False)
class _Batch:
    """The rows that are being answered: their jobs, their cache, and its mask `(rows, length)` int64."""

    jobs: list[Job]
    cache: DynamicCache
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.jobs)

    def join(self, other: "_Batch") -> None:
        """Take the rows of another batch in. Both are padded on the left to the longer one."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        for layer, others in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys = _cat(layer.keys, others.keys, length)
            layer.values = _cat(layer.values, others.values, length)
        self.mask = torch.cat(
            [nn.functional.pad(mask, (length - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        )
        self.jobs += other.jobs

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, without the columns that are padding in all of them if the cache has them."""
        index = torch.tensor(rows, device=self.mask.device)
        self.jobs, self.mask = [self.jobs[row] for row in rows], self.mask[index]
        self.cache.batch_select_indices(index)
        padding = int(self.mask.any(0).int().argmax())
        if padding and joins(self.cache):
            self.mask = self.mask[:, padding:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]


def joins(cache: DynamicCache) -> bool:
    """Return whether rows can join a cache. Those of sliding windows and state-space models cannot be padded."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _cat(first: torch.Tensor, second: torch.Tensor, length: int) -> torch.Tensor:
    padded = (nn.functional.pad(part, (0, 0, length - part.shape[2], 0)) for part in (first, second))
    return torch.cat(list(padded))


def give_back_memory() -> None:
    """Give free memory back to the system: what garbage still holds, and what glibc keeps, which is hundreds of MB
    after clips of many lengths at once."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Engine(threading.Thread):
    """The thread that runs the model. It answers `max_batch` requests together, while `max_waiting` may wait."""

    def __init__(
        self,
        model: LsmForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        max_batch: int = 32,
        max_waiting: int = 256,
    ):
        super().__init__(name="engine", daemon=True)
        self.model, self.tokenizer, self.max_batch, self.max_waiting = model, tokenizer, max_batch, max_waiting
        settings = model.generation_config
        end = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
        self.ends = end if isinstance(end, list) else [end]
        self.pad = settings.pad_token_id if settings.pad_token_id is not None else self.ends[0]
        self.waiting: deque[Job] = deque()
        self.batch: _Batch | None = None
        self.changed, self.stopping, self.seconds = threading.Condition(), False, 0.0
        self.processors = self._logits_processors()

    @property
    def running(self) -> int:
        return 0 if self.batch is None else len(self.batch)

    def submit(self, job: Job) -> None:
        """Add a request to the queue.

        Raises:
            BusyError: the queue is full.
        """
        with self.changed:
            if len(self.waiting) >= self.max_waiting:
                raise BusyError(f"{len(self.waiting)} requests are waiting already; try again later.")
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Free the place of a request, whether it waits or is being answered."""
        with self.changed:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.join()

    def run(self) -> None:
        used = False
        while True:
            with self.changed:
                while not (self.waiting or self.batch or self.stopping):
                    if not self.changed.wait(IDLE if used else None):
                        give_back_memory()
                        used = False
                if self.stopping:
                    return
                jobs, used = self._admitted(), True
            began = time.monotonic()
            try:
                self._read(jobs)
            except Exception:
                self._tell_failure(jobs)
            try:
                self._write()
            except Exception:
                failed, self.batch = self.batch.jobs, None
                self._tell_failure(failed)
            self.seconds += time.monotonic() - began

    @staticmethod
    def _tell_failure(jobs: list[Job]) -> None:
        """Log the error that is being handled, and tell the clients that there was one. The engine goes on."""
        logger.exception("the model failed")
        for job in jobs:
            job.emit(Event(finish="error", tokens=len(job.tokens)))

    def _admitted(self) -> list[Job]:
        """Take the requests out of the queue that are read next."""
        if self.batch is not None and not joins(self.batch.cache):
            return []
        jobs: list[Job] = []
        frames = 0
        while self.waiting and len(jobs) + self.running < self.max_batch:
            frames += self.waiting[0].frames
            if jobs and frames > PREFILL_FRAMES:
                break
            jobs.append(self.waiting.popleft())
        return jobs

    @torch.inference_mode()
    def _read(self, jobs: list[Job]) -> None:
        """Run the model on the prompts of new requests, which join the batch. Clients may leave while others' clips are
        encoded, which takes long."""
        heard = {job: self._speech(job) for job in jobs if not job.cancelled}
        jobs = [job for job in jobs if job in heard and not job.cancelled]
        if not jobs:
            return
        speech = [heard[job] for job in jobs if heard[job] is not None]
        ids, mask = self._prompts(jobs)
        if speech:
            mask = without_blanks(mask, torch.cat(speech), ids == self.model.config.audio_token_id)
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            audio_embeds=torch.cat(speech) if speech else None,
            past_key_values=DynamicCache(config=self.model.config.text_config),
            use_cache=True,
            logits_to_keep=1,
        )
        new = _Batch(list(jobs), outputs.past_key_values, mask)
        self._choose(new, outputs.logits[:, -1])
        if not new.jobs:
            return
        if self.batch is None:
            self.batch = new
        else:
            self.batch.join(new)

    def _prompts(self, jobs: list[Job]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and the mask `(jobs, length)` int64 of the prompts, padded on the left."""
        length = max(job.inputs["input_ids"].shape[1] for job in jobs)

        def padded(name: str, value: int) -> torch.Tensor:
            rows = (job.inputs[name] for job in jobs)
            rows = [nn.functional.pad(row, (length - row.shape[1], 0), value=value) for row in rows]
            return torch.cat(rows).to(self.model.device)

        return padded("input_ids", self.pad), padded("attention_mask", 0)

    def _speech(self, job: Job) -> torch.Tensor | None:
        """Return the speech embeddings of a prompt. Each is encoded alone, because padding short clips to the length of
        long ones costs more than a batch saves. Few lengths are few kernels that oneDNN keeps in memory."""
        if "input_features" not in job.inputs:
            return None
        padding = -job.inputs["input_features"].shape[-1] % SHAPES
        audio = {name: nn.functional.pad(job.inputs[name], (0, padding)) for name in FEATURES}
        audio = {name: value.to(self.model.device) for name, value in audio.items()}
        return self.model.get_audio_features(**audio).pooler_output

    @torch.inference_mode()
    def _write(self) -> None:
        """Write the next token of every answer."""
        if self.batch is None:
            return
        batch = self.batch
        batch.mask = nn.functional.pad(batch.mask, (0, 1), value=1)
        outputs = self.model(
            input_ids=torch.tensor([job.tokens[-1:] for job in batch.jobs], device=self.model.device),
            attention_mask=batch.mask,
            position_ids=batch.mask.sum(1, keepdim=True) - 1,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        batch.cache = outputs.past_key_values
        self._choose(batch, outputs.logits[:, -1])
        if not batch.jobs:
            self.batch = None

    def _choose(self, batch: _Batch, logits: torch.Tensor) -> None:
        """Add a token to every answer, and let those leave that have ended or were cancelled."""
        logits = logits.float()
        if self.processors:
            logits = torch.cat([self._processed(job, row) for job, row in zip(batch.jobs, logits, strict=True)])
        best = logits.argmax(-1).tolist()
        left = []
        for row, job in enumerate(batch.jobs):
            try:
                token = best[row] if job.temperature == 0 else job.choose(logits[row])
                if not job.cancelled and not job.take(token, self.tokenizer, self.ends):
                    left.append(row)
            except Exception:  # of this answer alone
                self._tell_failure([job])
        if len(left) < len(batch):
            batch.keep(left) if left else batch.jobs.clear()

    def _processed(self, job: Job, logits: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor(job.tokens, dtype=torch.long, device=logits.device)
        ids = torch.cat([job.inputs["input_ids"][0].to(logits.device), ids])
        return self.processors(ids[None], logits[None])

    def _logits_processors(self):
        """Return the logits processors that `generate` would use, such as that of a repetition penalty."""
        made = []

        def make(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            made.append(logits_processor)
            return input_ids

        ids = torch.tensor([self.ends[:1]], device=self.model.device)
        self.model.generate(ids, **GREEDY, custom_generate=make, max_new_tokens=1, pad_token_id=self.pad)
        return made[0]
