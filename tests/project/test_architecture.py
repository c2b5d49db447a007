"""The house: files import only from floors below, no file is long, and the package is light to import."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
from importlinter.cli import lint_imports

import resnet_paths as rp
from tests.project.floor_plan import floor_plan
from tests.project.test_project import PROJECT, requirement, requirements_of

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


def test_the_floor_plan_is_that_of_the_code():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text.split("floor_plan. -->\n")[1].split("\n<!-- End of the floor plan. -->")[0]
    assert shown == floor_plan()


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


def lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    has_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_long(name):
    nodes = ast.walk(ast.parse(FILES[name].read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: lines for f in functions if (lines := lines_without_docstring(f)) > 60} == {}


def test_lines_are_counted_without_the_docstring():
    function = ast.parse('def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n    return x\n').body[0]
    assert lines_without_docstring(function) == 4


def test_few_types_are_any():
    """What a name holds is said by its type, as far as torch's own types say it."""
    assert sum(len(re.findall(r"\bAny\b", path.read_text())) for path in FILES.values()) < 150


def draws_of(path: Path) -> list[tuple[str, str | None]]:
    """(Generator, device) of each random draw of a file, but for those from a generator that is made beside it."""
    tree, found = ast.parse(path.read_text()), []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    own = {node for f in functions if "torch.Generator()" in ast.unparse(f) for node in ast.walk(f)}
    for node in ast.walk(tree):
        given = {k.arg: ast.unparse(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
        if "generator" in given and node not in own and re.match(r"torch\.rand\w*\(", ast.unparse(node)):
            found.append((given["generator"], given.get("device")))
    return found


def test_random_numbers_are_drawn_where_their_generator_is():
    """A caller's generator may be on the GPU; torch refuses to draw from it for another device."""
    instruments = ("core.", "gradients.", "lesions.", "predictions.")
    draws = [draw for name, path in FILES.items() if name.startswith(instruments) for draw in draws_of(path)]
    assert len(draws) > 9
    assert {device for generator, device in draws if device != f"{generator}.device"} == set()


def test_the_root_of_the_package_is_small():
    """The wings, and three files: the package itself, the list of its public names, the marker of a typed package."""
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert {"__init__.py", "__init__.pyi", "py.typed", "core"} <= entries
    assert len(entries) <= 12


def classes(*paths: Path) -> set[tuple[str, tuple[str, ...]]]:
    """Name and bases of each class in some files, other than in the docstring of another."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return {(node.name, tuple(map(ast.unparse, node.bases))) for node in nodes if isinstance(node, ast.ClassDef)}


def test_chains_are_made_of_few_kinds_of_modules():
    outside_zoo = classes(*(path for name, path in FILES.items() if name.split(".")[0] != "zoo"))
    modules = {"nn.Module", "nn.ModuleList", "GraphModule"}
    while found := {name for name, bases in outside_zoo if modules & set(bases)} - modules:
        modules |= found
    kinds = modules - {"nn.Module", "nn.ModuleList", "GraphModule", "Call"}  # a Call is exported, and in no chain
    assert {"Block", "ResidualChain", "Segment", "Parallel"} <= kinds
    assert len(kinds) <= 9


def test_few_types_lead_from_a_chain_to_the_frame_of_a_study():
    """Cheap scores are another instrument, Shapley values start from a frame; what intercepts BatchNorm is torch's."""
    others = {"lesions.predicted", "lesions.subsets", "lesions.permutations"}
    wing = [path for name, path in FILES.items() if name.startswith("lesions") and name not in others]
    types = {name for name, bases in classes(*wing) if bases != ("TorchDispatchMode",)}
    assert {"Lesion", "Trie", "Store"} <= types
    assert len(types) <= 6


def test_every_public_name_is_there_and_has_a_docstring():
    for name in rp.__all__:
        assert getattr(rp, name).__doc__, name
    assert len(set(rp.__all__)) == len(rp.__all__)
    with pytest.raises(AttributeError, match="attribute remove_block"):
        _ = rp.remove_block


@pytest.mark.parametrize("module", ["resnet_paths", "resnet_paths.reproduce.cli"])
def test_importing_is_light(module):
    code = f"import {module}, sys, json; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "pandas", "networkx", "seaborn", "matplotlib", "torchvision", "lightning_fabric", "scipy"}
    assert not heavy & set(json.loads(done.stdout))


def test_optional_libraries_are_not_imported_and_names_stay_functions_whatever_is_imported_first():
    code = (
        "import resnet_paths.core.edits, resnet_paths.lesions, sys, torch, resnet_paths as rp; from torch import nn\n"
    )
    code += "print(callable(rp.unravel), callable(rp.path_histogram))\n"
    code += "m = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).eval()\n"
    code += "rp.unravel(m, torch.zeros(2, 2)); optional = {'timm', 'transformers', 'dask', 'distributed'}\n"
    code += "print(sorted(optional & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True True", "[]"]


WITHOUT_EXTRAS = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import torch
import resnet_paths as rp
from tests.project.floor_plan import floor_plan
from tests.project.test_project import PROJECT, requirement, requirements_of
"""
INSTRUMENTS = """
import matplotlib; matplotlib.use("agg")
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)
    def forward(self, x):
        return x + torch.tanh(self.f(x))
model = nn.Sequential(Block(), Block(), Block(), nn.Linear(4, 3)).eval()
x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
chain = rp.unravel(model, x)
frame = rp.lesion_study(chain, [(x, y)], rp.single_deletions(chain), progress=False)
gradient = rp.gradient_by_path_length(chain, x, y, progress=False)
rp.figures.plot_path_histogram(rp.path_histogram(chain))
rp.figures.plot_unraveled_graph(rp.unraveled_graph(3))
rp.figures.plot_single_deletions(frame.assign(network='tiny', block_index=frame.blocks.str[0]))
rp.load_network("preact-resnet-20"), rp.load_dataset("fashion-mnist")
print(len(chain), len(frame), len(gradient))
"""


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    extras = set(PROJECT["optional-dependencies"]) - {"test"}
    names = {requirement(line)[0].replace("-", "_") for extra in extras for line in requirements_of(extra)}
    modules = {"PIL" if name == "pillow" else name for name in names} - {"PIL"}  # matplotlib needs it
    script = WITHOUT_EXTRAS.replace("{EXTRAS}", repr(modules)) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_instruments_need_no_extra():
    done = run_without_extras(INSTRUMENTS)
    assert done.stdout.split() == ["3", "3", "4"], done.stderr


NEEDS = {
    "rp.widgets": "notebooks",
    "import resnet_paths.reproduce.runner": "notebooks",
    "from resnet_paths.reproduce.training import *; train(TrainingSettings('plain-20'))": "train",
}


def test_what_needs_an_extra_says_which(tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r})\nfor code in {list(NEEDS)!r}:\n"
    code += "    try:\n        exec(code)\n    except Exception as error:\n        print(str(error).splitlines()[-1])\n"
    done = run_without_extras(code)
    assert done.returncode == 0, done.stderr
    for message, extra in zip(done.stdout.splitlines(), NEEDS.values(), strict=True):
        assert f"pip install 'resnet_paths[{extra}]'" in message
