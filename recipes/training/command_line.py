"""The command line of the trainings: TRL's parser, and the names that the other commands have for the same options."""

import sys

from trl import TrlParser

from dataset_builders.files import read_yaml

SAME = {
    "--model": "--model_name_or_path",
    "--data": "--dataset_name",
    "--split": "--dataset_train_split",
    "--output": "--output_dir",
}


def parse(*kinds: type) -> tuple:
    """The arguments of every kind: as the command line says, or else the file that `--config` names.

    Hyphens and underscores are the same in the names of options, and `--model`, `--data`, `--split` and `--output` are
    short for TRL's names (`SAME`).

    Raises:
        ValueError: that file has a key twice, of which TRL would silently take the last.
    """
    words = [rename(word) for word in sys.argv[1:]]
    if "--config" in words[:-1]:
        read_yaml(words[words.index("--config") + 1])
    return TrlParser(kinds).parse_args_and_config(words)


def rename(word: str) -> str:
    """A word of the command line with TRL's name for the option, if it is one of `SAME`."""
    option, equals, value = word.partition("=")
    return SAME.get(option, option) + equals + value
