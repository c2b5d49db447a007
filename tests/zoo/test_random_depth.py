"""Exactly the blocks that are drawn are trained, the eval mode scales by their chance, and a stop changes nothing."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce import training
from resnet_paths.reproduce.training import TrainingSettings
from resnet_paths.reproduce.training.batches import generator_of
from resnet_paths.zoo import NETWORKS, build_network, load_network
from resnet_paths.zoo.weights import read_metadata, read_tensors
from tests.reproduce.small_runs import killed_and_resumed, same_run, start_training

DRAWN = ["stochastic-depth-20", "effective-20"]


def untrained(name, **options):
    return build_network(name, torch.Generator().manual_seed(0), **options)


def images(batch=2, size=8):
    return torch.randn(batch, 1, size, size, generator=torch.Generator().manual_seed(1))


def blocks_run(model, x):
    """Numbers of the blocks whose branch runs in a forward pass."""
    ran = []
    handles = [
        block.conv2.register_forward_hook(lambda *args, index=index: ran.append(index))
        for index, block in enumerate(model.blocks())
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return ran


# Which blocks


@pytest.mark.parametrize(("name", "drawn", "blocks"), [("effective-20", 4, 9), ("effective-56", 12, 27)])
def test_each_batch_trains_exactly_the_papers_share(name, drawn, blocks):
    model, generator = untrained(name), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(12):
        model.draw_blocks(generator)
        ran = blocks_run(model, images())
        assert len(ran) == drawn
        seen.add(tuple(ran))
    assert len(model.blocks()) == blocks
    assert len(seen) > 8


def test_the_papers_network_trains_23_of_54():
    facts = NETWORKS["effective-110"]
    assert facts.num_drawn_blocks == (23, 23)
    with torch.device("meta"):
        model = facts.build()
    assert {block.survival for block in model.blocks()} == {23 / 54}
    assert 54 * 23 / 54 / 2 == 11.5  # where the paper's path lengths centre
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(54)
    for _ in range(2000):
        model.draw_blocks(generator)
        marks = torch.tensor([block.is_drawn for block in model.blocks()])
        assert marks.sum() == 23
        counts += marks
    assert (counts / 2000 - 23 / 54).abs().max() < 4.5 * math.sqrt(23 / 54 * 31 / 54 / 2000)


def test_a_range_of_numbers_is_drawn_from_uniformly():
    model, generator = untrained("effective-20", num_drawn_blocks=(2, 5)), torch.Generator().manual_seed(0)
    numbers = torch.zeros(10)
    for _ in range(2000):
        model.draw_blocks(generator)
        numbers[sum(block.is_drawn for block in model.blocks())] += 1
    assert numbers.nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert (numbers[2:6] / 2000 - 1 / 4).abs().max() < 4.5 * math.sqrt(3 / 16 / 2000)
    assert {block.survival for block in model.blocks()} == {3.5 / 9}


def test_survival_falls_linearly_to_a_half():
    model, generator = untrained("stochastic-depth-20"), torch.Generator().manual_seed(0)
    survival = torch.tensor([block.survival for block in model.blocks()])
    assert survival.tolist() == pytest.approx([1 - step / 9 * 0.5 for step in range(1, 10)])
    counts = torch.zeros(9)
    for _ in range(2000):
        model.draw_blocks(generator)
        counts += torch.tensor([block.is_drawn for block in model.blocks()])
    assert ((counts / 2000 - survival).abs() < 4.5 * (survival * (1 - survival) / 2000).sqrt()).all()
    # Huang et al. 2016, section 3: of L blocks, (3L - 1) / 4 are expected.
    assert survival.sum().item() == pytest.approx((3 * 9 - 1) / 4)


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_from_the_generator_alone(name):
    def draws(seed):
        model, generator = untrained(name), torch.Generator().manual_seed(seed)
        marks = []
        for _ in range(5):
            model.draw_blocks(generator)
            marks.append([block.is_drawn for block in model.blocks()])
        return marks

    torch.manual_seed(3)
    first = draws(1)
    assert first == draws(1)
    assert first != draws(2)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (10, "10"), ((5, 4), r"\(5, 4\)"), ((1, 2, 3), ""), ("23", ""), (True, ""), (2.0, "")],
)
def test_numbers_that_cannot_be_drawn(number, shown):
    for call in (
        lambda: untrained("effective-20", num_drawn_blocks=number),
        lambda: TrainingSettings("effective-20", num_drawn_blocks=number),
    ):
        with pytest.raises(ResnetPathsError, match=rf"num_drawn_blocks: got .*{shown}.*an int from 1 to 9") as caught:
            call()
        assert caught.value.value is number


@pytest.mark.parametrize("name", ["plain-20", "stochastic-depth-20"])
def test_other_networks_have_no_such_choice(name):
    with pytest.raises(ResnetPathsError, match=f"num_drawn_blocks: got 3; allowed: None for '{name}'"):
        TrainingSettings(name, num_drawn_blocks=3)


# What the blocks compute


def branch_by_hand(block, x):
    activated = F.relu(block.bn1(x))
    inner = F.conv2d(activated, block.conv1.weight, stride=block.conv1.stride, padding=1)
    return activated, F.conv2d(F.relu(block.bn2(inner)), block.conv2.weight, padding=1)


@pytest.mark.parametrize("name", DRAWN)
def test_eval_mode_scales_each_branch_by_its_chance(name):
    model = untrained(name).eval()
    for block in model.blocks():
        block.is_drawn = False  # of no account in eval mode
        x = images(2, 8).expand(2, block.conv1.in_channels, 8, 8)
        activated, branch = branch_by_hand(block, x)
        skip = x if block.projection is None else F.conv2d(activated, block.projection.weight, stride=2)
        assert torch.equal(block(x), skip + block.survival * branch)
        assert 0 < block.survival < 1


@pytest.mark.parametrize("name", DRAWN)
def test_training_adds_the_whole_branch_or_nothing(name):
    model = untrained(name)
    for block in model.blocks():
        x = images(2, 8).expand(2, block.conv1.in_channels, 8, 8)
        activated, branch = branch_by_hand(block, x)
        skip = x if block.projection is None else F.conv2d(activated, block.projection.weight, stride=2)
        assert torch.equal(block(x), skip + branch)
        block.is_drawn = False
        assert torch.equal(block(x), skip)


def test_the_mean_over_draws_is_what_eval_mode_computes():
    """For one block, whose output is linear in whether it is drawn: E[skip + b * branch] = skip + p * branch."""
    model, x = untrained("effective-20"), images(4, 8).expand(4, 16, 8, 8)
    block, generator = model.blocks()[1], torch.Generator().manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the same statistics in both modes
    total = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(1000):
            model.draw_blocks(generator)
            total += block(x)
        mean = total / 1000
        expected = block.eval()(x)
        branch = (expected - x) / block.survival
    assert ((mean - expected).abs() <= 4.5 * math.sqrt(4 / 9 * 5 / 9 / 1000) * branch.abs() + 1e-4).all()


@pytest.mark.parametrize("name", DRAWN)
def test_blocks_left_out_keep_weights_statistics_and_momentum(name):
    model = untrained(name)
    model.draw_blocks(torch.Generator().manual_seed(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(images()).square().sum().backward()
    out = [block for block in model.blocks() if not block.is_drawn]
    assert out
    for number, block in enumerate(model.blocks()):
        touched = {parameter.grad is not None for parameter in (block.conv1.weight, block.bn2.bias, block.conv2.weight)}
        assert touched == {block.is_drawn}
        # The projection and the pre-activation that it shares are no part of the branch.
        assert (block.bn1.weight.grad is None) == (not block.is_drawn and block.projection is None)
        stage, place = divmod(number, 3)
        moved = model.state_dict()[f"layer{stage + 1}.{place}.bn2.running_mean"]
        assert torch.equal(moved, before[f"layer{stage + 1}.{place}.bn2.running_mean"]) != block.is_drawn


@pytest.mark.parametrize("depth", [20, 56])
def test_weights_are_named_as_in_the_ordinary_network(depth):
    ordinary = untrained(f"preact-resnet-{depth}").state_dict()
    for kind in ("stochastic-depth", "effective"):
        state = untrained(f"{kind}-{depth}").state_dict()
        assert state.keys() == ordinary.keys()
        assert all(torch.equal(value, ordinary[key]) for key, value in state.items())  # the same start, by seed


# Training


@pytest.mark.parametrize("name", DRAWN)
def test_blocks_are_drawn_once_a_batch_as_seed_and_epoch_say(run, tmp_path, monkeypatch, name):
    settings = TrainingSettings(name, epochs=2, batch_size=16, seed=7)
    cls, seen = type(untrained(name)), []
    draw = cls.draw_blocks

    def keep(self, generator):
        draw(self, generator)
        seen.append([block.is_drawn for block in self.blocks()])

    monkeypatch.setattr(cls, "draw_blocks", keep)
    run(tmp_path, settings)
    monkeypatch.undo()
    model, expected = untrained(name), []
    for epoch in range(2):
        generator = generator_of(settings, epoch, "blocks")
        for _ in range(3):
            model.draw_blocks(generator)
            expected.append([block.is_drawn for block in model.blocks()])
    assert seen == expected


def test_the_number_drawn_is_kept_with_the_weights(run, tmp_path):
    settings = TrainingSettings("effective-20", epochs=1, batch_size=20, num_drawn_blocks=(2, 3))
    path = run(tmp_path, settings, snapshots=(0,))
    assert read_metadata(path)["num_drawn_blocks"] == [2, 3]
    for file in (path, path.with_name("effective-20-seed0.epoch0.safetensors")):
        assert {block.survival for block in load_network("effective-20", file).blocks()} == {2.5 / 9}
    assert run(tmp_path, settings) == path  # finished, and known as the same run
    with pytest.raises(ResnetPathsError, match=r"num_drawn_blocks: got \[4, 4\]; allowed: \[2, 3\]"):
        run(tmp_path, dataclasses.replace(settings, num_drawn_blocks=None))
    assert TrainingSettings("effective-20", num_drawn_blocks=3).num_drawn_blocks == (3, 3)


def test_parameters_that_no_batch_has_touched_survive_a_stop(run, tmp_path, monkeypatch):
    """The optimizer has no momentum for them yet, and starts it when they are first drawn."""
    settings = TrainingSettings("effective-20", epochs=4, batch_size=40, num_drawn_blocks=1)
    checkpoints = []
    write = training.write_checkpoint

    def stop(path, *args):
        write(path, *args)
        checkpoints.append((read_metadata(path)["untouched"], set(read_tensors(path))))
        raise KeyboardInterrupt

    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(training, "write_checkpoint", stop)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "stopped", settings)
    untouched, names = checkpoints[0]
    assert "layer1.2.conv1.weight" in untouched or "layer1.1.conv1.weight" in untouched
    assert not any(f"momentum.{name}" in names for name in untouched)
    assert "momentum.conv.weight" in names
    assert len(checkpoints[3][0]) < len(untouched)
    same_run(run(tmp_path / "stopped", settings), run(tmp_path / "whole", settings))


MOMENTS = [("in a batch", 5), ("half a file", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        TrainingSettings("effective-20", epochs=3, batch_size=16, seed=4),
        TrainingSettings("stochastic-depth-20", epochs=3, batch_size=16, seed=4),
        TrainingSettings("effective-20", epochs=3, batch_size=16, optimizer="adamw", learning_rate=0.003),
    ],
    ids=["effective", "stochastic depth", "AdamW"],
)
def test_killed_and_resumed_is_the_same_run(run, tmp_path, settings):
    killed_and_resumed(tmp_path / "killed", settings, MOMENTS)
    name = f"{settings.network}-seed{settings.seed}.safetensors"
    same_run(tmp_path / "killed" / name, run(tmp_path / "whole", settings))


@pytest.mark.slow
def test_two_processes_draw_the_same_blocks(run, tmp_path):
    """Else they would wait for each other's gradients for ever."""
    settings = TrainingSettings("effective-20", epochs=3, batch_size=16, seed=4)
    finished = start_training(tmp_path / "two", settings, devices=2, strategy="ddp")
    assert finished.returncode == 0, finished.stderr
    two = read_metadata(tmp_path / "two" / "effective-20-seed4.safetensors")["log"]
    one = read_metadata(run(tmp_path / "one", settings))["log"]
    assert [row["train_loss"] for row in two] == pytest.approx([row["train_loss"] for row in one], rel=0.2)
