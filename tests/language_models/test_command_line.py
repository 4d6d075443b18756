"""The help of the commands."""

from language_models.command_line import parser_of


def test_the_help_shows_defaults_and_keeps_the_lines_of_the_description():
    parser = parser_of("Count clips.\n\n    python -m count --limit 5 \\\n        --quiet")
    parser.add_argument("--limit", type=int, default=120, help="largest number of clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order")
    parser.add_argument("--folder", default="here", help="folder; the one here by default")
    parser.add_argument("--split", help="split of the corpus")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    shown = parser.format_help()
    assert "    python -m count --limit 5 \\\n        --quiet\n" in shown
    assert "largest number of clips (default: 120)" in shown
    assert "seed of the order (default: 0)" in shown
    assert shown.count("default") == 3  # the folder's text says it, and the others have none
