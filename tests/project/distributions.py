"""Build the wheel and the source distribution, and run the README's lines from the wheel alone.

    python -m tests.project.distributions

Needs the extra [release]. The wheel is built from the source distribution and installed in a new environment; then the
data are installed beside it. Stops at the first step that fails.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "distributions"
LARGEST = {".whl": 3_000_000, ".gz": 3_500_000}  # bytes; the source distribution has the tests as well
IMPORT = (
    "import time; import torch; start = time.perf_counter(); import resnet_paths; print(time.perf_counter() - start)"
)
WITHOUT_DATA = """
import resnet_paths as rp
try:
    rp.load_network("preact-resnet-20")
except rp.ResnetPathsError as error:
    assert "resnet-paths-data" in str(error), error
else:
    raise SystemExit("the wheel has all networks")
"""
WITH_DATA = """
import resnet_paths as rp
assert len(rp.load_dataset(download=False)) == 10_000
assert rp.list_networks().trained.sum() > 10
rp.load_network("preact-resnet-110", snapshot=4)
"""


def run(*command: str | Path, where: Path = ROOT) -> str:
    """Standard output of a command; its error is shown."""
    return subprocess.run([*map(str, command)], cwd=where, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Build, check, install and run."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", FOLDER, ROOT)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", FOLDER, ROOT / "data")
    run(sys.executable, "-m", "twine", "check", "--strict", *FOLDER.iterdir())
    source, wheel = next(FOLDER.glob("resnet_paths-*.tar.gz")), next(FOLDER.glob("resnet_paths-*.whl"))
    for path in (source, wheel):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
        assert path.stat().st_size < LARGEST[path.suffix], path
    with zipfile.ZipFile(wheel) as archive:
        notebooks = [name for name in archive.namelist() if name.endswith(".ipynb")]
        cells = [cell for name in notebooks for cell in json.loads(archive.read(name))["cells"]]
    expected = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {name.removeprefix("resnet_paths/notebooks/") for name in notebooks} == expected
    assert not any(cell.get("outputs") for cell in cells), "the wheel has notebooks with outputs"

    run(sys.executable, "-m", "venv", FOLDER / "env")
    python = FOLDER / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    elsewhere = FOLDER / "elsewhere"  # a folder that does not contain the package
    elsewhere.mkdir()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines, shown = (re.search(rf"```{kind}\n(.*?)```", readme, flags=re.DOTALL)[1] for kind in ("python", "text"))
    printed = run(python, "-c", lines, where=elsewhere)
    assert printed == shown, printed
    run(python, "-c", WITHOUT_DATA, where=elsewhere)
    seconds = min(float(run(python, "-c", IMPORT, where=elsewhere)) for _ in range(5))
    print(f"the lines of the README print what it shows; import resnet_paths takes {seconds:.2f} s beside torch")
    run(python, "-m", "pip", "install", "--quiet", next(FOLDER.glob("resnet_paths_data-*.whl")))
    run(python, "-c", WITH_DATA, where=elsewhere)
    print("with resnet-paths-data, all networks and images are found")


if __name__ == "__main__":
    main()
