"""csv and tsv: what is well-formed comes back, what is not never changes another row, and no character is lost."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exlm_dist.tables import delimited
from exlm_dist.tables.delimited import split_rows

CELLS = st.text(alphabet='ab1 ,;"\n\r\té', max_size=8)


def rows_of(text: str, delimiter: str = ",", quoted: bool = True) -> list[delimited.Fields]:
    return list(split_rows(io.StringIO(text, newline=""), delimiter, quoted))


def molecules(count: int) -> list[str]:
    return ["C" * (number % 60 + 1) + "O" * (number // 60) for number in range(count)]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 4).flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), max_size=6)),
    st.sampled_from(",;\t"),
)
def test_what_a_csv_writer_writes_comes_back(rows: list[list[str]], delimiter: str) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
    assert [list(fields.values) for fields in rows_of(file.getvalue(), delimiter)] == rows


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet='ab1,"\n', max_size=60))
def test_no_character_of_any_text_is_lost(text: str) -> None:
    """All but quotes, delimiters and line ends is in the values or in the lines set aside, in order."""
    read = "".join("".join(fields.values) + fields.raw for fields in rows_of(text))
    drop = str.maketrans("", "", ',"\n')
    assert read.translate(drop) == text.translate(drop)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(5, 39), min_size=1, max_size=4, unique=True), st.lists(st.booleans(), min_size=4, max_size=4)
)
def test_stray_quotes_cost_only_their_own_rows(at: list[int], last: list[bool]) -> None:
    """A quote at the start of a cell may swallow rows up to one at the end of a cell: all others come through."""
    rows = [[str(number), smiles] for number, smiles in enumerate(molecules(40))]
    lines = [",".join(row) for row in rows]
    for index, end in zip(at, last):
        lines[index] = f'{lines[index]}"' if end else lines[index].replace(",", ',"')
    found = rows_of("\n".join(lines) + "\n")
    assert len(found) == len(rows)
    for index, (fields, row) in enumerate(zip(found, rows)):
        if index not in at:
            assert fields.values == row
        else:
            assert fields.problem.startswith(f"stray quote: line {index + 1}:") or fields.values[1].endswith('"')


@pytest.mark.parametrize("closing", ['500,CCO"', '500,"CCO"', '500,"', '500,"C, O"', '500,""', '"500",CCO'])
def test_a_quote_that_closes_far_below(closing: str) -> None:
    lines = [f"{number},{smiles}" for number, smiles in enumerate(molecules(1000))]
    lines[10], lines[500] = '10,"CCC', closing
    found = rows_of("\n".join(lines))
    assert len(found) == 1000 and {index for index, fields in enumerate(found) if fields.problem} <= {10, 500}
    assert found[10].raw == '10,"CCC' and found[400].values == lines[400].split(",")


def test_text_over_several_lines_is_kept() -> None:
    texts = ["first line, with a comma\nsecond, line\n\nfourth", "one", 'she said "no", and\nleft', "x y"] * 10
    file = io.StringIO(newline="")
    csv.writer(file).writerows(enumerate(texts))
    assert [fields.values[1] for fields in rows_of(file.getvalue())] == texts


def test_a_text_over_several_lines_below_single_words_is_kept() -> None:
    texts = [*"abcdefgh", "more than\none word", "x"]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([text, "end", "5"] for text in texts)
    assert [fields.values[0] for fields in rows_of(file.getvalue())] == texts


def test_swallowed_texts_are_found_by_the_numbers_beside_them() -> None:
    lines = [f"{number},some words of number {number}" for number in range(50)]
    lines[20], lines[30] = '20,"some words', '30,more words"'
    found = rows_of("\n".join(lines))
    assert [index for index, fields in enumerate(found) if fields.problem] == [20] and len(found) == 50


@pytest.mark.parametrize("header", [["id,smiles"], []])
def test_a_stray_quote_among_the_first_rows(header: list[str]) -> None:
    lines = [*header, '1,"CCC', *(f"{number},{smiles}" for number, smiles in enumerate(molecules(20), 2))]
    lines[8] += '"'
    found = rows_of("\n".join(lines))
    assert len(found) == len(lines) and [fields.values for fields in found[10:]] == [
        line.split(",") for line in lines[10:]
    ]


@pytest.mark.parametrize("line", ['1,"Hello" he said', '1,"he said \\"hi\\" to me"', '1,"open'])
def test_rows_that_are_not_well_formed(line: str) -> None:
    first, second = rows_of(f"{line}\n2,next\n")
    assert first.problem.startswith("stray quote: line 1: ") and first.raw == line and second.values == ["2", "next"]


def test_a_field_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "LONGEST_FIELD", 1000)
    pulled = []

    def lines():
        yield '1,"open\n'
        for number in range(10_000):
            pulled.append(number)
            yield f"{number},x\n"

    found = split_rows(lines(), ",", True)
    assert "field limit" in next(found).problem and len(pulled) < 300
    assert next(found).values == ["0", "x"]


def test_quotes_are_ordinary_characters_in_tsv() -> None:
    assert [fields.values for fields in rows_of('a\t"b\n\n"c"\td\r\n', "\t", quoted=False)] == [
        ["a", '"b'],
        ['"c"', "d"],
    ]


def test_a_stray_quote_that_the_next_quoted_field_closes() -> None:
    """The three rows would make one of three fields, of which the second, `CCO"`, has a quote but no quotes."""
    lines = ['";<0>\n', ";<1>\n", '";CCO";<2>\n']
    first, *others = split_rows(lines, ";", True)
    assert first.problem.startswith("stray quote: line 1: ") and first.raw == '";<0>'
    assert [fields.values for fields in others] == [["", "<1>"], [";CCO", "<2>"]]


def test_escaped_quotes_beside_a_field_over_several_lines() -> None:
    rows = [["name", "text"], ['5" pipe', 'a\n"b"'], ['say ""', "c"]]
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    assert [fields.values for fields in split_rows(file.getvalue().splitlines(keepends=True), ",", True)] == rows
