"""Processor of an LSM, which turns prompts and audio into model inputs.

All prompts have the same layout, from the chat template and [`LsmProcessor.conversation`]. The prompt of the teacher
has the transcript where that of the student has the audio; there is no other difference. Self-powered data needs this
("Self-Powered LLM Modality Expansion for Large Speech-Text Models", arXiv 2410.03798).

The texts of a conversation contain no special tokens: `<|audio|>` or `</s>` in a transcript is read as plain text, and
only the chat template adds special tokens. For this, `apply_chat_template` puts a zero-width character, [`BREAK`], into
such names, so that no tokenizer recognises them. Fast tokenizers then remove this character, so that the tokens are
those of the plain text; with slow tokenizers, the LLM also reads the character. Because it is in the prompt itself, all
programs that tokenise the prompt (teacher, student, server, pipeline) read the same text, with correct offsets. Special
tokens of a single character cannot be broken and are not changed.
"""

import datetime
import hashlib
import http.client
import inspect
import io
import os
import re
import urllib.request

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs, TextKwargs

try:
    import soundfile
    import soxr
except ImportError:  # only needed for files and for audio at another rate
    soundfile = soxr = None

try:
    from .configuration_lsm import LsmConfig, num_audio_tokens, num_encoder_frames, num_mel_frames, validate_windowing
except ImportError:
    from configuration_lsm import LsmConfig, num_audio_tokens, num_encoder_frames, num_mel_frames, validate_windowing

AUDIO_TOKEN = "<|audio|>"
FILES = (str, os.PathLike, bytes, bytearray, memoryview)  # types of audio files, besides open files
BREAK = "\u2060"  # word joiner
TEXTS = ("content", "reasoning_content", "text")  # keys of texts in messages and their parts
FEATURES = ("input_features", "input_features_mask")
URL_TIMEOUT = 60  # seconds
# The largest float sample, 24 dB above full scale: loud recordings and resampling stay far below it, and samples in
# 16-bit scale are far above it, except silence.
LOUDEST = 16.0

# Defaults of the variables that templates use besides the messages. Prompts must not depend on the day when they are
# rendered, because a set is built, used for training and evaluated on different days. The date is Llama's default.
TEMPLATE_SETTINGS = {"enable_thinking": False, "date": "2024-07-26"}
_PINNED = "{#- template settings, as LsmProcessor has them -#}\n"
_STRFTIME = ("%-d", "%-m", *(f"%{code}" for code in "aAbBdeFHIjmMpSTyY"))


def load_audio(source, sampling_rate: int | None = None, target_rate: int = 16_000) -> np.ndarray:
    """Read a clip from any of these sources.

    Args:
        source: a waveform (numpy array, list or torch tensor; `(samples,)`, `(samples, channels)` or
            `(channels, samples)`), a path, an `http(s)` URL, a data URI, the bytes of a file, a file opened in binary
            mode (read from its beginning), or a `datasets` audio value (`{"array", "sampling_rate"}`,
            `{"bytes", "path"}` or torchcodec's `AudioDecoder`). Float samples are in [-1, 1]. Integers are PCM with 8,
            16 or 32 bits, according to their type. If integers of a wider type all fit into 16 bits, they are 16-bit
            samples, so that a list is read like an int16 array with the same samples.
        sampling_rate: rate of a waveform in Hz, `target_rate` if None. Files contain their own rate.
        target_rate: rate of the result in Hz.

    Returns:
        `(samples,)` float32 at `target_rate`, with averaged channels and integers scaled to [-1, 1].

    Raises:
        ValueError: the audio cannot be read, is empty, has NaN or infinite samples, or samples of another scale.
        ImportError: soundfile or soxr is needed and not installed.
    """
    if isinstance(source, dict):
        if source.get("array") is not None:
            source, sampling_rate = source["array"], source.get("sampling_rate", sampling_rate)
        else:
            source = next((source[key] for key in ("bytes", "path") if source.get(key) is not None), source)
    if isinstance(source, FILES) or hasattr(source, "read") or hasattr(source, "get_all_samples"):
        waveform, sampling_rate = _decode(source)
    else:
        waveform = _to_array(source)
    waveform = _to_mono_float(waveform)
    if sampling_rate is not None and sampling_rate != target_rate:
        if sampling_rate <= 0:
            raise ValueError(f"The sampling rate must be positive, got {sampling_rate} Hz.")
        _require(soxr, "soxr", "to resample audio")
        waveform = soxr.resample(waveform, sampling_rate, target_rate)
        if waveform.size == 0:
            raise ValueError("The audio is empty: it has no samples after resampling.")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def _require(module, name: str, purpose: str) -> None:
    if module is None:
        raise ImportError(f"{name} is needed {purpose}: pip install {name}")


