"""Configuration of an LSM: a frozen Whisper encoder, a windowed Q-Former and a causal LLM.

The functions here also compute the number of speech tokens of a clip, for both the processor and the model.
Architecture: "Self-Powered LLM Modality Expansion for Large Speech-Text Models", arXiv 2410.03798.
"""

from collections.abc import Sequence
from typing import ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

WINDOW_MODES = ("fixed", "proportional")
AUDIO_PADDINGS = ("longest", "max_length")
READING_EMBEDDINGS = ("text", "audio")

_AUTO_MAP = {
    "AutoConfig": "configuration_lsm.LsmConfig",
    "AutoModel": "modeling_lsm.LsmForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_lsm.LsmForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_lsm.LsmForConditionalGeneration",
    "AutoProcessor": "processing_lsm.LsmProcessor",
}


def num_mel_frames(num_samples: int, hop_length: int = 160) -> int:
    """Return the number of mel frames (100 per second) of a clip of `num_samples` samples, rounded up."""
    return -(-num_samples // hop_length)


def num_encoder_frames(mel_frames: int) -> int:
    """Return the number of encoder frames (50 per second) of a clip of `mel_frames` mel frames. Whisper's second
    convolution halves their number."""
    return (mel_frames + 1) // 2


def window_layout(encoder_frames: Sequence[int], window_frames: int, window_mode: str) -> tuple[int, list[int]]:
    """Cut the clips of a batch into windows.

    Args:
        encoder_frames: number of real encoder frames of each row (a chunk of at most 30 s) of the batch.
        window_frames: length of a window in encoder frames, for `window_mode="fixed"`.
        window_mode: with `"fixed"`, the windows of a row depend only on the row, and the last one may be partly filled.
            With `"proportional"`, as in the original code, they depend on the length T of the longest row: windows have
            round(T / 90) frames, and each row has as many of them as fit into T.

    Returns:
        The length of a window in encoder frames, and the number of windows of each row.

    Raises:
        ValueError: there are no rows, or a row has no frames.
    """
    encoder_frames = list(encoder_frames)
    if not encoder_frames or min(encoder_frames) < 1:
        raise ValueError(f"Each row of audio needs at least one encoder frame, got lengths {encoder_frames}.")
    if window_mode == "fixed":
        return window_frames, [-(-frames // window_frames) for frames in encoder_frames]
    longest = max(encoder_frames)
    window = max(1, round(longest * 0.33333 / 30))  # the constants of the original code, for the same rounding
    return window, [longest // window] * len(encoder_frames)


def num_audio_tokens(
    encoder_frames: Sequence[int], *, window_frames: int, window_mode: str, queries_per_window: int
) -> list[int]:
    """Return the number of speech tokens of each row of a batch. Arguments and errors are as in [`window_layout`]."""
    _, windows = window_layout(encoder_frames, window_frames, window_mode)
    return [count * queries_per_window for count in windows]


def num_positions(text_config: PretrainedConfig) -> int | None:
    """Return the number of positions of an LLM; None if its configuration has none, for example without such a limit.

    For scaled rotary embeddings, this is the number after scaling. Configurations contain the number before scaling for
    the types `linear`, `dynamic` and `yarn`, and the number after scaling for `llama3` and `longrope`.
    """
    positions = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    factor, kind = rope.get("factor"), rope.get("rope_type")
    if positions is None or not factor or kind not in ("linear", "dynamic", "yarn"):
        return positions
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(positions, int(factor * (original or positions)))


def validate_windowing(window_frames: int, window_mode: str, queries_per_window: int, audio_padding: str) -> None:
    """Raise a `ValueError` that names the first invalid setting."""
    if window_mode not in WINDOW_MODES:
        raise ValueError(f"`window_mode` must be one of {WINDOW_MODES}, got {window_mode!r}.")
    if audio_padding not in AUDIO_PADDINGS:
        raise ValueError(f"`audio_padding` must be one of {AUDIO_PADDINGS}, got {audio_padding!r}.")
    for name, value in {"window_frames": window_frames, "queries_per_window": queries_per_window}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


class LsmConfig(PretrainedConfig):
    """Configuration of [`LsmForConditionalGeneration`].

    Args:
        audio_config (`WhisperConfig` or `dict`, *optional*): configuration of the Whisper checkpoint, of which only the
            encoder is used.
        qformer_config (`Blip2QFormerConfig` or `dict`, *optional*): configuration of the Q-Former. A dict replaces some
            of the defaults: 2 layers, hidden size 768, 12 heads, cross-attention in every layer and no dropout. Its
            `encoder_hidden_size` is always set to the encoder's width.
        text_config (`PretrainedConfig` or `dict`, *optional*): configuration of the causal LLM; that of Llama if
            absent.
        window_frames (`int`, defaults to 17): number of encoder frames (20 ms each) in a window; 17 are 1/3 s.
        context_frames (`int`, defaults to 0): number of encoder frames before and after its window that a speech token
            also sees. If it is not 0, the projector adds a learned position embedding to the frames of each window.
        window_mode (`str`, defaults to `"fixed"`): `"fixed"` or `"proportional"`, see [`window_layout`].
        queries_per_window (`int`, defaults to 1): number of speech tokens per window.
        audio_padding (`str`, defaults to `"longest"`): `"longest"` pads to the longest clip of the batch and masks
            the padding; `"max_length"` pads with silence to Whisper's 30 s and attends to it, as in Whisper's training.
        pieces_per_token (`int`, defaults to 8): number of the LLM's word pieces that a speech token is composed of, see
            [`LsmReader`]. With 0, there is only a linear map, as in the paper and the original code.
        reading_embeddings (`str`, defaults to `"text"`): the vectors of word pieces that speech is compared with:
            `"text"`, the LLM's input embeddings, or `"audio"`, those made of Whisper's decoder's, see
            [`reading_vectors`].
        non_text_token_ids (`list[int]`, *optional*): ids that no speech token is composed of: special tokens, and
            unused embeddings.
        projector_trained (`bool`, defaults to `False`): whether the projector was trained. If not, `recipes/sft.py`
            first aligns it with the LLM.
        audio_token_id (`int`, *optional*): id of the placeholder that speech embeddings replace.
        lm_head_bias (`bool`, defaults to `False`): whether the LLM's head has a bias (Phi-1, Phi-2).
        responder (`dict`, *optional*): the LLM, as `{"model", "revision", "template"}`: its id, the commit or content
            hash of its weights, and the hash of the prompt layout. In self-powered training, the responses must be from
            the same LLM, which is checked with this entry.
        sources (`dict`, *optional*): the checkpoints of encoder and LLM, as `{"audio": source, "text": source}`. A
            source is `{"model", "revision", "content"}`: the Hub id or folder name, the commit or file hash, and the
            hash of the weights inside the LSM. A checkpoint with only the projector is joined to these weights.
        projector_only (`bool`, defaults to `False`): whether the checkpoint contains only the projector.

    Raises:
        ValueError: a setting is invalid; the message names it.
    """

    model_type = "lsm"
    sub_configs: ClassVar = {"audio_config": AutoConfig, "qformer_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        audio_config=None,
        qformer_config=None,
        text_config=None,
        window_frames=17,
        context_frames=0,
        window_mode="fixed",
        queries_per_window=1,
        audio_padding="longest",
        pieces_per_token=8,
        reading_embeddings="text",
        non_text_token_ids=None,
        projector_trained=False,
        audio_token_id=None,
        lm_head_bias=False,
        responder=None,
        sources=None,
        projector_only=False,
        **kwargs,
    ):
        validate_windowing(window_frames, window_mode, queries_per_window, audio_padding)
        _validate_count("context_frames", context_frames)
        if context_frames and window_mode != "fixed":
            raise ValueError(f"`context_frames` {context_frames} needs windows of a fixed length; set it to 0.")
        _validate_count("pieces_per_token", pieces_per_token)
        if reading_embeddings not in READING_EMBEDDINGS[: 1 if pieces_per_token == 0 else 2]:
            raise ValueError(
                f"`reading_embeddings` must be one of {READING_EMBEDDINGS}, and 'text' if `pieces_per_token` is 0, got "
                f"{reading_embeddings!r}."
            )
        self.audio_config = _sub_config("audio_config", audio_config, "whisper")
        qformer_defaults = {
            "num_hidden_layers": 2,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        self.qformer_config = _sub_config("qformer_config", qformer_config, "blip_2_qformer", qformer_defaults)
        self.qformer_config.encoder_hidden_size = self.audio_config.d_model
        self.text_config = _sub_config("text_config", text_config, "llama", any_type=True)
        self.window_frames = window_frames
        self.context_frames = context_frames
        self.window_mode = window_mode
        self.queries_per_window = queries_per_window
        self.audio_padding = audio_padding
        self.pieces_per_token = pieces_per_token
        self.reading_embeddings = reading_embeddings
        self.non_text_token_ids = list(non_text_token_ids or ())
        self.projector_trained = projector_trained
        self.audio_token_id = audio_token_id
        self.lm_head_bias = lm_head_bias
        self.responder = _validate_keys("responder", responder, {"model", "revision", "template"})
        self.sources = _validate_keys("sources", sources, {"audio", "text"})
        for name, source in (sources or {}).items():
            _validate_keys(f"sources[{name!r}]", source, {"model", "revision", "content"})
        if projector_only and sources is None:
            raise ValueError("`projector_only` is True, so `sources` must say which encoder and LLM belong to it.")
        self.projector_only = projector_only

        vocab_size = getattr(self.text_config, "vocab_size", None)
        if audio_token_id is not None and vocab_size is not None and not 0 <= audio_token_id < vocab_size:
            raise ValueError(f"`audio_token_id` {audio_token_id} is outside of the LLM's {vocab_size} embeddings.")
        # In transformers, the top-level configuration determines tying, but it is a property of the LLM.
        kwargs["tie_word_embeddings"] = getattr(self.text_config, "tie_word_embeddings", False)
        # `register_for_auto_class` saves only one auto class.
        kwargs["auto_map"] = kwargs.get("auto_map") or dict(_AUTO_MAP)
        super().__init__(**kwargs)

    @property
    def reading_size(self) -> int:
        """Width of the projector's linear map: of the vectors that speech is compared with."""
        return self.audio_config.d_model if self.reading_embeddings == "audio" else self.text_config.hidden_size

    @property
    def windowing(self) -> dict:
        """The arguments of [`num_audio_tokens`] besides the lengths."""
        return {name: getattr(self, name) for name in ("window_frames", "window_mode", "queries_per_window")}

    def seconds_that_fit(self, tokens: int) -> int:
        """Return the number of seconds of speech, rounded down, that fit into `tokens` tokens of the prompt."""
        chunk = num_audio_tokens([1500], **self.windowing)[0]  # 30 s
        return max(tokens, 0) * 30 // chunk

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Create a configuration as in transformers, but raise ValueError if the model type is another. transformers
        would only warn and use defaults."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the configuration of a {model_type!r} model, not of an LSM; recipes/compose.py composes an "
                "LSM from a Whisper checkpoint and a causal LLM."
            )
        return super().from_dict(config_dict, **kwargs)


def _sub_config(
    name: str, config, model_type: str, defaults: dict | None = None, any_type: bool = False
) -> PretrainedConfig:
    """Return a sub-config from None, a dict or a config object. `model_type` and `defaults` complete a dict.

    Raises:
        ValueError: the sub-config is invalid, or of another type unless `any_type` is set.
    """
    if not isinstance(config, PretrainedConfig):
        if config is not None and not isinstance(config, dict):
            raise ValueError(f"`{name}` must be a dict or a PretrainedConfig, got {type(config).__name__}.")
        settings = {"model_type": model_type, **(defaults or {}), **(config or {})}
        if settings["model_type"] not in CONFIG_MAPPING:
            raise ValueError(f"`{name}` has the unknown model_type {settings['model_type']!r}.")
        config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    if config.model_type != model_type and not any_type:
        raise ValueError(f"`{name}` must be of type {model_type!r}, got {config.model_type!r}.")
    return config


def _validate_count(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"`{name}` must be an integer of 0 or more, got {value!r}.")


def _validate_keys(name: str, value: dict | None, keys: set[str]) -> dict | None:
    if value is not None and (not isinstance(value, dict) or set(value) != keys):
        raise ValueError(f"`{name}` must be None or a dict with the keys {sorted(keys)}, got {value!r}.")
    return value


LsmConfig.register_for_auto_class()
if not __package__:  # in a checkout (not remote code), `trust_remote_code` should not be needed
    AutoConfig.register("lsm", LsmConfig, exist_ok=True)

__all__ = ["LsmConfig", "num_audio_tokens", "num_encoder_frames", "num_mel_frames", "num_positions", "window_layout"]
