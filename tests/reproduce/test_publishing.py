"""A published run is found by name, seed and moment, takes half the space, and says what that did to its error."""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from resnet_paths import zoo
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce import cli
from resnet_paths.reproduce.training import TrainingSettings, evaluate, publishing, train
from resnet_paths.reproduce.training.publishing import publish, published_errors
from resnet_paths.zoo import list_networks, load_network, networks_table, training_logs
from resnet_paths.zoo.weights import read_metadata, weights_in, write_tensors

NAME = "plain-20"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two finished runs of two epochs, with snapshots of the first."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def images(make_images):
    return make_images(30, seed=1)


@pytest.fixture
def finished(runs, make_images, images):
    for seed, snapshots in ((0, (0, 1)), (3, ())):
        settings = TrainingSettings(NAME, epochs=2, batch_size=20, seed=seed)
        options = {"accelerator": "cpu", "progress": False, "train_set": make_images(40), "test_set": images}
        train(settings, runs, snapshots=snapshots, **options)
    return runs


@pytest.fixture
def shipped(finished, images, tmp_path, monkeypatch):
    """The published runs, where networks are loaded from by name alone."""
    for seed in (0, 3):
        publish(finished / f"{NAME}-seed{seed}.safetensors", tmp_path / "networks", test_set=images)
    monkeypatch.setattr(zoo, "shipped_folder", lambda name: tmp_path)
    return tmp_path / "networks"


def test_names_of_published_files(finished, images, tmp_path):
    written = publish(finished / f"{NAME}-seed0.safetensors", tmp_path, test_set=images)
    names = ["plain-20.safetensors", "plain-20.epoch0.safetensors", "plain-20.epoch1.safetensors"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "plain-20.csv"])
    assert (tmp_path / "plain-20.csv").read_bytes() == (finished / f"{NAME}-seed0.csv").read_bytes()
    (other,) = publish(finished / f"{NAME}-seed3.safetensors", tmp_path, test_set=images)
    assert other.name == "plain-20-seed3.safetensors"
    assert other.with_suffix(".csv").is_file()


def test_parameters_are_stored_in_float16_and_loaded_in_float32(shipped, finished, images):
    halved = []
    for seed, snapshot in ((0, None), (0, 0), (0, 1), (3, None)):
        trained = load_network(NAME, finished, seed=seed, snapshot=snapshot)
        parameters = dict(trained.named_parameters())
        model = load_network(NAME, seed=seed, snapshot=snapshot)
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        metadata = read_metadata(weights_in(shipped, NAME)[seed, snapshot])
        before = read_metadata(weights_in(finished, NAME)[seed, snapshot])
        assert metadata["trained_test_error_rate"] == before["test_error_rate"]
        assert evaluate(model, images) == (metadata["test_loss"], metadata["test_error_rate"])
        changed = {"stored_as", "trained_test_error_rate", "test_error_rate", "test_loss"}
        assert {k: v for k, v in metadata.items() if k not in changed} == {
            k: v for k, v in before.items() if k not in changed
        }
        # After two epochs logits are nearly equal, and on some processors rounding changes an answer: then the rule
        # keeps float32.
        rounded = load_network(NAME, finished, seed=seed, snapshot=snapshot).half().float()
        rounded.load_state_dict({k: v for k, v in trained.state_dict().items() if k not in parameters}, strict=False)
        if evaluate(rounded, images)[1] != before["test_error_rate"]:
            continue
        halved.append((seed, snapshot))
        assert metadata["stored_as"] == "float16"
        stored = load_file(weights_in(shipped, NAME)[seed, snapshot])
        for key, value in trained.state_dict().items():
            assert stored[key].dtype == (torch.float16 if key in parameters else value.dtype)
            assert torch.equal(stored[key], value.to(stored[key].dtype))
        size = weights_in(shipped, NAME)[seed, snapshot].stat().st_size
        assert size < 0.55 * weights_in(finished, NAME)[seed, snapshot].stat().st_size
    assert halved


