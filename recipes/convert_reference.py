r"""Convert a checkpoint of the paper authors' code into an LSM folder.

python -m recipes.convert_reference \
    --checkpoint checkpoints/original \
    --tokenizer lmsys/vicuna-7b-v1.5 \
    --output checkpoints/lsm

The original pads all audio to 30 s, attends to the padding, and sets the window length of a batch by its longest clip.
The converted model does the same (`audio_padding="max_length"`, `window_mode="proportional"`) and has the same logits.
The original is the code of "Self-Powered LLM Modality Expansion for Large Speech-Text Models", arXiv 2410.03798.
"""

import json
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaConfig, WhisperConfig, WhisperFeatureExtractor

from configuration_lsm import LsmConfig
from language_models.command_line import parser_of
from language_models.generation import never_write
from language_models.identity import identify
from language_models.tokenizers import load_tokenizer
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN, LsmProcessor
from recipes.listening.composing import whole_checkpoint

logger = logging.getLogger(__name__)

# Names of tensors in the original code, and in an LSM.
RENAMED = [
    (r"whisper_model\.(.+)", r"model.audio_tower.\1"),
    (r"ln_speech\.(.+)", r"model.projector.layer_norm.\1"),
    (r"speech_query_tokens", r"model.projector.queries"),
    (r"speech_Qformer\.bert\.embeddings\.LayerNorm\.(.+)", r"model.projector.qformer.layernorm.\1"),
    (
        r"speech_Qformer\.bert\.(encoder\.layer\.\d+\.(?:cross)?attention)\.self\.(.+)",
        r"model.projector.qformer.\1.attention.\2",
    ),
    (r"speech_Qformer\.bert\.(encoder\.layer\.\d+\.(?:cross)?attention\.output\..+)", r"model.projector.qformer.\1"),
    (r"speech_Qformer\.bert\.(encoder\.layer\.\d+\.(?:intermediate|output)_query\..+)", r"model.projector.qformer.\1"),
    (r"speech_llama_proj\.(.+)", r"model.projector.linear.\1"),
    (r"llama_model\.model\.(.+)", r"model.language_model.\1"),
    (r"llama_model\.lm_head\.weight", r"lm_head.weight"),
]
UNUSED = [
    r"speech_Qformer\.cls\..+",
    r"speech_Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings|position_ids).*",
    r"speech_Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..+",  # for words; the queries have other layers
    r".+\.rotary_emb\.inv_freq",
]
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
SECONDS = 0.33333  # per window and per stride, in every checkpoint of the original code

# The original prompt. The response directly follows "ASSISTANT:" and ends with EOS.
CHAT_TEMPLATE = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. \n\n"
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if not loop.first %}{{ '\\nSPEECH:' }}{% endif %}"
    "{% if part['type'] == 'audio' %}{{ 'AUDIO_TOKEN' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT:' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('The original prompt has no place for the role ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
).replace("AUDIO_TOKEN", AUDIO_TOKEN)


def convert(checkpoint: str, output: str, tokenizer: str | None = None, qformer_heads: int = 12) -> list[str]:
    """Write the LSM of an original checkpoint to `output`.

    Args:
        checkpoint: folder with `config.json` and `pytorch_model*.bin` or `model*.safetensors`.
        output: folder to write.
        tokenizer: Hub id or folder of the LLM's tokenizer. Without it, no processor is written, and the placeholder
            gets a new last row of the embeddings.
        qformer_heads: attention heads of the Q-Former; the checkpoint does not contain this number.

    Returns:
        Names of the tensors that are dropped, because the original code never uses them.

    Raises:
        ValueError: the folder is not such a checkpoint. Names what is missing or unknown.
    """
    settings = _read_settings(Path(checkpoint))
    tensors, unused = _rename(_read_tensors(Path(checkpoint)))
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    rows = tensors[EMBEDDINGS[0]].shape[0]
    audio_token_id = rows if words is None else words.convert_tokens_to_ids(AUDIO_TOKEN)
    _add_rows(tensors, audio_token_id + 1 - rows)
    config = _config(settings, tensors, audio_token_id, qformer_heads)
    model = LsmForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors, dtype=config.dtype)
    eos_token_id = config.text_config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=config.text_config.bos_token_id, eos_token_id=eos_token_id)
    never_write(model.generation_config, audio_token_id, eos_token_id if words is None else words.pad_token_id)
    if words is not None:
        processor = _processor(config, words)
        model.config.responder = {**identify(checkpoint), "template": processor.template_hash}
    with whole_checkpoint(output) as partial:
        if words is not None:
            processor.save_pretrained(partial)
        model.save_pretrained(partial)
    return unused