def _decode(source) -> tuple[np.ndarray, int]:
    """Decode a source that is not a waveform, and return its samples and its rate in Hz."""
    try:
        if hasattr(source, "get_all_samples"):
            samples = source.get_all_samples()
            return _to_array(samples.data), samples.sample_rate
        _require(soundfile, "soundfile", "to read audio files")
        return soundfile.read(io.BytesIO(_content(source)), dtype="float32", always_2d=True)
    except FileNotFoundError:
        reason = "the file does not exist"
    except (OSError, RuntimeError, TypeError, ValueError, http.client.HTTPException) as error:
        # These attributes are preferred, because the message may contain the source, which can be megabytes.
        reason = str(getattr(error, "error_string", None) or getattr(error, "strerror", None) or error)
    raise ValueError(f"Cannot read {_name(source)} as audio: {reason.rstrip('.')}.")


def _content(source) -> bytes:
    """Return the bytes of a file."""
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        # The loader of transformers is not used, because it converts all audio to 16-bit samples.
        with urllib.request.urlopen(source, timeout=URL_TIMEOUT) as response:
            return response.read()
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return file.read()
    if not hasattr(source, "read"):
        return source
    if hasattr(source, "seekable") and source.seekable():
        source.seek(0)
    if isinstance(content := source.read(), str):
        raise ValueError("the file is open in text mode; open it in binary mode ('rb')")
    return content


def _name(source) -> str:
    """Return a name of a source for errors, which never contains its content."""
    if not isinstance(source, (str, os.PathLike)):
        return "the given bytes" if isinstance(source, FILES) else f"the given {type(source).__name__}"
    if str(source).startswith("data:"):
        return "the data URI"
    return str(source) if len(str(source)) <= 255 else f"{str(source)[:60]}... ({len(str(source))} characters)"


def _to_array(source) -> np.ndarray:
    if torch.is_tensor(source):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16
    try:
        array = np.asarray(source)
    except ValueError as error:
        raise ValueError(f"The audio is not a regular array: {error}") from error
    if array.dtype.kind not in "iuf":
        kind = f"a dict of {list(source)}" if isinstance(source, dict) else type(source).__name__
        raise ValueError(f"Audio must be numbers, a path, a URL, a file or its bytes; got {kind}.")
    return array


def _to_mono_float(waveform: np.ndarray) -> np.ndarray:
    if waveform.size == 0:
        raise ValueError("The audio is empty: it has no samples.")
    if waveform.ndim not in (1, 2):
        raise ValueError(f"A waveform has one or two axes (samples, channels), got shape {waveform.shape}.")
    if waveform.dtype.kind != "f":
        waveform = _from_pcm(waveform)
    if waveform.ndim == 2:
        waveform = waveform.mean(axis=int(waveform.shape[0] >= waveform.shape[1]))  # channels are the shorter axis
    with np.errstate(over="ignore"):  # the check below has a better message
        waveform = waveform.astype(np.float32)
    if not np.isfinite(waveform).all():
        raise ValueError("The audio has NaN or infinite samples.")
    if (loudest := np.abs(waveform).max()) > LOUDEST:
        raise ValueError(
            f"The audio has samples of up to {loudest:g}, but float samples are expected in [-1, 1]. Divide them by "
            "full scale (32768 for 16 bits), or give integers, whose type determines full scale."
        )
    return waveform


def _from_pcm(waveform: np.ndarray) -> np.ndarray:
    """Return integer samples as float64 in [-1, 1]."""
    kind, bits = waveform.dtype.kind, 8 * waveform.dtype.itemsize
    lowest, highest = int(waveform.min()), int(waveform.max())
    if bits > 16 and kind == "i":  # lists have no type, and computations widen it
        bits = 16 if lowest >= -(2**15) and highest < 2**15 else 32
    if bits > 32 or (kind == "u" and bits > 16) or not -(2**31) <= lowest <= highest < 2**31:
        raise ValueError(
            f"Samples of {lowest} to {highest} as {waveform.dtype} are not PCM; expected uint8, int16 or int32 "
            "samples, or floats in [-1, 1]."
        )
    full_scale = 2.0 ** (bits - 1)
    return waveform / full_scale - (kind == "u")  # unsigned PCM, as in 8-bit WAV, is centred on half its range


