"""What a check of `exlm doctor` reports, and the table of all reports. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from exlm_dist.utils.errors import UserError

PASS, WARN, FAIL = "pass", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """Result of one check. `remedy`: what to do about it; empty if nothing."""

    check: str
    status: str
    text: str
    remedy: str = ""


def good(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check, PASS, text)


def doubtful(check: str, text: str, remedy: str) -> Finding:
    """The run will work, but perhaps not as hoped."""
    return Finding(check, WARN, text, remedy)


def bad(check: str, text: str, remedy: str) -> Finding:
    """The run will fail, or not reach its end."""
    return Finding(check, FAIL, text, remedy)


def examine(checks: Iterable[tuple[str, Callable[[], Finding | list[Finding]]]]) -> list[Finding]:
    """The findings of each (name, check), in order; a check that raises UserError or OSError counts as failed."""
    findings: list[Finding] = []
    for name, check in checks:
        try:
            found = check()
        except (UserError, OSError) as error:
            found = bad(name, str(error), "The message says what to change.")
        findings += found if isinstance(found, list) else [found]
    return findings


def table(findings: list[Finding]) -> str:
    """Aligned lines `check  status  text`, each followed by its remedy if it has one, and a line of totals."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.check.ljust(width)}  {finding.status}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':{width}}        -> {finding.remedy}")
    counts = {status: sum(finding.status == status for finding in findings) for status in (PASS, WARN, FAIL)}
    return "\n".join([*lines, "", ", ".join(f"{count} {status.lower()}" for status, count in counts.items())])


def failed(findings: list[Finding]) -> bool:
    """Whether any check failed."""
    return any(finding.status == FAIL for finding in findings)
