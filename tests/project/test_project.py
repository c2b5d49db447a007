"""The project's own files say the same thing: dependencies, versions, data."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml

import resnet_paths as rp

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, HATCH = PYPROJECT["project"], PYPROJECT["tool"]["hatch"]


def requirement(line: str) -> tuple[str, str]:
    """(Name, version) of a requirement of pip or conda, spelt alike."""
    name, version = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*([<>=!~].*)?", line).groups()
    name = {"pytorch": "torch"}.get(name, name).lower().replace("_", "-")
    return name, (version or "").replace(" ", "")


def requirements_of(extra: str) -> list[str]:
    """The requirements of an extra, extras of this project that it names among them."""
    found = []
    for line in PROJECT["optional-dependencies"][extra]:
        inner = re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", line)
        found += [line] if inner is None else [each for name in inner[1].split(",") for each in requirements_of(name)]
    return found


def test_conda_and_pip_ask_for_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    by_pip = [line for entry in environment["dependencies"] if isinstance(entry, dict) for line in entry["pip"]]
    found = dict(map(requirement, [*conda, *(line for line in by_pip if not line.startswith("-e"))]))
    assert found.pop("python") == PROJECT["requires-python"]
    found.pop("pip")
    wanted = dict(map(requirement, [*PROJECT["dependencies"], *requirements_of("test")]))
    assert found == wanted
    assert "-e ." in by_pip


def test_one_version():
    assert PROJECT["dynamic"] == ["version"]  # read from the file below when the package is built
    assert (ROOT / HATCH["version"]["path"]).read_text().count(f'__version__ = "{rp.__version__}"') == 1
    assert f"## [{rp.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rp.__version__
    assert citation["references"][0]["title"].startswith("Residual networks behave like ensembles")


def test_the_top_level_is_tidy():
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    allowed = {
        "README.md",
        "environment.yml",
        "notebooks",
        "resnet_paths",
        "data",
        "tests",
        "pyproject.toml",
        "LICENSE",
        "CITATION.cff",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    }
    made_here = {"figures", "runs", "build", "dist"} | {name for name in shown if name.endswith(".egg-info")}
    assert allowed <= shown
    assert shown - allowed <= made_here


def test_shipped_data_is_small():
    size = sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file())
    assert size < 60e6


@pytest.mark.parametrize("name", ["single_deletion", "multi_lesion", "permutation_tau"])
def test_published_results_are_there(name):
    frame = pd.read_csv(ROOT / "data" / "veit2016" / f"{name}.csv")
    errors = frame[[c for c in frame if c.startswith("error_percent")]]
    assert len(frame) > 5
    assert errors.apply(lambda column: column.between(0, 100)).all(axis=None)


def test_modules_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    wings = "_utils|core|figures|gradients|lesions|predictions|reproduce|unraveling|zoo"
    named = set(re.findall(rf"`((?:{wings})[./]\w+)", text))
    assert len(named) > 10
    for name in named:
        path = ROOT / "resnet_paths" / name.replace(".", "/")
        package = path.parent / "__init__.py"
        assert (
            path.is_dir() or path.with_suffix(".py").exists() or re.search(rf"\b{path.name}\b", package.read_text())
        ), name
