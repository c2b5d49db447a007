"""The page that shows all figures: what it says is in the folder, and its links lead somewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from resnet_paths.figures import paper_style, save_figure
from resnet_paths.reproduce.gallery import figures_of, write_gallery

CLAIMS = [{"claim": "x < 3 & y", "numbers": "x is 2 <nats>", "comparisons": [[2, "<", 3]]}]


def notebook(question: str, stem: str, error: str | None = None):
    recorded = new_output("display_data", {"application/vnd.resnet-paths.claims+json": CLAIMS})
    cells = [
        new_markdown_cell(f"# {question}\n\nBecause $2^n$ paths and `x < y`, $\\nosuch{{3}}$."),
        new_code_cell("x = 1"),
        new_markdown_cell("## A heading\n\nWhat is **seen** here."),
        new_code_cell(f'figures.save_figure(fig, f"{{figures_folder}}/{stem}", frame)'),
        new_code_cell("assert x", outputs=[] if error else [recorded]),
    ]
    return new_notebook(cells=cells, metadata={"resnet_paths": {"profile": "quick", "error": error}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "notebooks").mkdir()
    for name, stem, error in (("01_good", "01_one", None), ("02_bad", "02_two", "cell 4 ('<x>'): ValueError: no")):
        nbformat.write(notebook(f"Does {name} hold?", stem, error), tmp_path / "notebooks" / f"{name}.ipynb")
    with paper_style("single"):
        fig, _ = plt.subplots()
        frame = pd.DataFrame({"path_length": range(20), "share": 1 / 3})
        save_figure(fig, tmp_path / "01_one", frame, seed=7)
        save_figure(fig, tmp_path / "mine")
        plt.close(fig)
    return tmp_path


class Links(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in {"href", "src"}]
        if tag not in {"img", "meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_its_links_lead_to_files(folder):
    path = write_gallery(folder)
    page = path.read_text(encoding="utf-8")
    links = Links(page)
    assert path == folder / "index.html"
    assert links.open == []
    ids = set(re.findall(r'id="([^"]+)"', page))
    for link in links.found:
        if link.startswith("#"):
            assert link[1:] in ids
        elif not link.startswith("data:"):
            assert (folder / link).is_file(), link
    assert "<script" not in page
    assert "http" not in page


def test_each_figure_has_its_words_numbers_and_source(folder):
    page = write_gallery(folder).read_text(encoding="utf-8")
    assert {f"01_one.{kind}" for kind in ("pdf", "svg", "png", "csv")} <= set(Links(page).found)
    assert "<h3>A heading</h3>\n<p>What is <strong>seen</strong> here.</p>" in page
    assert "numbers (20 rows, the first 12 shown)" in page
    assert page.count("<td>0.3333</td>") == 12
    assert re.search(r"seed 7; resnet_paths [\d.]+, torch", page)
    assert "x is 2 &lt;nats&gt;</td><td><code>x &lt; 3 &amp; y</code>" in page
    assert 'width="468"' in page  # 3.25 in, half as large again


def test_what_failed_is_named_and_what_nobody_claims_is_shown(folder):
    page = write_gallery(folder).read_text(encoding="utf-8")
    assert "<b>Failed:</b> 02_bad, cell 4 (&#x27;&lt;x&gt;&#x27;): ValueError: no.</p>" in page
    assert page.count("failed</span>") == 1
    assert page.index("Other figures in this folder") < page.index('src="mine.png"')


def test_formulas_are_pictures_and_those_that_cannot_be_are_words(folder):
    page = write_gallery(folder).read_text(encoding="utf-8")
    assert '<img alt="2^n" src="data:image/svg+xml;base64,' in page
    assert r"<code>\nosuch{3}</code>" in page


def test_the_same_folder_gives_the_same_page(folder):
    assert write_gallery(folder).read_bytes() == write_gallery(folder).read_bytes()


def test_an_empty_folder_gives_an_empty_page(tmp_path):
    assert "<ul>\n</ul>" in write_gallery(tmp_path).read_text()


def test_captions_are_the_words_above():
    found = figures_of(notebook("Why?", "01_one"))
    assert found == {"01_one": "## A heading\n\nWhat is **seen** here."}


# Files that are not what they should be


NASTY = "<img src=x onerror=alert(1)> & \"'#?%"

BROKEN = {
    "empty figure": ("01_one.png", b""),
    "truncated figure": ("01_one.png", None),
    "text as a figure": ("01_one.png", b"no picture"),
    "csv of uneven rows": ("01_one.csv", b'a,b\n1,2\n1,2,3,4\n"'),
    "csv of bytes": ("01_one.csv", b"a,b\n\xff\xfe\x00,2\n"),
    "empty notebook": ("notebooks/01_good.ipynb", b""),
    "notebook of another form": ("notebooks/01_good.ipynb", b"[]"),
    "notebook of bytes": ("notebooks/01_good.ipynb", b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_shown(kind, folder):
    name, content = BROKEN[kind]
    file = folder / name
    file.write_bytes(file.read_bytes()[:100] if content is None else content)
    page = write_gallery(folder).read_text(encoding="utf-8")
    assert Links(page).open == []
    assert re.search(r"(Cannot be read:</b> 01_one|Failed:</b> 01_good, not a notebook)", page)
    assert 'src="mine.png"' in page
    assert "<b>Failed:</b> 02_bad" in page


def test_names_of_files_are_text(folder):
    (folder / "mine.png").rename(folder / f"{NASTY}.png")
    (folder / "notebooks" / "02_bad.ipynb").rename(folder / "notebooks" / f"{NASTY}.ipynb")
    (folder / "01_one.csv").write_text(f'"{NASTY.replace(chr(34), "")}",b\n1,<script>\n')
    page = write_gallery(folder).read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "<script" not in page
    links = Links(page)
    assert links.open == []
    files = [unquote(link) for link in links.found if not link.startswith(("#", "data:"))]
    assert all((folder / link).is_file() for link in files)
    assert f"{NASTY}.png" in files
