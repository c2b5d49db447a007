"""The command line: ``resnet-paths COMMAND --help``. Each command calls functions of the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.data import Dataset, Subset

    from resnet_paths.core.chain import ResidualChain
    from resnet_paths.lesions.lesion import Lesion

# Heavy modules are imported inside the commands, so that --help is fast.

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the tables of rich cut off names of options in narrow terminals
    context_settings={"max_content_width": 120},
    help="Residual networks as ensembles of paths (Veit, Wilber and Belongie 2016).",
)

# Functions of `resnet_paths.lesions.plans`, with - for _.
_PLANS = (
    "single-deletions",
    "random-deletions",
    "pair-deletions",
    "random-swaps",
    "duplications",
    "random-duplications",
    "layer-schedules",
)
_MAX_COUNT = 20


@app.command()
def train(
    network: Annotated[str, typer.Argument(help="Name of the network; see 'resnet-paths networks'.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="'fashion-mnist', 'digits', 'cifar-10' or 'python-docs'; by default that of the recipe."),
    ] = None,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training images; for text, each of 4,096 windows at random places.")
    ] = 12,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and augmentation.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Images or windows per step, over all devices; by default that of the recipe.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; by default that of the network's recipe.")
    ] = None,
    num_drawn_blocks: Annotated[
        str, typer.Option(help="For 'effective-...': blocks trained per batch, as in 23 or 5-17.")
    ] = "",
    precision: Annotated[str, typer.Option(help="Fabric's: '32-true', 'bf16-mixed', '16-mixed'.")] = "32-true",
    accelerator: Annotated[str, typer.Option(help="Fabric's: 'auto', 'cpu', 'gpu', 'mps'.")] = "auto",
    devices: Annotated[str, typer.Option(help="Fabric's: number of devices per machine, or 'auto'.")] = "1",
    num_nodes: Annotated[int, typer.Option(help="Fabric's: number of machines.")] = 1,
    strategy: Annotated[str, typer.Option(help="Fabric's: 'auto' or 'ddp'.")] = "auto",
    snapshots: Annotated[str, typer.Option(help="Epochs after which to save the weights too, as in '0,1,4'.")] = "",
    folder: Annotated[Path, typer.Option(help="Folder for weights, log and checkpoint.")] = Path("runs"),
) -> None:
    """Train a network by name; an interrupted run is resumed."""
    from resnet_paths.reproduce.training import TrainingSettings, train

    given = {"dataset": dataset, "batch_size": batch_size, "learning_rate": learning_rate}
    own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if num_drawn_blocks:
        numbers = _numbers("num_drawn_blocks", num_drawn_blocks, "-", "a number or a range, as in 23 or 5-17")
        own["num_drawn_blocks"] = numbers[0] if len(numbers) == 1 else numbers
    settings = TrainingSettings(network=network, epochs=epochs, seed=seed, precision=precision, **own)
    epochs_kept = _numbers("snapshots", snapshots, ",", "comma-separated numbers of epochs, as in 0,1,4")
    path = train(
        settings,
        folder,
        snapshots=epochs_kept,
        accelerator=accelerator,
        num_nodes=num_nodes,
        strategy=strategy,
        devices=int(devices) if devices.lstrip("-").isdigit() else devices,
    )
    typer.echo(f"wrote {path}")


@app.command()
def publish(
    weights: Annotated[Path, typer.Argument(help="Weights of a finished run, such as runs/vgg-15-seed0.safetensors.")],
    folder: Annotated[Path | None, typer.Option(help="Folder to store them in; data/networks by default.")] = None,
) -> None:
    """Store a finished run, its snapshots and its log for loading by name, in half precision if the error allows it."""
    from resnet_paths.reproduce.training.publishing import publish

    for path in publish(weights, folder):
        typer.echo(f"wrote {path}")


@app.command()
def reproduce(
    profile: Annotated[
        str, typer.Option(help="'quick' (minutes on a laptop) or 'full' (the sizes stated in each notebook).")
    ] = "quick",
    only: Annotated[
        list[str] | None, typer.Option(help="Prefix of a notebook's name, such as 02; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="'auto', or a device of torch such as 'cuda:1'.")] = "auto",
    dataset: Annotated[
        str | None,
        typer.Option(help="Run those notebooks that have this parameter on another data set, such as 'cifar-10'."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for figures and executed notebooks.")] = Path("figures"),
    update: Annotated[
        bool, typer.Option("--update", help="Replace the outputs kept in the notebooks; quick profile only.")
    ] = False,
) -> None:
    """Run all notebooks in order; write every figure as PDF, SVG, PNG and CSV, and a page that shows all figures."""
    from resnet_paths.reproduce.runner import reproduce

    results = reproduce(output, profile=profile, only=only or (), device=device, dataset=dataset, update=update)
    for result in results:
        why = result.error or result.skipped
        state = "failed" if result.error else "skipped" if result.skipped else "passed"
        typer.echo(f"{state:<7} {result.name}{f': {why}' if why else ''}")
        if result.num_updated is not None:
            typer.echo(f"        outputs kept in the notebook: those of {result.num_updated} cells differ from before")
        if result.stale:
            typer.echo(
                f"        outputs kept in the notebook are of other {result.stale}; "
                f"'resnet-paths reproduce --update --only {result.name[:2]}' replaces them"
            )
    typer.echo(f"figures in {output.resolve()}; overview in {output.resolve() / 'index.html'}")
    if any(result.error for result in results):
        raise typer.Exit(1)


@app.command()
def findings(
    folder: Annotated[Path, typer.Argument(help="Output folder of 'resnet-paths reproduce'.")] = Path("figures"),
    update: Annotated[
        bool, typer.Option(help="Store them in data/findings.csv and write the tables of the documentation again.")
    ] = False,
) -> None:
    """Print the findings of executed notebooks: estimates with intervals, and what was predicted."""
    from resnet_paths.reproduce.findings_tables import collect_findings, findings_table, update_findings

    if update:
        for path in update_findings(folder):
            typer.echo(f"wrote {path}")
        return
    typer.echo(findings_table(collect_findings(folder)))


@app.command()
def lesion(
    network: Annotated[
        str, typer.Argument(help="Name of a network with shipped weights, or of any network together with --weights.")
    ],
    plan: Annotated[str, typer.Option(help=f"One of {', '.join(_PLANS)}.")] = "single-deletions",
    counts: Annotated[
        str | None,
        typer.Option(help="For random plans: number of blocks per lesion, as in '1-20' (default: 1 to at most 20)."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="For random plans: lesions per count.")] = 20,
    seed: Annotated[int, typer.Option(help="For random plans: seed.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="A weights file written by 'resnet-paths train'.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data set whose test split is used; by default that of the network's recipe.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(help="Number of test images, from the first one; all by default.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder for results of finished batches; an interrupted study resumes from it.")
    ] = None,
    device: Annotated[str, typer.Option(help="'auto', or a device of torch such as 'cuda:1'.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="'bfloat16', 'float16', 'float32' or 'float64'.")] = None,
    channels_last: Annotated[bool, typer.Option(help="Use the channels-last memory format.")] = False,
    fold_batchnorm: Annotated[bool, typer.Option(help="Fold BatchNorm into the convolutions before it.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 250,
    batch_budget: Annotated[
        int | None, typer.Option(help="Maximum number of examples per step; splits or stacks batches.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="CSV file to write; printed by default.")] = None,
) -> None:
    """Delete, duplicate or reorder blocks and measure the test error of each lesion."""
    from torch.utils.data import DataLoader

    from resnet_paths._utils.errors import StudyInterrupted
    from resnet_paths.lesions import lesion_study
    from resnet_paths.unraveling import unravel
    from resnet_paths.zoo import find_network, load_network

    _check_arguments(plan, repeats, batch_size, output)
    images = _first_images(dataset or find_network(network).recipe.dataset, num_images)
    # Unraveled on the CPU, where it was loaded; the study moves it to the device.
    chain = unravel(load_network(network, weights), images[0][0].unsqueeze(0))
    lesions = _lesions_of(plan, chain, counts, repeats, seed)
    try:
        frame = lesion_study(
            chain,
            DataLoader(images, batch_size=batch_size),
            lesions,
            store=store,
            device=device,
            precision=precision,
            channels_last=channels_last,
            batch_budget=batch_budget,
            fold_batchnorm=fold_batchnorm,
        )
    except StudyInterrupted as interrupt:
        raise _stopped(interrupt.num_batches, store) from None
    _show_or_write(frame, output)


def _check_arguments(plan: str, repeats: int, batch_size: int, output: Path | None) -> None:
    """Refuse what `lesion` cannot do, before any work."""
    from resnet_paths._utils.arguments import require_choice, require_int
    from resnet_paths._utils.files import check_output

    require_choice("plan", plan, _PLANS)
    require_int("batch_size", batch_size, 1)
    require_int("repeats", repeats, 1)
    if output is not None:
        check_output("output", output)


def _first_images(dataset: str, count: int | None) -> Subset[object]:
    """The first `count` test images of a data set; all if it is None."""
    from torch.utils.data import Subset

    from resnet_paths._utils.errors import ResnetPathsError
    from resnet_paths.reproduce.datasets import load_dataset

    images = load_dataset(dataset, "test")
    count = len(images) if count is None else count
    if not 1 <= count <= len(images):
        raise ResnetPathsError("num_images", count, f"an int from 1 to {len(images)}")
    return Subset(cast("Dataset[object]", images), range(count))


def _stopped(num_batches: int, store: Path | None) -> typer.Exit:
    """Say how to resume an interrupted study."""
    kept = f"run the same command again to resume from {store}" if store else "without --store their results are lost"
    typer.echo(f"resnet-paths: stopped after {num_batches} batches; {kept}", err=True)
    return typer.Exit(130)


def _show_or_write(frame: pd.DataFrame, output: Path | None) -> None:
    from resnet_paths._utils.errors import ResnetPathsError
    from resnet_paths._utils.files import write_then_rename

    if output is None:
        typer.echo(frame.to_string(index=False, float_format="{:.4f}".format))
        return
    try:
        with write_then_rename(output) as temporary:
            frame.to_csv(temporary, index=False)
    except OSError as error:  # the study is done: its numbers are not thrown away
        typer.echo(frame.to_csv(index=False))
        raise ResnetPathsError(
            "output", str(output), "a file that can be written to", f"{error}. The frame is printed instead."
        ) from error
    typer.echo(f"wrote {output}")


def _lesions_of(plan: str, chain: ResidualChain, counts: str | None, repeats: int, seed: int) -> list[Lesion]:
    """The lesions of a plan by name."""
    import torch

    from resnet_paths.lesions import plans

    arguments: dict[str, object] = {}
    if plan.startswith("random-"):
        # Any number of swaps can follow one another; deletions and duplications are limited by the number of blocks.
        singles = {"random-deletions": "single_deletions", "random-duplications": "duplications"}.get(plan)
        most = _MAX_COUNT if singles is None else min(_MAX_COUNT, len(getattr(plans, singles)(chain)))
        arguments = {
            "counts": range(1, most + 1) if counts is None else _range_of(counts),
            "repeats": repeats,
            "generator": torch.Generator().manual_seed(seed),
        }
    lesions: list[Lesion] = getattr(plans, plan.replace("-", "_"))(chain, **arguments)
    return lesions


def _range_of(counts: str) -> list[int]:
    from resnet_paths._utils.errors import ResnetPathsError

    first, _, last = counts.partition("-")
    numbers = first.isdecimal() and (last or first).isdecimal()
    if not numbers or not 1 <= int(first) <= int(last or first) <= 10**6:
        raise ResnetPathsError("counts", counts, "a number or a range of numbers of at least 1, as in '1-20'")
    return list(range(int(first), int(last or first) + 1))


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            help="FILE.py:FUNCTION or MODULE:FUNCTION, which returns the model, or the model and example inputs."
        ),
    ],
    shape: Annotated[
        str, typer.Option(help="Shape of a random example input, as in 2,3,224,224, if there is none.")
    ] = "",
) -> None:
    """Unravel your own model step by step, and say what prevents it."""
    from resnet_paths._utils.errors import ResnetPathsError
    from resnet_paths.reproduce.doctor import diagnose, find_function

    sizes = _numbers("shape", shape, ",", "comma-separated sizes with the batch first, as in 2,3,224,224")
    if any(size < 1 for size in sizes):
        raise ResnetPathsError("shape", shape, "sizes of at least 1")
    for step in diagnose(find_function(model), sizes or None):
        typer.echo(f"{step.name:<12} {'passed' if step.passed else 'FAILED'}  {step.finding}")
        if not step.passed:
            typer.echo("What helps is in notebooks/how_to/own_model.md, 'If it is refused'.")
            raise typer.Exit(1)


@app.command()
def paths(
    num_blocks: Annotated[int, typer.Argument(help="Number of residual blocks, such as 54 for ResNet-110.")],
) -> None:
    """Print the number and the fraction of paths of each length through n residual blocks."""
    from resnet_paths.core.paths import path_histogram
    from resnet_paths.core.polynomials import with_counts_as_text

    typer.echo(with_counts_as_text(path_histogram(num_blocks)).to_string(index=False))


@app.command()
def networks(
    markdown: Annotated[
        bool, typer.Option(help="Print the networks with shipped weights as a Markdown table.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Measure the test error of all shipped weights again.")] = False,
) -> None:
    """List the known networks, with the test error of those with shipped weights."""
    from resnet_paths.zoo import list_networks, networks_table

    if check:
        from resnet_paths.reproduce.training.publishing import published_errors

        found = published_errors()
        typer.echo(found.to_string(index=False))
        if not found["as_stated"].all():
            raise typer.Exit(1)
        return
    typer.echo(networks_table() if markdown else list_networks().to_string(index=False, na_rep="-"))


def _numbers(argument: str, text: str, separator: str, allowed: str) -> list[int]:
    from resnet_paths._utils.errors import ResnetPathsError

    try:
        return [int(number) for number in text.split(separator)] if text else []
    except ValueError as error:
        raise ResnetPathsError(argument, text, allowed) from error


def main() -> None:
    """Entry point: a `ResnetPathsError` is printed as one line on standard error, with exit status 2."""
    from resnet_paths._utils.errors import ResnetPathsError

    try:
        app()
    except ResnetPathsError as error:
        typer.echo(f"resnet-paths: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
