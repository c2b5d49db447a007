"""The notebooks that come with the project: their form, and the claims of the executed ones.

The notebooks are not run here. `resnet-paths reproduce` runs them, into the folder ``figures``, and leaves every number
that a claim is about in the executed copies; without these the claims are skipped.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import nbformat
import pytest

from resnet_paths.reproduce.claims import check_claim, claims_of
from resnet_paths.reproduce.gallery import figures_of
from resnet_paths.reproduce.runner import find_notebooks

FIGURES = Path(__file__).parents[2] / "figures"
SHIPPED = {path.stem: nbformat.read(path, as_version=4) for path in find_notebooks()}


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def assertions(notebook):
    return [node for node in ast.parse(code_of(notebook)[-1]).body if isinstance(node, ast.Assert)]


@pytest.fixture(params=SHIPPED)
def executed(request):
    """The name of a notebook and its executed copy."""
    path = FIGURES / "notebooks" / f"{request.param}.ipynb"
    advice = f"run 'resnet-paths reproduce --only {request.param[:2]}' in {FIGURES.parent}"
    if not path.is_file():
        pytest.skip(f"{request.param} was not executed: {advice}")
    notebook = nbformat.read(path, as_version=4)
    added = ("# Set by resnet-paths reproduce", "# Added by resnet-paths reproduce")
    if [s for s in code_of(notebook) if not s.startswith(added)] != code_of(SHIPPED[request.param]):
        pytest.skip(f"{request.param} has changed since it was executed: {advice}")
    return request.param, notebook


def test_the_claims_hold_of_the_executed_notebook(executed):
    name, notebook = executed
    assert notebook.metadata["resnet_paths"]["error"] is None
    claims = claims_of(notebook)
    texts = [text for text, _ in itertools.groupby(claim["claim"] for claim in claims)]  # a list of findings has many
    assert texts == [ast.unparse(node.test) for node in assertions(SHIPPED[name])]
    for claim in claims:
        check_claim(claim)


def test_its_figures_are_there_in_every_format_and_in_the_gallery(executed):
    name, notebook = executed
    page = (FIGURES / "index.html").read_text(encoding="utf-8")
    assert f'<h2 id="{name}">' in page
    assert figures_of(notebook)
    for stem in figures_of(notebook):
        assert f'<figure id="{stem}">' in page
        for kind in ("pdf", "svg", "png", "csv"):
            assert (FIGURES / f"{stem}.{kind}").stat().st_size > 0, f"{stem}.{kind}"
            assert f'href="{stem}.{kind}"' in page


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_notebooks_are_stripped_ask_one_question_and_assert(name):
    notebook = SHIPPED[name]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    assert notebook.cells[0].source.splitlines()[0].endswith("?")
    assert "parameters" in code[0].metadata["tags"]
    # Each with a message: the numbers that the gallery shows.
    assert assertions(notebook)
    assert all(node.msg is not None for node in assertions(notebook))
    everywhere = [node for source in code_of(notebook) for node in ast.walk(ast.parse(source))]
    assert sum(isinstance(node, ast.Assert) for node in everywhere) == len(assertions(notebook))
    assert len(nbformat.writes(notebook)) < 100_000


@pytest.mark.parametrize("name", SHIPPED)
def test_networks_run_where_the_parameters_say(name):
    """`resnet-paths reproduce --device` reaches every network and every study."""
    parameters, *others = code_of(SHIPPED[name])
    calls = [node for source in others for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [(ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}) for call in calls]
    if any(function == "rp.unravel" for function, _ in named):
        assert '\ndevice = "auto"' in parameters
    for function, keywords in named:
        if function in ("rp.load_network", "rp.lesion_study", "rp.predicted_effects"):
            assert keywords.get("device") == "device", function
        if function == "rp.load_dataset":
            assert keywords["folder"] == "data_folder"


def test_no_two_notebooks_write_the_same_figure():
    stems = [stem for notebook in SHIPPED.values() for stem in figures_of(notebook)]
    assert len(stems) == len(set(stems))
