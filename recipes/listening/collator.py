"""From rows of a self-powered set to a training batch: the one prompt layout, with labels on the response alone."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import compress

import torch

from processing_lsm import BREAK, LsmProcessor
from recipes.listening.features import AudioFeatureStore, load_clip

THOUGHT = re.compile(r"\A\s*(<think>.*?</think>\s*)+", re.DOTALL)


def render_prompt(processor: LsmProcessor, row: dict, slot: str = "audio") -> str:
    """The prompt for a row's instruction, up to where the answer begins.

    Args:
        row: `instruction`, and `transcript` if it goes into the slot.
        slot: what stands where the speech will be: `audio` (one placeholder) or `transcript`.
    """
    filling = {"audio": True} if slot == "audio" else {"transcript": row["transcript"]}
    messages = processor.conversation(row["instruction"], **filling)
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def render_response(processor: LsmProcessor, row: dict, prompt: str) -> str:
    """What follows `prompt` when the assistant answers with the row's response: the response and the end of turn.

    A thought before it, of the row (`<think>...</think>`) or of the template (an empty one, with `enable_thinking`), is
    nothing to learn and left out.

    Raises:
        ValueError: an empty response, or a chat template whose prompt is not the beginning of the conversation.
    """
    if not THOUGHT.sub("", row["response"]).strip():
        raise ValueError(f"row {row.get('id')!r} has an empty response; expected text to learn.")
    messages = processor.conversation(row["instruction"], audio=True, response=row["response"])
    text = processor.apply_chat_template(messages)
    if not text.startswith(prompt):
        raise ValueError(
            f"the chat template does not continue its own prompt: {prompt!r} is not how {text!r} begins; mend the "
            "template so that add_generation_prompt only appends."
        )
    end = processor.tokenizer.eos_token
    # Templates put a newline behind the end of turn, which nobody needs.
    response = THOUGHT.sub("", text[len(prompt) :]).rstrip()
    return response if response.endswith(end) else response + end


def response_tokens(tokenizer, prompts: list[str], responses: list[str]) -> list[list[int]]:
    """What the LLM has to write behind each prompt, whose tokens it has read, to have said the response.

    These are the tokens of the whole conversation behind those of the prompt: a response that is tokenised by itself
    may begin otherwise (`▁the` instead of `the`). Where a token would lie across the border, which no LLM can write
    that has read the prompt to its end, [`BREAK`] keeps the two apart; with a slow tokenizer, which cannot be told to
    leave that out, the response is tokenised by itself.

    Raises:
        ValueError: a response without tokens.
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False).input_ids

    found = []
    whole = ids_of([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    for prompt, response, before, ids in zip(prompts, responses, ids_of(prompts), whole, strict=True):
        if ids[: len(before)] == before:
            found.append(ids[len(before) :])
        elif tokenizer.is_fast:
            found.append(ids_of([prompt + BREAK + response])[0][len(before) :])
        else:
            found += ids_of([response])
    if not all(found):
        raise ValueError(f"the response {responses[found.index([])]!r} has no tokens; nothing would be learned.")
    return found


@dataclass
class SpeechResponseCollator:
    """Rows with `instruction`, `response` and a clip → `input_ids`, `attention_mask`, `labels` `(batch, length)` int64,
    right-padded, and the audio inputs of the model.

    The clip is `audio` (decoded here) or, with a store, `audio_key` (its features are read there). A row whose clip is
    None has its `transcript` in the slot. A batch without any clip has no audio inputs.

    Args:
        processor: of the LSM.
        store: of the clips' features.
        teacher: add the same rows as the text LLM reads them, each with its transcript in the slot, as
            `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels`.
        response_tasks: rows of these tasks are learned without a teacher. In a batch that has some, the teacher reads
            the others alone, which `teacher_rows` `(batch,)` bool names.
    """

    processor: LsmProcessor
    store: AudioFeatureStore | None = None
    teacher: bool = False
    response_tasks: Collection[str] = ()

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        heard = [row["audio" if self.store is None else "audio_key"] is not None for row in rows]
        audio, num_samples = self._audio([row for row, hears in zip(rows, heard, strict=True) if hears])
        spoken = [render_prompt(self.processor, row) for row in rows]
        responses = [render_response(self.processor, row, prompt) for row, prompt in zip(rows, spoken, strict=True)]
        read = [render_prompt(self.processor, row, "transcript") if self.teacher or not hears else None
                for row, hears in zip(rows, heard, strict=True)]  # fmt: skip
        prompts = [speech if hears else text for speech, text, hears in zip(spoken, read, heard, strict=True)]
        # Once, for all who learn: what the teacher says is compared token by token.
        answers = response_tokens(self.processor.tokenizer, spoken, responses)
        batch = self._pad(self.processor.expand_audio_tokens(prompts, num_samples), answers)
        if self.teacher:
            taught = [row.get("task") not in self.response_tasks for row in rows]
            batch |= {f"teacher_{name}": value for name, value in self._taught(read, answers, taught).items()}
        return {**batch, **audio}

    def _taught(self, prompts: list[str], answers: list[list[int]], taught: list[bool]) -> dict[str, torch.Tensor]:
        """What the teacher reads. One row it always reads, if for no label: processes that hold parts of one LLM must
        call it equally often, whatever their batches hold."""
        read = taught if any(taught) else [True, *taught[1:]]
        batch = self._pad(list(compress(prompts, read)), list(compress(answers, read)))
        if not any(taught):
            batch["labels"].fill_(-100)
        return batch if all(taught) else {**batch, "rows": torch.tensor(taught)}

    def _pad(self, prompts: list[str], answers: list[list[int]]) -> dict[str, torch.Tensor]:
        """Prompts, each followed by the tokens of its answer, as a batch."""
        tokenizer = self.processor.tokenizer
        prompt_ids = tokenizer(prompts, add_special_tokens=False).input_ids
        pairs = list(zip(prompt_ids, answers, strict=True))
        batch = tokenizer.pad(
            {"input_ids": [prompt + answer for prompt, answer in pairs]}, padding_side="right", return_tensors="pt"
        )
        length = batch["input_ids"].shape[1]
        labels = [[-100] * len(prompt) + answer for prompt, answer in pairs]
        batch["labels"] = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
        return dict(batch)

    def _audio(self, rows: list[dict]) -> tuple[dict[str, torch.Tensor], list[int]]:
        if not rows:
            return {}, []
        if self.store is not None:
            keys = [row["audio_key"] for row in rows]
            return self.store.batch(keys), [self.store.num_samples(key) for key in keys]
        clips = [load_clip(row, "learned from") for row in rows]
        features = self.processor.audio_features(clips)
        return {name: torch.from_numpy(value) for name, value in features.items()}, [len(clip) for clip in clips]
