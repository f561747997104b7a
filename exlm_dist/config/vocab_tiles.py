"""How `kernels/vocab` cuts its work. Not settings: constants that the kernels and the planner, which imports no torch,
have in common."""

from __future__ import annotations

#: Torch form: logits [rows, V] of a chunk of rows, and those kept for the backward pass, in elements.
CHUNK_ELEMENTS, KEEP_ELEMENTS = 1 << 21, 1 << 25
#: Triton form: how many rows are few, and the most words of a chunk for few and for many rows. Few rows: fewer chunks,
#: or launching them takes longer than they do. 5,632 by 768 is 132 tiles of 256 by 128: one for each SM of an H100.
FEW_ROWS, WORDS_OF_FEW, WORDS_OF_MANY = 8192, 6400, 5632
#: Logits whose gradients exist at a time (127 MB in bf16): 11,264 rows of 5,632 words, two rounds of the same tiles.
LOGITS = 11264 * 5632
#: Blocks of rows and chunks of words are whole tiles of every form of the kernels.
TILE = 128
