"""The tokenizer of an LLM with the audio placeholder, and the processor that writes its prompts."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, WhisperFeatureExtractor
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available

from language_models.checkpoints import checkpoint_with
from language_models.generation import never_write
from language_models.templates import speech_template
from processing_lsm import AUDIO_TOKEN, LsmProcessor


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the LLM's tokenizer and add the audio placeholder, and EOS as pad token if there is none.

    Raises:
        ImportError: the tokenizer is a sentencepiece model, whose packages are not installed.
        ValueError: the tokenizer has no EOS token.
    """
    # Left padding is for generation. The training collator asks for right padding.
    source, revision = checkpoint_with("tokenizer_config.json", source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, padding_side="left")
    except (ImportError, ValueError) as error:  # this error names tiktoken, whatever is missing
        model = cached_file(source, "tokenizer.model", revision=revision, _raise_exceptions_for_missing_entries=False)
        if model is None or (is_sentencepiece_available() and is_protobuf_available()):
            raise
        raise ImportError(
            f"the tokenizer of {source} is a sentencepiece model; pip install sentencepiece protobuf"
        ) from error
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {source} has no EOS token to end an answer; set its `eos_token`.")
    tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_room(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make sure that the placeholder has an embedding, and return its id. An embedding is added only if the LLM has no
    unused one."""
    audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
    if audio_token_id >= llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # The new row is never read (speech replaces it) or written (it is suppressed), but its logit affects every
        # likelihood. Zeros make the likelihoods the same each time the model is loaded.
        with torch.no_grad():
            for embeddings in (llm.get_input_embeddings(), llm.get_output_embeddings()):
                embeddings.weight[audio_token_id:].zero_()
    never_write(llm.generation_config, audio_token_id, tokenizer.pad_token_id)
    return audio_token_id


def non_text_token_ids(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> list[int]:
    """Return the ids without text: those of special tokens, and those that no token uses."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = set(tokenizer.get_vocab().values()) - special - set(tokenizer.all_special_ids)
    return [id for id in range(embeddings) if id not in text]


def speech_processor(
    feature_extractor: WhisperFeatureExtractor,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    **settings,
) -> LsmProcessor:
    """Return the processor of an LSM, with the LLM's chat template, or another one, adapted to audio
    (`speech_template`). The tokenizer has the audio placeholder; `settings` are those of [`LsmProcessor`]."""
    template = speech_template(chat_template or tokenizer.chat_template, tokenizer)
    return LsmProcessor(feature_extractor, tokenizer, chat_template=template, **settings)


def text_processor(llm: str | Path, template_settings: dict | None = None) -> LsmProcessor:
    """Return the processor that an LSM composed of this LLM would have, which writes the same prompts."""
    return speech_processor(WhisperFeatureExtractor(), load_tokenizer(str(llm)), template_settings=template_settings)


def parse_template_settings(text: str | None) -> dict | None:
    """Parse the `template_settings` of [`LsmProcessor`] from the command line.

    Raises:
        ValueError: the text is not a JSON object.
    """
    try:
        settings = None if text is None else json.loads(text)
    except json.JSONDecodeError:
        settings = text
    if not isinstance(settings, dict | None):
        example = '{"enable_thinking": true}'
        raise ValueError(f"--template-settings {text} is not a JSON object; expected one such as '{example}'.")
    return settings
