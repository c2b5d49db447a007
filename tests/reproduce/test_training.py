"""The same seed gives the same weights, stopped and resumed or not, and a run that fails leaves nothing finished."""

import dataclasses
import math

import lightning_fabric
import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric.plugins.precision import Precision
from safetensors.torch import load_file
from torch.nn import functional as F

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce import training
from resnet_paths.reproduce.training import TrainingSettings, train
from resnet_paths.reproduce.training.settings import learning_rate_at
from resnet_paths.zoo import build_network, load_network
from resnet_paths.zoo.weights import read_metadata, read_tensors, write_tensors
from tests.reproduce.small_runs import same_run, start_training

SETTINGS = TrainingSettings("plain-20", epochs=3, batch_size=16, seed=4)
NAME = "plain-20-seed4"
COLUMNS = [
    "network",
    "seed",
    "epoch",
    "learning_rate",
    "train_loss",
    "train_error_rate",
    "test_loss",
    "test_error_rate",
    "seconds",
]


@pytest.fixture
def run(run):
    return lambda folder, settings=SETTINGS, **options: run(folder, settings, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing stopped; made by the first test that needs it."""
    return tmp_path_factory.mktemp("uninterrupted")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# A run


def test_a_run_writes_weights_and_log_and_nothing_else(run, tmp_path):
    before = torch.get_rng_state()
    path = run(tmp_path / "new" / "runs")
    assert torch.equal(torch.get_rng_state(), before)
    assert path == tmp_path / "new" / "runs" / f"{NAME}.safetensors"
    assert names_in(path.parent) == [f"{NAME}.csv", f"{NAME}.safetensors"]
    metadata = read_metadata(path)
    assert {key: metadata[key] for key in dataclasses.asdict(SETTINGS)} == dataclasses.asdict(SETTINGS)
    assert (metadata["in_channels"], metadata["num_classes"]) == (1, 10)
    tensors = load_file(path)
    assert all(value.dtype == torch.float32 for key, value in tensors.items() if "num_batches" not in key)
    assert tensors["bn.num_batches_tracked"] == 9
    assert metadata["num_parameters"] == sum(p.numel() for p in load_network("plain-20", path).parameters())


def test_the_log_is_tidy(run, tmp_path):
    path = run(tmp_path)
    log = pd.read_csv(path.with_suffix(".csv"))
    assert list(log.columns) == COLUMNS
    assert log["epoch"].tolist() == [1, 2, 3]
    assert set(log["network"]) == {"plain-20"}
    assert set(log["seed"]) == {4}
    assert log["train_error_rate"].between(0, 1).all()
    assert log["test_error_rate"].between(0, 1).all()
    rates = [learning_rate_at(SETTINGS, epoch) for epoch in (1, 2, 3)]
    assert log["learning_rate"].tolist() == pytest.approx(rates, rel=1e-5)
    kept = pd.DataFrame(read_metadata(path)["log"])
    assert list(kept.columns) == COLUMNS
    assert kept["train_loss"].tolist() == pytest.approx(log["train_loss"].tolist(), rel=1e-5)
    assert (kept["test_error_rate"] * 21 % 1).tolist() == pytest.approx([0, 0, 0], abs=1e-9)


def test_something_is_learned(run, tmp_path):
    log = pd.read_csv(run(tmp_path, dataclasses.replace(SETTINGS, epochs=6)).with_suffix(".csv"))
    assert log["train_loss"].iloc[-1] < 0.8 * log["train_loss"].iloc[0]


def test_the_same_seed_gives_the_same_weights(run, tmp_path):
    torch.manual_seed(1)
    first = run(tmp_path / "a")
    torch.manual_seed(2)
    same_run(first, run(tmp_path / "b"))


def test_another_seed_gives_other_weights(run, tmp_path):
    one = dataclasses.replace(SETTINGS, epochs=1)
    other = dataclasses.replace(one, seed=5)
    assert not torch.equal(load_file(run(tmp_path, one))["fc.weight"], load_file(run(tmp_path, other))["fc.weight"])
    assert len(names_in(tmp_path)) == 4  # runs of several seeds share a folder


def test_one_step_by_hand(make_images, tmp_path):
    """One batch, one epoch: SGD with Nesterov momentum and weight decay, written out."""
    images = make_images(6)
    settings = TrainingSettings("preact-resnet-20", epochs=1, batch_size=6, seed=2, warmup_epochs=0, momentum=0.8)
    model = build_network("preact-resnet-20", torch.Generator().manual_seed(2)).to(memory_format=torch.channels_last)
    ((inputs, labels),) = training.augmented_batches(images, settings, 0, 0, 1)
    # With one step in all, the cosine has already reached zero: measure the step half an epoch in.
    settings = dataclasses.replace(settings, epochs=2)
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi / 2))
    expected = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad + 5e-4 * parameter.detach()
        expected[name] = parameter.detach() - rate * (gradient + 0.8 * gradient)  # the buffer starts as the gradient

    class Stop(Exception):  # noqa: N818
        pass

    def stop(*args):
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_write_log", stop)
        with pytest.raises(Stop):
            train(settings, tmp_path, accelerator="cpu", train_set=images, test_set=images, progress=False)
    found = read_tensors(tmp_path / "preact-resnet-20-seed2.checkpoint.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], value, rtol=1e-5, atol=1e-7)
    assert read_metadata(tmp_path / "preact-resnet-20-seed2.checkpoint.safetensors")["log"][0][
        "train_loss"
    ] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.filterwarnings("ignore:You passed `Fabric")
def test_mixed_precision_keeps_float32_weights(run, tmp_path, precision):
    full = run(tmp_path / "full", dataclasses.replace(SETTINGS, epochs=1))
    mixed = run(tmp_path / "mixed", dataclasses.replace(SETTINGS, epochs=1, precision=precision))
    tensors = load_file(mixed)
    assert all(value.dtype == torch.float32 for key, value in tensors.items() if "num_batches" not in key)
    assert not torch.equal(tensors["fc.weight"], load_file(full)["fc.weight"])
    assert read_metadata(mixed)["precision"] == precision
    torch.testing.assert_close(tensors["fc.weight"], load_file(full)["fc.weight"], atol=0.02, rtol=0)


def test_a_finished_run_is_returned_at_once(run, tmp_path, monkeypatch):
    path = run(tmp_path)
    content = path.read_bytes(), path.stat().st_mtime_ns
    monkeypatch.setattr(training, "build_network", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(training, "load_dataset", lambda *args: pytest.fail("data read"))
    assert run(tmp_path, train_set=None, test_set=None) == path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == content


def test_splits_are_those_of_the_data_set(make_images, tmp_path, monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return make_images(20, name=name)

    monkeypatch.setattr(training, "load_dataset", load)
    settings = TrainingSettings("plain-20", dataset="cifar-10", epochs=1, batch_size=10)
    path = train(settings, tmp_path, accelerator="cpu", progress=False)
    assert asked == [("cifar-10", "train"), ("cifar-10", "test")]
    assert read_metadata(path)["in_channels"] == 3
    assert load_network("plain-20", path)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_progress_goes_to_standard_error(run, tmp_path, capsys):
    run(tmp_path, dataclasses.replace(SETTINGS, epochs=1), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "plain-20" in captured.err
    run(tmp_path / "quiet", dataclasses.replace(SETTINGS, epochs=1))
    assert "plain-20" not in capsys.readouterr().err


# Stopped and resumed


def stop_at(monkeypatch, place, call):
    """Let the named step of training be interrupted instead of its call number `call` (from 1)."""
    original, calls = getattr(training, place), []

    def step(*args, **kwargs):
        calls.append(place)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(training, place, step)


@pytest.mark.parametrize(
    ("place", "call", "epochs_kept"),
    [
        ("_train_one_epoch", 1, 0),
        ("_measure", 1, 0),
        ("write_checkpoint", 1, 0),
        ("_write_log", 1, 1),  # the checkpoint has the epoch, the log has not
        ("_train_one_epoch", 3, 2),
        ("write_checkpoint", 3, 2),
        ("_write_log", 3, 3),
        ("evaluate", 1, 3),
        ("write_tensors", 1, 3),  # the weights themselves
    ],
)
def test_stopped_and_resumed_is_the_same_run(run, uninterrupted, tmp_path, monkeypatch, place, call, epochs_kept):
    with monkeypatch.context() as patch:
        stop_at(patch, place, call)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not (tmp_path / f"{NAME}.safetensors").exists()
    assert not [name for name in names_in(tmp_path) if "unfinished" in name]
    checkpoint = tmp_path / f"{NAME}.checkpoint.safetensors"
    assert checkpoint.exists() == (epochs_kept > 0)
    if epochs_kept:
        assert [row["epoch"] for row in read_metadata(checkpoint)["log"]] == list(range(1, epochs_kept + 1))
    epochs = []
    original = training._train_one_epoch
    monkeypatch.setattr(training, "_train_one_epoch", lambda *args: (epochs.append(args[5]), original(*args))[1])
    path = run(tmp_path)
    assert epochs == list(range(epochs_kept, 3))
    same_run(path, run(uninterrupted))
    assert names_in(tmp_path) == [f"{NAME}.csv", f"{NAME}.safetensors"]


def test_stopped_inside_an_epoch_and_resumed_is_the_same_run(run, uninterrupted, tmp_path, monkeypatch):
    original, seen = training.augmented_batches, []

    def batches(*args):
        for batch in original(*args):
            seen.append(batch)
            if len(seen) == 5:  # the second batch of the second epoch
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(training, "augmented_batches", batches)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert len(pd.read_csv(tmp_path / f"{NAME}.csv")) == 1
    same_run(run(tmp_path), run(uninterrupted))


def test_resuming_in_mixed_precision_is_the_same_run(run, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, precision="bf16-mixed")
    with monkeypatch.context() as patch:
        stop_at(patch, "_write_log", 2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", settings)
    same_run(run(tmp_path / "stopped", settings), run(tmp_path / "whole", settings))


@pytest.mark.parametrize(
    "field", ["epochs", "batch_size", "learning_rate", "warmup_epochs", "momentum", "weight_decay", "crop_padding"]
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_in_the_same_folder_are_refused(run, uninterrupted, tmp_path, field, finished):
    path = run(uninterrupted)
    if finished:
        for part in (path, path.with_suffix(".csv")):
            (tmp_path / part.name).write_bytes(part.read_bytes())
    else:
        write_tensors(tmp_path / f"{NAME}.checkpoint.safetensors", load_file(path), read_metadata(path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = dataclasses.replace(SETTINGS, **{field: getattr(SETTINGS, field) / 2 if field == "momentum" else 7})
    with pytest.raises(ResnetPathsError, match=rf"{field}: got .*; allowed: .*{NAME}.*another folder"):
        run(tmp_path, other)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_checkpoint_that_is_cut_is_refused(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "_write_log", 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    checkpoint = tmp_path / f"{NAME}.checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ResnetPathsError, match=r"checkpoint\.safetensors.*complete safetensors file"):
        run(tmp_path)
    assert names_in(tmp_path) == [checkpoint.name]


@pytest.mark.parametrize("lost", ["momentum.fc.bias", "model.conv.weight", "log"])
def test_a_checkpoint_that_lacks_a_part_is_refused(run, tmp_path, monkeypatch, lost):
    with monkeypatch.context() as patch:
        stop_at(patch, "_write_log", 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    checkpoint = tmp_path / f"{NAME}.checkpoint.safetensors"
    tensors, metadata = read_tensors(checkpoint), read_metadata(checkpoint)
    tensors.pop(lost, None)
    metadata.pop(lost, None)
    write_tensors(checkpoint, tensors, metadata)
    name = lost.removeprefix("model.")
    with pytest.raises(ResnetPathsError, match=rf"checkpoint .*{name}.*Delete it to start again"):
        run(tmp_path)


def test_momentum_is_resumed_on_the_device_of_the_weights(run, tmp_path, monkeypatch):
    """No GPU is needed to see that a buffer would stay behind: the meta device is another one, too."""
    stop_at(monkeypatch, "_write_log", 1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    with torch.device("meta"):
        model = torch.nn.Module()
        model.load_state_dict = lambda state: None
        model.fc = torch.nn.Linear(64, 10)
    sgd = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    training.resume(tmp_path / f"{NAME}.checkpoint.safetensors", model, sgd, Precision(), SETTINGS)
    assert {state["momentum_buffer"].device.type for state in sgd.state.values()} == {"meta"}
    assert len(sgd.state) == 2


def test_a_checkpoint_is_read_after_the_weights_moved_to_their_device(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "_write_log", 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    order = []
    setup, resume = lightning_fabric.Fabric.setup, training.resume
    monkeypatch.setattr(lightning_fabric.Fabric, "setup", lambda *args: (order.append("setup"), setup(*args))[1])
    monkeypatch.setattr(training, "resume", lambda *args: (order.append("resume"), resume(*args))[1])
    run(tmp_path)
    assert order == ["setup", "resume"]


# Snapshots


def test_snapshots_are_networks_on_the_way_and_do_not_change_the_run(run, uninterrupted, tmp_path):
    run(uninterrupted)
    path = run(tmp_path, snapshots=(0, 1, 3))
    same_run(uninterrupted / f"{NAME}.safetensors", path)
    assert names_in(tmp_path) == [
        f"{NAME}.csv",
        *(f"{NAME}.epoch{epoch}.safetensors" for epoch in (0, 1, 3)),
        f"{NAME}.safetensors",
    ]
    first = load_network("plain-20", tmp_path / f"{NAME}.epoch0.safetensors")
    initial = build_network("plain-20", torch.Generator().manual_seed(SETTINGS.seed))
    for (name, value), other in zip(first.named_parameters(), initial.parameters(), strict=True):
        assert torch.equal(value, other), name
    assert len(first.training_log) == 0
    one = read_metadata(tmp_path / f"{NAME}.epoch1.safetensors")
    log = pd.read_csv(path.with_suffix(".csv"))
    assert one["epochs_done"] == 1
    assert one["test_error_rate"] == pytest.approx(log.test_error_rate[0])
    last, end = load_file(tmp_path / f"{NAME}.epoch3.safetensors"), load_file(path)
    assert all(torch.equal(last[name], end[name]) for name in end)


def test_the_initial_snapshot_has_batchnorm_statistics_of_training_images(run, make_images, tmp_path):
    run(tmp_path, snapshots=(0,))
    model = build_network("plain-20", torch.Generator().manual_seed(SETTINGS.seed)).train()
    model.bn.momentum = None
    with torch.no_grad():
        for images, _ in training.augmented_batches(make_images(40), SETTINGS, 0, 0, 1):
            model.bn(model.conv(images))
    stored = load_file(tmp_path / f"{NAME}.epoch0.safetensors")
    torch.testing.assert_close(stored["bn.running_mean"], model.bn.running_mean)
    torch.testing.assert_close(stored["bn.running_var"], model.bn.running_var)


def test_snapshots_survive_a_stop(run, tmp_path, monkeypatch):
    run(tmp_path / "whole", snapshots=(0, 2))
    measure, calls = training._measure, []

    def stop_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(training, "_measure", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", snapshots=(0, 2))
    run(tmp_path / "stopped", snapshots=(0, 2))
    for epoch in (0, 2):
        one, other = (load_file(tmp_path / f / f"{NAME}.epoch{epoch}.safetensors") for f in ("whole", "stopped"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_snapshots_of_epochs_that_are_over_are_refused(run, uninterrupted, tmp_path, monkeypatch):
    left = run(uninterrupted)
    before = names_in(left.parent)
    with pytest.raises(ResnetPathsError, match=rf"snapshots: got 0; allowed: epochs after 3, .*{NAME}.*another folder"):
        run(uninterrupted, snapshots=(0, 1))
    assert names_in(left.parent) == before
    with monkeypatch.context() as patch:
        stop_at(patch, "_write_log", 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, snapshots=(1,))
    with pytest.raises(ResnetPathsError, match=r"snapshots: got 0; allowed: epochs after 1"):
        run(tmp_path, snapshots=(0, 1, 2))
    run(tmp_path, snapshots=(1, np.int64(2)))
    assert {f"{NAME}.epoch{epoch}.safetensors" for epoch in (1, 2)} < set(names_in(tmp_path))


@pytest.mark.parametrize("epoch", [-1, 4, "1"])
def test_snapshots_beyond_the_run_are_refused(run, tmp_path, epoch):
    with pytest.raises(ResnetPathsError, match=r"snapshots.*numbers of epochs from 0 to 3"):
        run(tmp_path, snapshots=(epoch,))


# Runs that fail


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    settings = dataclasses.replace(SETTINGS, learning_rate=1e25)
    with pytest.raises(ResnetPathsError, match=r"learning_rate: got 1e\+25; .*finite.* epoch 1.*a third of this rate"):
        run(tmp_path, settings)
    assert names_in(tmp_path) == []


def test_weights_that_are_not_finite_after_the_last_step_are_never_written(run, tmp_path, monkeypatch):
    original = training._train_one_epoch

    def spoil(fabric, model, *args):
        row = original(fabric, model, *args)
        if row["epoch"] == 2:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = math.nan
        return row

    monkeypatch.setattr(training, "_train_one_epoch", spoil)
    with pytest.raises(ResnetPathsError, match="a finite loss; it became non-finite in epoch 2"):
        run(tmp_path)
    assert names_in(tmp_path) == [f"{NAME}.checkpoint.safetensors", f"{NAME}.csv"]
    assert len(pd.read_csv(tmp_path / f"{NAME}.csv")) == 1
    read_tensors(tmp_path / f"{NAME}.checkpoint.safetensors")


@pytest.mark.parametrize("argument", ["train_set", "test_set"])
def test_images_of_another_data_set_are_refused(run, make_images, tmp_path, argument):
    with pytest.raises(ResnetPathsError, match=f"{argument}: got 'cifar-10'; allowed: images of 'fashion-mnist'"):
        run(tmp_path / "new", **{argument: make_images(20, name="cifar-10")})
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_training(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResnetPathsError, match=r"folder: got '.*file/runs'; allowed: a writable folder"):
        run(tmp_path / "file" / "runs")


@pytest.mark.parametrize(
    "options",
    [
        {"accelerator": "abacus"},
        {"devices": 0},
        {"devices": "two"},
        {"num_nodes": 0},
        {"strategy": "chess"},
    ],
)
def test_what_fabric_cannot_do_is_refused(run, tmp_path, options):
    with pytest.raises(ResnetPathsError, match="accelerator, devices, num_nodes, strategy, precision") as caught:
        run(tmp_path / "new", **options)
    assert str(*options.values()) in caught.value.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_the_largest_seed_works(run, tmp_path):
    run(tmp_path, dataclasses.replace(SETTINGS, seed=2**32 - 1, epochs=1))


# Several processes


@pytest.mark.slow
def test_two_processes_train_one_network(uninterrupted, run, tmp_path):
    """Learning rates, images and their order are those of one process; BatchNorm sees halves of each batch."""
    finished = start_training(tmp_path / "runs", SETTINGS, devices=2, strategy="ddp")
    assert finished.returncode == 0, finished.stderr
    path = tmp_path / "runs" / f"{NAME}.safetensors"
    two, one = read_metadata(path), read_metadata(run(uninterrupted))
    assert names_in(path.parent) == [f"{NAME}.csv", f"{NAME}.safetensors"]
    assert [row["learning_rate"] for row in two["log"]] == [row["learning_rate"] for row in one["log"]]
    for row, alone in zip(two["log"], one["log"], strict=True):
        assert row["train_error_rate"] * 40 == pytest.approx(round(row["train_error_rate"] * 40), abs=1e-4)
        assert row["test_error_rate"] * 21 == pytest.approx(round(row["test_error_rate"] * 21), abs=1e-4)
        assert row["train_loss"] == pytest.approx(alone["train_loss"], rel=0.2)
    stated = {key: two[key] for key in ("test_loss", "test_error_rate")}
    assert stated["test_error_rate"] == pytest.approx(two["log"][-1]["test_error_rate"], abs=0.1)


def test_a_last_batch_too_small_for_the_processes_is_refused(make_images, tmp_path, monkeypatch):
    class TwoProcesses(lightning_fabric.Fabric):
        world_size = 2

    monkeypatch.setattr(lightning_fabric, "Fabric", TwoProcesses)
    with pytest.raises(ResnetPathsError, match=r"batch_size: got 16; .*each of 2 processes.*33 images.*have 1"):
        train(SETTINGS, tmp_path, accelerator="cpu", train_set=make_images(33), test_set=make_images(5))
