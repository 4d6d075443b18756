"""Configuration of an LSM: a frozen Whisper encoder, a windowed Q-Former and a causal LLM.

Also the one place that turns a clip's length into a number of speech tokens; processor and model both call it.
Architecture: "Self-Powered LLM Modality Expansion for Large Speech-Text Models", arXiv 2410.03798.
"""

from collections.abc import Sequence
from typing import ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

WINDOW_MODES = ("fixed", "proportional")
AUDIO_PADDINGS = ("longest", "max_length")

_AUTO_MAP = {
    "AutoConfig": "configuration_lsm.LsmConfig",
    "AutoModel": "modeling_lsm.LsmForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_lsm.LsmForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_lsm.LsmForConditionalGeneration",
    "AutoProcessor": "processing_lsm.LsmProcessor",
}


def num_mel_frames(num_samples: int, hop_length: int = 160) -> int:
    """Mel frames (100 per second) of a clip of `num_samples` samples; a partly filled hop counts."""
    return -(-num_samples // hop_length)


def num_encoder_frames(mel_frames: int) -> int:
    """Encoder frames (50 per second) of a clip of `mel_frames` mel frames: Whisper's second convolution halves them."""
    return (mel_frames + 1) // 2


def window_layout(encoder_frames: Sequence[int], window_frames: int, window_mode: str) -> tuple[int, list[int]]:
    """Cut the clips of a batch into windows.

    Args:
        encoder_frames: real encoder frames of every row (chunk of at most 30 s) of the batch.
        window_frames: length of a window in encoder frames, for `window_mode="fixed"`.
        window_mode: `"fixed"`, where a row's windows depend on that row alone and a last, partly filled window counts;
            or `"proportional"`, as in the original code, where the longest row T decides for all of them: windows of
            round(T / 90) frames, as many for each row as fit into T.

    Returns:
        The window length in encoder frames, and the number of windows of every row.
    """
    encoder_frames = list(encoder_frames)
    if not encoder_frames or min(encoder_frames) < 1:
        raise ValueError(f"Every row of audio needs at least one encoder frame, got lengths {encoder_frames}.")
    if window_mode == "fixed":
        return window_frames, [-(-frames // window_frames) for frames in encoder_frames]
    longest = max(encoder_frames)
    window = max(1, round(longest * 0.33333 / 30))  # the original code's constants, kept to round as it does
    return window, [longest // window] * len(encoder_frames)


def num_audio_tokens(
    encoder_frames: Sequence[int], *, window_frames: int, window_mode: str, queries_per_window: int
) -> list[int]:
    """Number of speech tokens that every row of a batch takes in the prompt. See [`window_layout`]."""
    _, windows = window_layout(encoder_frames, window_frames, window_mode)
    return [count * queries_per_window for count in windows]


def num_positions(text_config: PretrainedConfig) -> int | None:
    """Tokens that an LLM has positions for; None if its configuration does not say, as where there is no such limit.

    Rotary positions that are stretched (`linear`, `dynamic`, `yarn`) count as stretched: configurations keep the number
    from before. With `llama3` and `longrope` they have the number from after.
    """
    positions = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    factor, kind = rope.get("factor"), rope.get("rope_type")
    if positions is None or not factor or kind not in ("linear", "dynamic", "yarn"):
        return positions
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(positions, int(factor * (original or positions)))


def validate_windowing(window_frames: int, window_mode: str, queries_per_window: int, audio_padding: str) -> None:
    """Raise a `ValueError` that names the first setting that cannot be used."""
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
        audio_config (`WhisperConfig` or `dict`, *optional*): the Whisper checkpoint whose encoder is used.
        qformer_config (`Blip2QFormerConfig` or `dict`, *optional*): 2 layers, hidden size 768, 12 heads,
            cross-attention in every layer and no dropout, unless told otherwise. Its `encoder_hidden_size` is always
            set to the encoder's width.
        text_config (`PretrainedConfig` or `dict`, *optional*): any causal LLM; Llama's defaults if absent.
        window_frames (`int`, defaults to 17): encoder frames (20 ms each) per Q-Former window, 1/3 s.
        window_mode (`str`, defaults to `"fixed"`): `"fixed"` or `"proportional"`, see [`window_layout`].
        queries_per_window (`int`, defaults to 1): speech tokens per window.
        audio_padding (`str`, defaults to `"longest"`): `"longest"` pads to the longest clip of the batch and masks
            the padding; `"max_length"` pads with silence to Whisper's 30 s and attends to it, as Whisper was trained.
        pieces_per_token (`int`, defaults to 8): how many of the LLM's word pieces a speech token is read as, see
            [`LsmReader`]. 0 is the plain linear map of the paper and of the original code.
        non_text_token_ids (`list[int]`, *optional*): ids that speech is never read as: special tokens, and embeddings
            that no token has.
        projector_trained (`bool`, defaults to `False`): whether the projector has learned anything yet. If not,
            `recipes/sft.py` aligns it with the LLM before it trains it.
        audio_token_id (`int`, *optional*): id of the placeholder that speech embeddings replace.
        lm_head_bias (`bool`, defaults to `False`): whether the LLM's head has a bias (Phi-1, Phi-2).
        responder (`dict`, *optional*): which LLM is inside, `{"model", "revision", "template"}`: the id, the commit
            or content hash of its weights, and the hash of the prompt layout. Training compares it with the LLM that
            wrote the responses, since they must be the same for a set to be self-powered.
        sources (`dict`, *optional*): where encoder and LLM come from, `{"audio": source, "text": source}` with
            `{"model", "revision", "content"}` each: the Hub id or folder name, the commit or file hash, and the hash of
            the weights as they are inside. A checkpoint of the projector alone is joined to these weights.
        projector_only (`bool`, defaults to `False`): whether the checkpoint holds the projector alone.

    Raises:
        ValueError: for a setting that cannot be used; the message names it.
    """

    model_type = "lsm"
    sub_configs: ClassVar = {"audio_config": AutoConfig, "qformer_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        audio_config=None,
        qformer_config=None,
        text_config=None,
        window_frames=17,
        window_mode="fixed",
        queries_per_window=1,
        audio_padding="longest",
        pieces_per_token=8,
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
        self.audio_config = _sub_config("audio_config", audio_config, "whisper")
        qformer_defaults = {
            "num_hidden_layers": 2,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        self.qformer_config = _sub_config("qformer_config", qformer_config, "blip_2_qformer", qformer_defaults)
        for name, expected in {"audio_config": "whisper", "qformer_config": "blip_2_qformer"}.items():
            if getattr(self, name).model_type != expected:
                raise ValueError(f"`{name}` must be of type {expected!r}, got {getattr(self, name).model_type!r}.")
        self.qformer_config.encoder_hidden_size = self.audio_config.d_model
        self.text_config = _sub_config("text_config", text_config, "llama")
        self.window_frames = window_frames
        self.window_mode = window_mode
        self.queries_per_window = queries_per_window
        self.audio_padding = audio_padding
        if isinstance(pieces_per_token, bool) or not isinstance(pieces_per_token, int) or pieces_per_token < 0:
            raise ValueError(f"`pieces_per_token` must be an integer of 0 or more, got {pieces_per_token!r}.")
        self.pieces_per_token = pieces_per_token
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
        # Tying is decided at the top level in transformers, but it is the LLM's own property.
        kwargs["tie_word_embeddings"] = getattr(self.text_config, "tie_word_embeddings", False)
        # `register_for_auto_class` remembers one auto class only.
        kwargs["auto_map"] = kwargs.get("auto_map") or dict(_AUTO_MAP)
        super().__init__(**kwargs)

    @property
    def windowing(self) -> dict:
        """What [`num_audio_tokens`] wants to know besides the lengths."""
        return {name: getattr(self, name) for name in ("window_frames", "window_mode", "queries_per_window")}

    def seconds_that_fit(self, tokens: int) -> int:
        """Seconds of speech, rounded down, that take at most so many tokens in the prompt."""
        chunk = num_audio_tokens([1500], **self.windowing)[0]  # of 30 s
        return max(tokens, 0) * 30 // chunk

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, which would only warn of another family's configuration and go on with defaults."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the configuration of a {model_type!r} model, not of an LSM; recipes/compose.py makes an LSM "
                "of a Whisper and a causal LLM."
            )
        return super().from_dict(config_dict, **kwargs)


def _sub_config(name: str, config, model_type: str, defaults: dict | None = None) -> PretrainedConfig:
    """A sub-config from None, a dict or a config object; `model_type` and `defaults` fill what a dict leaves out."""
    if isinstance(config, PretrainedConfig):
        return config
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"`{name}` must be a dict or a PretrainedConfig, got {type(config).__name__}.")
    settings = {"model_type": model_type, **(defaults or {}), **(config or {})}
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"`{name}` has the unknown model_type {model_type!r}.")
    return CONFIG_MAPPING[model_type](**settings)


def _validate_keys(name: str, value: dict | None, keys: set[str]) -> dict | None:
    if value is not None and (not isinstance(value, dict) or set(value) != keys):
        raise ValueError(f"`{name}` must be None or a dict with the keys {sorted(keys)}, got {value!r}.")
    return value


LsmConfig.register_for_auto_class()
if not __package__:  # a checkout, not remote code: its own class needs no trust
    AutoConfig.register("lsm", LsmConfig, exist_ok=True)

__all__ = ["LsmConfig", "num_audio_tokens", "num_encoder_frames", "num_mel_frames", "num_positions", "window_layout"]
