"""Some seconds of `tests/fuzz_tables.py`: random tables and damage through every reader lose nothing."""

from __future__ import annotations

from pathlib import Path

import fuzz_tables
import pytest
from fuzz_tables import Table, check, tables
from hypothesis import HealthCheck, given, settings

from exlm_dist.tables.records import read_rows


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(table=tables())
def test_nothing_is_lost_without_being_counted(table: Table, tmp_path: Path) -> None:
    assert check(table, tmp_path)


def test_a_reader_that_loses_a_row_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself fails where it should."""
    table = Table("csv", ["<0>a", "<1>b", "<2>c"], ["x", "y", "z"], ",", True, "\n", "utf-8", ".gz", False, "", 0)
    assert check(table, tmp_path) == "whole"
    for wrong in (
        lambda rows: rows[1:],
        lambda rows: rows[::-1],
        lambda rows: [row._replace(text="<1>") for row in rows],
    ):
        monkeypatch.setattr(fuzz_tables, "read_rows", lambda *given, wrong=wrong: wrong(list(read_rows(*given))))
        with pytest.raises(AssertionError):
            check(table, tmp_path)
