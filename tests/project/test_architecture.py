"""The house: files import only from floors below, no file is long, and the package is light to import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
from importlinter.cli import lint_imports

import resnet_paths as rp

PACKAGE = Path(rp.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "resnet_paths":
            inner = node.module.removeprefix("resnet_paths").removeprefix(".")
            found |= {inner} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("resnet_paths.") for a in node.names if a.name.startswith("resnet_paths.")}
    return found


def test_a_file_imports_only_from_the_floors_below():
    assert lint_imports(config_filename=str(PACKAGE.parent / "pyproject.toml"), no_cache=True) == 0


def test_any_file_can_be_imported_first():
    """Who imports a part of a package runs all that the package imports; that must not need the importer."""
    graph = nx.DiGraph((name, imported) for name, path in FILES.items() for imported in imports(path))
    graph.add_nodes_from(FILES)
    for name, imported in graph.edges:
        package = imported.split(".")[0]
        if package != imported and package != name.split(".")[0]:
            assert name not in nx.descendants(graph, package), f"{name} imports {imported}, and {package} needs {name}"


def test_the_walk_sees_imports():
    assert {"core.chain", "_utils.errors", "unraveling"} <= imports(FILES["unraveling.edits"])


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_long(name):
    assert len(FILES[name].read_text().splitlines()) <= 500


def test_every_public_name_is_there_and_has_a_docstring():
    for name in rp.__all__:
        assert getattr(rp, name).__doc__, name
    assert len(set(rp.__all__)) == len(rp.__all__)
    with pytest.raises(AttributeError, match="attribute remove_block"):
        _ = rp.remove_block


def test_a_name_stays_a_function_whatever_is_imported_first():
    code = "import resnet_paths.core.edits, resnet_paths.lesions, resnet_paths as rp; "
    code += "print(callable(rp.unravel), callable(rp.path_histogram))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.parametrize("module", ["resnet_paths", "resnet_paths.cli"])
def test_importing_is_light(module):
    code = f"import {module}, sys, json; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "pandas", "networkx", "seaborn", "matplotlib", "torchvision", "lightning_fabric", "scipy"}
    assert not heavy & set(json.loads(done.stdout))


def test_optional_libraries_are_not_imported():
    code = "import sys, torch, resnet_paths as rp; from torch import nn\n"
    code += "m = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).eval()\n"
    code += "rp.unravel(m, torch.zeros(2, 2)); print(sorted({'timm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
