"""Held-out quality of checkpoints and runs, in numbers that compare across objectives (docs/evaluation.md)."""
