"""A checkpoint in use: loaded onto one device, asked for embeddings and for what stands at a mask."""
