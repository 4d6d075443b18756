"""One interface to every model that answers questions about speech:

- an LSM, with its own prompts;
- a speech LLM of transformers (such as Qwen2-Audio, Granite Speech, Audio Flamingo 3 and Voxtral), with the prompts of
  its documentation: the clip, then the instruction;
- a text LLM, which can only read transcripts.
"""

import base64
import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BatchFeature
from transformers.utils import is_mistral_common_available

from dataset_builders.corpora.audio import encode
from dataset_builders.responders.exchange import Reply
from language_models.checkpoints import load_config, load_processor, open_model
from language_models.decoding import greedy_rows
from language_models.generation import GREEDY, changed_decoding, read_answers
from language_models.tokenizers import make_room, text_processor
from processing_lsm import as_text, special_tokens
from recipes.listening.collator import render_prompt, render_response, response_tokens
from recipes.listening.features import AudioFeatureStore, audio_key, load_clip

SLOTS = ("audio", "silence", "transcript")  # what can be in the place of the speech
MARKS = ("\ue000", "\ue001")  # characters for private use, which no text has


class SpeechLLM:
    """A model and its processor. This class is for the speech LLMs of transformers.

    Rows are dicts with an `instruction` and, depending on `slot`, `audio` (`{"bytes", "path"}`, or anything that
    `load_audio` takes) or a `transcript`.
    """

    hears = True

    def __init__(self, model, processor, name: str = "model"):
        self.model, self.processor, self.name = model.eval(), processor, name
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        config = model.config
        self.audio_token_id = getattr(config, "audio_token_id", getattr(config, "audio_token_index", None))

    @cached_property
    def _special(self):
        return special_tokens(self.tokenizer)

    def as_text(self, text: str) -> str:
        """Return the text as [`LsmProcessor.as_text`] does. Other tokenizers read its zero-width character, too."""
        return as_text(text, self._special)

    def conversation(self, row: dict, slot: str) -> list[dict]:
        """Return the messages of a prompt, without the clip itself."""
        instruction = self.as_text(row["instruction"])
        if slot == "transcript":
            content = [{"type": "text", "text": f"{instruction}\n{self.as_text(row['transcript'])}"}]
        else:
            content = [{"type": "audio", "audio": ""}, {"type": "text", "text": instruction}]
        return [{"role": "user", "content": content}]

    def prompt(self, row: dict, slot: str = "audio") -> str:
        """Return the prompt up to the beginning of the answer, with one placeholder if there is a clip."""
        return self.processor.apply_chat_template(self.conversation(row, slot), add_generation_prompt=True)

    def response_ids(self, row: dict) -> list[int]:
        """Return the tokens of the row's `response` after its prompt, including the end of the answer."""
        response = self.as_text(row["response"]) + (self.tokenizer.eos_token or "")
        return self.tokenizer(response, add_special_tokens=False).input_ids

    def inputs(self, rows: Sequence[dict], slot: str = "audio", store: AudioFeatureStore | None = None) -> BatchFeature:
        """Return the model inputs of a batch of prompts, padded on the left.

        Args:
            rows: rows with what `slot` needs.
            slot: what is in the place of the speech: `audio`, `silence` (as long as the clip) or `transcript`.
            store: stored output of an LSM's audio tower; other models ignore it.
        """
        prompts = [self.prompt(row, slot) for row in rows]
        if slot == "transcript":
            return self.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        # Only the text is padded here, because some encoders need clips padded to 30 s.
        settings = {"text_kwargs": {"padding": True, "padding_side": "left"}, "return_tensors": "pt"}
        if hasattr(self.processor, "feature_extractor"):
            settings["audio_kwargs"] = {"sampling_rate": 16_000}
        inputs = self.processor(text=prompts, audio=self.clips(rows, slot), **settings)
        return inputs.to(self.model.dtype)  # only changes the features; not all encoders convert them

    def clips(self, rows: Sequence[dict], slot: str) -> list[np.ndarray]:
        """Return the waveforms of the clips, or silence of the same length, each `(samples,)` float32 at 16 kHz."""
        clips = [load_clip(row) for row in rows]
        return [np.zeros_like(clip) for clip in clips] if slot == "silence" else clips

    def spans(self, row: dict, slot: str) -> list[tuple[int, str]]:
        """Return the tokens of the prompt as `(token id, role)`. The roles are `instruction`, `speech` (also that of a
        transcript) and `template`; a clip is a single token.

        Raises:
            ValueError: the template changes the instruction or the transcript.
        """
        prompt = self.prompt(row, slot)
        fields = {"instruction": "instruction"} | ({"speech": "transcript"} if slot == "transcript" else {})
        texts = {role: row[field].strip() for role, field in fields.items()}
        # The texts are replaced by marks to find their positions, because their words may also occur elsewhere.
        marks = dict(zip(fields, MARKS, strict=False))
        filled = {field: row[field].replace(texts[role], marks[role], 1) for role, field in fields.items()}
        texts = {role: self.as_text(text) for role, text in texts.items()}
        rebuilt, covered = self.prompt(row | filled, slot), {}
        for role in sorted(fields, key=lambda role: rebuilt.find(marks[role])):
            start = rebuilt.find(marks[role])
            covered[role] = (start, start + len(texts[role]))
            rebuilt = rebuilt.replace(marks[role], texts[role])
        if rebuilt != prompt or any(start < 0 for start, _ in covered.values()):
            raise ValueError(f"the prompt {prompt!r} does not contain {texts} unchanged; change the chat template.")
        return [
            (token, "speech" if token == self.audio_token_id else _role_of(span, covered))
            for token, span in self._tokens(row, slot)
        ]

    def _tokens(self, row: dict, slot: str) -> list[tuple[int, tuple[int, int]]]:
        """Return the tokens of the prompt, each with the span of characters that it covers."""
        tokens = self.tokenizer(self.prompt(row, slot), add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(tokens.input_ids, tokens.offset_mapping, strict=True))

    def logits(self, inputs: dict, kept: torch.Tensor) -> torch.Tensor:
        """Return the logits `(batch, len(kept), vocabulary)` at these positions, without computing the others if the
        model supports it."""
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            return self.model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return self.model(**inputs, use_cache=False).logits[:, kept]

    @torch.inference_mode()
    def log_likelihoods(
        self, rows: Sequence[dict], slot: str = "audio", store: AudioFeatureStore | None = None, batch_size: int = 16
    ) -> list[tuple[float, int]]:
        """Return how likely each row's `response` is after its prompt: the sum of the log-likelihoods of its tokens
        (natural logarithms, without the end of the answer), and the number of these tokens.

        Args:
            rows: rows as in `inputs`, with a non-empty `response`.
            slot, store: as in `inputs`.
        """
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]["response"]))
        values: dict[int, tuple[float, int]] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            values |= zip(batch, self._log_likelihoods([rows[place] for place in batch], slot, store), strict=True)
        return [values[place] for place in range(len(rows))]

    def _log_likelihoods(self, rows: Sequence[dict], slot: str, store) -> list[tuple[float, int]]:
        inputs = self.inputs(rows, slot, store).to(self.model.device)
        end = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        ends = end if isinstance(end, list) else [end]
        responses = [[token for token in self.response_ids(row) if token not in ends] for row in rows]
        counts = torch.tensor([len(response) for response in responses])
        first, longest = inputs["input_ids"].shape[1], int(counts.max())
        ids = torch.tensor([[*ids, *[ends[0]] * (longest - len(ids))] for ids in responses]).to(self.model.device)
        real = (torch.arange(longest) < counts[:, None]).to(self.model.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], real.to(inputs["attention_mask"])], 1)
        if not self.hears:  # models that take audio count positions themselves
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        kept = torch.arange(first - 1, first + longest - 1, device=ids.device)
        logits = self.logits(inputs, kept).float()
        never = torch.tensor(self.model.generation_config.suppress_tokens or [], dtype=torch.long, device=ids.device)
        log_probs = logits.index_fill(-1, never, -torch.inf).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        sums = log_probs.masked_fill(~real, 0.0).sum(1).tolist()
        return list(zip(sums, counts.tolist(), strict=True))

    @torch.inference_mode()
    def respond(
        self,
        rows: Sequence[dict],
        slot: str = "audio",
        store: AudioFeatureStore | None = None,
        batch_size: int = 64,
        max_new_tokens: int = 48,
        allowed: Sequence[Sequence[str]] | None = None,
        progress: bool = True,
    ) -> list[Reply]:
        """Return greedy answers, in order.

        Args:
            rows, slot, store: as in `inputs`.
            batch_size: number of rows that are answered together.
            max_new_tokens: largest number of tokens of an answer; `allowed` overrides it.
            allowed: the possible answers for each row; decoding is greedy among their tokens.
            progress: whether to show a progress bar.

        Raises:
            ValueError: `slot` is unknown, or needs audio but the model is a text LLM.
        """
        if slot not in SLOTS:
            raise ValueError(f"{slot=} is unknown; expected one of {SLOTS}.")
        if slot != "transcript" and not self.hears:
            raise ValueError(f"{self.name} is a text LLM, which takes transcripts and no {slot}.")
        replies: dict[int, Reply] = {}
        tokens_of: dict[str, list[int]] = {}
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].get("transcript", "")))
        for start in tqdm(range(0, len(order), batch_size), desc="answers", unit="batch", disable=not progress):
            batch = order[start : start + batch_size]
            inputs = self.inputs([rows[index] for index in batch], slot, store)
            choices = None
            if allowed is not None:
                for index in batch:  # the end of the prompt may change its tokens, but is the same for all
                    for answer in set(allowed[index]) - set(tokens_of):
                        tokens_of[answer] = self.response_ids(rows[index] | {"response": answer})
                choices = [[tokens_of[answer] for answer in allowed[index]] for index in batch]
            replies |= zip(batch, self._generate(inputs, max_new_tokens, choices), strict=True)
        return [replies[index] for index in range(len(rows))]

    def _generate(self, inputs: BatchFeature, max_new_tokens: int, choices) -> list[Reply]:
        inputs = inputs.to(self.model.device)
        start = inputs["input_ids"].shape[1]
        settings = {**GREEDY, "max_new_tokens": max_new_tokens}
        end = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        ends = end if isinstance(end, list) else [end]
        if choices is not None:
            settings |= self._only(choices, start, ends)
        elif isinstance(self, Lsm) and not changed_decoding(self.model.generation_config):
            settings["custom_generate"] = greedy_rows  # other models may have state for each row
        output = self.model.generate(**inputs, **settings, pad_token_id=self.tokenizer.pad_token_id)[:, start:]
        finished = torch.isin(output, torch.tensor(ends, device=output.device)).any(dim=1).tolist()
        texts = read_answers(self.tokenizer, output.tolist())
        return [Reply(text, "stop" if done else "length") for text, done in zip(texts, finished, strict=True)]

    @staticmethod
    def _only(choices: Sequence[Sequence[list[int]]], start: int, ends: list[int]) -> dict:
        """Return settings of `generate` that restrict every row to the tokens of one of its choices."""
        tries = []
        for answers in choices:
            trie: dict = {}
            for ids in answers:
                node = trie
                for token in ids if ids[-1] in ends else [*ids, ends[0]]:
                    node = node.setdefault(token, {})
            tries.append(trie)

        def allowed(row: int, tokens: torch.Tensor) -> list[int]:
            node = tries[row]
            for token in tokens[start:].tolist():
                node = node.get(token, {})
            return list(node) or ends[:1]

        longest = max(_depth(trie) for trie in tries)
        return {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": longest}


class Lsm(SpeechLLM):
    """An LSM, with the prompts of `LsmProcessor.conversation`, and optionally with stored features."""

    def prompt(self, row: dict, slot: str = "audio") -> str:
        return render_prompt(self.processor, row, "transcript" if slot == "transcript" else "audio")

    def response_ids(self, row: dict) -> list[int]:
        prompt = self.prompt(row)
        return response_tokens(self.tokenizer, [prompt], [render_response(self.processor, row, prompt)])[0]

    def inputs(self, rows: Sequence[dict], slot: str = "audio", store: AudioFeatureStore | None = None) -> BatchFeature:
        prompts = [self.prompt(row, slot) for row in rows]
        settings = {"add_special_tokens": False, "padding_side": "left", "padding": True, "return_tensors": "pt"}
        if slot == "transcript":
            return self.tokenizer(prompts, **settings)
        keys = [audio_key(row["audio"]) for row in rows] if store is not None and slot == "audio" else []
        if keys and all(key in store for key in keys):
            prompts = self.processor.expand_audio_tokens(prompts, [store.num_samples(key) for key in keys])
            inputs = self.tokenizer(prompts, **settings)
            inputs.update(store.batch(keys))
            return inputs
        return self.processor(text=prompts, audio=self.clips(rows, slot), **settings)


class TextLLM(Lsm):
    """A text LLM, with the same prompts as an LSM composed of it. It can only read transcripts."""

    hears = False


class GraniteSpeech(SpeechLLM):
    """Granite Speech. Its template takes only text, so the placeholder is part of the text, as in its documentation."""

    def conversation(self, row: dict, slot: str) -> list[dict]:
        instruction = self.as_text(row["instruction"])
        if slot == "transcript":
            return [{"role": "user", "content": f"{instruction}\n{self.as_text(row['transcript'])}"}]
        return [{"role": "user", "content": f"{self.processor.audio_token}{instruction}"}]

    def prompt(self, row: dict, slot: str = "audio") -> str:
        return self.tokenizer.apply_chat_template(
            self.conversation(row, slot), add_generation_prompt=True, tokenize=False
        )


class Voxtral(SpeechLLM):
    """Voxtral. Its tokenizer (mistral-common's) turns messages into tokens without rendering text, so `prompt` decodes
    the tokens.

    Raises:
        ImportError: mistral-common is not installed.
    """

    def __init__(self, model, processor, name: str = "model"):
        if not is_mistral_common_available():
            raise ImportError(f"{name} is a Voxtral, which needs mistral-common; pip install mistral-common")
        super().__init__(model, processor, name)

    def as_text(self, text: str) -> str:
        return text  # this tokenizer reads no text as a special token

    def conversation(self, row: dict, slot: str, clip: np.ndarray | None = None) -> list[dict]:
        """Return the messages of a prompt with the clip or, if it is None, with 0.1 s of silence."""
        messages = super().conversation(row, slot)
        if slot != "transcript":
            file = encode(np.zeros(1600, np.float32) if clip is None else clip, subtype="FLOAT")
            data = f"data:audio/wav;base64,{base64.b64encode(file).decode()}"
            messages[0]["content"][0] = {"type": "audio", "base64": data}
        return messages

    def prompt(self, row: dict, slot: str = "audio") -> str:
        return b"".join(piece for _, piece in self._pieces(row, slot)).decode()

    def response_ids(self, row: dict) -> list[int]:
        return [*self.tokenizer(row["response"], add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def inputs(self, rows: Sequence[dict], slot: str = "audio", store: AudioFeatureStore | None = None) -> BatchFeature:
        clips = [None] * len(rows) if slot == "transcript" else self.clips(rows, slot)
        messages = [self.conversation(row, slot, clip) for row, clip in zip(rows, clips, strict=True)]
        return self.processor.apply_chat_template(messages).to(self.model.dtype)

    def _pieces(self, row: dict, slot: str) -> list[tuple[int, bytes]]:
        """Return the tokens of the prompt with their bytes; the clip is a single token."""
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        ids = self.tokenizer.apply_chat_template(self.conversation(row, slot), return_dict=False)
        words = self.tokenizer.tokenizer.instruct_tokenizer.tokenizer
        return [
            (token, words.id_to_byte_piece(token, SpecialTokenPolicy.KEEP))
            for token, before in zip(ids, [None, *ids], strict=False)
            if not token == before == self.audio_token_id
        ]

    def _tokens(self, row: dict, slot: str) -> list[tuple[int, tuple[int, int]]]:
        # Tokens consist of bytes, and a character may have several bytes.
        places = [place for place, char in enumerate(self.prompt(row, slot)) for _ in char.encode()]
        tokens, start = [], 0
        for token, piece in self._pieces(row, slot):
            end = start + len(piece)
            tokens.append((token, (places[start], places[end - 1] + 1)))
            start = end
        return tokens


FAMILIES: dict[str, type[SpeechLLM]] = {"lsm": Lsm, "granite_speech": GraniteSpeech, "voxtral": Voxtral}


def load(source: str | Path, dtype: str = "auto") -> SpeechLLM:
    """Load a model, on the GPU if there is one.

    Args:
        source: folder or Hub id of an LSM, a speech LLM or a text LLM, or of an adapter for one of them.
        dtype: data type of the weights; `"auto"` is the checkpoint's.
    """
    config = load_config(source, trust_remote_code=True)
    speech = any(hasattr(config, name) for name in ("audio_token_id", "audio_token_index"))
    family = FAMILIES.get(config.model_type, SpeechLLM) if speech else TextLLM
    # The families have different auto classes, but their checkpoints name the model class.
    auto = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    model = open_model(source, auto, trust_remote_code=True, dtype=dtype)
    if speech:
        processor = load_processor(source)
    else:
        processor = text_processor(source)
        make_room(model, processor.tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return family(model, processor, Path(source).name if Path(source).exists() else str(source))


def is_url(source: str | Path) -> bool:
    """Return whether a model is behind a server."""
    return str(source).startswith(("http://", "https://"))


def template_settings_of(source: str | Path) -> dict | None:
    """Return the template settings of an LSM, for a text LLM that is compared with it; None for other checkpoints."""
    if load_config(source, trust_remote_code=True).model_type != "lsm":
        return None
    return load_processor(source).template_settings


def _role_of(span: tuple[int, int], covered: dict[str, tuple[int, int]]) -> str:
    """Return the role of a token with this span of characters; it is the role of the token's last character."""
    for role, (start, end) in covered.items():
        if span[1] > start and span[1] <= end and span[0] < span[1]:
            return role
    return "template"


def _depth(trie: dict) -> int:
    return 1 + max(map(_depth, trie.values())) if trie else 0
