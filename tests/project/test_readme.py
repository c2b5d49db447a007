"""What the README and the pages of the documentation show is run as it is printed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset

import resnet_paths as rp
from tests.benchmarks.architectures import TABLE, summary

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path for path in (ROOT / "notebooks").rglob("*.md") if "```python" in path.read_text(encoding="utf-8"))


def code_of(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.fixture(scope="module")
def names():
    """What the pages assume: a model, an example, a loader."""
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = torchvision.models.resnet18(weights=None).eval()
    return {
        "model": model,
        "chain": rp.unravel(model, images[:2]),
        "example_inputs": images[:2],
        "loader": DataLoader(TensorDataset(images, torch.arange(6)), batch_size=3),
        "images": images,
        "labels": torch.arange(6),
    }


@pytest.mark.slow
def test_the_lines_print_what_is_shown_below_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert code_of(README).count("\n") <= 10
    exec(code_of(README), {})
    assert capsys.readouterr().out == re.search(r"```text\n(.*?)```", README, flags=re.DOTALL)[1]


@pytest.mark.slow
def test_the_start_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_of((ROOT / "notebooks" / "start.md").read_text(encoding="utf-8")), names)
    assert len(names["fig"].axes) == 1  # each figure has axes of its own
    plt.close("all")
    printed = capsys.readouterr().out
    assert "ResidualChain of 8 blocks, 256 paths" in printed
    assert "EffectiveWindow(quantity='gradient_share'" in printed
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".pdf", ".svg", ".png", ".csv"}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"deletions", "path_lengths", "resnet18"}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "start"], ids=lambda path: path.stem)
def test_the_code_of_a_page_runs_as_printed(page, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with plt.rc_context():
        exec(code_of(page.read_text(encoding="utf-8")), dict(names))
    plt.close("all")
    if page.stem == "own_model":
        assert "ResidualChain of 8 blocks, 256 paths" in capsys.readouterr().out


def test_it_is_short():
    assert README.count("\n") <= 150


def test_files_that_it_shows_or_names_are_there():
    named = re.findall(r"\]\((?!https:)([^)]+)\)|`(data/[a-z0-9/-]+)/?`", README)
    assert len(named) > 20
    for name in named:
        assert (ROOT / "".join(name)).exists(), name


def test_commands_are_one_line_each():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert all(block.count("\n") == 1 for block in blocks)
    assert sum("resnet-paths reproduce" in block for block in blocks) == 2  # pip's and conda's


def test_the_table_of_architectures_is_that_of_the_data():
    frame = pd.read_csv(TABLE)
    assert summary(frame) in README
    assert (frame.library != "transformers").sum() >= 90
    assert (frame.library == "transformers").sum() >= 20
    assert set(frame.architecture[frame.library == "torchvision"]) == set(
        torchvision.models.list_models(module=torchvision.models)
    )
    assert (frame.max_difference.notna() ^ frame.reason.notna()).all()  # a chain, or the reason why not
    assert (frame.max_difference.dropna() == 0).all()


def test_every_module_of_public_names_is_on_a_page_of_the_reference():
    """The build of the documentation checks this too, much later."""
    stub = ast.parse((ROOT / "resnet_paths" / "__init__.pyi").read_text())
    modules = {statement.module for statement in stub.body if isinstance(statement, ast.ImportFrom)}
    modules -= {None, "figures"}  # modules that are public themselves: figures.widgets, and those beside the stub
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "notebooks" / "reference").glob("*.rst"))
    listed = [module for line in re.findall(r"public-names:: (.*)", pages) for module in line.split()]
    assert sorted(module for module in listed if ":" not in module) == sorted(modules)
