"""Each network is trained by its own recipe, and a stop changes nothing whatever the recipe is."""

import dataclasses

import pytest
import torch
from lightning_fabric.plugins.precision import MixedPrecision
from safetensors.torch import load_file

from resnet_paths.reproduce import training
from resnet_paths.reproduce.training import TrainingSettings
from resnet_paths.reproduce.training.checkpoints import check_settings
from resnet_paths.zoo import NETWORKS, Recipe, build_network
from resnet_paths.zoo.weights import read_metadata, read_tensors, write_tensors
from tests.reproduce.small_runs import same_run


def stopped_after_the_first_epoch(run, folder, settings):
    """Run, stop after the first checkpoint and run again; returns the weights file."""

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_write_log", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, settings)
    assert [path.suffixes for path in folder.iterdir()] == [[".checkpoint", ".safetensors"]]
    return run(folder, settings)


@pytest.mark.parametrize("name", NETWORKS)
def test_settings_follow_the_recipe_unless_told_otherwise(name):
    recipe = NETWORKS[name].recipe
    settings = TrainingSettings(name)
    for field in dataclasses.fields(Recipe):
        assert getattr(settings, field.name) == getattr(recipe, field.name)
    assert TrainingSettings(name, learning_rate=0.3, weight_decay=0.0).learning_rate == 0.3
    assert TrainingSettings(name, weight_decay=0.0).weight_decay == 0


def test_nets_that_differ_in_their_skips_alone_have_one_recipe():
    assert TrainingSettings("resnet-56") == dataclasses.replace(TrainingSettings("plain-56"), network="resnet-56")


def test_vgg_trains_with_its_recipe(run, tmp_path):
    settings = TrainingSettings("vgg-15", epochs=2, batch_size=20)
    path = stopped_after_the_first_epoch(run, tmp_path / "stopped", settings)
    same_run(path, run(tmp_path / "whole", settings))
    assert (read_metadata(path)["optimizer"], read_metadata(path)["learning_rate"]) == ("adamw", 0.0005)


def test_files_of_the_time_before_there_was_a_choice_of_optimizer(run, tmp_path):
    """Finished runs are recognised, and interrupted ones resume to the same weights."""
    settings = TrainingSettings("plain-20", epochs=2, batch_size=20)
    whole = run(tmp_path / "whole", settings)
    keep = training.write_checkpoint

    later = ("optimizer", "num_drawn_blocks", "max_gradient_norm", "untouched")

    def write_as_before(path, *args):
        keep(path, *args)
        metadata = {key: value for key, value in read_metadata(path).items() if key not in later}
        write_tensors(path, read_tensors(path), metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_checkpoint", write_as_before)
        same_run(stopped_after_the_first_epoch(run, tmp_path / "stopped", settings), whole)
    metadata = read_metadata(whole)
    del metadata["optimizer"], metadata["num_drawn_blocks"], metadata["max_gradient_norm"]
    write_tensors(whole, load_file(whole), metadata)
    check_settings(whole, settings)
    with pytest.raises(training.ResnetPathsError, match="optimizer: got 'adamw'; allowed: 'sgd'"):
        check_settings(whole, dataclasses.replace(settings, optimizer="adamw"))


def test_adamw_is_resumed_with_all_of_its_state(run, tmp_path):
    settings = TrainingSettings("vit-small", epochs=2, batch_size=20)
    assert settings.optimizer == "adamw"
    path = stopped_after_the_first_epoch(run, tmp_path / "stopped", settings)
    same_run(path, run(tmp_path / "whole", settings))
    by_sgd = run(tmp_path / "sgd", dataclasses.replace(settings, optimizer="sgd"))
    assert not torch.equal(load_file(path)["fc.weight"], load_file(by_sgd)["fc.weight"])


def test_the_loss_scale_is_kept_in_the_checkpoint(tmp_path):
    def float16():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    settings = TrainingSettings("plain-20")
    model = build_network("plain-20", torch.Generator().manual_seed(0))
    sgd = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model(torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))).sum().backward()
    sgd.step()
    precision = float16()
    precision.scaler.load_state_dict({**precision.state_dict(), "scale": 64.0, "_growth_tracker": 17})
    training.write_checkpoint(tmp_path / "x.safetensors", model, sgd, precision, settings, [])
    again = float16()
    assert again.state_dict() != precision.state_dict()
    training.resume(tmp_path / "x.safetensors", model, sgd, again, settings)
    assert again.state_dict() == precision.state_dict()
