"""Starts ranks, watches them, restarts them. No torch."""
