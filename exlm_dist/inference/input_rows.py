"""The rows of the files that a checkpoint is asked about: the text of each, and the columns beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from exlm_dist.tables.records import InputOptions, Record, column_names, expand_inputs, read_records, text_column
from exlm_dist.utils.errors import ConfigError


class InputRows:
    """Rows of files with the same columns; a record has the name of its file, and its number there."""

    def __init__(self, inputs: Sequence[str], options: InputOptions, domain: str, *, added: Sequence[str]):
        """`inputs`: paths and patterns. `domain` 'smiles' or 'text': what the column is called if `options` do not
        say. `added`: columns that the output will have besides. ConfigError or DataError for what does not fit."""
        self.files = expand_inputs(list(inputs), options)
        self._options, self._domain = options, domain
        self._chosen = {str(file): text_column(file, options, domain) for file in self.files}
        self.names = column_names(self.files[0], options)
        for file in self.files[1:]:
            if (names := column_names(file, options)) != self.names:
                raise ConfigError(
                    f"{file} has the columns {names}, but {self.files[0]} has {self.names}: take them one by one."
                )
        if taken := [name for name in added if name in self.names]:
            raise ConfigError(
                f"{self.files[0]} has a column {taken[0]!r} already, and so will the output. Rename or drop it."
            )

    def chunks(self, size: int) -> Iterator[list[Record]]:
        """All rows in order, `size` at a time."""
        rows = (
            record
            for file in self.files
            for record in read_records(file, replace(self._options, column=self._chosen[str(file)]))
        )
        return iter(lambda: list(islice(rows, size)), [])

    def text(self, record: Record) -> str | None:
        """The text that is asked about; None if there is none or reading showed a problem."""
        return None if record.problem else record.values.get(self._chosen[record.file])

    def shown(self, record: Record) -> str:
        """What to show of a row that failed."""
        return record.raw or record.values.get(self._chosen[record.file]) or ""

    def columns(self, records: Sequence[Record]) -> dict[str, list[str | None]]:
        """The columns of the input, by name."""
        return {name: [record.values.get(name) for record in records] for name in self.names}

    def none_usable(self, rows: int, reason: str) -> str:
        """Message where none of the `rows` can be used; `reason`: why the first cannot."""
        files = ", ".join(map(str, self.files[:3])) + (" ..." if len(self.files) > 3 else "")
        if not rows:
            return f"{files}: there are no rows."
        what = "molecules (SMILES)" if self._domain == "smiles" else "texts"
        return (
            f"{files}: none of the {rows:,} rows can be used (first: {reason}). The model reads {what}, looked for in "
            f"column {self._chosen[str(self.files[0])]!r}; choose another with --column NAME."
        )
