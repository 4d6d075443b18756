"""Compose an LSM from a Whisper encoder and a causal LLM. Only the projector is new."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.utils import cached_file

from configuration_lsm import READING_EMBEDDINGS, LsmConfig
from dataset_builders.files import partial_of
from language_models.checkpoints import adapter_of, load_config, open_model, refuse_missing
from language_models.generation import generation_settings
from language_models.identity import identify
from language_models.tokenizers import load_tokenizer, make_room, non_text_token_ids, speech_processor
from modeling_lsm import LsmForConditionalGeneration, LsmProjector, content_of, reading_vectors
from processing_lsm import LsmProcessor
from recipes.reporting.model_card import write_base_card

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
QFORMER_INITS = ("auto", "decoder", "random")
QUERY_SCALE = 0.2  # of the query, to which a layer that starts from the decoder adds what it reads from the speech
BLANK_SCALE = 0.3  # standard deviation of the blank around the mean of Whisper's words, in terms of theirs
# Nats by which a piece that is met exactly exceeds all others together, by `reading_embeddings`.
READING_MARGINS = {"text": 6.0, "audio": 1.0}


def compose(
    audio: str,
    text: str,
    output: str | None = None,
    *,
    window_frames: int = 17,
    context_frames: int = 0,
    window_mode: str = "fixed",
    queries_per_window: int = 1,
    audio_padding: str = "longest",
    pieces_per_token: int = 8,
    reading_embeddings: str = "auto",
    qformer_layers: int = 2,
    qformer_hidden: int | None = None,
    qformer_heads: int | None = None,
    qformer_ffn: int | None = None,
    qformer_init: str = "auto",
    instruction_first: bool = True,
    template_settings: dict | None = None,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
    weights: bool = True,
) -> tuple[LsmForConditionalGeneration, LsmProcessor]:
    """Build an LSM and its processor. The LLM's weights are moved into the LSM, not copied.

    Args:
        audio: Hub id or folder of a Whisper checkpoint, of which only the encoder is used.
        text: Hub id or folder of a causal LLM, of an adapter for one (which is merged), or of a vision-language model
            (of which only the LLM is used). If the tokenizer has no pad token, this is the EOS token. If it has no chat
            template, this is `DEFAULT_CHAT_TEMPLATE`, and if the template refuses system messages, `FOLD_SYSTEM` puts
            them into the first user message (`language_models/templates.py`).
        output: folder for model, processor, code and card; None to save nothing. It appears once it can be loaded.
        window_frames, context_frames, window_mode, queries_per_window, audio_padding, pieces_per_token: as in
            [`LsmConfig`].
        reading_embeddings: as in [`LsmConfig`]; `"auto"` is `"audio"` if the Whisper checkpoint has a decoder and a
            tokenizer.
        qformer_layers: number of layers of the Q-Former.
        qformer_hidden, qformer_heads: hidden size and attention heads of the Q-Former; those of Whisper if None.
        qformer_ffn: width of the Q-Former's feed-forward layers, four times its hidden size if None.
        qformer_init: initial weights of the Q-Former: `"decoder"`, the last layers of Whisper's decoder, see
            [`start_from_decoder`]; `"random"`, as in the paper; or `"auto"`, the decoder's if they have its size.
        instruction_first: whether the instruction precedes the speech in the prompt.
        template_settings: settings of the chat template, as in [`LsmProcessor`].
        dtype: data type of the whole model; `"auto"` is the LLM checkpoint's.
        seed: seed of the projector's initial weights.
        weights: False leaves the model on the meta device, without reading or downloading any weights.

    Raises:
        ValueError: the two models cannot be combined; the message says why.
    """
    if output is not None and not weights:
        raise ValueError(
            f"an LSM without weights cannot be saved to {output}; leave out `output`, or set `weights=True`."
        )
    _check_choice("qformer_init", qformer_init, QFORMER_INITS)
    _check_choice("reading_embeddings", reading_embeddings, ("auto", *READING_EMBEDDINGS))
    whisper, feature_extractor, llm, tokenizer = _load(audio, text, dtype, weights)
    audio_tokenizer = _audio_tokenizer(audio, whisper, reading_embeddings) if pieces_per_token else None
    qformer_hidden = qformer_hidden or whisper.config.d_model
    qformer_heads = qformer_heads or whisper.config.decoder_attention_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        audio_token_id = make_room(llm, tokenizer)
        config = LsmConfig(
            audio_config=whisper.config,
            qformer_config={
                "num_hidden_layers": qformer_layers,
                "hidden_size": qformer_hidden,
                "num_attention_heads": qformer_heads,
                "intermediate_size": qformer_ffn or 4 * qformer_hidden,
            },
            text_config=llm.config.get_text_config(),
            window_frames=window_frames,
            context_frames=context_frames,
            window_mode=window_mode,
            queries_per_window=queries_per_window,
            audio_padding=audio_padding,
            pieces_per_token=pieces_per_token,
            reading_embeddings="text" if audio_tokenizer is None else "audio",
            non_text_token_ids=non_text_token_ids(tokenizer, llm.get_input_embeddings().weight.shape[0]),
            audio_token_id=audio_token_id,
            lm_head_bias=llm.get_output_embeddings().bias is not None,
        )
        # Taken before the conversion, because `reading_vectors` needs them in the checkpoint's own data type.
        words = None if audio_tokenizer is None else whisper.decoder.embed_tokens.weight.detach()
        model = _assemble(config, whisper.to(llm.dtype), llm)
    if weights:
        _start(model, whisper, words, audio_tokenizer, tokenizer, qformer_init)
    processor = speech_processor(
        feature_extractor,
        tokenizer,
        window_frames=window_frames,
        window_mode=window_mode,
        queries_per_window=queries_per_window,
        audio_padding=audio_padding,
        instruction_first=instruction_first,
        template_settings=template_settings,
    )
    config.responder = {**identify(text), "template": processor.template_hash}
    if weights and adapter_of(text) is None:  # the LLM with a merged adapter exists only here
        config.sources = _sources(model, audio=audio, text=text)
    if output is not None:
        with whole_checkpoint(output) as partial:
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
            write_base_card(partial, audio, text, config)
    return model, processor


def _start(
    model: LsmForConditionalGeneration,
    whisper: WhisperModel,
    words: torch.Tensor | None,
    audio_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    qformer_init: str,
) -> None:
    """Set what is new in the LSM to its initial weights, as far as these are not random."""
    if words is not None:
        vectors = reading_vectors(words, audio_tokenizer, tokenizer, model.config).float()
        model.model.reading_embeddings.load_state_dict({"weight": vectors.to(model.dtype)}, assign=True)
    if qformer_init != "random":
        start_from_decoder(model.model.projector, whisper, required=qformer_init == "decoder")
    if model.config.pieces_per_token:
        start_reader(model)


@torch.no_grad()
def start_from_decoder(projector: LsmProjector, whisper: WhisperModel, required: bool) -> None:
    """Start the Q-Former from the last layers of Whisper's decoder, which has learned on far more speech than an
    alignment has what the encoder's frames say (`docs/real.md`).

    A layer of both attends to the encoder and has a feed-forward network. The keys, values and outputs of that
    attention, the network and the norm before it are copied. The decoder's queries and its attention to its own text
    ask for the next word after those before, which a window does not know: queries stay random, and self-attention
    starts as zero. The norm of the frames starts as nearly no change of the encoder's output, and if speech is compared
    with Whisper's words, the linear map starts as the decoder's last norm without its division.

    Raises:
        ValueError: `required`, and the decoder has other sizes or too few layers with weights.
    """
    qformer, decoder = projector.qformer, whisper.decoder
    ours, theirs, layers = qformer.config, decoder.config, qformer.encoder.layer
    sizes = {
        "--qformer-hidden": (ours.hidden_size, theirs.d_model),
        "--qformer-heads": (ours.num_attention_heads, theirs.decoder_attention_heads),
        "--qformer-ffn": (ours.intermediate_size, theirs.decoder_ffn_dim),
    }
    unlike = [f"{option} is {size}, not {known}" for option, (size, known) in sizes.items() if size != known]
    if len(layers) > len(decoder.layers):
        unlike.append(f"--qformer-layers is {len(layers)}, not at most {len(decoder.layers)}")
    if unlike and required:
        raise ValueError(
            f"the Q-Former cannot start from Whisper's decoder: {'; '.join(unlike)}. Give it these sizes, or "
            "--qformer-init random."
        )
    if unlike:
        logger.info("the Q-Former starts with random weights and not from Whisper's decoder: %s", "; ".join(unlike))
        return
    for layer, read in zip(layers, decoder.layers[-len(layers) :], strict=True):
        cross = layer.crossattention
        for new, old in (
            (cross.attention.key, read.encoder_attn.k_proj),
            (cross.attention.value, read.encoder_attn.v_proj),
            (cross.output.dense, read.encoder_attn.out_proj),
            (cross.output.LayerNorm, read.final_layer_norm),
            (layer.intermediate_query.dense, read.fc1),
            (layer.output_query.dense, read.fc2),
        ):
            new.weight.copy_(old.weight)
            if old.bias is None:  # of Whisper's keys, where it has no effect
                new.bias.zero_()
            else:
                new.bias.copy_(old.bias)
        layer.attention.output.dense.weight.zero_()
        layer.attention.output.dense.bias.zero_()
        layer.attention.output.LayerNorm.weight.fill_(QUERY_SCALE)
    last = whisper.encoder.layer_norm
    projector.layer_norm.weight.fill_((last.weight.float().square().mean() + last.bias.float().var()).sqrt())
    if projector.config.reading_embeddings == "audio":
        projector.linear.weight.copy_(torch.diag(decoder.layer_norm.weight))
        projector.linear.bias.copy_(decoder.layer_norm.bias)


@torch.no_grad()
def start_reader(model: LsmForConditionalGeneration) -> None:
    """Set the scale of the reader's cosines so that a speech token in the direction of a word piece is read as it, and
    the blank so that it is like any piece.

    With a scale s, that piece has the logit s, and the V others together have about ln V + s c, if c is the mean cosine
    of two pieces. The scale hardly changes at the learning rates of a projector: with 10, the right one of SmolLM2's
    49,000 pieces, whose mean cosine is 0.44, could never become likely.
    """
    vectors, reader = model.model.get_reading_embeddings().weight.float(), model.model.projector.reader
    text = torch.ones(len(vectors), dtype=torch.bool)
    text[model.config.non_text_token_ids] = False
    directions = torch.nn.functional.normalize(vectors[text], dim=-1)
    pieces = len(directions)
    cosine = (float(directions.sum(0).square().sum()) - pieces) / (pieces * (pieces - 1))
    reader.scale.fill_((math.log(pieces) + READING_MARGINS[model.config.reading_embeddings]) / (1 - cosine))
    if model.config.reading_embeddings == "audio":  # the blank is random, and pieces are in one half of the space
        reader.blank.mul_(BLANK_SCALE * vectors[text].std(0)).add_(vectors[text].mean(0))


@contextlib.contextmanager
def whole_checkpoint(output: str | Path) -> Iterator[Path]:
    """Yield a folder to write an LSM to. It becomes `output` once it can be loaded, and is deleted after an error."""
    output = Path(output).resolve()
    partial = partial_of(output)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        LsmForConditionalGeneration.from_pretrained(partial, device_map="meta")  # checks keys and shapes
        output.mkdir(exist_ok=True)
        for stale in output.glob("model*.safetensors*"):  # they might be loaded instead of the new ones
            stale.unlink()
        for file in partial.iterdir():
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(audio: str, text: str, dtype: str | torch.dtype, weights: bool) -> tuple:
    """Load encoder, feature extractor, LLM and tokenizer, and check that they fit together."""
    text_config = load_config(text)
    _check_llm(text, text_config)
    tokenizer, settings = load_tokenizer(text), generation_settings(text)
    if weights:
        llm = open_model(text, dtype=dtype, run=False, generation_config=settings)
        whisper, loaded = WhisperModel.from_pretrained(audio, dtype="auto", output_loading_info=True)
        refuse_missing(audio, {key for key in loaded["missing_keys"] if key.startswith("encoder.")})
        # transformers makes what is missing of random numbers.
        if any(key.startswith("decoder.layers.") for key in loaded["missing_keys"]):
            del whisper.decoder.layers[:]
        if "decoder.embed_tokens.weight" in loaded["missing_keys"]:
            whisper.decoder.embed_tokens = None
    else:
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(text_config, **({} if dtype == "auto" else {"dtype": dtype}))
            whisper = WhisperModel(WhisperConfig.from_pretrained(audio))
    feature_extractor = WhisperFeatureExtractor.from_pretrained(audio)
    _check_parts(whisper, feature_extractor, llm)
    return whisper, feature_extractor, llm, tokenizer


def _sources(model: LsmForConditionalGeneration, **checkpoints: str) -> dict[str, dict]:
    """Return where the frozen weights of each part come from, for `LsmConfig.sources`."""
    state = model.state_dict()
    return {
        part: {**identify(name), "content": content_of(state, part, model.dtype)} for part, name in checkpoints.items()
    }


def _audio_tokenizer(audio: str, whisper: WhisperModel, reading_embeddings: str) -> PreTrainedTokenizerBase | None:
    """Return Whisper's tokenizer if speech is compared with Whisper's words, otherwise None.

    Raises:
        ValueError: it should be, but the checkpoint has no tokenizer or no decoder.
    """
    if reading_embeddings == "text":
        return None
    files = [cached_file(audio, name, _raise_exceptions_for_missing_entries=False) for name in TOKENIZER_FILES]
    lacking = ["tokenizer"] * (not any(files)) + ["decoder"] * (whisper.decoder.embed_tokens is None)
    if not lacking:
        return AutoTokenizer.from_pretrained(audio)
    problem = f"{audio} has no {' and no '.join(lacking)}"
    if reading_embeddings == "audio":
        raise ValueError(f"{problem}, which --reading-embeddings audio needs; give --reading-embeddings text.")
    logger.info("speech is compared with the LLM's embeddings, because %s", problem)
    return None


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; expected one of {', '.join(known)}.")


def _check_llm(text: str, config) -> None:
    if config.model_type == LsmConfig.model_type:
        raise ValueError(f"{text} is already an LSM, or an adapter for one; name the LLM that it was composed of.")
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise ValueError(
            f"{text} is quantised ({method}), but an LSM needs the original weights: name the checkpoint that it was "
            "quantised from. `recipes.sft --llm qlora` keeps the LLM in 4 bits during the training."
        )


def _check_parts(whisper: WhisperModel, feature_extractor: WhisperFeatureExtractor, llm: PreTrainedModel) -> None:
    mels, frames = whisper.config.num_mel_bins, 2 * whisper.config.max_source_positions
    if feature_extractor.feature_size != mels:
        raise ValueError(
            f"The encoder takes {mels} mels, but its feature extractor returns {feature_extractor.feature_size}."
        )
    if feature_extractor.nb_max_frames > frames:
        raise ValueError(
            f"The encoder takes {frames} frames, but its feature extractor cuts audio into chunks of "
            f"{feature_extractor.nb_max_frames}; lower its `chunk_length`."
        )
    head, text_config = llm.get_output_embeddings(), llm.config.get_text_config()
    if head is None or (head.in_features, head.out_features) != (text_config.hidden_size, text_config.vocab_size):
        raise ValueError(f"{type(llm).__name__} has no linear head from hidden states to vocabulary; use another LLM.")


def _assemble(config: LsmConfig, whisper: WhisperModel, llm: PreTrainedModel) -> LsmForConditionalGeneration:
    """Return an LSM made of the given modules, without copying them; only the projector is new."""
    config.dtype = llm.dtype
    for name in config.sub_configs:
        sub_config = getattr(config, name)
        sub_config.dtype = llm.dtype
        sub_config._name_or_path = ""  # a local folder's path would end up in a published config
    with torch.device("meta"):
        model = LsmForConditionalGeneration(config)
    tower = model.model.audio_tower
    tower.load_state_dict(whisper.encoder.state_dict(), assign=True)
    model.model.projector = LsmProjector(config).to(llm.dtype)
    model.model.language_model = llm.get_decoder()
    model.lm_head = llm.get_output_embeddings()
    model.generation_config = llm.generation_config
    return model.eval()
