"""From a run configuration to a trained, saved and resumable model."""
