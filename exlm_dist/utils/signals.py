"""The signals that ask a run to save and end: caught by its ranks, blocked in the processes that write checkpoints."""

import signal

#: TERM: preemption, `kill`; USR1: Slurm's warning before the time limit; INT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