# Keywords of the tokenizer, and keywords of `apply_chat_template` for every template.
TEXT_KEYWORDS = {
    *TextKwargs.__annotations__,
    *(name for name in ProcessingKwargs.__annotations__ if not name.endswith("_kwargs")),
}
TEMPLATE_KEYWORDS = set(inspect.signature(ProcessorMixin.apply_chat_template).parameters) - {"tools", "documents"}


def special_tokens(tokenizer) -> re.Pattern:
    """Return a pattern that finds the names of a tokenizer's special tokens in a text."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names.update(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def as_text(text: str, special: re.Pattern) -> str:
    """Return the text with a [`BREAK`] in each special token that `special` finds."""
    while special.search(text):  # repeatedly, because names may overlap
        text = special.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
    return text


def leave_out_breaks(tokenizer) -> None:
    """Make a fast tokenizer ignore [`BREAK`]. It makes no token for it, and no token across it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    own = backend.pre_tokenizer
    state = "" if own is None else own.__getstate__().decode()
    if BREAK not in state:
        steps = [pre_tokenizers.Split(BREAK, "removed"), *([] if own is None else [own])]
        if "Metaspace" in state:  # it puts a space before each piece, so it must come first
            steps.reverse()
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)


class LsmProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    # The chat template has already added the special tokens; there must be no second BOS.
    _defaults = {"text_kwargs": {"padding": True, "add_special_tokens": False}}  # noqa: RUF012


