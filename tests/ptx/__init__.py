"""Compiled Triton kernels run on a CPU, instruction by instruction: what the interpreter cannot show.

Triton compiles a kernel to PTX without a GPU; `driver.py` replaces the CUDA driver and runs that text (`machine.py`),
one block of threads after the other, with numpy arrays for the registers of all its threads.

Beyond wrong values it finds reads and writes outside a tensor or misaligned, and races: two warps that touch one
address with no barrier between them, or two blocks that touch one address at all (`memory.py`).

It does not show time, registers and spills (the machine code is ptxas's), or instructions of sm_100's tensor memory.
"""
