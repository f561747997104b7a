"""Starts ranks. Never imports torch."""
