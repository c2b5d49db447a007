"""Kills with identical results, as many as in the short form of the command that counts them."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks import kills


@pytest.mark.slow
@pytest.mark.parametrize("kind", kills.KINDS)
def test_every_kill_is_followed_by_identical_results(kind, tmp_path):
    if kind.startswith("Dask"):
        pytest.importorskip("distributed")
    kill, _, times = kills.KINDS[kind]
    assert kill(times, tmp_path) == times


def test_a_kind_that_is_not_as_it_should_be_fails_the_command(monkeypatch, capsys):
    def broken(times, scratch):
        raise AssertionError("another frame")

    kinds = {"one": kills.Kind(lambda times, scratch: times - 1, 3, 2), "other": kills.Kind(broken, 3, 2)}
    monkeypatch.setattr(kills, "KINDS", kinds | {"good": kills.Kind(lambda times, scratch: times, 3, 2)})
    monkeypatch.setattr(sys, "argv", ["kills", "--short"])
    assert kills.main() == 1
    rows = capsys.readouterr().out
    assert "| one | 2 | 1 of 2 |" in rows
    assert "| other | 2 | 0 of 2 |" in rows
    assert "| good | 2 | 2 of 2 |" in rows
