"""Evaluation: what is asked of a speech LLM, how answers are read and scored, and what is reported."""
