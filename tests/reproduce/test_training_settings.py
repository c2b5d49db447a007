"""Settings that cannot be trained with are refused, and the learning rate follows from those that can."""

import dataclasses
import json
import math

import pytest

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce.training import TrainingSettings
from resnet_paths.reproduce.training.settings import learning_rate_at


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("network", "plain-21", "'plain-20'"),
        ("dataset", "cifar10", "one of 'cifar-10', 'fashion-mnist'"),
        ("epochs", 0, "an int of at least 1"),
        ("epochs", 1.5, "an int of at least 1"),
        ("epochs", "3", "an int of at least 1"),
        ("batch_size", 1, "an int of at least 2"),
        ("batch_size", True, "an int of at least 2"),
        ("crop_padding", -1, "an int of at least 0"),
        ("seed", -1, "an int of at least 0"),
        ("seed", 2**32, "an int from 0 to 4294967295"),
        ("learning_rate", 0, "a positive number"),
        ("learning_rate", -0.1, "a finite number of at least 0"),
        ("learning_rate", math.nan, "a finite number of at least 0"),
        ("learning_rate", math.inf, "a finite number of at least 0"),
        ("learning_rate", "0.1", "a finite number of at least 0"),
        ("warmup_epochs", -1, "a finite number of at least 0"),
        ("weight_decay", -1e-4, "a finite number of at least 0"),
        ("weight_decay", math.nan, "a finite number of at least 0"),
        ("momentum", 0, "a number between 0 and 1, both excluded"),
        ("momentum", 1, "a number between 0 and 1, both excluded"),
        ("precision", "bf16", "one of '32-true', 'bf16-mixed', '16-mixed'"),
        ("precision", "16-true", "one of '32-true', 'bf16-mixed', '16-mixed'"),
        ("precision", 32, "one of '32-true', 'bf16-mixed', '16-mixed'"),
    ],
)
def test_settings_that_cannot_be_trained_with(field, value, allowed):
    with pytest.raises(ResnetPathsError) as caught:
        TrainingSettings(**{"network": "plain-20", field: value})
    assert caught.value.argument == ("name" if field == "network" else field)
    assert caught.value.value is value
    assert allowed in caught.value.allowed


def test_defaults_are_those_of_the_shipped_networks():
    assert json.loads(json.dumps(dataclasses.asdict(TrainingSettings("plain-20")))) == {
        "network": "plain-20",
        "dataset": "fashion-mnist",
        "epochs": 12,
        "seed": 0,
        "batch_size": 128,
        "learning_rate": 0.1,
        "warmup_epochs": 1.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "crop_padding": 2,
        "precision": "32-true",
        "optimizer": "sgd",
        "num_drawn_blocks": None,
        "max_gradient_norm": None,
    }


# The learning rate


def test_learning_rate_rises_linearly_and_falls_on_a_cosine():
    settings = TrainingSettings("plain-20", epochs=12, learning_rate=0.2, warmup_epochs=2)
    assert learning_rate_at(settings, 0) == 0
    assert learning_rate_at(settings, 0.5) == pytest.approx(0.05)
    assert learning_rate_at(settings, 2) == pytest.approx(0.2)
    assert learning_rate_at(settings, 7) == pytest.approx(0.1)
    assert learning_rate_at(settings, 12) == pytest.approx(0, abs=1e-12)
    rates = [learning_rate_at(settings, step / 10) for step in range(121)]
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


@pytest.mark.parametrize(("epochs", "warmup", "peak_at"), [(1, 1.0, 0.5), (1, 5.0, 0.5), (4, 0.0, 0.0), (4, 9.0, 2.0)])
def test_warm_up_takes_half_of_the_run_at_the_most(epochs, warmup, peak_at):
    settings = TrainingSettings("plain-20", epochs=epochs, warmup_epochs=warmup)
    steps = [step / 100 * epochs for step in range(101)]
    assert max(steps, key=lambda epoch: learning_rate_at(settings, epoch)) == peak_at
    assert learning_rate_at(settings, epochs) == pytest.approx(0, abs=1e-12)
