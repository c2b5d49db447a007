"""Outputs kept in notebooks: what is kept of an executed copy, and when it is stale."""

from __future__ import annotations

import base64
import io
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import resnet_paths as rp
from resnet_paths.reproduce.kept_outputs import ADDED, keep_outputs, stale_reason
from resnet_paths.reproduce.runner import reproduce

STYLED = """<style>#T_1b22f td {}</style>
<table id="T_1b22f"><td id="T_1b22f_row0_col1" class="row0" >1</td></table>"""


def png_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=None)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def paths(tmp_path):
    """A notebook, and its executed copy with one output of each kind."""
    figures = tmp_path / "figures"
    image = Image.linear_gradient("L").convert("RGBA")
    image.putpixel((0, 0), (255, 0, 0, 0))  # transparent: white on a page
    outputs = [
        new_output("stream", name="stderr", text="100%|####| 3/3 [00:01]"),
        new_output("stream", name="stdout", text=f"wrote {figures}/a.pdf by <C object at 0x7f80a1b2c3d4>\n"),
        new_output("display_data", {"image/png": png_of(image), "text/plain": "<Figure>"}),
        new_output("execute_result", {"text/html": STYLED, "text/plain": "1", "text/latex": "1"}, execution_count=7),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox(children=..."}),
    ]
    notebook = new_notebook(
        cells=[new_markdown_cell("# Why?"), new_code_cell("profile = 'quick'"), new_code_cell("f()")]
    )
    path, executed = tmp_path / "01_why.ipynb", figures / "01_why.ipynb"
    nbformat.write(notebook, path)
    notebook.cells.insert(2, new_code_cell(f"{ADDED[0]}\nx = 1", outputs=[new_output("stream", text="x")]))
    notebook.cells[3].outputs, notebook.cells[3].execution_count = outputs, 7
    notebook.cells[3].metadata["execution"] = {"iopub.status.busy": "12:00"}
    notebook.cells.append(new_code_cell(f"{ADDED[1]}: claims", outputs=[new_output("stream", text="claims")]))
    notebook.metadata["widgets"] = {"state": {}}
    notebook.metadata["resnet_paths"] = {"profile": "quick", "figures_folder": str(figures), "error": None}
    figures.mkdir()
    nbformat.write(notebook, executed)
    return path, executed


def test_what_varies_is_not_kept(paths):
    path, executed = paths
    assert keep_outputs(path, executed) == 1
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.source for cell in notebook.cells] == ["# Why?", "profile = 'quick'", "f()"]
    cell = notebook.cells[2]
    assert (cell.execution_count, cell.metadata, "widgets" in notebook.metadata) == (None, {}, False)
    text, figure, table = cell.outputs
    assert text.text == "wrote figures/a.pdf by <C object at 0x...>\n"
    assert list(figure.data) == ["image/png"]
    (style,) = re.findall(r"#(T_\S+) td", table.data["text/html"])
    assert style != "T_1b22f"  # which pandas draws
    assert table.data["text/html"].count("T_") == table.data["text/html"].count(style) == 2
    assert table.data["text/plain"] == "1"
    assert list(table.data) == ["text/html", "text/plain"]
    assert table.execution_count is None
    with Image.open(io.BytesIO(base64.b64decode(figure.data["image/png"]))) as kept:
        assert (kept.mode, kept.size, kept.info) == ("P", (256, 256), {})
        pixels = kept.convert("RGB")
        assert pixels.getpixel((0, 0)) == (255, 255, 255)
        assert all(abs(pixels.getpixel((9, y))[0] - y) <= 4 for y in range(256))


def test_the_same_outputs_are_the_same_file(paths):
    path, executed = paths
    keep_outputs(path, executed)
    before = path.read_bytes()
    assert keep_outputs(path, executed) == 0
    assert path.read_bytes() == before


def test_outputs_are_stale_after_a_change_of_code_or_data_only(paths, monkeypatch):
    path, executed = paths
    assert stale_reason(path) is None  # no outputs
    keep_outputs(path, executed)
    assert stale_reason(path) is None

    def edit(index, source):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[index].source = source
        nbformat.write(notebook, path)

    edit(0, "# Why not?")
    assert stale_reason(path) is None
    networks = path.parent / "data" / "networks"
    networks.mkdir(parents=True)
    (networks / "resnet.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr("resnet_paths.reproduce.kept_outputs.shipped_folder", lambda name: path.parent / name)
    assert stale_reason(path) == "data"
    edit(1, "profile = 'full'")
    assert stale_reason(path) == "code"


def test_outputs_of_an_interactive_session_are_stale(paths):
    path, _ = paths
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [new_output("stream", text="by hand")]
    nbformat.write(notebook, path)
    assert stale_reason(path) == "code"


@pytest.mark.parametrize("facts", [{"profile": "full"}, {"error": "cell 3: ValueError"}, {"skipped": "a reason"}, None])
def test_copies_that_are_not_of_this_notebook_are_refused(paths, facts):
    path, executed = paths
    run = nbformat.read(executed, as_version=4)
    if facts is None:
        run.cells[3].source = "g()"
    else:
        run.metadata["resnet_paths"].update(facts)
    nbformat.write(run, executed)
    before = path.read_bytes()
    with pytest.raises(rp.ResnetPathsError, match=r"executed: got .*01_why\.ipynb'; allowed: a copy of 01_why\.ipynb"):
        keep_outputs(path, executed)
    assert path.read_bytes() == before


def test_reproduce_updates_outputs_one_notebook_at_a_time(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("01_a", "02_b"):
        cells = [new_code_cell('profile = "quick"', metadata={"tags": ["parameters"]}), new_code_cell("print(profile)")]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    (result,) = reproduce(tmp_path / "out", only=["01"], update=True, folder=folder, progress=False)
    assert (result.error, result.num_updated, result.stale) == (None, 1, None)
    first, second = (nbformat.read(folder / f"{name}.ipynb", as_version=4) for name in ("01_a", "02_b"))
    assert first.cells[1].outputs[0].text == "quick\n"
    assert not second.cells[1].outputs
    first.cells[1].source = "raise ValueError(profile)"
    first.cells.append(new_code_cell("x", outputs=first.cells[1].outputs))
    nbformat.write(first, folder / "01_a.ipynb")
    before = (folder / "01_a.ipynb").read_bytes()
    (result,) = reproduce(tmp_path / "out", only=["01"], update=True, folder=folder, progress=False)
    assert result.error.startswith("cell 3 ('raise ValueError(profile)')")
    assert (folder / "01_a.ipynb").read_bytes() == before
    copy = nbformat.read(tmp_path / "out" / "notebooks" / "01_a.ipynb", as_version=4)
    assert not copy.cells[3].outputs  # not run, after the failure
    with pytest.raises(rp.ResnetPathsError, match="profile: got 'full'; allowed: 'quick' with update"):
        reproduce(tmp_path / "out", profile="full", update=True, folder=folder)