def _read_settings(checkpoint: Path) -> dict:
    file = checkpoint / "config.json"
    if not file.is_file():
        raise ValueError(f"{checkpoint} has no config.json; expected a checkpoint folder of the original code.")
    settings = json.loads(file.read_text(encoding="utf-8"))
    if missing := {"whisper_config", "llama_config"} - settings.keys():
        raise ValueError(f"{file} has no {sorted(missing)}; expected a configuration of the original code's BlspModel.")
    for name in ("second_per_frame", "second_stride"):
        if settings.get(name, SECONDS) != SECONDS:
            raise ValueError(f"{file} sets {name} to {settings[name]}; only windows of {SECONDS} s can be converted.")
    return settings


def _read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of a checkpoint, sharded or not, without executing pickles."""
    files = sorted(checkpoint.glob("model*.safetensors")) or sorted(checkpoint.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{checkpoint} has no weights; expected model*.safetensors or pytorch_model*.bin.")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        pickled = file.suffix == ".bin"
        tensors |= torch.load(file, weights_only=True, mmap=True) if pickled else load_file(file)
    return tensors


def _rename(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors under the names of an LSM, and the original names of tensors that are never used.

    Raises:
        ValueError: a tensor is unknown, or one is missing.
    """
    renamed, unused, unknown = {}, [], []
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in UNUSED):
            unused.append(name)
            continue
        rule = next((rule for rule in RENAMED if re.fullmatch(rule[0], name)), None)
        if rule is None:
            unknown.append(name)
        else:
            renamed[re.sub(*rule, name)] = tensor
    if unknown:
        raise ValueError(f"{len(unknown)} tensors do not belong to the original code, such as {unknown[:3]}.")
    needed = ["model.projector.queries", *EMBEDDINGS]
    if missing := [name for name in needed if name not in renamed]:
        raise ValueError(f"The checkpoint lacks the tensors for {missing}; expected the whole model, not a part of it.")
    renamed[needed[0]] = renamed[needed[0]].squeeze(0)
    return renamed, unused


def _add_rows(tensors: dict[str, torch.Tensor], count: int) -> None:
    """Append rows of zeros to embeddings and head. They are never read (speech replaces the placeholder) or written."""
    if count > 0:
        for name in EMBEDDINGS:
            weight = tensors[name]
            tensors[name] = torch.cat([weight, weight.new_zeros(count, weight.shape[1])])


def _config(settings: dict, tensors: dict[str, torch.Tensor], audio_token_id: int, qformer_heads: int) -> LsmConfig:
    queries = tensors["model.projector.queries"]
    prefix = "model.projector.qformer.encoder.layer"
    layers = {name.removeprefix(prefix).split(".")[1] for name in tensors if name.startswith(prefix)}
    dtype = tensors[EMBEDDINGS[0]].dtype
    llama = {**settings["llama_config"], "vocab_size": tensors[EMBEDDINGS[0]].shape[0], "dtype": dtype}
    return LsmConfig(
        audio_config=WhisperConfig(**{**settings["whisper_config"], "dtype": dtype}),
        qformer_config={
            "num_hidden_layers": len(layers),
            "hidden_size": queries.shape[1],
            "num_attention_heads": qformer_heads,
            "intermediate_size": tensors[f"{prefix}.0.intermediate_query.dense.weight"].shape[0],
            "layer_norm_eps": 1e-12,  # as in BERT, which the original code copies
            "dtype": dtype,
        },
        text_config=LlamaConfig(**llama),
        window_mode="proportional",
        queries_per_window=queries.shape[0],
        audio_padding="max_length",
        pieces_per_token=0,
        projector_trained=True,
        audio_token_id=audio_token_id,
        dtype=dtype,
    )


def _processor(config: LsmConfig, tokenizer) -> LsmProcessor:
    return LsmProcessor(
        WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        window_mode=config.window_mode,
        queries_per_window=config.queries_per_window,
        audio_padding=config.audio_padding,
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder of the original checkpoint")
    parser.add_argument("--output", required=True, help="folder to write the LSM to")
    parser.add_argument("--tokenizer", help="Hub id or folder of the LLM's tokenizer, for the processor")
    parser.add_argument(
        "--qformer-heads",
        type=int,
        default=12,
        help="attention heads of the Q-Former, which the checkpoint does not contain; the original has 12",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    unused = convert(**vars(args))
    logger.info("%d tensors are dropped, because the original code never uses them:", len(unused))
    for name in unused:
        logger.info("  %s", name)
    print(f"Wrote {args.output}" + ("." if args.tokenizer else ", without a processor; give --tokenizer to write one."))


if __name__ == "__main__":
    main()
