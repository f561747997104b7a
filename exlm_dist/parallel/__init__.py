"""Processes and groups. Knows how ranks find each other and how they agree; knows nothing of models."""