@pytest.mark.parametrize("extra", [1e-4, 2e-4])
def test_what_would_change_the_error_stays_float32(finished, images, tmp_path, monkeypatch, extra):
    """One image more or less of 10,000 is tolerated, two are not: then only the part that changes it stays float32."""
    trained = load_file(finished / f"{NAME}-seed0.safetensors")
    culprit, losses = "layer2.0.conv1.weight", []

    def evaluate_as_if(model, *args, **options):
        losses.append(float(len(losses)))
        is_rounded = not torch.equal(model.state_dict()[culprit], trained[culprit])
        return losses[-1], 0.1 + extra * is_rounded

    monkeypatch.setattr(publishing, "evaluate", evaluate_as_if)
    monkeypatch.setattr(publishing, "weights_in", lambda *args: {})
    (path,) = publish(finished / f"{NAME}-seed0.safetensors", tmp_path, test_set=images)
    metadata, stored = read_metadata(path), load_file(path)
    parameters = dict(load_network(NAME, finished, seed=0).named_parameters())
    kept = {name for name in parameters if stored[name].dtype == torch.float32}
    assert metadata["trained_test_error_rate"] == 0.1
    if extra == 1e-4:
        assert kept == set()
        assert (metadata["stored_as"], metadata["test_error_rate"]) == ("float16", 0.1 + extra)
        assert losses == [0, 1]
    else:
        assert culprit in kept
        assert len(kept) <= len(parameters) / 8
        assert (metadata["stored_as"], metadata["test_error_rate"]) == ("float16 and float32", 0.1)
        assert all(torch.equal(stored[name], trained[name]) for name in kept)
    assert metadata["test_loss"] in losses
    for name in set(parameters) - kept:
        assert torch.equal(stored[name], trained[name].half())


def test_parameters_that_cannot_be_halved_at_all(finished, images, tmp_path, monkeypatch):
    trained = load_file(finished / f"{NAME}-seed0.safetensors")

    def evaluate_as_if(model, *args, **options):
        return 0.5, 0.1 + 0.2 * any(not torch.equal(value, trained[key]) for key, value in model.state_dict().items())

    monkeypatch.setattr(publishing, "evaluate", evaluate_as_if)
    path, *_ = publish(finished / f"{NAME}-seed0.safetensors", tmp_path, test_set=images)
    assert read_metadata(path)["stored_as"] == "float32"
    stored = load_file(path)
    assert all(torch.equal(stored[key], value) for key, value in trained.items())


def test_a_tensor_too_large_for_float16_stays_float32(finished, images, tmp_path):
    tensors = load_file(finished / f"{NAME}-seed3.safetensors")
    tensors["layer1.0.conv1.weight"] *= 1e6  # BatchNorm takes it back
    tensors["layer1.0.bn1.running_mean"] *= 1e6
    tensors["layer1.0.bn1.running_var"] *= 1e12
    write_tensors(tmp_path / "run.safetensors", tensors, read_metadata(finished / f"{NAME}-seed3.safetensors"))
    (tmp_path / "run.csv").write_text("")
    path, *_ = publish(tmp_path / "run.safetensors", tmp_path / "networks", test_set=images)
    stored = load_file(path)
    assert stored["layer1.0.conv1.weight"].dtype == torch.float32
    assert stored["layer1.0.conv2.weight"].dtype == torch.float16
    assert torch.equal(stored["layer1.0.conv1.weight"], tensors["layer1.0.conv1.weight"])
    assert read_metadata(path)["stored_as"] == "float16 and float32"


def test_stored_files_are_measured_again(shipped, images, monkeypatch):
    frame = published_errors(shipped, test_set=images, progress=False)
    assert frame[["network", "dataset", "seed", "epoch"]].to_numpy().tolist() == [
        [NAME, "fashion-mnist", 0, 2],
        [NAME, "fashion-mnist", 0, 0],
        [NAME, "fashion-mnist", 0, 1],
        [NAME, "fashion-mnist", 3, 2],
    ]
    assert frame["as_stated"].all()
    assert frame["measured"].tolist() == frame["stated"].tolist()
    file = weights_in(shipped, NAME)[3, None]
    metadata = read_metadata(file)
    write_tensors(file, load_file(file), metadata | {"test_error_rate": metadata["test_error_rate"] + 2e-4})
    monkeypatch.setattr(publishing, "load_dataset", lambda *args: images)
    result = CliRunner().invoke(cli.app, ["networks", "--check"])
    assert result.exit_code == 1
    assert [line.split()[-1] for line in result.stdout.splitlines() if NAME in line][-4:] == ["True"] * 3 + ["False"]


