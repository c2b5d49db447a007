"""Running notebooks: parameters replaced, failures named, the others still run."""

from __future__ import annotations

import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

import resnet_paths as rp
from resnet_paths.reproduce import cli, kernels
from resnet_paths.reproduce.claims import claims_of
from resnet_paths.reproduce.findings_tables import update_findings
from resnet_paths.reproduce.runner import reproduce, run_notebook


def write(folder, name, *sources):
    cells = [new_code_cell('profile = "none"\nfigures_folder = "none"', metadata={"tags": ["parameters"]})]
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), *cells, *map(new_code_cell, sources)])
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write(
        folder,
        "01_good",
        "from pathlib import Path",
        "Path(figures_folder, 'one.txt').write_text(f'{profile} {device}')",
    )
    write(folder, "02_bad", "x = 1", "raise ValueError('the claim does not hold')", "x = 3")
    write(folder, "03_good", "rates = [0.25, 0.5]", "assert max(rates) < 0.6, f'highest rate {max(rates)}'")
    return folder


def test_a_failing_notebook_is_named_and_the_others_run(folder, tmp_path):
    results = reproduce(tmp_path / "out", profile="full", device="cpu", folder=folder, progress=False)
    assert [r.name for r in results] == ["01_good", "02_bad", "03_good"]
    assert [r.error is None for r in results] == [True, False, True]
    # Cells: title, parameters, injected, x = 1, raise.
    assert results[1].error.startswith(
        """cell 5 ("raise ValueError('the claim does not hold')"): ValueError: the claim"""
    )
    assert (tmp_path / "out" / "one.txt").read_text() == "full cpu"
    executed = nbformat.read(tmp_path / "out" / "notebooks" / "02_bad.ipynb", as_version=4)
    assert executed.cells[3].execution_count is not None
    assert executed.cells[5].execution_count is None
    assert executed.metadata["resnet_paths"]["error"] == results[1].error
    shipped = nbformat.read(folder / "02_bad.ipynb", as_version=4)
    assert len(shipped.cells) == 5


def test_a_data_set_reaches_the_notebooks_that_have_the_parameter(folder, tmp_path):
    cells = [new_code_cell('figures_folder = ""\ndataset = "own"', metadata={"tags": ["parameters"]})]
    source = "from pathlib import Path\nPath(figures_folder, 'two.txt').write_text(dataset)"
    nbformat.write(new_notebook(cells=[*cells, new_code_cell(source)]), folder / "04_data.ipynb")
    (folder / "05_broken.ipynb").write_text("not a notebook")
    results = reproduce(tmp_path / "out", device="cpu", dataset="cifar-10", folder=folder, progress=False)
    assert [(r.name, r.error) for r in results] == [("04_data", None)]
    assert (tmp_path / "out" / "two.txt").read_text() == "cifar-10"
    with pytest.raises(rp.ResnetPathsError, match=r"folder: .*; 04_data was on 'cifar-10'"):
        update_findings(tmp_path / "out", tmp_path, tmp_path)
    for wrong, match in (
        ({"dataset": "mnist"}, "dataset: got 'mnist'; allowed: None or one of 'fashion-mnist'"),
        ({"dataset": "digits", "update": True}, "dataset: got 'digits'; allowed: None with update"),
        ({"dataset": "digits", "only": ["01"]}, "a notebook with the parameter 'dataset'"),
    ):
        with pytest.raises(rp.ResnetPathsError, match=match):
            reproduce(tmp_path / "none", folder=folder, **wrong)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "1 None"),
        ({"OMP_NUM_THREADS": "3"}, "3 None"),
        ({"MKL_NUM_THREADS": "3"}, "None 3"),
    ],
)
def test_threads_of_a_kernel_are_those_of_idle_processors_unless_the_user_says_otherwise(
    tmp_path, monkeypatch, own, expected
):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("resnet_paths.reproduce.kernels.idle_threads", lambda: 1)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SET_BY_THE_USER", "kept")
    before = dict(os.environ)
    names = '"OMP_NUM_THREADS", "MKL_NUM_THREADS", "SET_BY_THE_USER"'
    write(tmp_path, "01", "import os", f"print(*(os.environ.get(name) for name in ({names})))")
    assert run_notebook(tmp_path / "01.ipynb", {}, tmp_path / "out" / "01.ipynb").error is None
    executed = nbformat.read(tmp_path / "out" / "01.ipynb", as_version=4)
    assert executed.cells[4].outputs[0].text == f"{expected} kept\n"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("percent", "usable", "threads", "expected"),
    [
        ([0, 4], {0, 1}, 2, 2),
        ([100, 3], {0, 1}, 2, 1),
        ([55, 0], {0, 1}, 2, 1),
        ([100, 100], {0, 1}, 2, 1),
        ([100, 0, 0, 0], {1, 2}, 2, 2),  # the busy processor is not for this process
        ([100, 0, 0, 0], {0, 1, 2, 3}, 2, 2),  # as with two threads a core
        ([100, 30, 20, 0], {0, 1, 2, 3}, 4, 2),
        ([0], {0, 1}, 2, 2),  # processors that are not listed
    ],
)
def test_a_kernel_has_a_thread_for_each_idle_processor(monkeypatch, percent, usable, threads, expected):
    monkeypatch.setattr(kernels.psutil, "cpu_percent", lambda interval, percpu: percent)
    monkeypatch.setattr(kernels.os, "sched_getaffinity", lambda process: usable, raising=False)
    monkeypatch.setattr(kernels.torch, "get_num_threads", lambda: threads)
    assert kernels.idle_threads() == expected


