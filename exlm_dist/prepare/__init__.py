"""Offline preparation: files that people have become a folder of tokenized, hashed shards."""
