"""What networks are judged by: the error rate of a classifier, the root-mean-square error of a denoiser."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from resnet_paths import zoo
from resnet_paths.reproduce import training
from resnet_paths.reproduce.training import TrainingSettings, evaluate
from resnet_paths.reproduce.training.batches import augmented_batches
from resnet_paths.reproduce.training.publishing import publish
from resnet_paths.reproduce.training.tasks import TASKS
from resnet_paths.zoo import NETWORKS, build_network, list_networks, load_network, networks_table, training_logs
from resnet_paths.zoo.weights import read_metadata
from tests.reproduce.small_runs import same_run

DENOISER = TrainingSettings("unet-small", epochs=2, batch_size=16, seed=2)


# Evaluation of classifiers


@pytest.mark.parametrize("batch_size", [1, 7, 21, 500])
def test_evaluate_agrees_with_a_loop_by_hand(make_images, batch_size):
    images = make_images(21)
    model = build_network("preact-resnet-20", torch.Generator().manual_seed(0))
    model.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    loss, error_rate = evaluate(model, images, batch_size)
    model.eval()
    loss_sum, num_wrong = 0.0, 0
    with torch.no_grad():
        for image, label in images:
            logits = model(image.unsqueeze(0))[0].double()
            loss_sum -= torch.log_softmax(logits, 0)[label].item()
            num_wrong += int(logits.argmax()) != label
    assert loss == pytest.approx(loss_sum / 21, rel=1e-5)
    assert error_rate == num_wrong / 21


@pytest.mark.parametrize("fails", [False, True])
def test_evaluate_leaves_modes_weights_and_gradients_alone(make_images, fails):
    model = build_network("plain-20", torch.Generator().manual_seed(0))
    model.layer2.eval()  # a mixture of modes
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError):
            evaluate(model, make_images(5, name="cifar-10"))
    else:
        evaluate(model, make_images(5))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


# Denoising


def test_every_network_has_a_known_task():
    assert {facts.task for facts in NETWORKS.values()} == set(TASKS)
    assert [name for name, facts in NETWORKS.items() if facts.task == "denoising"] == ["unet-small"]


@pytest.mark.parametrize("batch_size", [1, 7, 21, 500])
def test_evaluate_of_a_denoiser_agrees_with_a_loop_by_hand(make_images, batch_size):
    images = make_images(21)
    model = build_network("unet-small", torch.Generator().manual_seed(0)).eval()
    loss, rmse = evaluate(model, images, batch_size, task="denoising")
    noise = 0.5 * torch.randn(21, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    clean = torch.stack([image for image, _ in images])
    with torch.no_grad():
        squares = (model(clean + noise) - clean).double().square()
    assert loss == pytest.approx(squares.mean().item(), rel=1e-5)
    assert rmse == pytest.approx(math.sqrt(squares.mean().item()), rel=1e-5)


def test_a_network_that_changes_nothing_has_the_noise_as_its_error(make_images):
    nothing = torch.nn.Conv2d(1, 1, 1, bias=False)
    torch.nn.init.ones_(nothing.weight)
    loss, rmse = evaluate(nothing, make_images(100), task="denoising")
    assert rmse == pytest.approx(0.5, rel=0.01)
    assert loss == pytest.approx(0.25, rel=0.02)


def batches(images, epoch=0, settings=DENOISER, rank=0, world_size=1):
    return list(augmented_batches(images, settings, epoch, rank, world_size))


def test_training_inputs_are_the_targets_with_noise(make_images):
    images = make_images(200)
    pairs = batches(images)
    noise = torch.cat([inputs - targets for inputs, targets in pairs])
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)
    # The targets are the images that a classifier would be given.
    settings = dataclasses.replace(DENOISER, network="plain-20")
    for (_, targets), (clean, _) in zip(pairs, batches(images, settings=settings), strict=True):
        assert torch.equal(targets, clean)


def test_noise_follows_from_seed_and_epoch_alone(make_images):
    images = make_images(40)
    torch.manual_seed(1)
    first = batches(images)
    torch.manual_seed(2)
    for (inputs, targets), (again, same) in zip(first, batches(images), strict=True):
        assert torch.equal(inputs, again)
        assert torch.equal(targets, same)
    for other in (batches(images, 1), batches(images, settings=dataclasses.replace(DENOISER, seed=3))):
        assert not torch.allclose(first[0][0] - first[0][1], other[0][0] - other[0][1])


def test_several_processes_together_see_the_noise_of_one(make_images):
    images = make_images(40)
    whole = batches(images)
    parts = [batches(images, rank=rank, world_size=2) for rank in (0, 1)]
    for step, (inputs, targets) in enumerate(whole):
        for rank, part in enumerate(parts):
            assert torch.equal(part[step][0], inputs[rank::2])
            assert torch.equal(part[step][1], targets[rank::2])


@pytest.fixture
def run(run):
    return lambda folder, settings=DENOISER, **options: run(folder, settings, **options)


def test_a_denoiser_is_trained_and_judged_by_its_root_mean_square_error(run, make_images, tmp_path):
    path = run(tmp_path)
    log, metadata = pd.read_csv(path.with_suffix(".csv")), read_metadata(path)
    assert log["test_error_rate"].isna().all()
    assert log["train_error_rate"].isna().all()
    assert log["train_loss"].iloc[1] < log["train_loss"].iloc[0]
    assert "test_error_rate" not in metadata
    assert metadata["test_rmse"] == math.sqrt(metadata["test_loss"])
    assert metadata["test_loss"] == pytest.approx(log["test_loss"].iloc[-1], rel=1e-4)
    model = load_network("unet-small", path)
    assert evaluate(model, make_images(21, seed=1), task="denoising") == (metadata["test_loss"], metadata["test_rmse"])
    assert model.training_log["test_error_rate"].dtype == float


def test_a_denoiser_that_was_stopped_goes_on_to_the_same_weights(run, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write_log", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    same_run(run(tmp_path / "stopped"), run(tmp_path / "whole"))


def test_a_published_denoiser_is_listed_by_its_root_mean_square_error(run, make_images, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    run(runs)
    run(runs, TrainingSettings("plain-20", epochs=1, batch_size=20))
    (tmp_path / "networks").mkdir()
    for name in ("unet-small-seed2", "plain-20-seed0"):
        publish(runs / f"{name}.safetensors", tmp_path / "networks", test_set=make_images(21, seed=1))
    monkeypatch.setattr(zoo, "shipped_folder", lambda name: tmp_path)
    metadata = read_metadata(tmp_path / "networks" / "unet-small-seed2.safetensors")
    assert metadata["test_rmse"] == pytest.approx(metadata["trained_test_rmse"], abs=1e-4)
    assert "test_error_rate" not in metadata
    row = list_networks().set_index("name").loc["unet-small"]
    assert row["test_rmse"] == metadata["test_rmse"]
    assert math.isnan(row["test_error_rate"])
    assert f"| RMSE {metadata['test_rmse']:.3f} | 2 | 2 |" in networks_table()
    logs = training_logs()
    assert logs.groupby("network").test_error_rate.count().to_dict() == {"plain-20": 1, "unet-small": 0}
    assert logs["test_error_rate"].dtype == float


def test_snapshots_of_a_denoiser(run, tmp_path):
    run(tmp_path, snapshots=(0, 1))
    for epoch in (0, 1):
        metadata = read_metadata(tmp_path / f"unet-small-seed2.epoch{epoch}.safetensors")
        assert metadata["test_rmse"] == math.sqrt(metadata["test_loss"])
