"""`resnet-paths doctor` ends at the step that fails, and says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce import cli
from resnet_paths.reproduce.doctor import diagnose, find_function

SOURCE = """
import torch
from torch import nn


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Net(nn.Module):
    def __init__(self, own_rule=False):
        super().__init__()
        self.a, self.b, self.own_rule = nn.Linear(4, 4), nn.Linear(4, 4), own_rule

    def forward(self, x):
        x = x + self.a(x).relu()
        x = Twice.apply(x) if self.own_rule else x
        return x + self.b(x).relu()


def make_model():
    return Net()


def with_example():
    return Net().eval(), torch.ones(2, 4)


def with_own_rule():
    return Net(own_rule=True), torch.ones(2, 4)


def number():
    return 3


def broken():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some_net.py"
    path.write_text(SOURCE)
    return path


def doctor(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])


def test_a_model_that_unravels_passes_every_step(file):
    result = doctor(f"{file}:make_model", "--shape", "2,4")
    assert result.exit_code == 0, result.output
    words = [line[:13].strip() for line in result.output.splitlines()[:5]]
    assert words == ["model", "forward pass", "blocks", "comparison", "deletion"]
    assert "40 parameters, was in training mode: call model.eval()" in result.output
    assert "2 blocks, 4 paths; skips: 2 identity" in result.output
    assert "ResidualChain of 2 blocks" in result.output
    assert "FAILED" not in result.output


def test_the_deletion_changes_the_output_by_what_it_states(file):
    torch.manual_seed(0)
    model = find_function(f"{file}:make_model")().eval()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        lesioned = x + model.b(x).relu()
        change = 100 * (lesioned - model(x)).norm() / model(x).norm()
    *_, last = diagnose(lambda: model, [2, 4])
    assert last.finding.startswith(f"without 'a' the output changes by {float(change):.3g} %")


@pytest.mark.parametrize(
    ("function", "step", "reason"),
    [
        ("make_model", "example", "use --shape 2,3,224,224"),
        ("broken", "model", "RuntimeError: no weights"),
        ("number", "model", "the function returned int, not an nn.Module"),
        ("with_own_rule", "comparison", "Twice"),
    ],
)
def test_it_ends_at_the_step_that_fails(file, function, step, reason):
    result = doctor(f"{file}:{function}")
    assert result.exit_code == 1
    *_, failed, advice = result.output.strip().splitlines()
    assert failed.startswith(f"{step:<12} FAILED")
    assert reason in failed
    assert "own_model.md" in advice


def test_inputs_that_the_model_does_not_take(file):
    result = doctor(f"{file}:make_model", "--shape", "2,5")
    assert result.exit_code == 1
    assert "forward pass FAILED  RuntimeError" in result.output


def test_a_network_without_skips_has_nothing_to_delete():
    layers = [nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(4)]
    steps = list(diagnose(lambda: nn.Sequential(*layers), [2, 3]))
    assert steps[-1].name == "deletion"
    assert not steps[-1].passed


@pytest.mark.parametrize(
    "place", ["make_model", "nowhere.py:make_model", "no_such_module_at_all:f", "some_net.py:missing", ":f", "a.py:"]
)
def test_places_that_are_refused(file, monkeypatch, place):
    monkeypatch.chdir(file.parent)
    with pytest.raises(ResnetPathsError, match="model: got '"):
        find_function(place)


@pytest.mark.parametrize("shape", ["2,a", "0,3"])
def test_shapes_that_are_refused(file, shape):
    result = doctor(f"{file}:make_model", "--shape", shape)
    assert isinstance(result.exception, ResnetPathsError)
