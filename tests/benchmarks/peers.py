"""The other libraries, in an environment of their own beside the one that runs: ``.venv-benchmarks``.

It sees the packages of the running environment, so that torch is the same, file by file; what the peers need beyond it
goes into the folder alone. A peer that cannot be installed is a row of the table, with pip's reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.benchmarks.table import ROOT

FOLDER = ROOT / ".venv-benchmarks"
PEERS = ("captum", "nnsight", "torchlens", "pyvene", "baukit")
_VERSIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
)


def python() -> Path:
    """The environment's interpreter, made if need be."""
    found = FOLDER / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not found.exists():
        venv.create(FOLDER, with_pip=True)
        own = subprocess.run(
            [str(found), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        Path(own, "running.pth").write_text("\n".join(folders) + "\n")
    return found


def install(names: tuple[str, ...] = PEERS) -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the peers that are there, and for each of the others the reason why it is not."""
    interpreter = python()
    constraints = FOLDER / "constraints.txt"
    constraints.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    reasons = {}
    known = _versions(interpreter)
    for name in names:
        if name in known:
            continue
        done = subprocess.run(
            [str(interpreter), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            reasons[name] = reason_of(errors[-1] if errors else "pip failed")
    known = _versions(interpreter)
    return {name: known[name] for name in names if name in known}, reasons


def reason_of(line: str) -> str:
    """What pip answered, as a note: no address of an index, no path."""
    words = [word for word in line.removeprefix("ERROR: ").split() if "/" not in word]
    return "cannot be installed: " + " ".join(words).rstrip(".")


def _versions(interpreter: Path) -> dict[str, str]:
    done = subprocess.run([str(interpreter), "-c", _VERSIONS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
