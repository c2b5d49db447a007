"""Findings: intervals against scipy's, verdicts, and the tables that are made of them."""

from __future__ import annotations

import json
import math

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from scipy import stats
from typer.testing import CliRunner

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import shipped_folder
from resnet_paths.reproduce import cli
from resnet_paths.reproduce.claims import check_claim, read_claims
from resnet_paths.reproduce.findings import Finding, as_expected, findings_frame, on_dataset
from resnet_paths.reproduce.findings_tables import (
    PAGES,
    findings_table,
    read_findings,
    replace_tables,
    update_findings,
)
from resnet_paths.reproduce.runner import find_notebooks

NAN = (math.nan, math.nan)


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(size=7)
    found = Finding.of_mean("x", values, over="seeds")
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.ends == pytest.approx((expected.low, expected.high))
    assert found.estimate == pytest.approx(values.mean())
    for few in ([3.0], [3.0, 4.0]):
        assert all(math.isnan(end) for end in Finding.of_mean("x", few).ends)


def test_the_interval_of_a_statistic_is_scipys_bootstrap():
    x, y = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 60).T

    def correlation(a, b):
        return stats.spearmanr(a, b).statistic

    found = Finding.of_sample("x", correlation, x, y)
    options = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 2_000}
    expected = stats.bootstrap((x, y), correlation, rng=np.random.default_rng(1), **options).confidence_interval
    assert found.ends == pytest.approx((expected.low, expected.high), abs=0.03)
    assert found.estimate == correlation(x, y)
    assert all(math.isnan(end) for end in Finding.of_sample("x", np.median, [1.0]).ends)


def test_the_interval_over_rows_and_columns_has_the_variance_of_both():
    """The mean of r + c: its variance is the sum of those of the two means, also where one of them is 0."""
    generator = np.random.default_rng(0)
    rows, columns = generator.normal(size=40), 3 * generator.normal(size=60)
    for table, variance in (
        (np.add.outer(rows, columns), rows.var() / 40 + columns.var() / 60),
        (np.add.outer(0 * rows, columns), columns.var() / 60),
        (np.add.outer(rows, 0 * columns), rows.var() / 40),
    ):
        found = Finding.of_table("x", np.mean, table)
        low, high = found.ends
        assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.08)
        assert found.estimate == pytest.approx(table.mean())


@pytest.mark.parametrize(
    ("interval", "bounds", "verdict", "prediction"),
    [
        ((1, 2), {"at_most": 3}, "agrees", "at most 3 points"),
        ((1, 2), {"at_most": 1.5}, "too small to tell", "at most 1.5 points"),
        ((1, 2), {"at_most": 1}, "too small to tell", "at most 1 point"),
        ((1, 2), {"at_most": 0.5}, "differs", "at most 0.5 points"),
        ((1, 2), {"at_least": 1, "at_most": 2}, "agrees", "1 to 2 points"),
        ((1, 2), {"at_least": 2.5}, "differs", "at least 2.5 points"),
        (NAN, {"at_least": 2.5}, "no interval", "at least 2.5 points"),
        ((1, 2), {}, "", ""),
        (None, {"at_least": 1.5, "at_most": 1.5}, "agrees", "1.5 points"),
    ],
)
def test_verdicts(interval, bounds, verdict, prediction):
    finding = Finding("cost", 1.5, interval, "points", "images", **bounds)
    assert (finding.verdict, finding.prediction) == (verdict, prediction)
    assert finding.as_expected == (verdict != "differs")
    opposite = Finding("cost", 1.5, interval, expected="differs", **bounds)
    assert opposite.as_expected == (verdict != "agrees")
    assert bool(finding.refuted_by) == bool(bounds)
    claim = read_claims("assert f.as_expected, [f]", {"f": finding})[0]
    assert claim["finding"] == json.loads(json.dumps(claim["finding"])) == finding.to_dict()
    if verdict == "differs":
        with pytest.raises(AssertionError, match=r"f.as_expected .*: not"):
            check_claim(claim)
        check_claim(read_claims("assert f, [f]", {"f": opposite})[0])
    else:
        check_claim(claim)


