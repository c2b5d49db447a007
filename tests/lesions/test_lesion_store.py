"""A folder of finished pieces: nothing is computed twice, mixed up or lost, whatever happens to study or disk."""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.lesions import store as store_module
from resnet_paths.lesions.store import Store
from tests.chains import inputs, random_chain
from tests.lesions.killed_studies import counts, in_a_process, looks_of, parts, paused_chain
from tests.lesions.test_lesion_options import norm_chain, study
from tests.lesions.test_lesions import STEADY, labelled
from tests.processes import server

same = pd.testing.assert_frame_equal


def test_a_function_is_found_by_its_key(tmp_path):
    """As a user says that it changed where neither weights nor a probe of two examples show it."""
    chain, loader = random_chain(STEADY), labelled()

    def deleting(key):
        return rp.lesions.Lesion("", name="mine", function=lambda chain: rp.delete_block(chain, 1), key=key)

    expected = study(chain, loader, [deleting(None)])
    frames = [study(chain, loader, [deleting(key)], store=tmp_path) for key in ("1", "1", "2", None)]
    for frame in frames:
        same(frame, expected)
    assert [frame.attrs["batches_found"] for frame in frames] == [0, 5, 0, 0]
    with pytest.raises(rp.ResnetPathsError, match=r"key: got '1'; allowed: a str, with a function"):
        rp.lesions.Lesion("delete", (1,), key="1")


def test_a_study_that_is_run_again_computes_nothing(tmp_path):
    chain, loader = random_chain(STEADY), labelled()
    plain = study(chain, loader, per_class=True)
    first = study(chain, loader, store=tmp_path, per_class=True)
    before = looks_of(tmp_path)
    again = study(random_chain(STEADY), labelled(), store=str(tmp_path), per_class=True)
    same(first, plain)
    same(again, plain)
    assert (counts(plain), counts(first), counts(again)) == ((5, 0), (5, 0), (0, 5))
    assert looks_of(tmp_path) == before
    assert len(before) == 5
    [about] = tmp_path.glob("*/study.json")
    stated = json.loads(about.read_text())
    assert stated["resnet_paths"] == rp.__version__
    assert (stated["precision"], stated["channels_last"], stated["batchnorm"]) == (None, False, "intact")


def test_nothing_runs_when_everything_is_there(tmp_path, monkeypatch):
    chain, loader = random_chain(STEADY), labelled()
    first = study(chain, loader, store=tmp_path)
    monkeypatch.setattr("resnet_paths.lesions.runner.Runner.run", None)
    same(study(chain, loader, store=tmp_path), first)


def test_more_lesions_compute_what_is_missing(tmp_path, monkeypatch):
    chain, loader = random_chain(STEADY), labelled()
    wanted = []
    run = store_module.Store.write
    monkeypatch.setattr(
        Store, "write", lambda self, b, lesions, piece: wanted.append(len(lesions)) or run(self, b, lesions, piece)
    )
    singles, pairs = rp.single_deletions(chain), rp.pair_deletions(chain)
    same(study(chain, loader, singles[:4], store=tmp_path), study(chain, loader, singles[:4]))
    assert wanted == [1 + 4] * 5
    frame = study(chain, loader, pairs[::-1], store=tmp_path)
    assert wanted[5:] == [len(pairs) - 4] * 5
    same(frame, study(chain, loader, pairs[::-1]))
    assert counts(study(chain, loader, pairs[3:9], store=tmp_path)) == (0, 5)
    # More images, and fewer: only what is new is computed.
    assert counts(study(chain, labelled(53), singles, store=tmp_path))[1] == 0  # other images
    batches = list(loader)
    other = [(inputs(8, 9), torch.zeros(8, dtype=torch.int64))]
    assert counts(study(chain, batches[1:3] + other, singles, store=tmp_path)) == (1, 2)


def test_a_lesion_is_found_by_what_it_computes(tmp_path):
    chain, loader = random_chain(STEADY), labelled()
    study(chain, loader, rp.single_deletions(chain), store=tmp_path)
    functions = [lambda c: rp.delete_blocks(c, ["block2"]), lambda c: rp.delete_block(c, -6), lambda c: c]
    frame = study(chain, loader, functions, store=tmp_path)
    assert counts(frame) == (0, 5)
    same(frame, study(chain, loader, functions))
    twice = [
        lambda c: rp.scale_block(c, 0, 2),
        lambda c: rp.scale_block(c, 0, 2.0),
        lambda c: rp.scale_block(c, 0, 2.0),
    ]
    same(study(chain, loader, twice, store=tmp_path), study(chain, loader, twice))


