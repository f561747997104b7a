"""The DeepSpeed engines of a run, and their state as the checkpoint format sees it."""
