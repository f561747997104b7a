"""One file that opens without a server: what a page of Markdown becomes."""

from __future__ import annotations

import base64
from pathlib import Path

from exlm_dist.analysis.html_page import as_html, write_page

PAGE = """# Runs <a> & b

Words in **bold**, `co*de*`, *slanted* and [a link](docs/x.md)
over two lines.

| run | nll |
| --- | ---: |
| a\\|b | 0.5 |
| c | **0.4** |

- first
    - below it
- second

![a figure](plots/one.png)

![gone](plots/two.png)
"""


def test_all_that_reports_write_is_understood(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "one.png").write_bytes(b"picture")
    page = as_html(PAGE, tmp_path)
    assert "<title>Runs &lt;a&gt; &amp; b</title>" in page and "<h1>Runs &lt;a&gt; &amp; b</h1>" in page
    text = "<p>Words in <b>bold</b>, <code>co*de*</code>, <i>slanted</i> and"
    assert f'{text} <a href="docs/x.md">a link</a> over two lines.</p>' in page
    assert "<th>run</th><th class=number>nll</th>" in page and "<td>a|b</td><td class=number>0.5</td>" in page
    assert "<ul>\n<li>first</li>\n<ul>\n<li>below it</li>\n</ul>\n<li>second</li>\n</ul>" in page
    assert f'src="data:image/png;base64,{base64.b64encode(b"picture").decode()}"' in page
    assert "<p>gone</p>" in page and page.count("<img") == 1


def test_both_forms_of_a_page_are_written(tmp_path: Path) -> None:
    write_page(tmp_path / "report.md", "# title\n")
    assert (tmp_path / "report.md").read_text() == "# title\n"
    assert "<h1>title</h1>" in (tmp_path / "report.html").read_text()
