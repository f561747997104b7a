"""Distributed pretraining of ExLM masked language models for text and molecules."""

__version__ = "0.1.0"
