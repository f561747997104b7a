"""Checkpoints judged as the field judges them: suites of tasks, many checkpoints, seeds and settings in one table."""
