"""What a user runs: each recipe is a short script that reads top to bottom."""
