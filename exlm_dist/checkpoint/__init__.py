"""The checkpoint format: fp32 tensors in pieces, free of layout. Knows neither DeepSpeed, nor the model, nor process
groups.

In the order in which they build on one another:

- `pieces`: which elements of a full tensor a piece covers (arithmetic only)
- `tensors`: the index of all pieces, and reading any part of a parameter from the files
- `reader`: a checkpoint folder as a whole: verified, its weights, its state
- `storage`: writing such a folder whole or not at all, and removing old ones
- `messages`: the jobs that a rank gives to the process that writes for it, and their outcomes
- `writer`: that process
"""