@pytest.mark.slow
def test_a_busy_process_is_seen():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            percent = kernels.psutil.cpu_percent(interval=1.0, percpu=True)
        finally:
            busy.kill()
    assert sum(percent) > 50


def test_a_notebook_whose_extra_is_not_installed_is_skipped(tmp_path, monkeypatch):
    imports = "from resnet_paths._utils.errors import requires_extra"
    write(tmp_path, "01_needs_more", imports, "with requires_extra('pretrained'):\n    import not_there", "1 / 0")
    monkeypatch.setattr("resnet_paths.reproduce.runner.shipped_folder", lambda name: tmp_path)
    before = (tmp_path / "01_needs_more.ipynb").read_bytes()
    done = CliRunner().invoke(cli.app, ["reproduce", "--update", "--output", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "skipped 01_needs_more: module 'not_there': got 'not installed'" in done.output
    assert (tmp_path / "01_needs_more.ipynb").read_bytes() == before
    executed = nbformat.read(tmp_path / "out" / "notebooks" / "01_needs_more.ipynb", as_version=4)
    assert executed.metadata["resnet_paths"]["error"] is None
    assert "resnet_paths[pretrained]" in executed.metadata["resnet_paths"]["skipped"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<b>Skipped:</b> 01_needs_more" in page
    assert "claims verified" not in page


def test_a_file_that_is_no_notebook_is_named_and_the_others_run(folder, tmp_path):
    (folder / "00_broken.ipynb").write_text("{bad")
    results = reproduce(tmp_path / "out", only=["00", "03"], folder=folder, progress=False)
    assert results[0].error.startswith("not a notebook: NotJSONError")
    assert results[1].error is None
    assert "not a notebook: NotJSONError" in (tmp_path / "out" / "index.html").read_text()


def test_a_cell_that_kills_its_kernel_or_never_ends_is_named(tmp_path):
    write(tmp_path, "01_dies", "import os", "os.kill(os.getpid(), 9)")
    write(tmp_path, "02_hangs", "import time", "time.sleep(60)")
    died = run_notebook(tmp_path / "01_dies.ipynb", {}, tmp_path / "out" / "1.ipynb")
    assert died.error.startswith("cell 5: DeadKernelError")
    hung = run_notebook(tmp_path / "02_hangs.ipynb", {}, tmp_path / "out" / "2.ipynb", timeout=2)
    assert hung.error.startswith("cell 5: CellTimeoutError")


def test_only_some_and_the_gallery_keeps_the_others(folder, tmp_path):
    reproduce(tmp_path / "out", only=["02"], folder=folder, progress=False)
    results = reproduce(tmp_path / "out", only=["03"], folder=folder, progress=False)
    assert [(r.name, r.error) for r in results] == [("03_good", None)]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "ValueError: the claim does not hold" in page
    assert "highest rate 0.5" in page


def test_the_executed_copy_holds_the_claims_and_their_numbers(folder, tmp_path):
    reproduce(tmp_path / "out", only=["01", "03"], folder=folder, progress=False)
    first, last = (
        nbformat.read(tmp_path / "out" / "notebooks" / f"{name}.ipynb", 4) for name in ("01_good", "03_good")
    )
    assert claims_of(first) == []
    assert claims_of(last) == [
        {"claim": "max(rates) < 0.6", "numbers": "highest rate 0.5", "comparisons": [[0.5, "<", 0.6]]}
    ]


def test_bad_input(folder, tmp_path):
    with pytest.raises(rp.ResnetPathsError, match=r"only: got '99'; .*01_good, 02_bad, 03_good"):
        reproduce(tmp_path, only=["99"], folder=folder)
    with pytest.raises(rp.ResnetPathsError, match="profile: got 'fast'; allowed: 'quick' or 'full'"):
        reproduce(tmp_path, profile="fast", folder=folder)
    with pytest.raises(rp.ResnetPathsError, match="device: got 'gpu'; allowed: 'auto' or a torch device"):
        reproduce(tmp_path, device="gpu", folder=folder)


def test_a_notebook_without_parameters_is_reported(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / "01.ipynb")
    assert reproduce(tmp_path / "out", folder=tmp_path, progress=False)[0].error == "no cell tagged 'parameters'"


def test_the_exit_status_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_paths.reproduce.runner.shipped_folder", lambda name: folder)
    good, bad = (
        CliRunner().invoke(cli.app, ["reproduce", "--output", str(tmp_path / "out"), "--only", start])
        for start in ("01", "02")
    )
    assert good.exit_code == 0
    assert bad.exit_code == 1
    assert "failed  02_bad: cell 5" in bad.output
