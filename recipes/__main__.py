"""All commands by short names: `lsm COMMAND`, which is `python -m recipes COMMAND`."""

import importlib
import sys

COMMANDS = {
    "compose": ("recipes.compose", "compose an LSM from a Whisper and an LLM"),
    "data": ("dataset_builders.self_powered", "build, inspect, publish, import or export a self-powered set"),
    "features": ("recipes.store_features", "store the encoder's output for a corpus, to share it between trainings"),
    "align": ("recipes.align", "align the projector with the LLM's embeddings"),
    "train": (
        "recipes.sft",
        "align and train on a self-powered set (several GPUs: accelerate launch -m recipes.sft)",
    ),
    "evaluate": ("recipes.evaluate", "measure what a speech LLM can do, and whether it follows and listens"),
    "bias": ("recipes.analyze_bias", "measure how answers depend on instruction and speech, layer by layer"),
    "chat": ("recipes.chat", "ask a checkpoint about a clip"),
    "serve": ("recipes.serve", "serve an LSM to OpenAI's clients"),
    "study": ("recipes.study", "train and evaluate many settings, and compare them in a table"),
    "quickstart": ("recipes.quickstart", "run everything on the nano setting, in minutes"),
    "convert": ("recipes.convert_reference", "convert a checkpoint of the original code"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        ["usage: lsm COMMAND [OPTIONS]", "", *lines, "", "lsm COMMAND --help shows the options of a command."]
    )


def main() -> None:
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        sys.exit(print(usage()))
    if name not in COMMANDS:
        sys.exit(f"lsm: {name!r} is not a command; expected one of {', '.join(COMMANDS)}.")
    sys.argv = [f"lsm {name}", *options]
    importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    main()