def test_wrong_findings_are_refused():
    with pytest.raises(ResnetPathsError, match="expected: got 'maybe'; allowed: 'agrees' or 'differs' or ''"):
        Finding("x", 1, expected="maybe")
    with pytest.raises(ResnetPathsError, match="at_least: got 3"):
        Finding("x", 1, at_least=3, at_most=2)
    with pytest.raises(ResnetPathsError, match=r"interval: got \(2, 1\)"):
        Finding("x", 1, (2, 1))
    with pytest.raises(ResnetPathsError, match="at least one finding"):
        as_expected([])


@pytest.mark.parametrize("expected", ["agrees", "differs"])
@pytest.mark.parametrize("interval", [(0.1, 0.9), (1.1, 1.9)])
def test_on_another_data_set_either_verdict_may_be(interval, expected):
    measured = Finding("cost", 1.0, interval, at_most=1, expected=expected)
    of_text = Finding("loss", 1.0, interval, at_most=1, expected=expected, dataset="python-docs")
    moved, kept = on_dataset([measured, of_text], "cifar-10")
    assert (moved.dataset, moved.verdict, moved.as_expected) == ("CIFAR-10", measured.verdict, True)
    check_claim(read_claims("assert f.as_expected, [f]", {"f": moved})[0])
    assert kept == of_text
    assert on_dataset([measured, of_text], "fashion-mnist") == [measured, of_text]
    assert on_dataset([measured], "digits")[0].dataset == "digits"
    both = Finding("loss", 1.0, interval, dataset="Fashion-MNIST, python-docs")
    assert on_dataset([both], "cifar-10")[0].dataset == "CIFAR-10, python-docs"


FINDINGS = [
    Finding("a median", 0.5, (0.25, 1), "%", "blocks", at_most=2, networks="n|1", images=2_000, headline=True),
    Finding("a number of blocks", 12, networks="n1"),
    Finding(
        *("a window", 9, NAN, "blocks"),
        **{"at_least": 5, "images": 6, "example": "window", "source": "Someone 2016, figure 1", "larger_run": "seeds"},
    ),
]


def executed(folder, name, findings, error=None):
    claims = read_claims("assert as_expected(f), f", {"f": findings, "as_expected": as_expected})
    recorded = new_output("display_data", {"application/vnd.resnet-paths.claims+json": claims})
    metadata = {"resnet_paths": {"profile": "quick", "error": error}}
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[recorded])], metadata=metadata)
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


def test_tables_are_made_of_executed_notebooks(tmp_path):
    data, pages = tmp_path / "data", tmp_path / "pages"
    for folder in ("tables", "explanation"):
        (pages / folder).mkdir(parents=True)
    made = "<!-- findings: {} -->old<!-- end of findings -->"
    (pages / "tables" / "findings.md").write_text(f"# F\n\n{made.format('agreement')}\n\n{made.format('all')}\n")
    (pages / "gallery.md").write_text(f"| x | kept {made.format('01')} |\n| y | {made.format('02')} |\n")
    (pages / "explanation" / "three_findings.md").write_text(f"{made.format('table:01:a_number')}\n")
    executed(tmp_path, "01_one", FINDINGS)
    executed(tmp_path, "02_two", FINDINGS[:1], error="cell 3")
    assert len(update_findings(tmp_path, data, pages)) == 4
    some = (pages / "explanation" / "three_findings.md").read_text().splitlines()
    assert some[1].startswith("| finding | seeds |")
    assert some[3:] == ["| a number of blocks | 1 | - | 12 | exact | none |  |", "<!-- end of findings -->"]
    frame = read_findings(data / "findings.csv")
    assert frame.quantity.tolist() == [finding.quantity for finding in FINDINGS]
    assert frame.verdict.tolist() == ["agrees", "", "no interval"]
    page = (pages / "tables" / "findings.md").read_text()
    row = "a median | n\\|1 | 1 | 2,000 images | Fashion-MNIST | 0.5 % | 0.25 to 1, blocks | at most 2 %"
    assert row in page
    assert "an interval above 2 | agrees | quick |" in page
    assert "| Someone 2016, figure 1 | a window | at least 5 blocks | 9 blocks (not known) | **no interval" in page
    assert "; Fashion-MNIST; 1 seed; 6 windows | seeds |" in page
    assert "| a window |  | 1 | 6 windows | Fashion-MNIST | 9 blocks |" in page
    cell = "a median 0.5 % (0.25 to 1, blocks); [all](tables/findings.md) (quick profile)."
    expected = f"| x | kept <!-- findings: 01 --> {cell} <!-- end of findings --> |\n"
    assert (pages / "gallery.md").read_text() == expected + "| y | <!-- findings: 02 -->  <!-- end of findings --> |\n"
    # Another run replaces the rows of its own notebooks only.
    executed(tmp_path, "02_two", FINDINGS[1:2])
    (tmp_path / "notebooks" / "01_one.ipynb").unlink()
    update_findings(tmp_path, data, pages)
    assert read_findings(data / "findings.csv").notebook.tolist() == ["01_one"] * 3 + ["02_two"]
    first = findings_table(frame).splitlines()[0]
    assert first == "01  a median: 0.5 % (0.25 to 1, blocks); predicted at most 2 %: agrees"


