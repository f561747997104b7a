"""Where this process and those that it starts look for modules. Imported before all else of the package.

`python -m exlm_dist.cli`, which is how launchers start ranks, has the working folder first on the path: a `random.py`
there would be imported in place of Python's. Importing this module moves that folder to the end of the path, where a
checkout that is not installed is still found.
"""

from __future__ import annotations

import os
import sys

COMMAND = "exlm_dist.cli"


def shield_children() -> None:
    """Have no process that is started from here, such as a worker, import modules of the working folder (Python 3.11
    and later), unless this is a checkout of the package."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    if checkout == os.path.realpath(os.getcwd()):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))


# While Python looks for the module that `-m` names, that is its first argument.
if sys.argv[:1] == ["-m"] and COMMAND in sys.orig_argv and sys.path[:1] == [os.getcwd()]:
    sys.path.append(sys.path.pop(0))
