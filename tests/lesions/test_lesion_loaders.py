"""What studies do with loaders of every kind, and when somebody stops them by hand."""

from __future__ import annotations

import concurrent.futures
import itertools
import warnings
from collections import UserDict
from concurrent.futures import Executor, Future

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils import data

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import inputs_of
from resnet_paths.lesions.lesion import Lesion
from tests.chains import inputs, random_chain
from tests.lesions.test_lesion_options import near, study
from tests.lesions.test_lesions import STEADY, labelled

X, Y = inputs(30), torch.arange(30) % 3
SET = data.TensorDataset(X, Y)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8, torch.int64])
def test_labels_of_any_whole_kind(kind, tmp_path):
    chain = random_chain(STEADY)
    plain = study(chain, [(X, Y)], per_class=True)
    for _ in range(2):
        assert study(chain, [(X, Y.to(kind))], per_class=True, store=tmp_path).equals(plain)
    truth = study(chain.with_head(nn.Linear(3, 2).double()), [(X, Y > 0)])
    assert truth.num_examples.tolist() == [30] * 6


class Pairs(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (5, r"loader: got 'int'; allowed: batches of \(inputs, labels\). Wrap a data set"),
        (None, r"loader: got 'NoneType'"),
        ([], "loader: got 'no batches'; allowed: a loader of at least one batch"),
        ([(X[:0], Y[:0])], "loader: got 'no batches'"),
        (iter([]), "loader: got 'no batches'"),
        (X, r"loader: got 'Tensor'; allowed: batches of \(inputs, labels\)"),
        ([(X, Y, Y)], r"loader: got 'tuple'; allowed: batches of \(inputs, labels\), or mappings"),
        ([(X, 0)], r"loader: got 'tuple'"),
        ([{"x": X}], r"loader: got \"dict of 'x'\"; allowed: .*mappings with 'labels' among their keys"),
        ([{"x": X, "labels": 3}], r"loader: got \"dict of 'x', 'labels'\"; allowed: .*labels are a tensor"),
        ([((X, X[:3]), Y)], r"loader: got 'labels \[30\] for inputs \[\[30, 5\], \[3, 5\]\]'"),
        ([({"x": 3}, Y)], r"loader: got 'labels \[30\] for inputs \[\]'"),
        ([(X, Y[:7])], r"loader: got 'labels \[7\] for inputs \[30, 5\]'; allowed: one label for each input"),
        ([(X[:1], torch.tensor(0))], r"loader: got 'labels \[\] for inputs \[1, 5\]'"),
        ([(torch.tensor(0.0), torch.tensor(0))], r"loader: got 'labels \[\] for inputs \[\]'"),
        ([(X, Y[:, None])], r"labels: got 'torch.int64 \[30, 1\]'; allowed: class indices"),
        ([(X, Y.double())], r"labels: got 'torch.float64 \[30\]'; allowed: class indices, integers \[batch\]"),
        ([(X, Y + 1)], r"labels: got \[1, 3\]; allowed: class indices from 0 to 2"),
        ([(X, Y - 1)], r"labels: got \[-1, 1\]"),
        ([(X, Y), (X, Y + 7)], r"labels: got \[7, 9\]"),
    ],
)
def test_loaders_that_are_none(loader, message):
    for loads in (study, lambda *args: rp.predicted_effects(*args, progress=False)):
        with pytest.raises(rp.ResnetPathsError, match=message):
            loads(random_chain(STEADY), loader)


def test_labels_are_held_against_every_head():
    chain = random_chain(STEADY)
    smaller = chain.with_head(nn.Linear(3, 2).double())
    for lesions in ([lambda c: smaller], [lambda c: c, lambda c: rp.delete_block(smaller, 0)]):
        with pytest.raises(rp.ResnetPathsError, match=r"labels: got \[0, 2\]; allowed: class indices from 0 to 1"):
            study(chain, [(X, Y)], lesions)
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got 'a chain that returns a tuple'; allowed: one tensor"):
        study(chain, [(X, Y)], [lambda c: c.with_head(Pairs())])
    with pytest.raises(rp.ResnetPathsError, match=r"loader: got 'labels \[30\] for logits \[30, 1, 3\]'"):
        study(chain, [(X, Y)], [lambda c: c.with_head(nn.Unflatten(1, (1, 3)))])


