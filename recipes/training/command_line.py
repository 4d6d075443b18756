"""The command line of the trainings, with TRL's parser."""

import sys

from trl import TrlParser

from dataset_builders.files import read_yaml


def parse(*kinds: type) -> tuple:
    """The arguments of every kind: as the command line says, or else the file that `--config` names.

    Raises:
        ValueError: that file has a key twice, of which TRL would silently take the last.
    """
    words = sys.argv[1:]
    if "--config" in words[:-1]:
        read_yaml(words[words.index("--config") + 1])
    return TrlParser(kinds).parse_args_and_config()
