"""What a launch of a run has opened, and how the launch ended."""

from __future__ import annotations

import contextlib


class Resources(contextlib.ExitStack):
    """Everything a launch must close however it ends, closed in reverse order of opening."""

    #: How the launch ended, as in `tracking.EventLog.status`; a failure until something better is known.
    status: str = "FAILED"