def test_a_cell_has_the_first_six_main_findings_and_the_profiles():
    def cell(findings, profiles, page="gallery.md"):
        rows = [{"notebook": "01_one"} | finding.to_dict() for finding in findings]
        frame = pd.DataFrame(rows).assign(profile=profiles)
        text = replace_tables("<!-- findings: 01 --> <!-- end of findings -->", frame, page)
        return text.removeprefix("<!-- findings: 01 --> ").removesuffix(" <!-- end of findings -->")

    main = [Finding(f"number {i}", i, unit="blocks", headline=True) for i in range(8)]
    assert cell(main[:2], "full") == "number 0 0 blocks; number 1 1 block (full profile)."
    assert cell([*main[:1], FINDINGS[1]], "") == "number 0 0 blocks; [all](tables/findings.md)."
    several = cell(main, ["quick", *["full"] * 7], "explanation/other.md")
    assert several.endswith("number 5 5 blocks; [all](../tables/findings.md) (full and quick profiles).")
    assert "number 6" not in several


def test_the_command_prints_findings_or_says_that_there_are_none(tmp_path):
    result = CliRunner().invoke(cli.app, ["findings", str(tmp_path)])
    assert isinstance(result.exception, ResnetPathsError)
    assert "Run resnet-paths reproduce" in str(result.exception)
    executed(tmp_path, "01_one", FINDINGS)
    result = CliRunner().invoke(cli.app, ["findings", str(tmp_path)])
    assert result.stdout.count("\n") == 3


def test_a_notebook_shows_its_findings_as_a_table():
    frame = findings_frame(FINDINGS)
    assert frame.loc["a median"].tolist() == ["0.5 %", "0.25 to 1, blocks", "at most 2 %", "agrees"]
    assert frame.loc["a number of blocks", "95 % interval"] == "exact"


def test_the_tables_of_the_documentation_are_those_of_the_data():
    frame = read_findings()
    assert set(frame.notebook) <= {path.stem for path in find_notebooks()}
    assert frame[["quantity", "estimate", "networks"]].notna().all(axis=None)
    assert frame[frame.verdict == "differs"].expected.isin(["differs", ""]).all()
    for page in PAGES:
        text = (shipped_folder("notebooks") / page).read_text(encoding="utf-8")
        assert "<!-- findings: " in text
        assert replace_tables(text, frame, page) == text, f"run 'resnet-paths findings --update' to write {page} again"


@pytest.mark.parametrize("counts", [[1] * 8, [0] * 8, [1, 1, 1, 0, 1, 1, 1, 1], [3, 3, 2, 3, 3, 3, 3, 3]])
def test_intervals_of_rates_stay_within_0_and_100_percent(counts):
    sizes = [max(counts, default=1) or 1] * 8
    finding = Finding.of_rate("rate", counts, sizes, over="photographs")
    low, high = finding.interval
    assert finding.estimate == pytest.approx(100 * sum(counts) / sum(sizes))
    assert 0 <= low <= finding.estimate <= high <= 100
    assert low < high
    assert finding.unit == "%"
    if sizes[0] == 1:  # one item a cluster: Wilson's, by another library
        expected = stats.binomtest(sum(counts), 8).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high))


def test_numbers_of_data_are_kept():
    assert pd.api.types.is_bool_dtype(read_findings().headline)
