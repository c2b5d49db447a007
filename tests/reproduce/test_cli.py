"""The command line helps at once, refuses in one line with exit status 2, and does what the library does."""

import math
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from resnet_paths import lesions, unraveling
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce import cli, training
from resnet_paths.zoo import NETWORKS, list_networks, load_network, networks_table

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]


def run(*arguments):
    """The exit status, standard output and standard error of `resnet-paths` in a process of its own."""
    command = [sys.executable, "-m", "resnet_paths.reproduce.cli", *arguments]
    environment = {**os.environ, "COLUMNS": "120"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    return finished.returncode, finished.stdout, finished.stderr


def refuse(monkeypatch, capsys, *arguments):
    """What `main` says on standard error; asserts that it is one line, and the exit status 2."""
    monkeypatch.setattr(sys, "argv", ["resnet-paths", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("resnet-paths: ")
    return captured.err


def test_help_of_the_program_names_every_command():
    status, out, err = run("--help")
    assert status == 0
    assert err == ""
    assert all(command in out for command in COMMANDS)
    assert {"train", "networks"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert command in result.output.split("\n\n")[0] + result.output.split("\n")[1]


def test_help_of_train_names_every_option():
    result = CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200"})
    for option in ("dataset", "epochs", "seed", "batch-size", "learning-rate", "precision", "devices", "folder"):
        assert f"--{option}" in result.output


@pytest.mark.parametrize("columns", ["20", "40", "80"])
def test_help_in_a_narrow_terminal_keeps_every_name(columns):
    program = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": columns}).stdout
    commands = typer.main.get_command(cli.app).commands
    assert all(f"\n  {name} " in program for name in commands)
    for name, command in commands.items():
        shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": columns}).stdout.split()
        options = {option for each in command.params for option in each.opts if option.startswith("--")}
        assert options <= set(shown), name


def test_importing_the_command_line_imports_nothing_heavy():
    code = "import sys, resnet_paths.reproduce.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    imported = set(finished.stdout.split())
    assert "resnet_paths" in imported
    heavy = {"torch", "torchvision", "pandas", "numpy", "matplotlib", "lightning_fabric", "networkx", "safetensors"}
    assert not imported & heavy


def test_refusal_of_a_process_is_one_line_and_status_2():
    status, out, err = run("train", "preact-resnet-21")
    assert status == 2
    assert out == ""
    assert err.startswith("resnet-paths: name: got 'preact-resnet-21'; allowed: ")
    assert "'preact-resnet-20'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain-21"], "name: got 'plain-21'; allowed: one of the known networks, nearest"),
        (["plain-20", "--dataset", "cifar10"], "dataset: got 'cifar10'; allowed: one of 'cifar-10'"),
        (["plain-20", "--epochs", "0"], "epochs: got 0; allowed: an int of at least 1."),
        (["plain-20", "--batch-size", "1"], "batch_size: got 1; allowed: an int of at least 2."),
        (["plain-20", "--seed", "-1"], "seed: got -1"),
        (["plain-20", "--learning-rate", "nan"], "learning_rate: got nan"),
        (["plain-20", "--snapshots", "0,one"], "snapshots: got '0,one'; allowed: comma-separated numbers"),
        (["plain-20", "--num-drawn-blocks", "3"], "num_drawn_blocks: got 3; allowed: None for 'plain-20'"),
        (["effective-20", "--num-drawn-blocks", "few"], "num_drawn_blocks: got 'few'; allowed: a number or a range"),
        (["effective-20", "--num-drawn-blocks", "1-2-3"], "num_drawn_blocks: got [1, 2, 3]"),
        (["plain-20", "--precision", "bf16"], "precision: got 'bf16'; allowed: one of '32-true', 'bf16-mixed'"),
        (["plain-20", "--accelerator", "abacus"], "accelerator='abacus'"),
        (["plain-20", "--devices", "0"], "devices"),
        (["plain-20", "--devices", "-3"], "devices"),
        (["plain-20", "--devices", "many"], "'auto, many, 1, auto, 32-true'"),
        (["plain-20", "--strategy", "chess"], "strategy='chess'"),
        (["plain-20", "--num-nodes", "0"], "num_nodes"),
        (["plain-20", "--folder", "/dev/null/runs"], "folder: got '/dev/null/runs'"),
    ],
)
def test_train_refuses(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refuse(monkeypatch, capsys, "train", *arguments)
    assert not list(tmp_path.rglob("*.*"))


def test_usage_errors_have_status_2_too():
    assert CliRunner().invoke(cli.app, ["train"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["train", "plain-20", "--epochs", "few"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["dance"]).exit_code == 2


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    def fault(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(training, "train", fault)
    monkeypatch.setattr(sys, "argv", ["resnet-paths", "train", "plain-20"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_train_end_to_end(monkeypatch, tmp_path, make_images):
    splits = {"train": make_images(40), "test": make_images(20, seed=1)}
    monkeypatch.setattr(training, "load_dataset", lambda name, split: splits[split])
    arguments = ["train", "plain-20", "--epochs", "2", "--batch-size", "20", "--seed", "3", "--learning-rate", "0.05"]
    arguments += ["--accelerator", "cpu", "--devices", "1", "--folder", str(tmp_path / "runs")]
    result = CliRunner().invoke(cli.app, arguments)
    path = tmp_path / "runs" / "plain-20-seed3.safetensors"
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {path}\n"
    model = load_network("plain-20", path)
    assert model.training_log["epoch"].tolist() == [1, 2]
    assert pd.read_csv(path.with_suffix(".csv"))["seed"].tolist() == [3, 3]
    settings = training.TrainingSettings("plain-20", epochs=2, batch_size=20, seed=3, learning_rate=0.05)
    content = path.read_bytes()
    training.train(settings, tmp_path / "again", accelerator="cpu", progress=False)
    by_library = load_network("plain-20", tmp_path / "again" / path.name).state_dict()
    assert all((value == by_library[key]).all() for key, value in model.state_dict().items())
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0  # finished: returned at once
    assert path.read_bytes() == content
    with pytest.raises(ResnetPathsError, match="epochs: got 3; allowed: 2"):
        CliRunner().invoke(cli.app, [*arguments, "--epochs", "3"], catch_exceptions=False)


def test_defaults_of_train_are_those_of_the_settings(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(training, "train", lambda *arguments, **options: asked.append((*arguments, options)))
    assert CliRunner().invoke(cli.app, ["train", "plain-20"]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["train", "plain-20", "--devices", "auto"]).exit_code == 0
    (settings, folder, options), (_, _, other) = asked
    assert settings == training.TrainingSettings("plain-20")
    assert str(folder) == "runs"
    assert options == {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto", "snapshots": []}
    assert other["devices"] == "auto"


def test_train_takes_a_number_of_blocks_or_a_range(monkeypatch):
    asked = []
    monkeypatch.setattr(training, "train", lambda settings, *arguments, **options: asked.append(settings))
    for arguments in ([], ["--num-drawn-blocks", "3"], ["--num-drawn-blocks", "2-7"]):
        assert CliRunner().invoke(cli.app, ["train", "effective-20", *arguments]).exit_code == 0
    assert [settings.num_drawn_blocks for settings in asked] == [(4, 4), (3, 3), (2, 7)]


def test_networks_prints_every_network():
    result = CliRunner().invoke(cli.app, ["networks"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(NETWORKS)
    assert lines[0].split() == list(list_networks().columns)
    row = next(line for line in lines if "preact-resnet-110" in line)
    assert str(2**54) in row  # exact, never 1.8e16


def test_networks_as_markdown():
    result = CliRunner().invoke(cli.app, ["networks", "--markdown"])
    assert result.exit_code == 0
    assert result.stdout == networks_table() + "\n"


def test_lesion_deletes_each_block_and_writes_a_table(capsys, tmp_path, monkeypatch):
    arguments = ["lesion", "plain-20", "--num-images", "50", "--fold-batchnorm"]
    arguments += ["--output", str(tmp_path / "table.csv")]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout.split()[0]) == (0, "wrote")
    frame = pd.read_csv(tmp_path / "table.csv")
    assert frame.lesion.tolist() == [
        f"delete layer{i}.{j}" for i, j in [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    ]
    assert (frame.num_examples == 50).all()
    assert "num_images: got 0; allowed: an int from 1 to 10000" in refuse(
        monkeypatch, capsys, "lesion", "plain-20", "--num-images", "0"
    )


def test_random_lesions_of_a_small_network_need_no_counts(monkeypatch):
    asked, chain = [], unraveling.unravel(load_network("preact-resnet-20"), torch.zeros(1, 1, 28, 28))

    def study(chain, loader, plan, **options):
        asked.append([len(lesion.blocks) for lesion in plan])
        return pd.DataFrame()

    monkeypatch.setattr(unraveling, "unravel", lambda *arguments: chain)
    monkeypatch.setattr(lesions, "lesion_study", study)
    for plan in ("random-deletions", "random-duplications", "random-swaps"):
        arguments = ["lesion", "preact-resnet-20", "--plan", plan, "--repeats", "1", "--num-images", "1"]
        assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    deletions, duplications, swaps = asked
    assert deletions == list(range(1, 10))
    assert duplications == list(range(1, 8))  # two blocks change the shape
    assert len(swaps) == 20


def test_paths_prints_exact_numbers():
    status, out, _ = run("paths", "54")
    assert status == 0
    assert str(math.comb(54, 27)) in out


# Output files and arguments of `lesion`


LESION = ("lesion", "preact-resnet-20", "--num-images", "4")


def no_work(monkeypatch):
    def refuse_work(*args, **kwargs):
        raise AssertionError("work before the arguments were validated")

    monkeypatch.setattr(lesions, "lesion_study", refuse_work)


@pytest.mark.parametrize(
    "kind", ["symlink", "dangling symlink", "fifo", "folder", "device", "below a file", "read-only"]
)
def test_an_output_that_is_no_regular_file_is_refused_before_any_work(kind, tmp_path, monkeypatch, capsys):
    no_work(monkeypatch)
    target, output = tmp_path / "target", tmp_path / "out.csv"
    if kind.endswith("symlink"):
        if kind == "symlink":
            target.write_text("kept")
        output.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(output)
    elif kind == "folder":
        output.mkdir()
    elif kind == "device":
        output = "/dev/null"
    elif kind == "below a file":
        target.write_text("kept")
        output = target / "out.csv"
    else:
        monkeypatch.setattr("resnet_paths._utils.files.tempfile.NamedTemporaryFile", refuse_to_write)
    before = sorted(tmp_path.iterdir())
    message = refuse(monkeypatch, capsys, *LESION, "--output", str(output))
    assert message.startswith("resnet-paths: output: got ")
    assert "allowed: a new or a regular file in a folder that can be written to" in message
    assert sorted(tmp_path.iterdir()) == before
    assert not target.exists() or target.read_text() == "kept"


def refuse_to_write(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


def test_a_frame_that_cannot_be_written_after_all_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("resnet_paths._utils.files.Path.touch", refuse_to_write)
    with pytest.raises(ResnetPathsError, match=r"Permission denied\. The frame is printed instead"):
        cli._show_or_write(pd.DataFrame({"lesion": ["delete a"], "error_rate": [0.25]}), tmp_path / "out.csv")
    assert capsys.readouterr().out == "lesion,error_rate\ndelete a,0.25\n\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--counts", "5-1"), "counts: got '5-1'"),
        (("--counts", "0"), "counts: got '0'"),
        (("--counts", "1-99999999999"), "counts: got '1-99999999999'"),
        (("--counts", "²"), "counts: got '²'"),
        (("--counts", "99"), "counts: got 99"),
        (("--repeats", "0"), "repeats: got 0; allowed: an int of at least 1"),
        (("--repeats", "-1"), "repeats: got -1"),
        (("--batch-size", "0"), "batch_size: got 0"),
        (("--num-images", "0"), "num_images: got 0"),
        (("--device", "meta"), "device: got 'meta'"),
        (("--device", "banana"), "device: got 'banana'"),
        (("--precision", "banana"), "precision: got 'banana'"),
        (("--batch-budget", "-1"), "batch_budget: got -1"),
    ],
)
def test_wrong_arguments_of_lesion_are_refused(arguments, message, monkeypatch, capsys):
    said = refuse(monkeypatch, capsys, *LESION, "--plan", "random-deletions", *arguments)
    assert said.startswith(f"resnet-paths: {message}")


def test_loops_and_factors_of_a_lesion():
    from resnet_paths.lesions.lesion import Lesion

    for wrong in ({"loops": 0}, {"loops": 1.5}, {"factor": math.nan}, {"factor": "x"}):
        with pytest.raises(ResnetPathsError, match=f"{next(iter(wrong))}: got .*; allowed"):
            Lesion("parallel", (0, 1), **wrong)
