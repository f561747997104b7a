"""What holds the project's files to one another: names of tests, links of the documentation, versions."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from locations import ROOT

import exlm_dist

TESTS = ROOT / "tests"
FOLDERS = ("docs", "exlm_dist", "benchmarks", "containers")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def test_no_two_files_of_tests_have_one_name() -> None:
    """Folders of tests are no packages: pytest imports each file by its stem, so a second one fails to collect."""
    files = [path for path in TESTS.rglob("*.py") if not (path.parent / "__init__.py").exists()]
    stems = Counter(path.stem for path in files if path.name != "conftest.py")
    assert not [stem for stem, count in stems.items() if count > 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose) + re.findall(r"src=\"([^\"]+)\"", prose)
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_tests_and_files_that_the_documentation_names_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    code = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py"))
    tests = set(re.findall(r"`(test_\w+)`", text))
    missing = [name for name in sorted(tests) if f"def {name}(" not in code and not any(TESTS.rglob(f"{name}.py"))]
    roots = (ROOT, ROOT / "exlm_dist", ROOT / "configs")
    files = set(re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|md|sh|yaml))`", text))
    missing += [name for name in sorted(files) if not any((root / name).exists() for root in roots)]
    assert not missing


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == exlm_dist.__version__
