"""Compiled Triton kernels run on a CPU, instruction by instruction: what the interpreter cannot show.

Triton compiles a kernel to PTX for a GPU that is not there; `driver.py` takes the place of the CUDA driver and runs
that text (`machine.py`), one block of threads after the other, with numpy arrays for the registers of all its threads.

What it finds beyond wrong values: reads and writes outside of a tensor or not aligned, and races, that is two warps
touching one address with no barrier between them, or two blocks touching one address at all (`memory.py`).

What it does not show: time, registers and spills (the machine code is ptxas's), instructions of sm_100's tensor memory.
"""