def test_only_finished_runs_are_published(finished, images, tmp_path):
    for name in (f"{NAME}-seed0.epoch1.safetensors", f"{NAME}-seed0.epoch0.safetensors"):
        with pytest.raises(ResnetPathsError, match=r"weights: got .*; allowed: the weights of a finished run"):
            publish(finished / name, tmp_path, test_set=images)
    with pytest.raises(ResnetPathsError, match=r"weights file: got '.*absent"):
        publish(finished / "absent.safetensors", tmp_path, test_set=images)
    write_tensors(tmp_path / "foreign.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(ResnetPathsError, match="the weights of a finished run"):
        publish(tmp_path / "foreign.safetensors", tmp_path / "networks", test_set=images)
    (tmp_path / "copy.safetensors").write_bytes((finished / f"{NAME}-seed3.safetensors").read_bytes())
    with pytest.raises(ResnetPathsError, match="with their log in the same folder"):
        publish(tmp_path / "copy.safetensors", tmp_path / "networks", test_set=images)
    assert not (tmp_path / "networks").exists()


# Loading by seed and moment


def test_loading_a_seed_and_a_snapshot_by_name(shipped):
    weights = {
        which: load_network(NAME, seed=which[0], snapshot=which[1]).fc.weight for which in weights_in(shipped, NAME)
    }
    assert list(weights) == [(0, None), (0, 0), (0, 1), (3, None)]
    assert len({value.sum().item() for value in weights.values()}) == 4
    assert torch.equal(load_network(NAME).fc.weight, weights[0, None])
    assert torch.equal(load_network(NAME, snapshot=1).fc.weight, weights[0, 1])
    assert load_network(NAME, snapshot=1).training_log["epoch"].tolist() == [1]
    assert load_network(NAME, seed=3).training_log["seed"].tolist() == [3, 3]


def test_loading_from_a_folder_or_beside_a_file(finished):
    file = finished / f"{NAME}-seed0.safetensors"
    one = load_file(finished / f"{NAME}-seed0.epoch1.safetensors")["fc.weight"]
    assert torch.equal(load_network(NAME, finished, snapshot=1).fc.weight, one)
    assert torch.equal(load_network(NAME, str(file), snapshot=1).fc.weight, one)
    assert torch.equal(load_network(NAME, finished / f"{NAME}-seed0.epoch1.safetensors").fc.weight, one)
    assert torch.equal(load_network(NAME, finished).fc.weight, load_network(NAME, file).fc.weight)
    other = load_file(finished / f"{NAME}-seed3.safetensors")["fc.weight"]
    assert torch.equal(load_network(NAME, finished, seed=3).fc.weight, other)


def test_what_is_not_there_is_refused_with_what_is(shipped, finished, tmp_path):
    message = r"snapshot: got 4; allowed: .*: 0, 1\. These are the snapshots of 'plain-20' in"
    with pytest.raises(ResnetPathsError, match=message):
        load_network(NAME, snapshot=4)
    with pytest.raises(ResnetPathsError, match=r"snapshot: got 0; .*: none\."):
        load_network(NAME, seed=3, snapshot=0)
    with pytest.raises(ResnetPathsError, match=r"seed: got 1; allowed: one of 0, 3, the seeds of 'plain-20'"):
        load_network(NAME, seed=1)
    with pytest.raises(ResnetPathsError, match=r"snapshot: got 2; allowed: .*: 0, 1\."):
        load_network(NAME, finished / f"{NAME}-seed0.safetensors", snapshot=2)
    with pytest.raises(ResnetPathsError, match=r"seed: got 0; allowed: None if weights is a file"):
        load_network(NAME, finished / f"{NAME}-seed0.safetensors", seed=0)
    with pytest.raises(
        ResnetPathsError, match=r"weights: got '.*runs.*'; allowed: an existing weights file of 'vgg-15'"
    ):
        load_network("vgg-15", finished)
    with pytest.raises(
        ResnetPathsError, match=r"name: got 'vgg-15'; allowed: a network with shipped weights \(plain-20\)"
    ):
        load_network("vgg-15")


def test_the_list_the_logs_and_the_table_know_all_seeds(shipped):
    row = list_networks().set_index("name").loc[NAME]
    assert (row["seeds"], row["snapshots"], row["epochs"]) == ((0, 3), (0, 1), 2)
    logs = training_logs()
    assert logs[["seed", "epoch"]].to_numpy().tolist() == [[0, 1], [0, 2], [3, 1], [3, 2]]
    pd.testing.assert_frame_equal(training_logs([NAME]), logs)
    rows = networks_table().splitlines()[2:]
    assert [line.split(" | ")[5] for line in rows] == ["0", "3"]
    assert all(line.endswith("| 2 | 0 min |") for line in rows)


def test_names_that_only_begin_alike_are_told_apart(tmp_path):
    for name in ("plain-20", "plain-20-seed2", "plain-200", "plain-20-seed2.epoch10", "plain-20.checkpoint"):
        (tmp_path / f"{name}.safetensors").touch()
    found = {which: path.stem for which, path in weights_in(tmp_path, NAME).items()}
    assert found == {(0, None): "plain-20", (2, None): "plain-20-seed2", (2, 10): "plain-20-seed2.epoch10"}
    assert weights_in(tmp_path / "missing", NAME) == {}


def test_the_command_publishes(finished, images, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "load_dataset", lambda name, split: images)
    file = finished / f"{NAME}-seed3.safetensors"
    result = CliRunner().invoke(cli.app, ["publish", str(file), "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {tmp_path / 'plain-20-seed3.safetensors'}\n"
    assert (tmp_path / "plain-20-seed3.csv").is_file()
