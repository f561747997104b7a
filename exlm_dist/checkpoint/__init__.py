"""The checkpoint format: fp32 tensors in pieces, free of layout. Knows neither DeepSpeed, nor the model, nor process
groups.

In the order in which they build on one another:

- `pieces`: which elements of a full tensor a piece covers (arithmetic only)
- `tensors`: the index of all pieces, and reading any part of a parameter from the files
- `reader`: a checkpoint folder as a whole: verified, its weights, its state
- `hf_export`: what an export for transformers has of it: names of settings and tensors, weights, tokens
- `rank_files`: writing the files of one rank, hashed on the way
- `storage`: a folder of such files is there whole or not at all; old ones removed
- `weights_only`: a checkpoint made by a command, which belongs to no run
- `average`: one such, of several checkpoints of a run
- `messages`: the jobs that a rank gives to the process that writes for it, and their outcomes
- `writer`: that process
"""
