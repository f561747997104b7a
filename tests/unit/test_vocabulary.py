"""The project speaks the field's language: words that it once used in a dialect of its own do not come back.

The glossary is in docs/architecture.md. Prose is everything that people read: comments, docstrings, messages, Markdown,
scripts and configurations. Names are those of Python.
"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest
from locations import ROOT

#: Words of the former dialect in any text -> what the field says.
PROSE = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(copy|copies) of the model\b": "replica",
    r"\btrained numbers\b": "parameters",
    r"\btogether\b": "say what is done: at once, in one group, as a whole",
    r"\bshares?\b": "fraction, split, probability; have in common",
    r"\bheld\b(?!-out)": "stored, local, sharded parameter",
    r"\bturned\b|\bturning\b": "rotated, rotation",
    r"\bfaint(ly)?\b|\bweak\b": "one name for the one flag",
    r"\bbatch-mates\b": "other sequences of the batch",
    r"\bdearest\b": "most expensive",
    r"\bthinn?(ed|s|ing)? out\b": "downsampled, pruned",
    r"\b(stood|stands?) still\b": "hung, hangs",
    r"\bspeaks\b(?! the field)": "reports_metrics",
    r"\bliving\b": "keep_alive, alive",
    r"\bdisband(s|ed|ing)?\b": "shut down",
    r"\bstatistic\b": "lse (log-sum-exp)",
    r"\bentering\b": "copy_to tensor region",
    r"\ball_rows\b": "gather_from sequence region",
    r"\b_see_them_gone\b": "wait_until_gone",
    r"\b_told\b": "report_to_peers",
}
#: Names of Python that are gone -> what they are called now. (In prose some of them are plain English: nothing, moves.)
NAMES = {
    r"(?i)(.*_)?shares?(_.*)?": "fraction, split, broadcast_object",
    r"Line": "ParallelGroup",
    r"cu": "cu_seqlens",
    r"nothing": "opaque_zero",
    r"(.*_)?moves(_.*)?|[mobp]_move": "transitions",
    r"(.*_)?(collect)": "all_gather_object",
    r"(?!.*held_out)(.*_)?held(_.*)?": "sharded parameter, local",
    r"living": "keep_alive",
}
#: Names that other packages or Python itself have given.
FOREIGN = {"collect": ("gc",)}
SUFFIXES = (".py", ".md", ".sh", ".yaml", ".toml", ".cff", ".cfg")
FOLDERS = ("exlm_dist", "tests", "benchmarks", "docs", "configs", "launchers", "slurm")


def written() -> list[Path]:
    """Every text of the project; but this one, which holds the list."""
    inner = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))
    found = [path for path in (*sorted(ROOT.glob("*")), *inner) if path.is_file() and path.suffix in SUFFIXES]
    return [path for path in found if path != Path(__file__).resolve()]


def names(text: str) -> list[tuple[int, str]]:
    """(line, name) of every name in Python code; those of `FOREIGN` left out."""
    found, before = [], ["", ""]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and not (before[1] == "." and before[0] in FOREIGN.get(token.string, ())):
            found.append((token.start[0], token.string))
        before = [before[1], token.string]
    return found


@pytest.mark.parametrize("path", written(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_the_field(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT)
    said = [
        f"{where}:{number}: {match.group(0)!r} -> {better}"
        for number, line in enumerate(text.split("\n"), 1)
        for pattern, better in PROSE.items()
        for match in re.finditer(pattern, line, re.IGNORECASE)
    ]
    if path.suffix == ".py":
        said += [
            f"{where}:{number}: name {name!r} -> {better}"
            for number, name in names(text)
            for pattern, better in NAMES.items()
            if re.fullmatch(pattern, name)
        ]
    if said:
        pytest.fail("\n".join(said), pytrace=False)
