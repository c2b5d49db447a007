"""Words: phrases that torch's and scipy's documentation would not use, searched in all texts that users read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = [
    *ROOT.glob("*.md"),
    ROOT / "environment.yml",
    ROOT / "pyproject.toml",
    *(ROOT / ".github").rglob("*.*"),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
    *(path for suffix in ("md", "rst", "py") for path in sorted((ROOT / "notebooks").rglob(f"*.{suffix}"))),
    *sorted((ROOT / "resnet_paths").rglob("*.py")),
]
# What is banned, and what to write instead.
BANNED = {
    r"\b(?:an?|one) (?:row|entry|line|bar|dot|mark|mapping|number|worker|gate|factor) an? \w+": "one row per lesion",
    r"\banew\b": "again",
    r"\bhindmost\b": "last",
    r"\bbe (?:it|they)\b": "or",
    r"\berrs\b": "has a test error of",
    r"\b(?:go|goes|going|went) on (?:from|where|to|with|after)\b": "resumes",
    r"\b(?:lie|lies|lying) (?:at|in|on|beside|above|below|between|behind|there|within|where|elsewhere|well)\b": "is",
    r"\b(?:stand|stands) (?:at|in|on|beside|above|below|between|behind|there|where|once|for one another)\b": "is",
    r"\btold (?:from|apart|by)\b": "inferred from, distinguished",
    r"\bhangs? on\b": "depends on",
    r"\bat the most\b": "at most",
    r"\bof theirs\b": "their",
    r"\b(?<!there )(?:is|are) (?-i:none)\b(?! of)": "is not one",
    r"\bbut for\b": "except for",
    r"\btrades? places\b": "swap",
    r"\bstands? in for\b": "replaces",
    r"\bis another matter\b": "is different",
    r"\bwhat (?:it|they) (?:is|are) given\b": "the input",
    r"\bnothing to speak of\b": "almost nothing",
    r"\bunderflown\b": "underflowed",
    r"share_left_out": "omitted_share",
    r"num_paths_in_all": "total_num_paths",
}


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    # One line, so that phrases across line breaks are found: without quotes, comment signs and indentation.
    return re.sub(r"[\s\"]*\n[\s#\"]*", " ", text)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_have_no_banned_phrases(path):
    text = text_of(path)
    found = {
        match[0]: instead for banned, instead in BANNED.items() for match in re.finditer(banned, text, re.IGNORECASE)
    }
    assert not found, f"write instead: {found}"


def test_phrases_are_found_across_lines(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""A frame with a row\n    a lesion, computed\n    anew."""\n')
    with pytest.raises(AssertionError, match=r"a row a lesion.*anew"):
        test_texts_have_no_banned_phrases(path)
