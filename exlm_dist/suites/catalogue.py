"""The suites, by name."""

from __future__ import annotations

from exlm_dist.suites.glue import GLUE
from exlm_dist.suites.moleculenet import MOLECULENET
from exlm_dist.suites.squad import SQUAD
from exlm_dist.suites.suite import Suite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (MOLECULENET, GLUE, SQUAD)}
#: Kinds of methods whose results are the same for each seed.
UNSEEDED = tuple(kind for suite in SUITES.values() for one in suite.baselines if not one.seeded for kind in one.kinds)