@pytest.mark.parametrize(
    ("lesions", "message"),
    [
        (["block1"], r"lesions: got 'block1'; allowed: a Lesion, or a function from chain to chain.*single_deletions"),
        ([3], r"lesions: got 3"),
        (Lesion("delete", (), name="one"), r"lesions: got Lesion\(kind='delete'.*allowed: a list of lesions"),
        ("block1", r"lesions: got 'block1'; allowed: a list of lesions"),
        (rp.delete_block, r"lesions: got <function delete_block.*allowed: a list"),
    ],
)
def test_lesions_that_are_none(lesions, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        study(random_chain(STEADY), [(X, Y)], lesions)


def test_no_lesions_give_an_empty_frame():
    frame = study(random_chain(STEADY), [(X, Y)], [])
    assert len(frame) == 0
    assert frame.attrs["block_evaluations"] == 6


def test_empty_batches_are_passed_over():
    chain = random_chain(STEADY)
    empty = (X[:0], Y[:0])
    plain = study(chain, [(X[:20], Y[:20]), (X[20:], Y[20:])])
    frame = study(chain, [empty, (X[:20], Y[:20]), empty, (X[20:], Y[20:]), empty])
    assert frame.equals(plain)


def test_loaders_of_any_kind():
    chain = random_chain(STEADY)
    plain = study(chain, labelled())

    class Items:
        """Without __iter__ and __len__."""

        def __getitem__(self, index):
            return list(labelled())[index]

    class Lengthless(data.IterableDataset):
        def __iter__(self):
            return iter([(x, y) for batch in labelled() for x, y in zip(*batch, strict=True)])

    for loader in (
        list(labelled()),
        iter(labelled()),
        (batch for batch in labelled()),
        [list(batch) for batch in labelled()],
        Items(),
        data.DataLoader(Lengthless(), batch_size=8),
    ):
        assert study(chain, loader).equals(plain)


def shuffling():
    return {
        "shuffle": {"shuffle": True},
        "subset": {"sampler": data.SubsetRandomSampler(range(30))},
        "batch sampler": {"batch_sampler": data.BatchSampler(data.RandomSampler(SET), 8, drop_last=False)},
    }


@pytest.mark.parametrize("kind", shuffling())
def test_loaders_that_shuffle(kind, tmp_path):
    chain = random_chain(STEADY)
    options = shuffling()[kind]
    batch_size = {} if kind == "batch sampler" else {"batch_size": 8}
    loader = data.DataLoader(SET, **options, **batch_size)
    near(study(chain, loader), study(chain, data.DataLoader(SET, batch_size=8)))
    with pytest.raises(
        rp.ResnetPathsError, match=r"loader: got .*RandomSampler.*same batches each time.*shuffle=False"
    ):
        study(chain, loader, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_loaders_that_drop_their_last_batch():
    chain = random_chain(STEADY)

    class Endless(data.IterableDataset):
        def __iter__(self):
            return iter(SET)

    dropping = [
        (data.DataLoader(SET, batch_size=8, drop_last=True), 24, "leaves out 6 of 30 examples"),
        (data.DataLoader(SET, batch_sampler=data.BatchSampler(range(28), 8, True)), 24, "leaves out 4 of 28 examples"),
        (data.DataLoader(SET, batch_size=8, sampler=range(20), drop_last=True), 16, "leaves out 4 of 20 examples"),
        (data.DataLoader(Endless(), batch_size=8, drop_last=True), 24, "leaves out up to 7 examples"),
    ]
    for loader, num_examples, message in dropping:
        with pytest.warns(UserWarning, match=f"loader: drop_last=True {message}") as caught:
            assert study(chain, loader).num_examples[0] == num_examples
        assert "test_lesion_options" in caught[0].filename  # where the study was called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study(chain, data.DataLoader(SET, batch_size=10, drop_last=True))
        study(chain, data.DataLoader(SET, batch_size=8))


# Ctrl-C


def stopping(batches, after):
    """Batches, and then somebody presses Ctrl-C."""
    for number, batch in enumerate(batches):
        if number == after:
            raise KeyboardInterrupt
        yield batch


class Pressed(nn.Module):
    """Ctrl-C while a step runs for the n-th time."""

    def __init__(self, part, after):
        super().__init__()
        self.part, self.left = part, after

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.part(x)


def test_a_study_that_is_stopped_returns_the_rows_so_far():
    chain, batches = random_chain(STEADY), list(labelled())
    for k in range(1, len(batches)):
        with pytest.raises(
            rp.StudyInterrupted, match=rf"stopped after {k} batches. The rows.*sys.last_value"
        ) as caught:
            study(chain, stopping(batches, k), per_class=True)
        assert isinstance(caught.value, KeyboardInterrupt)
        assert isinstance(caught.value.__cause__, KeyboardInterrupt)
        pd.testing.assert_frame_equal(caught.value.frame, study(chain, batches[:k], per_class=True), check_like=True)
        assert caught.value.num_batches == k
        assert caught.value.store is None
    with pytest.raises(rp.StudyInterrupted, match=r"^stopped after 0 batches\.$") as caught:
        study(chain, stopping(batches, 0))
    assert caught.value.frame is None


def test_a_study_may_be_stopped_inside_a_step(tmp_path):
    plain, batches = random_chain(STEADY), list(labelled())
    # The stem runs once for the probe, then once per batch.
    chain = ResidualChain(Pressed(plain.stem, 4), plain, plain.head).eval()
    resumes = r"stopped after 2 batches\. The rows.* Run the same study again to resume from"
    with pytest.raises(rp.StudyInterrupted, match=resumes) as caught:
        study(chain, batches, store=tmp_path)
    assert caught.value.store == tmp_path
    assert str(tmp_path) in str(caught.value)
    pd.testing.assert_frame_equal(caught.value.frame, study(plain, batches[:2]))


def test_a_study_from_a_loader_that_was_stopped_goes_on_from_its_store(tmp_path):
    chain, batches = random_chain(STEADY), list(labelled())
    with pytest.raises(rp.StudyInterrupted):
        study(chain, stopping(batches, 2), store=tmp_path)
    frame = study(chain, batches, store=tmp_path)
    assert (frame.attrs["batches_found"], frame.attrs["batches_computed"]) == (2, 3)
    pd.testing.assert_frame_equal(frame, study(chain, batches))


def test_a_loader_that_never_ends_is_stopped_and_goes_on_from_its_store(tmp_path, capsys):
    chain, stop_at = random_chain(STEADY), [4]

    def endless():
        generator = torch.Generator().manual_seed(0)
        for number in itertools.count():
            if number == stop_at[0]:
                raise KeyboardInterrupt
            yield torch.randn(3, 5, generator=generator, dtype=torch.float64), torch.arange(3)

    frames = []
    for found, num_batches in ((0, 4), (4, 6)):
        stop_at[0] = num_batches
        message = (
            rf"stopped after {num_batches} batches\. .* They are kept in '.*'\. Run the same study again to resume"
        )
        with pytest.raises(rp.StudyInterrupted, match=message) as caught:
            rp.lesion_study(chain, endless(), rp.single_deletions(chain), store=tmp_path)
        assert caught.value.num_batches == num_batches
        frames.append(caught.value.frame)
        assert frames[-1].attrs["batches_found"] == found
        bar = capsys.readouterr().err
        assert f"{num_batches}batch" in bar
        assert f"{3 * num_batches} examples" in bar
    batches = list(itertools.islice(endless(), 6))
    for frame, number in zip(frames, (4, 6), strict=True):
        pd.testing.assert_frame_equal(frame, study(chain, batches[:number]))


class Idle(Executor):
    """Takes work and does none of it."""

    _max_workers = 4

    def __init__(self):
        self.futures = []

    def submit(self, fn, /, *args, **kwargs):
        self.futures.append(Future())
        return self.futures[-1]


class Stopped(Idle):
    """As when the second piece is stopped by hand in its thread."""

    def submit(self, fn, /, *args, **kwargs):
        future = super().submit(fn, *args, **kwargs)
        if len(self.futures) == 2:
            future.set_exception(KeyboardInterrupt())
        return future


def test_work_that_waits_in_an_executor_is_cancelled():
    executor = Idle()
    with pytest.raises(rp.StudyInterrupted, match="stopped after 0 batches"):
        study(random_chain(STEADY), stopping(list(labelled()), 3), executor=executor)
    assert [future.cancelled() for future in executor.futures] == [True] * 3
    executor = Stopped()
    with pytest.raises(rp.StudyInterrupted, match="stopped after 0 batches"):
        study(random_chain(STEADY), labelled(80), executor=executor)
    assert [future.cancelled() for future in executor.futures] == [True, False] + [True] * 6


class Reader(nn.Module):
    """As a language model: tokens, a mask, positions that are one row for all examples; a dictionary comes out."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 4), nn.Embedding(6, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3))
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask, position_ids=None, *, scale=1.0):
        x = self.tokens(input_ids) * attention_mask[..., None]
        if position_ids is not None:
            x = x + self.positions(position_ids)
        for layer in self.layers:
            x = x + scale * layer(x)
        return {"logits": self.out(self.norm(x.mean(1)))}


def sentences():
    """(Tokens, mask, positions, labels) of two batches."""
    generator = torch.Generator().manual_seed(0)
    for batch in (8, 5):
        tokens = torch.randint(20, (batch, 6), generator=generator)
        mask = (torch.arange(6) < torch.randint(2, 7, (batch, 1), generator=generator)).double()
        yield tokens, mask, torch.arange(6)[None], torch.randint(3, (batch,), generator=generator)


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping that is no dict."""


FORMS = {
    "a mapping": lambda t, m, p, y: {"input_ids": t, "attention_mask": m, "position_ids": p, "labels": y},
    "a mapping that is no dict": lambda t, m, p, y: Encoding(labels=y, position_ids=p, attention_mask=m, input_ids=t),
    "a pair with a mapping": lambda t, m, p, y: (
        {"input_ids": t, "attention_mask": m, "position_ids": p, "scale": 0.5},
        y,
    ),
    "a pair with a tuple": lambda t, m, p, y: ((t, m, p), y),
    "a list with a list": lambda t, m, p, y: [[t, m], y],
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_every_form_that_a_model_is_called_with(form, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reader().double().eval()
    loader = [FORMS[form](*batch) for batch in sentences()]
    examples = [inputs_of(batch) for batch in loader]
    chain = rp.unravel(model, examples[0])
    truth = torch.cat([batch[-1] for batch in sentences()])

    def wrong(lesioned):
        called = [lesioned(**x) if isinstance(x, dict) else lesioned(*x) for x in examples]
        return int((torch.cat(called).argmax(1) != truth).sum())

    with torch.no_grad():
        expected = [wrong(rp.delete_block(chain, index)) for index in range(3)]
    frame = study(chain, loader)
    assert (frame.error_rate * 13).round().tolist() == expected
    assert frame.num_examples.tolist() == [13] * 3
    for options in ({"batch_budget": 3}, {"batch_budget": 64}, {"store": tmp_path}, {"store": tmp_path}):
        near(study(chain, loader, **options), frame)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        near(study(chain, loader, executor=pool), frame)
    again = study(chain, loader, store=tmp_path)
    assert again.attrs["batches_computed"] == 0
    # Statistics of these very batches, from the whole batch or from its inputs alone.
    renewed = study(chain, loader, reestimate_batchnorm=loader)
    assert renewed.batchnorm_statistics.tolist() == ["re-estimated"] * 3
    if isinstance(examples[0], dict):
        assert study(chain, loader, reestimate_batchnorm=examples).equals(renewed)
    # The other ways to read a batch.
    effects = rp.predicted_effects(chain, loader, progress=False)
    assert effects.num_examples.tolist() == [13] * 3
    means = rp.mean_replacements(chain, examples[0])
    assert study(chain, loader, means).num_examples.tolist() == [13] * 3


def test_arguments_other_than_those_unraveled_are_refused():
    (tokens, mask, _, labels), _ = sentences()
    chain = rp.unravel(Reader().eval(), {"input_ids": tokens, "attention_mask": mask.float()})
    batch = {"input_ids": tokens, "labels": labels}
    with pytest.raises(
        rp.ResnetPathsError, match=r"inputs: got .*\['input_ids'\].*with \['attention_mask', 'input_ids'\]"
    ):
        study(chain, [batch])
