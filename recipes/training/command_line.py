"""The command line of the trainings: TRL's parser, and shorter names for some options as in the other commands."""

import sys

from trl import TrlParser

from dataset_builders.files import read_yaml
from language_models.command_line import HelpFormatter

SAME = {
    "--model": "--model_name_or_path",
    "--data": "--dataset_name",
    "--split": "--dataset_train_split",
    "--output": "--output_dir",
}
NAMES = f"""
`--config FILE` reads options from a YAML file; those of the command line have priority. Short names are
{", ".join(f"`{short}` for `{name}`" for short, name in SAME.items())}.
"""


def parse(*kinds: type, description: str | None = None) -> tuple:
    """Parse dataclasses of arguments from the command line and from the file of `--config`, which has lower priority.

    Options may be written with hyphens or underscores, and `--model`, `--data`, `--split` and `--output` are short for
    TRL's names (`SAME`).

    Raises:
        ValueError: the file has a duplicate key, of which TRL would silently use the last.
    """
    words = [rename(word) for word in sys.argv[1:]]
    if "--config" in words[:-1]:
        read_yaml(words[words.index("--config") + 1])
    parser = TrlParser(kinds, description=(description or "") + NAMES, formatter_class=HelpFormatter)
    return parser.parse_args_and_config(words)


def rename(word: str) -> str:
    """Replace a short name (`SAME`) in a word of the command line by TRL's name."""
    option, equals, value = word.partition("=")
    return SAME.get(option, option) + equals + value
