"""Offline preparation: input files become a folder of tokenized, hashed shards."""
