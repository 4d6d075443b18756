"""Evaluation of speech LLMs: tasks, questions and systems, scores of the answers, and reports."""
