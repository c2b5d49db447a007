"""The notebooks that come with the project: their form, and the claims of the executed ones.

The notebooks are not run here. `resnet-paths reproduce` runs them, into the folder ``figures``, and leaves every number
that a claim is about in the executed copies; without these the claims are skipped.
"""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import nbformat
import pytest

from resnet_paths.reproduce.claims import check_claim, claims_of
from resnet_paths.reproduce.gallery import figures_of
from resnet_paths.reproduce.kept_outputs import ADDED, stale_reason
from resnet_paths.reproduce.runner import find_notebooks

FIGURES = Path(__file__).parents[2] / "figures"
NOTEBOOKS = FIGURES.parent / "notebooks"
INSTALL = """\
# Installs the package where it is missing.
import importlib.util

repository = ".."  # this clone; in Colab, write the address of the repository
if importlib.util.find_spec("resnet_paths") is None:
    if "://" in repository:
        get_ipython().system(f"git clone --quiet --depth 1 {repository} cloned")
        repository = "./cloned"
    get_ipython().run_line_magic("pip", f"install --quiet {repository}[notebooks] {repository}/data")"""
SHIPPED = {path.stem: nbformat.read(path, as_version=4) for path in find_notebooks()}


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(output):
    """What an output says, without its pictures."""
    data = output.get("data", {})
    return [output.get("text", ""), *(data[mime] for mime in data if mime.startswith("text/"))]


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
    if [s for s in code_of(notebook) if not s.startswith(ADDED)] != code_of(SHIPPED[request.param]):
        pytest.skip(f"{request.param} has changed since it was executed: {advice}")
    if notebook.metadata["resnet_paths"].get("skipped"):
        pytest.skip(notebook.metadata["resnet_paths"]["skipped"])
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
def test_shipped_notebooks_ask_one_question_and_assert(name):
    notebook = SHIPPED[name]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].source.splitlines()[0].endswith("?")
    assert code[0].source == INSTALL
    assert "parameters" in code[1].metadata["tags"]
    # Each with a message: the numbers that the gallery shows.
    assert assertions(notebook)
    assert all(node.msg is not None for node in assertions(notebook))
    everywhere = [node for source in code_of(notebook) for node in ast.walk(ast.parse(source))]
    assert sum(isinstance(node, ast.Assert) for node in everywhere) == len(assertions(notebook))
    assert sum(len(cell.source) for cell in notebook.cells) < 50_000


@pytest.mark.parametrize("name", SHIPPED)
def test_outputs_that_are_kept_are_those_of_the_present_code(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    advice = f"run 'resnet-paths reproduce --update --only {name[:2]}' in {NOTEBOOKS.parent}"
    assert stale_reason(path) != "code", advice
    code = [cell for cell in SHIPPED[name].cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None for cell in code), advice
    texts = [text for cell in code for output in cell.outputs for text in texts_of(output)]
    found = {match[0] for text in texts for match in re.finditer(r"(?<![\w.)/<])/\w[\w.-]*/\w|[A-Z]:\\|0x\w{6,}", text)}
    assert not found, f"paths of a machine, or addresses: {found}"


def test_outputs_that_are_kept_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS.glob("*.ipynb")) < 6e6


@pytest.mark.parametrize("name", SHIPPED)
def test_networks_run_where_the_parameters_say(name):
    """`resnet-paths reproduce --device` reaches every network and every study."""
    _, parameters, *others = code_of(SHIPPED[name])
    calls = [node for source in others for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [(ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}) for call in calls]
    if any(function == "rp.unravel" for function, _ in named):
        assert '\ndevice = "auto"' in parameters
    for function, keywords in named:
        if function in ("rp.load_network", "rp.lesion_study", "rp.predicted_effects"):
            assert keywords.get("device") == "device", function
        if function == "rp.load_dataset":
            assert keywords["folder"] in ("data_folder", "text_folder")


@pytest.mark.parametrize("name", SHIPPED)
def test_images_and_networks_are_those_of_the_data_set_in_the_parameters(name):
    """`resnet-paths reproduce --dataset` reaches every network and every finding."""
    _, parameters, *others = code_of(SHIPPED[name])
    source = "\n".join(others)
    if name[:2] in ("17", "23", "24"):  # text, several data sets, the networks of others
        assert '\ndataset = "' not in parameters
        return
    assert '\ndataset = "fashion-mnist"' in parameters
    assert "findings = on_dataset(findings, dataset)" in source
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for call in calls:
        function, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        if function in ("rp.load_network", "rp.zoo.training_logs", "rp.list_networks"):
            of_folder = function == "rp.load_network" and len(call.args) > 1  # weights that were selected by data set
            assert of_folder or "dataset" in keywords or call.args[0].value == "gpt-small", ast.unparse(call)
    # Only where it matters whether the results are those that are included, or how many images there are.
    named = [line for line in source.splitlines() if '"fashion-mnist"' in line]
    assert all(re.search(r'dataset [!=]= "fashion-mnist"|60_000', line) for line in named), named


def test_no_two_notebooks_write_the_same_figure():
    stems = [stem for notebook in SHIPPED.values() for stem in figures_of(notebook)]
    assert len(stems) == len(set(stems))
