"""Collate rows of a self-powered set into a training batch, with labels on the response only."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import compress

import torch

from processing_lsm import BREAK, LsmProcessor
from recipes.listening.features import AudioFeatureStore, load_clip

THOUGHT = re.compile(r"\A\s*(<think>.*?</think>\s*)+", re.DOTALL)


def render_prompt(processor: LsmProcessor, row: dict, slot: str = "audio") -> str:
    """Render the prompt for a row's instruction, up to where the answer begins. The slot says what stands in the place
    of the speech: `audio` (one placeholder), or the row's `transcript`."""
    filling = {"audio": True} if slot == "audio" else {"transcript": row["transcript"]}
    messages = processor.conversation(row["instruction"], **filling)
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def render_response(processor: LsmProcessor, row: dict, prompt: str) -> str:
    """Render the row's response and the end of turn as they follow `prompt`.

    A thought (`<think>...</think>`) before the response is removed, whether it comes from the row or from the template,
    because it should not be learned.

    Raises:
        ValueError: the response is empty, or the conversation does not begin with the prompt of its chat template.
    """
    if not THOUGHT.sub("", row["response"]).strip():
        raise ValueError(f"row {row.get('id')!r} has an empty response; expected text to learn.")
    messages = processor.conversation(row["instruction"], audio=True, response=row["response"])
    text = processor.apply_chat_template(messages)
    if not text.startswith(prompt):
        raise ValueError(
            f"the chat template does not continue its own prompt: {text!r} does not begin with {prompt!r}; change the "
            "template so that add_generation_prompt only appends."
        )
    end = processor.tokenizer.eos_token
    # Some templates put a newline after the end of turn, which is not needed.
    response = THOUGHT.sub("", text[len(prompt) :]).rstrip()
    return response if response.endswith(end) else response + end


def response_tokens(tokenizer, prompts: list[str], responses: list[str]) -> list[list[int]]:
    """Return the tokens of each response, as the LLM has to write them after the tokens of its prompt.

    Prompt and response are tokenised together, because a response tokenised alone may begin with another token (`▁the`
    instead of `the`). If a token would span prompt and response, which the LLM cannot write after the complete prompt,
    [`BREAK`] separates them. A slow tokenizer cannot remove [`BREAK`], so there the response is tokenised alone.

    Raises:
        ValueError: a response has no tokens.
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False).input_ids

    tokens = []
    together = ids_of([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    for prompt, response, before, ids in zip(prompts, responses, ids_of(prompts), together, strict=True):
        if ids[: len(before)] == before:
            tokens.append(ids[len(before) :])
        elif tokenizer.is_fast:
            tokens.append(ids_of([prompt + BREAK + response])[0][len(before) :])
        else:
            tokens += ids_of([response])
    if not all(tokens):
        raise ValueError(f"the response {responses[tokens.index([])]!r} has no tokens; expected text to learn.")
    return tokens


@dataclass
class SpeechResponseCollator:
    """Makes a batch of rows with `instruction`, `response` and a clip: `input_ids`, `attention_mask` and `labels`
    `(batch, length)` int64, right-padded, and the audio inputs of the model.

    The clip is `audio` (decoded here) or, with a store, `audio_key` (whose features are read from the store). A row
    whose clip is None has its `transcript` in the place of the speech. A batch without clips has no audio inputs.

    Args:
        processor: the LSM's processor.
        store: store of the audio tower's output.
        teacher: add the same rows with the transcript in the place of the speech, as `teacher_input_ids`,
            `teacher_attention_mask` and `teacher_labels`.
        response_tasks: tasks whose rows are learned without a teacher. If a batch has such rows, the teacher's inputs
            have only the other rows, which are True in `teacher_rows` `(batch,)` bool.
    """

    processor: LsmProcessor
    store: AudioFeatureStore | None = None
    teacher: bool = False
    response_tasks: Collection[str] = ()

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        has_clip = [row["audio" if self.store is None else "audio_key"] is not None for row in rows]
        audio, num_samples = self._audio(list(compress(rows, has_clip)))
        speech_prompts = [render_prompt(self.processor, row) for row in rows]
        pairs = zip(rows, speech_prompts, strict=True)
        responses = [render_response(self.processor, row, prompt) for row, prompt in pairs]
        text_prompts = [render_prompt(self.processor, row, "transcript") if self.teacher or not clip else ""
                        for row, clip in zip(rows, has_clip, strict=True)]  # fmt: skip
        choices = zip(speech_prompts, text_prompts, has_clip, strict=True)
        prompts = [speech if clip else text for speech, text, clip in choices]
        # Teacher and student get the same tokens, because their predictions are compared token by token.
        answers = response_tokens(self.processor.tokenizer, speech_prompts, responses)
        batch = self._pad(self.processor.expand_audio_tokens(prompts, num_samples), answers)
        if self.teacher:
            taught = [row.get("task") not in self.response_tasks for row in rows]
            batch |= {f"teacher_{name}": value for name, value in self._taught(text_prompts, answers, taught).items()}
        return {**batch, **audio}

    def _taught(self, prompts: list[str], answers: list[list[int]], taught: list[bool]) -> dict[str, torch.Tensor]:
        """Return the teacher's inputs of the rows that it teaches. If there is no such row, the first one is used
        without labels, because processes that share the weights of an LLM must call it equally often."""
        used = taught if any(taught) else [True, *taught[1:]]
        batch = self._pad(list(compress(prompts, used)), list(compress(answers, used)))
        if not any(taught):
            batch["labels"].fill_(-100)
        return batch if all(taught) else {**batch, "rows": torch.tensor(taught)}

    def _pad(self, prompts: list[str], answers: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return a batch of the prompts, each followed by the tokens of its answer."""
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
