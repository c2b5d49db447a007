"""A part of a store that was changed, exchanged or made up is computed again: results are those without a store."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import warnings

import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.lesions.store import Store
from resnet_paths.zoo.weights import read_metadata, write_tensors
from tests.chains import random_chain
from tests.lesions.killed_studies import counts, parts
from tests.lesions.test_lesion_options import study
from tests.lesions.test_lesion_store import read
from tests.lesions.test_lesions import STEADY, labelled

CHAIN = random_chain(STEADY)
same = pd.testing.assert_frame_equal


def studies(folder):
    """Studies that differ in one thing, on one store: settings, precision, batch size, lesions."""
    small = rp.single_deletions(CHAIN)[:2]
    return [
        study(CHAIN, labelled(8, batch_size=4), small, store=folder),
        study(CHAIN, labelled(4, batch_size=2), small, store=folder),
        study(CHAIN, labelled(8, batch_size=4), small, store=folder, precision="bfloat16"),
        study(CHAIN, labelled(4, batch_size=4), rp.scalings(CHAIN, [0.5])[:1], store=folder),
    ]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return folder, studies(folder)


def test_every_swap_of_two_parts_is_found_out(kept, tmp_path):
    folder, frames = kept
    assert len(parts(folder)) == 7
    for number, (i, j) in enumerate(itertools.combinations(range(7), 2)):
        store = tmp_path / str(number)
        shutil.copytree(folder, store)
        one, other = parts(store)[i], parts(store)[j]
        contents = one.read_bytes(), other.read_bytes()
        one.write_bytes(contents[1])
        other.write_bytes(contents[0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = studies(store)
        # Of one batch and the same settings, both names lead to both parts: nothing is wrong.
        are_alike = one.parent == other.parent and one.name[:16] == other.name[:16]
        num_warnings = len([w for w in caught if "computed again" in str(w.message)])
        assert num_warnings == 0 if are_alike else 1 <= num_warnings <= len(frames)
        assert sum(counts(frame)[0] for frame in again) == (0 if are_alike else 2)
        for frame, first in zip(again, frames, strict=True):
            same(frame, first)


def test_a_part_copied_to_another_name_is_not_taken(kept, tmp_path):
    folder, frames = kept
    shutil.copytree(folder, tmp_path / "store")
    store = parts(tmp_path / "store")
    shutil.copyfile(store[0], store[0].with_name(store[0].stem[:17] + "0" * 16 + ".safetensors"))
    shutil.copyfile(store[0], store[1].with_name(store[1].stem[:17] + "0" * 16 + ".safetensors"))
    with pytest.warns(UserWarning, match="a part of another") as caught:
        again = studies(tmp_path / "store")
    assert len(caught) == 1
    assert all(counts(frame)[0] == 0 for frame in again)
    for frame, first in zip(again, frames, strict=True):
        same(frame, first)


@pytest.fixture
def stored(tmp_path):
    """A store with one part, and a function that reads it as a study does."""
    frame = study(CHAIN, labelled(4, batch_size=4), rp.single_deletions(CHAIN)[:1], store=tmp_path)
    [path] = parts(tmp_path)
    metadata = read_metadata(path)
    about = json.loads((path.parent / "study.json").read_text())
    store = Store(tmp_path, {k: v for k, v in about.items() if k not in ("format", "resnet_paths", "torch")})
    assert store.folder == path.parent

    def found():
        store._warned = False
        return store.read(metadata["batch"], metadata["lesions"], 4)

    assert len(found()) == len(frame) + 1
    return path, metadata, found


def test_no_flipped_bit_goes_unnoticed(stored):
    path, _, found = stored
    content, bits = path.read_bytes(), random.Random(0)
    for _ in range(300):
        flipped = bytearray(content)
        flipped[bits.randrange(len(content))] ^= 1 << bits.randrange(8)
        path.write_bytes(bytes(flipped))
        with pytest.warns(UserWarning, match="cannot be read and is computed again"):
            assert found() == {}


FORMS = {
    "negative": lambda form: [form[0], [-1, *form[1][1:]]],
    "free": lambda form: [form[0], [*form[1][:2], -1]],
    "huge": lambda form: [form[0], [*form[1][:2], 10**12]],
    "too many rows": lambda form: [form[0], [10**12, *form[1][1:]]],
    "a number": lambda form: 3,
    "objects": lambda form: ["O", form[1]],
    "no dtype": lambda form: ["x", form[1]],
    "fractions": lambda form: [form[0], [*form[1][:2], 1.5]],
    "no sizes": lambda form: [form[0], None],
    "smaller": lambda form: ["int8", form[1]],
}


@pytest.mark.parametrize("kind", FORMS)
def test_made_up_sizes_with_a_right_checksum_are_refused_at_once(kind, stored):
    path, metadata, found = stored
    forms = {name: FORMS[kind](form) for name, form in metadata["forms"].items()}
    write_tensors(path, read(path)[0], metadata | {"forms": forms})
    with pytest.warns(UserWarning, match="computed again"):
        assert found() == {}


def test_compressed_data_that_would_fill_the_memory_are_refused(stored):
    import zlib

    path, metadata, found = stored
    tensors = read(path)[0]
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(10**8), 9)), dtype=torch.uint8)
    write_tensors(path, {name: bomb.clone() for name in tensors}, metadata)
    with pytest.warns(UserWarning, match="computed again"):
        assert found() == {}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"lesions":' * 100_000, "3", "null", "{}"])
def test_metadata_that_are_nothing_of_ours_are_refused(text, stored):
    path, _, found = stored
    safetensors.torch.save_file(read(path)[0], path, {"resnet_paths": text})
    with pytest.warns(UserWarning, match="computed again"):
        assert found() == {}
    (path.parent.parent / "other").mkdir()
    (path.parent.parent / "other" / "study.json").write_text(text)
    with pytest.warns(UserWarning, match="computed again|unknown"):
        study(CHAIN, labelled(4, batch_size=4), rp.single_deletions(CHAIN)[:1], store=path.parent.parent)


# Settings of the process that change numbers


def test_autocast_and_the_precision_of_products_are_part_of_the_key(tmp_path):
    chain, loader = random_chain(STEADY).float(), [(x.float(), y) for x, y in labelled(8)]
    plain = study(chain, loader, store=tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        low = study(chain, loader, store=tmp_path)
        assert counts(low) == (1, 0)
        same(low, study(chain, loader))
    assert low.cross_entropy.tolist() != plain.cross_entropy.tolist()
    assert counts(study(chain, loader, store=tmp_path)) == (0, 1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert counts(study(chain, loader, store=tmp_path)) == (1, 0)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_global_hook_on_an_exported_model_is_not_answered_from_the_store(tmp_path):
    model = nn.Sequential(nn.Linear(5, 3), Residual(), nn.Linear(3, 3)).eval()
    chain, loader = rp.unravel(model, torch.zeros(2, 5)), [(x.float(), y) for x, y in labelled(8)]
    first = study(chain, loader, store=tmp_path)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 1.5)
    try:
        hooked = study(chain, loader, store=tmp_path)
        same(hooked, study(chain, loader))
    finally:
        hook.remove()
    assert hooked.cross_entropy.tolist() != first.cross_entropy.tolist()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.linear(x).relu()
