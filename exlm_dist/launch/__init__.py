"""Starts ranks, watches them, starts them again. No torch."""