def test_what_is_different_is_never_mixed(tmp_path):
    chain, loader = random_chain(STEADY), labelled()

    def changed(what):
        other = random_chain(STEADY)
        with torch.no_grad():
            what(other)
        return other

    def reweighted(c):
        c[3].branch[0].weight[0, 0] += 1e-15

    other_model = changed(reweighted)
    other_labels = [(x, (y + 1) % 3) for x, y in loader]
    other_images = [(x + 1e-15, y) for x, y in loader]
    variants = [
        (chain, loader, {}),
        (other_model, loader, {}),
        (random_chain(STEADY, 1), loader, {}),
        (chain, other_labels, {}),
        (chain, other_images, {}),
        (chain, [(x.flip(0), y.flip(0)) for x, y in loader], {}),
        (chain, loader, {"precision": "float32"}),
        (chain, loader, {"precision": "bfloat16"}),
        (chain, loader, {"channels_last": True}),
        (chain, loader, {"reestimate_batchnorm": [inputs(20)]}),
        (chain, loader, {"reestimate_batchnorm": [inputs(20), inputs(20)]}),
        (chain.with_head(nn.Sequential(chain.head)), loader, {}),
    ]
    frames = []
    for model, batches, options in variants:
        frame = study(model, batches, store=tmp_path, **options)
        assert counts(frame) == (5, 0), options
        same(frame, study(model, batches, **options))
        frames.append(frame)
    for (model, batches, options), frame in zip(variants, frames, strict=True):
        again = study(model, batches, store=tmp_path, **options)
        assert counts(again) == (0, 5)
        same(again, frame)
    normed = [study(norm_chain(), loader, store=tmp_path, reestimate_batchnorm=[inputs(n)]) for n in (20, 21)]
    assert [counts(frame) for frame in normed] == [(5, 0), (5, 0)]


def test_what_does_not_matter_is_found(tmp_path):
    chain, loader = random_chain(STEADY), labelled()
    study(chain, loader, store=tmp_path)
    for options in ({"batch_budget": 64}, {"batch_budget": 3}, {"per_class": True}, {"device": "cpu"}):
        assert counts(study(chain, loader, store=tmp_path, **options)) == (0, 5)


# Damage


def truncated(path):
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path):
    path.write_bytes(b"")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def of_text(path):
    path.write_text("not a part")


def of_other_rows(path):
    tensors, metadata = read(path)
    stated = json.loads(metadata["resnet_paths"])
    stated["lesions"] = stated["lesions"][:-1]
    safetensors.torch.save_file(tensors, path, {"resnet_paths": json.dumps(stated)})


def of_fewer_rows(path):
    tensors, metadata = read(path)
    safetensors.torch.save_file(tensors | {"error_rate": tensors["error_rate"][:-1]}, path, metadata)


def of_fewer_examples(path):
    tensors, metadata = read(path)
    safetensors.torch.save_file(tensors | {"num_examples": torch.tensor(800)}, path, metadata)


def without_metadata(path):
    safetensors.torch.save_file(read(path)[0], path)


def of_nonsense(path):
    tensors, _ = read(path)
    stated = {"lesions": [["nested"]] * 7, "checksum": 3}
    safetensors.torch.save_file(tensors, path, {"resnet_paths": json.dumps(stated)})


def a_pickle(path):
    torch.save({"wrong": torch.zeros(1)}, path)


def read(path):
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


