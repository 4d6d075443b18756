"""The parts of `recipes/sft.py`: arguments, rows, order, trainer, checkpoints, preflight."""
