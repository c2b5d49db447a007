"""The explorers in a real JupyterLab, in a real browser: cells are run, controls moved, words and pictures change.

Needs Debian's ``chromium`` and the Python package ``playwright`` (which is given the path of that browser and downloads
none); skipped where one is missing. Of each notebook those cells are opened that its explorers need: the others take
long, and are run by ``resnet-paths reproduce``. Screenshots go to ``figures/screenshots``, or to the folder that the
environment variable RESNET_PATHS_SCREENSHOTS names.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from resnet_paths.reproduce.runner import find_notebooks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = Path(os.environ.get("RESNET_PATHS_SCREENSHOTS", Path(__file__).parents[2] / "figures" / "screenshots"))
TOKEN = "only-for-this-test"
WAIT_MS = 240_000  # as long as a machine with much else to do may take; a free one needs seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]


def needed_cells(name, starts):
    """A shipped notebook with only those cells that begin with one of `starts`."""
    (path,) = find_notebooks([name])
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.source.startswith(starts)]
    return notebook


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The notebooks that JupyterLab is to show."""
    folder = tmp_path_factory.mktemp("notebooks")
    always = ("profile =", "import ", "rp.widgets.")
    nbformat.write(needed_cells("09", (*always, "depth, weights =")), folder / "09.ipynb")
    notebook = needed_cells("10", (*always, "test_images ="))
    notebook.cells.insert(1, nbformat.v4.new_code_cell('network = "preact-resnet-20"  # less to compute'))
    nbformat.write(notebook, folder / "10.ipynb")
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The address of a JupyterLab with settings of its own, without news from the network."""
    home = tmp_path_factory.mktemp("jupyter")
    (home / "labconfig").mkdir()
    disabled = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "labconfig" / "page_config.json").write_text(json.dumps(disabled))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder}",
        f"--IdentityProvider.token={TOKEN}",
    ]
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    own = {"JUPYTER_CONFIG_DIR": str(home), **{name: str(home / name.lower()) for name in places[1:]}}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        _wait_for(port, process, home / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_for(port, process, log, seconds=90):
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", f"/api/status?token={TOKEN}")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    with playwright.sync_playwright() as driver:
        # Without a sandbox: it cannot be set up as root or in most containers. Only our own server is visited.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_notebook(browser, server):
    """A function that opens a notebook; what is seen at the end of the test is kept too, also when it failed."""
    opened = []

    def open_(name):
        opened.append(Notebook(browser, server, name))
        opened[-1].run_all()
        return opened[-1]

    yield open_
    for notebook in opened:
        notebook.keep("at_the_end")
        notebook.page.close()


class Notebook:
    """A notebook in JupyterLab."""

    def __init__(self, browser, server, name):
        self.name = name
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.set_default_timeout(WAIT_MS)
        self.page.goto(f"{server}/lab/tree/{name}.ipynb?token={TOKEN}&reset")
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()

    def run_all(self):
        """Run all cells, by the menu; until the kernel has answered the entry does nothing."""
        self.page.locator(".jp-StatusBar-TextItem", has_text="| Idle").wait_for()
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()

    def explorer(self, number):
        """The box of one explorer, once it is there with its picture."""
        picture = self.page.locator(".jp-OutputArea-output img.widget-image").nth(number)
        picture.wait_for()
        picture.scroll_into_view_if_needed()
        return self.page.locator(".jp-OutputArea-output:has(img.widget-image)").nth(number)

    def changes(self, box, act):
        """The words after `act`, once they and the picture have changed in the browser; a screenshot is kept."""
        words, picture = box.locator(".widget-html-content").last, box.locator("img.widget-image")
        before = words.inner_text(), picture.screenshot()
        act()
        until = time.monotonic() + WAIT_MS / 1000
        while words.inner_text() == before[0] or picture.screenshot() == before[1]:
            assert time.monotonic() < until, f"nothing changed: {words.inner_text()}"
            self.page.wait_for_timeout(200)
        return words.inner_text()

    def keep(self, name):
        """A screenshot of what the reader sees."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{self.name}_{name}.png")


def press(box, handle, key):
    """Move a slider by a key, as a reader without a mouse does."""
    slider = box.locator(".noUi-handle").nth(handle)
    slider.focus()
    slider.press(key)


def test_the_explorers_of_notebook_09(open_notebook):
    notebook = open_notebook("09")
    highway = notebook.explorer(0)
    words = notebook.changes(highway, lambda: press(highway, 0, "ArrowRight"))
    assert words.startswith("Through 51 layers the product of F' is")
    words = notebook.changes(highway, lambda: highway.get_by_role("button", name="relu").click())
    assert "is 1, the product of 1 + F' is 2.25e+15" in words
    notebook.keep("gradient_highway")
    paths = notebook.explorer(1)
    words = notebook.changes(paths, lambda: paths.get_by_role("button", name="f2").click())
    assert words.startswith("This path takes f2: length 1. 3 of the 8 paths")
    words = notebook.changes(paths, lambda: press(paths, 0, "ArrowRight"))
    assert "4 of the 16 paths" in words
    notebook.keep("paths")


def test_the_explorers_of_notebook_10(open_notebook):
    notebook = open_notebook("10")
    blocks = notebook.explorer(0)
    words = notebook.changes(blocks, lambda: press(blocks, 0, "Home"))
    assert re.search(r"With 0\.1 F\(x\): test error \d+\.\d%", words)
    notebook.keep("blocks")
    lesions = notebook.explorer(1)
    words = notebook.changes(lesions, lambda: lesions.get_by_role("button", name="layer2.1").click())
    assert "256 of 512 paths remain. Test error" in words
    notebook.keep("lesions")