DAMAGE = [
    truncated,
    emptied,
    flipped,
    of_text,
    of_other_rows,
    of_fewer_rows,
    of_fewer_examples,
    without_metadata,
    of_nonsense,
    a_pickle,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_computed_again(damage, tmp_path):
    chain, loader = random_chain(STEADY), labelled()
    first = study(chain, loader, store=tmp_path)
    damage(parts(tmp_path)[2])
    with pytest.warns(UserWarning, match=r"store: .*safetensors cannot be read and is computed again: .+"):
        frame = study(chain, loader, store=tmp_path)
    assert counts(frame) == (1, 4)
    same(frame, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counts(study(chain, loader, store=tmp_path)) == (0, 5)


def test_parts_that_vanish_or_cannot_be_opened(tmp_path, monkeypatch):
    chain, loader = random_chain(STEADY), labelled()
    first = study(chain, loader, store=tmp_path)
    parts(tmp_path)[0].unlink()
    assert counts(study(chain, loader, store=tmp_path)) == (1, 4)
    opened = Path.open

    def refused(self, *args, **kwargs):
        if self == parts(tmp_path)[1]:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.warns(UserWarning, match="cannot be read and is computed again: .*Permission denied"):
        same(study(chain, loader, store=tmp_path), first)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    chain = recorded = random_chain(STEADY)
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(
            rp.ResnetPathsError, match=r"store: got '.*file.*'; allowed: a folder that can be written to"
        ):
            study(recorded, labelled(), store=folder)
    assert file.read_text() == ""
    assert chain is recorded


@pytest.fixture
def read_only(monkeypatch):
    """No file can be made, as on a read-only file system."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("resnet_paths._utils.files.Path.touch", refuse)


def times_of(folder):
    """When each file and folder was last written to; a folder changes whenever a file in it is made or removed."""
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_study_that_finds_everything_writes_nothing(workers, tmp_path, request):
    chain, loader = random_chain(STEADY), labelled()
    first = study(chain, loader, store=tmp_path)
    before = times_of(tmp_path)
    with ThreadPoolExecutor(workers or 1) as pool:
        options = {"store": tmp_path, "executor": pool if workers else None}
        frame = study(chain, loader, **options)
        assert times_of(tmp_path) == before
        request.getfixturevalue("read_only")
        same(study(chain, loader, **options), frame)
        same(study(chain, loader, rp.single_deletions(chain)[1:3], **options), first[1:3].reset_index(drop=True))
    same(frame, first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_only_folder_that_lacks_results_is_refused_before_they_are_computed(
    workers, tmp_path, monkeypatch, request
):
    chain, loader = random_chain(STEADY), labelled()
    study(chain, list(loader)[:2], store=tmp_path / "store")
    before = times_of(tmp_path / "store")
    request.getfixturevalue("read_only")
    monkeypatch.setattr("resnet_paths.lesions.runner.Runner.run", None)
    message = r"store: got '.*'; allowed: .*or one that has all results\. .*Read-only file system\. Pass another folder"
    with ThreadPoolExecutor(workers or 1) as pool:
        executor = pool if workers else None
        for folder in (tmp_path / "store", tmp_path):  # some results, and none
            with pytest.raises(rp.ResnetPathsError, match=message):
                study(chain, loader, store=folder, executor=executor)
        more = [*rp.single_deletions(chain), *rp.pair_deletions(chain)]
        with pytest.raises(rp.ResnetPathsError, match=message):
            study(chain, list(loader)[:2], more, store=tmp_path / "store", executor=executor)
    assert times_of(tmp_path / "store") == before


@pytest.mark.parametrize("half_written", [False, True])
def test_a_full_disk_loses_nothing_that_was_finished(half_written, tmp_path, monkeypatch):
    chain, loader = random_chain(STEADY), labelled()
    save, saved = safetensors.torch.save_file, []

    def until_full(tensors, path, metadata=None):
        if len(saved) == 3:
            if half_written:
                Path(path).write_bytes(b"\0" * 20)
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        save(tensors, path, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", until_full)
        full = r"store: got .*safetensors'; allowed: a folder with space left.*No space left.*make room and run.*again"
        with pytest.raises(rp.ResnetPathsError, match=full):
            study(chain, loader, store=tmp_path)
    before = looks_of(tmp_path)
    assert len(before) == 3
    assert not list(tmp_path.glob("*/.unfinished-*"))
    frame = study(chain, loader, store=tmp_path)
    assert counts(frame) == (2, 3)
    same(frame, study(chain, loader))
    assert looks_of(tmp_path).items() >= before.items()


def test_results_of_another_version_are_not_used(tmp_path, monkeypatch):
    chain, loader = random_chain(STEADY), labelled()
    with monkeypatch.context() as patched:
        patched.setattr(rp, "__version__", "0.0.9")
        study(chain, loader, store=tmp_path)
    with pytest.warns(UserWarning, match=r"store .*: results of resnet_paths 0\.0\.9 with torch .* not used") as caught:
        assert counts(study(chain, loader, store=tmp_path)) == (5, 0)
    assert "resnet_paths" not in Path(caught[0].filename).parts[-2:]
    with pytest.warns(UserWarning, match="not used"):
        assert counts(study(chain, loader, store=tmp_path)) == (0, 5)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "study.json").write_text("{")
    with pytest.warns(
        UserWarning, match=r"results of resnet_paths 0\.0\.9 with torch .*, unknown \(strange\) are stored there"
    ):
        study(chain, loader, store=tmp_path)


def test_what_a_killed_study_left_half_written_is_no_part(tmp_path):
    chain, loader = random_chain(STEADY), labelled()
    first = study(chain, loader, store=tmp_path)
    part = parts(tmp_path)[0]
    young, old = (part.with_name(f".unfinished-{name}.safetensors") for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(part.read_bytes()[:40])
    os.utime(old, (0, time.time() - 7200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = study(chain, loader, store=tmp_path)
    same(frame, first)
    assert counts(frame) == (0, 5)
    assert young.exists()  # another study may be writing it
    assert not old.exists()


# Several processes


@pytest.mark.slow
def test_two_studies_at_once_on_one_store(tmp_path):
    folder, results = tmp_path / "store", [tmp_path / "one", tmp_path / "other"]
    studies = [server().Process(target=in_a_process, args=(folder, 19, result)) for result in results]
    for process in studies:
        process.start()
    folder.with_suffix(".go").touch()
    for process in studies:
        process.join(120)
    plain = study(random_chain(STEADY), labelled(152))
    for result in results:
        same(pd.read_pickle(result), plain)
    assert len(parts(folder)) == 19
    assert not list(folder.glob("*/.unfinished-*"))
    assert counts(study(paused_chain(), labelled(152), store=folder)) == (0, 19)
