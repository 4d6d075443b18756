"""The parser of the commands, whose help shows defaults."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds the default of an option unless its help has it or it has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if unset or action.default == [] or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser without options.

    Args:
        description: the command's docstring, of which each line stays as it is.
    """
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
