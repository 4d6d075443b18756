"""Put a Whisper and a causal LLM together into a fresh, Hub-ready LSM folder. Only the projector is new.

python -m recipes.compose \
    --audio openai/whisper-small \
    --text meta-llama/Llama-3.2-1B-Instruct \
    --output checkpoints/lsm
"""

import argparse
import logging

from language_models.tokenizers import parse_template_settings
from recipes.listening.composing import compose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", required=True, help="Hub id or folder of a Whisper checkpoint")
    parser.add_argument("--text", required=True, help="Hub id or folder of a causal LLM")
    parser.add_argument("--output", required=True, help="folder to write the LSM to")
    parser.add_argument("--window-frames", type=int, default=17, help="encoder frames (20 ms) per window")
    parser.add_argument(
        "--window-mode",
        default="fixed",
        choices=["fixed", "proportional"],
        help="proportional: windows as long as the original code has them, for its checkpoints",
    )
    parser.add_argument("--queries-per-window", type=int, default=1, help="speech tokens per window")
    parser.add_argument(
        "--audio-padding",
        default="longest",
        choices=["longest", "max_length"],
        help="pad clips to the longest of a batch, or all to 30 s",
    )
    parser.add_argument(
        "--pieces-per-token",
        type=int,
        default=8,
        help="number of word pieces whose embeddings a speech token is the mean of; 0 leaves the reader out",
    )
    parser.add_argument("--qformer-layers", type=int, default=2, help="layers of the Q-Former")
    parser.add_argument("--qformer-hidden", type=int, default=768, help="hidden size of the Q-Former")
    parser.add_argument("--qformer-heads", type=int, default=12, help="attention heads of the Q-Former")
    parser.add_argument(
        "--qformer-ffn", type=int, help="width of its feed-forward layers; four times the hidden size if absent"
    )
    parser.add_argument(
        "--instruction-first",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the instruction stands before the speech in a prompt",
    )
    parser.add_argument("--template-settings", help="""JSON for the chat template: '{"enable_thinking": true}'""")
    parser.add_argument("--dtype", default="auto", help="auto (the LLM's), float32, bfloat16 or float16")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's initial weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.template_settings = parse_template_settings(args.template_settings)
    model, _ = compose(**vars(args))
    parameters = sum(parameter.numel() for parameter in model.model.projector.parameters())
    print(f"Wrote {args.output}: {parameters / 1e6:.1f} M new parameters between {args.audio} and {args.text}.")


if __name__ == "__main__":
    main()
