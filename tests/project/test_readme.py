"""What the README shows is run as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.architectures import TABLE, summary

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_as_printed(tmp_path, monkeypatch, capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(6)), batch_size=3)
    model = torchvision.models.resnet18(weights=None)
    monkeypatch.chdir(tmp_path)
    exec(
        code,
        {
            "model": model,
            "example_inputs": images[:2],
            "loader": loader,
            "images": images,
            "labels": torch.arange(6),
        },
    )
    printed = capsys.readouterr().out
    assert "ResidualChain of 8 blocks, 256 paths" in printed
    assert "EffectiveWindow(quantity='gradient_share'" in printed
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".pdf", ".svg", ".png", ".csv"}


def test_files_that_it_shows_or_names_are_there():
    for name in re.findall(r"\]\((data/[^)]+)\)|`(data/[a-z0-9/-]+)/?`", README):
        assert (Path(__file__).parents[2] / "".join(name)).exists(), name


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
