"""Hand-written text has no numbers of results: findings are made from executed notebooks (`resnet-paths findings`)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from resnet_paths.reproduce.runner import find_notebooks

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in find_notebooks()}

# Digits that stand for something else than a result.
EXCEPTIONS = {
    r"`[^`]*`": "code",
    r"\$[^$]*\$": "formulas",
    r"\]\([^)]*\)": "links",
    r"<!-- findings: .*?<!-- end of findings -->": "generated",
    r"<!-- Made by .*?<!-- End of .*?-->": "generated tables, checked by tests of their own",
    r"```.*?```": "code and its output, which is run by tests",
    r"\b(?:19|20)\d\d[a-z]?\b": "years of citations",
    r"\barXiv:[\d.]+": "citations",
    r"(?i:\b(?:notebooks?|figures?|sections?|equations?)) \d+[a-z]?(?: (?:and|to) \d+[a-z]?)?": "references",
    r"\b(?:ResNet|VGG|DenseNet|[Pp]lain|preact-resnet|ViT)-\d+\b": "names of networks",
    r"\bCIFAR-10+\b": "names of data sets",
    r"\b1x1\b": "kinds of convolution",
    r"\b\d+x\d+ pixels\b": "sizes of images",
    r"\b95 % intervals?\b": "confidence level",
}
OF_README = {
    "2^n": "number of paths, a definition",
    "n (n + 1) / 2": "operations, a formula",
    "2^54": "number of paths, exact",
    "64 test images": "size of the sample",
    "one network and 500 images": "contents of the wheel",
    "Python 3.11": "version",
    "GPT-2": "a name",
    "1605.06431": "citation",
    "CC BY 4.0": "a license",
}


def numbers_in(text: str, allowed: dict[str, str]) -> list[str]:
    """Numbers with a few words beside them, of what is left of a text without its exceptions."""
    for pattern in EXCEPTIONS:
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    for phrase in allowed:
        text = text.replace(phrase, " ")
    return re.findall(r"[^\n]{0,30}\d+[^\n]{0,30}", text)


def interpretation_of(cells: list[dict]) -> str:
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return next((text for text in texts if text.startswith("## Interpretation")), "")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_interpretations_have_no_numbers_of_results(name):
    text = interpretation_of(NOTEBOOKS[name])
    assert text
    assert not numbers_in(text, {})
    headings = [line for cell in NOTEBOOKS[name] for line in cell["source"] if line.startswith("## ")]
    last = ["## What is seen, in numbers", "## Interpretation", "## Claims"]
    assert [line.strip() for line in headings][-3:] == last


def test_the_gallery_has_generated_numbers():
    text = (ROOT / "notebooks" / "gallery.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if ".ipynb)" in line]
    assert len(rows) >= len(NOTEBOOKS)
    for row in rows:
        number = re.search(r"\[(\d\d)\]", row)[1]
        assert f"<!-- findings: {number} -->" in row
        assert not numbers_in(row.split(" | ")[2], {})


def test_the_note_on_three_findings_has_generated_numbers():
    text = (ROOT / "notebooks" / "explanation" / "three_findings.md").read_text(encoding="utf-8")
    assert "<!-- findings: table:23:" in text
    assert not numbers_in(text, {})


def test_the_readme_has_no_numbers_of_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not numbers_in(text, OF_README)
    for phrase in OF_README:
        assert phrase in text, f"{phrase!r} is no longer in the README: take it off the list"


def test_numbers_are_found():
    text = "Deleting it costs 52 points (Veit et al. 2016, figure 5a; notebook 02) in the ResNet-110 at $2^n$, `x = 3`."
    assert len(numbers_in(text, {})) == 1
    assert numbers_in("see notebooks 02 and 03, 95 % intervals", {}) == []
