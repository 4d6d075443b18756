r"""Compose an LSM from a Whisper encoder and a causal LLM, ready for the Hub. Only the projector is new.

    python -m recipes.compose --audio openai/whisper-small --text meta-llama/Llama-3.2-1B-Instruct --window-frames 8 \
        --output checkpoints/lsm
"""

import argparse
import logging

from configuration_lsm import READING_EMBEDDINGS
from language_models.command_line import parser_of
from language_models.tokenizers import parse_template_settings
from recipes.listening.composing import QFORMER_INITS, compose


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--audio", required=True, help="Hub id or folder of a Whisper checkpoint")
    parser.add_argument("--text", required=True, help="Hub id or folder of a causal LLM")
    parser.add_argument("--output", required=True, help="folder to write the LSM to")
    parser.add_argument(
        "--window-frames",
        type=int,
        default=17,
        help="encoder frames (20 ms) per window; 17 as in the paper, 8 for the alignment, which needs more tokens",
    )
    parser.add_argument(
        "--context-frames", type=int, default=0, help="encoder frames that a token sees before and behind its window"
    )
    parser.add_argument(
        "--window-mode",
        default="fixed",
        choices=["fixed", "proportional"],
        help="fixed: windows of --window-frames; proportional: windows as in the original code, for its checkpoints",
    )
    parser.add_argument("--queries-per-window", type=int, default=1, help="speech tokens per window")
    parser.add_argument(
        "--audio-padding",
        default="longest",
        choices=["longest", "max_length"],
        help="longest: pad clips to the longest of the batch; max_length: pad all clips to 30 s",
    )
    parser.add_argument(
        "--pieces-per-token",
        type=int,
        default=8,
        help="number of word pieces whose embeddings are averaged for a speech token; 0 leaves the reader out",
    )
    parser.add_argument(
        "--reading-embeddings",
        default="auto",
        choices=("auto", *READING_EMBEDDINGS),
        help="vectors of word pieces that speech is compared with: audio: those of Whisper's decoder; text: the LLM's; "
        "auto: audio if the Whisper checkpoint has a decoder and a tokenizer",
    )
    parser.add_argument("--qformer-layers", type=int, default=2, help="layers of the Q-Former")
    parser.add_argument("--qformer-hidden", type=int, help="hidden size of the Q-Former; that of Whisper by default")
    parser.add_argument(
        "--qformer-heads", type=int, help="attention heads of the Q-Former; those of Whisper by default"
    )
    parser.add_argument(
        "--qformer-ffn", type=int, help="width of the Q-Former's feed-forward layers; 4 × hidden size by default"
    )
    parser.add_argument(
        "--qformer-init",
        default="auto",
        choices=QFORMER_INITS,
        help="first weights of the Q-Former: decoder: the last layers of Whisper's decoder; random: as in the paper; "
        "auto: decoder if the Q-Former has its sizes",
    )
    parser.add_argument(
        "--instruction-first",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the instruction before the speech in a prompt",
    )
    parser.add_argument("--template-settings", help="""JSON for the chat template: '{"enable_thinking": true}'""")
    parser.add_argument("--dtype", default="auto", help="auto (the LLM's), float32, bfloat16 or float16")
    parser.add_argument("--seed", type=int, default=0, help="seed of the projector's initial weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.template_settings = parse_template_settings(args.template_settings)
    model, _ = compose(**vars(args))
    parameters = sum(parameter.numel() for parameter in model.model.projector.parameters())
    print(f"Wrote {args.output}: {parameters / 1e6:.1f} M new parameters between {args.audio} and {args.text}.")


if __name__ == "__main__":
    main()