class LsmProcessor(ProcessorMixin):
    """Turns prompts and audio into the inputs of [`LsmForConditionalGeneration`].

    Args:
        feature_extractor (`WhisperFeatureExtractor`): its `chunk_length` (30 s) is the largest length of a row of
            audio.
        tokenizer (`PreTrainedTokenizerBase`): the LLM's tokenizer, to which `audio_token` was added.
        chat_template (`str`, *optional*): renders text and audio parts, each audio part as `audio_token`; that of the
            tokenizer if absent. `language_models.tokenizers.speech_processor` makes one from an LLM's own template.
        audio_token (`str`): placeholder of a clip in the text, which is repeated once per speech token.
        window_frames, window_mode, queries_per_window, audio_padding: as in [`LsmConfig`].
        instruction_first (`bool`): whether the instruction precedes the speech.
        template_settings (`dict`, *optional*): values of the template's variables besides the messages, such as
            `{"enable_thinking": True}` or `{"tools": [...]}`, and `date` (`"2026-11-28"`), which replaces today's date.
            By default, thinking is disabled and the date is always the same. The values are written into the chat
            template, so that they apply wherever it is rendered. Keywords of `apply_chat_template` override them.

    Raises:
        ValueError: the tokenizer has no `audio_token` or no EOS token, the template has no `audio_token`, or a setting
            is invalid or not used by the template.
    """

    valid_processor_kwargs = LsmProcessorKwargs

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template=None,
        audio_token=AUDIO_TOKEN,
        window_frames=17,
        window_mode="fixed",
        queries_per_window=1,
        audio_padding="longest",
        instruction_first=True,
        template_settings=None,
    ):
        validate_windowing(window_frames, window_mode, queries_per_window, audio_padding)
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.get_vocab().get(audio_token)
        if self.audio_token_id is None:
            raise ValueError(f"The tokenizer has no token {audio_token!r}; add it first, as recipes/compose.py does.")
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no EOS token, so no answer could end; set `tokenizer.eos_token`.")
        self.window_frames = window_frames
        self.window_mode = window_mode
        self.queries_per_window = queries_per_window
        self.audio_padding = audio_padding
        self.instruction_first = instruction_first
        for key in ("is_local", "local_files_only", "name_or_path"):  # they describe this machine, but would be saved
            tokenizer.init_kwargs.pop(key, None)
        template = chat_template or tokenizer.chat_template or ""
        if audio_token not in template:
            raise ValueError(
                f"The chat template does not contain {audio_token}. language_models.tokenizers.speech_processor makes "
                "a processor from an LLM's own template."
            )
        template, self.template_settings = _pin(template, template_settings)
        tokenizer.chat_template = template
        leave_out_breaks(tokenizer)
        self._special = special_tokens(tokenizer)
        super().__init__(feature_extractor, tokenizer, chat_template=template)

    @property
    def template_hash(self) -> str:
        """Hash of the prompt layout with 16 hex digits. It depends on the chat template, on its settings (including the
        date, which is written into it), and on the order of instruction and speech, but not on the name of the audio
        token.

        Sets and checkpoints from before December 2026 have the same hash if the template has no settings. Otherwise,
        their prompts depended on the day or began with thinking, so they count as another layout.
        """
        template = self.chat_template.replace(self.audio_token, "<slot>")
        return hashlib.sha256(f"{template}\ninstruction_first={self.instruction_first}".encode()).hexdigest()[:16]

    def conversation(self, instruction: str, *, audio=None, transcript=None, response=None) -> list[dict]:
        """Return the messages of a question and its answer, for [`apply_chat_template`].

        Args:
            instruction: instruction about the speech; may be empty.
            audio: the clip, for the student: anything that `__call__` takes.
            transcript: the transcript, for the teacher, in the place of the clip.
            response: the answer, which becomes the assistant's message.

        Returns:
            A list of messages. Without audio and transcript, there is only the instruction.

        Raises:
            ValueError: both audio and transcript are given.
        """
        if audio is not None and transcript is not None:
            raise ValueError("Give the audio or the transcript, not both: they have the same place in the prompt.")
        alone = audio is None and transcript is None
        content = [{"type": "text", "text": instruction}] if instruction or alone else []
        if audio is not None:
            content.append({"type": "audio", "audio": audio})
        elif transcript is not None:
            content.append({"type": "text", "text": transcript})
        if not self.instruction_first:
            content.reverse()
        messages = [{"role": "user", "content": content}]
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return messages

    def apply_chat_template(
        self, conversation, *args, tokenize: bool = False, sampling_rate: int | None = None, **kwargs
    ):
        """Render a conversation as in transformers, but read special tokens in its texts as plain text.

        Args:
            conversation: list of messages, or list of such lists. Audio parts have anything that `__call__` takes under
                "audio", "url" or "path", which is only read if `tokenize=True`, and perhaps a "sampling_rate" in Hz.
            tokenize: whether to return model inputs instead of the prompt.
            sampling_rate: rate in Hz of waveforms without a "sampling_rate".
            args, kwargs: as in transformers; also variables of the template, and keywords of `__call__`.

        Raises:
            ValueError: the conversation is empty, its audio cannot be used, or neither the chat template nor `__call__`
                uses a keyword.
        """
        if not conversation:
            raise ValueError("The conversation is empty; expected a list of messages, or of such lists.")
        template = (args[0] if args else kwargs.get("chat_template")) or self.chat_template
        settings = dict(kwargs.pop("processor_kwargs", None) or {})
        for name in set(kwargs) - TEMPLATE_KEYWORDS:
            if not re.search(rf"\b{name}\b", template):  # not a variable of the template, so it is for `__call__`
                settings[name] = kwargs.pop(name)
        sampling_rate, kwargs["processor_kwargs"] = _keywords(sampling_rate, settings)
        batched = isinstance(conversation[0], (list, tuple))
        conversations = list(conversation) if batched else [conversation]
        conversations = [[self._as_text(message) for message in messages] for messages in conversations]
        if tokenize:
            conversations = [self._load_parts(messages, sampling_rate) for messages in conversations]
        return super().apply_chat_template(
            conversations if batched else conversations[0], *args, tokenize=tokenize, **kwargs
        )

    def as_text(self, text: str) -> str:
        """Return a text as `apply_chat_template` puts it into the prompt: unchanged, except for special tokens. This is
        only needed for texts that are compared with a prompt, or tokenised without one."""
        return as_text(text, self._special)

    def _as_text(self, message: dict) -> dict:
        """Return a message or part in which special tokens in texts are plain text."""
        items = ((key, value) for key, value in message.items() if key in TEXTS and isinstance(value, str))
        texts: dict = {key: self.as_text(value) for key, value in items}
        if isinstance(message.get("content"), (list, tuple)):
            texts["content"] = [self._as_text(part) for part in message["content"]]
        return message | texts

    def _load_parts(self, messages: list[dict], sampling_rate: int | None) -> list[dict]:
        """Return the messages with the waveforms of their audio parts, at the feature extractor's rate."""
        loaded = []
        for message in messages:
            if isinstance(message.get("content"), (list, tuple)):
                parts = [self._load_part(part, sampling_rate) for part in message["content"]]
                message = {**message, "content": parts}
            loaded.append(message)
        return loaded

    def _load_part(self, part: dict, sampling_rate: int | None) -> dict:
        if part.get("type") != "audio":
            return part
        source = next((part[key] for key in ("audio", "url", "path") if part.get(key) is not None), None)
        if source is None:
            raise ValueError('An audio part needs its clip under "audio", "url" or "path".')
        if _is_encoded(source):
            return {"type": "audio", "audio": _box(source)}
        sampling_rate = part.get("sampling_rate", sampling_rate)
        return {"type": "audio", "audio": load_audio(source, sampling_rate, self.feature_extractor.sampling_rate)}

    def __call__(self, text=None, audio=None, sampling_rate: int | None = None, **kwargs) -> BatchFeature:
        """Return the model inputs for prompts and their clips.

        Args:
            text: prompt or list of prompts from the chat template, with special tokens and one `audio_token` per clip.
                Without it, only the features of `audio` are returned.
            audio: clip or list of clips in prompt order, each anything that [`load_audio`] takes; a list of numbers is
                a single clip. A clip may also be the output of [`LsmModel.get_audio_features`], so that it is not
                encoded again for every question.
            sampling_rate: rate of waveforms in Hz, the feature extractor's (16 kHz) if None. Files contain their own.
            kwargs: keywords of the tokenizer as in [`ProcessorMixin`], such as `return_tensors="pt"` or
                `padding_side="left"`, also within `text_kwargs`. `audio_kwargs` may contain the `sampling_rate`.

        Returns:
            `input_ids` and `attention_mask` `(batch, length)`. With audio, also `input_features`
            `(chunks, mels, frames)` float32 and `input_features_mask` `(chunks, frames)` int64; clips of more than 30 s
            have several rows. With encoded clips, `audio_embeds` `(total_tokens, hidden)` instead.

        Raises:
            ValueError: the audio cannot be used, there is no prompt, the numbers of placeholders and clips differ, or a
                keyword would have no effect.
        """
        sampling_rate, kwargs = _keywords(sampling_rate, kwargs)
        clips = [] if audio is None else _as_clips(audio)
        encoded = sum(map(_is_encoded, clips))
        if encoded not in (0, len(clips)):
            raise ValueError(f"{encoded} of {len(clips)} clips are already encoded: encode all of them, or none.")
        rate = self.feature_extractor.sampling_rate
        clips = [_box(clip) if encoded else load_audio(clip, sampling_rate, rate) for clip in clips]
        if text is None:
            if encoded or not clips:
                raise ValueError("Neither `text` nor `audio` is given; give at least one of them.")
            if unused := set(kwargs) - {"return_tensors"}:
                raise ValueError(f"Without text, {_listed(unused)} would have no effect: leave it out, or give `text`.")
            return BatchFeature(self.audio_features(clips), tensor_type=kwargs.get("return_tensors"))
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("The batch is empty; expected at least one prompt.")
        self._check_placeholders(texts, len(clips))
        inputs = super().__call__(text=texts, audio=clips or None, **kwargs)
        if "text_replacement_offsets" in inputs and "input_features" in inputs:
            inputs.update(self._rows_of_clips([len(clip) for clip in clips], *map(inputs.get, FEATURES)))
        return inputs

    def _check_placeholders(self, texts: list[str], clips: int) -> None:
        placeholders = sum(text.count(self.audio_token) for text in texts)
        if placeholders != clips:
            raise ValueError(f"The text has {placeholders} {self.audio_token} placeholders for {clips} clips.")

    def chunk_lengths(self, num_samples: int) -> list[int]:
        """Return the numbers of samples of a clip's chunks, which are at most 30 s long."""
        longest = self.feature_extractor.n_samples
        return [min(longest, num_samples - start) for start in range(0, num_samples, longest)]

    def num_audio_tokens(self, num_samples: list[int]) -> list[int]:
        """Return the number of speech tokens of each clip of a batch, given the numbers of samples of the clips."""
        chunks = [self.chunk_lengths(length) for length in num_samples]
        hop = self.feature_extractor.hop_length
        counts = iter(
            num_audio_tokens(
                [num_encoder_frames(num_mel_frames(chunk, hop)) for clip in chunks for chunk in clip],
                window_frames=self.window_frames,
                window_mode=self.window_mode,
                queries_per_window=self.queries_per_window,
            )
        )
        return [sum(next(counts) for _ in clip) for clip in chunks]

    def expand_audio_tokens(self, texts: list[str], num_samples: list[int]) -> list[str]:
        """Repeat each placeholder once per speech token of its clip, as `__call__` does. This is for callers that store
        the audio tower's output and need no features.

        Args:
            texts: prompts.
            num_samples: numbers of samples of the clips at 16 kHz, in prompt order.

        Raises:
            ValueError: the numbers of placeholders and clips differ.
        """
        self._check_placeholders(texts, len(num_samples))
        counts = iter(self.num_audio_tokens(num_samples) if num_samples else [])
        expanded = []
        for text in texts:
            first, *rest = text.split(self.audio_token)
            expanded.append(first + "".join(self.audio_token * next(counts) + piece for piece in rest))
        return expanded

    def audio_features(self, clips: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the log-mel features of waveforms at the feature extractor's rate: `input_features`
        `(chunks, mels, frames)` float32 and `input_features_mask` `(chunks, frames)` int64.

        Each chunk is padded with silence on its own, so its features do not depend on the batch and are the same as
        Whisper's (those of the chunk padded to 30 s).
        """
        chunks = [chunk for clip in clips for chunk in np.split(clip, np.cumsum(self.chunk_lengths(len(clip)))[:-1])]
        hop = self.feature_extractor.hop_length
        lengths = [num_mel_frames(len(chunk), hop) for chunk in chunks]
        frames = self.feature_extractor.nb_max_frames if self.audio_padding == "max_length" else max(lengths)
        features = np.zeros((len(chunks), self.feature_extractor.feature_size, frames), dtype=np.float32)
        for row, (chunk, length) in enumerate(zip(chunks, lengths, strict=True)):
            padded = self.feature_extractor.n_samples
            if self.audio_padding == "longest":  # one window of silence; more would not change any frame
                padded = min(padded, length * hop + -(-self.feature_extractor.n_fft // hop) * hop)
            mel = self.feature_extractor(
                chunk, max_length=padded, sampling_rate=self.feature_extractor.sampling_rate, return_tensors="np"
            )["input_features"][0]
            kept = frames if self.audio_padding == "max_length" else length
            features[row, :, :kept] = mel[:, :kept]
        mask = (np.arange(frames) < np.array(lengths)[:, None]).astype(np.int64)
        return {"input_features": features, "input_features_mask": mask}

    def _rows_of_clips(self, num_samples: list[int], input_features, input_features_mask) -> dict[str, torch.Tensor]:
        """Return the features with a row for each clip, which has its chunks one after the other. vLLM needs this; it
        is recognised by `return_text_replacement_offsets`, with which it finds the clips in the prompt.

        Args:
            num_samples: numbers of samples of the clips.
            input_features, input_features_mask: features with a row for each chunk.

        Raises:
            ValueError: the clips have different lengths, and some have several chunks. vLLM would use only the first
                chunk of each clip.
        """
        chunks = [len(self.chunk_lengths(length)) for length in num_samples]
        features, mask = torch.as_tensor(input_features), torch.as_tensor(input_features_mask)
        if max(chunks) > 1 and len(set(num_samples)) > 1:
            raise ValueError(
                f"vLLM takes clips of more than {self.feature_extractor.chunk_length} s only if all clips of a prompt "
                "have the same length: put each into a prompt of its own, or cut them."
            )
        rows, mels = len(num_samples), features.shape[1]
        features = features.unflatten(0, (rows, -1)).transpose(1, 2).reshape(rows, mels, -1)
        return {"input_features": features, "input_features_mask": mask.reshape(rows, -1)}

    def _process_audio(self, audio, **kwargs):
        if audio[0].dtype == object:
            outputs = [_unbox(clip) for clip in audio]
            embeds = torch.cat([clip.pooler_output for clip in outputs])
            return {"audio_embeds": embeds}, [self.audio_token * int(clip.num_tokens.sum()) for clip in outputs]
        counts = self.num_audio_tokens([len(clip) for clip in audio])
        return self.audio_features(audio), [self.audio_token * count for count in counts]

    @property
    def model_input_names(self) -> list[str]:
        return list(dict.fromkeys([*super().model_input_names, "input_features_mask"]))


def _keywords(sampling_rate: int | None, keywords: dict) -> tuple[int | None, dict]:
    """Return the rate of waveforms and a flat dict of the tokenizer's keywords among the keywords of a call.

    Raises:
        ValueError: a keyword would have no effect, or has two values; the message names it.
    """
    either = {*TEXT_KEYWORDS, "sampling_rate"}
    nested = {"text_kwargs": TEXT_KEYWORDS, "audio_kwargs": {"sampling_rate"}, "common_kwargs": either}
    flat = {name: value for name, value in keywords.items() if name not in nested}
    groups = [({"sampling_rate": sampling_rate}, either), (flat, either)]
    values, unused = {}, set()
    for group, names in groups + [(keywords.get(name) or {}, names) for name, names in nested.items()]:
        for name, value in group.items():
            if value is not None and name not in names:
                unused.add(name)
            elif value is not None and values.setdefault(name, value) != value:
                raise ValueError(f"`{name}` has two values: {values[name]!r} and {value!r}.")
    if unused:
        raise ValueError(
            f"{_listed(unused)} would have no effect. An LSM takes `sampling_rate`, also within `audio_kwargs`, the "
            "keywords of its tokenizer, also within `text_kwargs`, and the variables of its chat template."
        )
    return values.pop("sampling_rate", None), values


def _listed(names) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _pin(template: str, settings: dict | None) -> tuple[str, dict]:
    """Return the template, preceded by the values of the settings that it uses, and these settings."""
    *_, template = template.rpartition(_PINNED)
    settings = TEMPLATE_SETTINGS | (settings or {})
    asked_for = set(re.findall(r"\w+", template.replace("strftime_now", "date")))
    for name in sorted(set(settings) - asked_for):
        if settings.pop(name) != TEMPLATE_SETTINGS.get(name):
            raise ValueError(f"The chat template does not use {name!r}; leave it out of `template_settings`.")
    lines = [
        _today(value)
        if name == "date"
        else f"{{%- if {name} is not defined or {name} is none %}}{{% set {name} = {value!r} %}}{{% endif -%}}\n"
        for name, value in sorted(settings.items())
    ]
    return ("".join(lines) + _PINNED if lines else "") + template, settings


def _today(date: str) -> str:
    """Return a macro that replaces `strftime_now` and always returns the same day, at midnight."""
    try:
        day = datetime.datetime.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`date` of `template_settings` is {date!r}; expected a day such as '2026-11-28'.") from error
    written = "".join(f" | replace('{code}', '{day.strftime(code)}')" for code in _STRFTIME)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{written} }}}}{{%- endmacro -%}}\n"


def _is_encoded(clip) -> bool:
    """Return whether a clip is an `LsmAudioOutput`. The fields are checked, because remote code has its own class."""
    return getattr(clip, "pooler_output", None) is not None and getattr(clip, "num_tokens", None) is not None


def _as_clips(audio) -> list:
    """Return the clips as a list. A list of numbers is a single clip."""
    if not isinstance(audio, (list, tuple)):
        return [_unbox(audio)]
    numbers = bool(audio) and np.isscalar(audio[0]) and not isinstance(audio[0], (str, bytes))
    return [audio] if numbers else [_unbox(clip) for clip in audio]


def _box(clip) -> np.ndarray:
    """Return an encoded clip in a 0-dimensional array, because transformers only takes arrays as audio."""
    boxed = np.empty((), dtype=object)
    boxed[()] = clip
    return boxed


def _unbox(clip):
    return clip.item() if isinstance(clip, np.ndarray) and clip.dtype == object and clip.ndim == 0 else clip


LsmProcessor.register_for_auto_class()
if not __package__:  # in a checkout (not remote code), `trust_remote_code` should not be needed
    AutoProcessor.register(LsmConfig, LsmProcessor, exist_ok=True)

__all__ = ["LsmProcessor", "as_text", "leave_out_breaks", "load_audio", "special_tokens"]
