"""What `recipes/sft.py` is made of: arguments, rows, order, trainer, checkpoints, preflight."""
