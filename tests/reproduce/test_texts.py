"""Text: held out by document, every window where it belongs, bits per byte of all tokens."""

import lzma
import math

import pytest
import torch
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce import texts, training
from resnet_paths.reproduce.texts import TextDataset, is_held_out, load_text
from resnet_paths.reproduce.training import TrainingSettings, evaluate, train
from resnet_paths.reproduce.training.batches import augmented_batches
from resnet_paths.reproduce.training.publishing import publish, published_errors
from resnet_paths.reproduce.training.tasks import TASKS
from resnet_paths.zoo import build_network, load_network
from resnet_paths.zoo.tokens import BytePairTokenizer
from resnet_paths.zoo.weights import read_metadata
from tests.reproduce.small_runs import same_run

BYTES = BytePairTokenizer([(97, 98)])
SETTINGS = TrainingSettings("gpt-small", epochs=2, batch_size=3, seed=1)


def small(seed=0, length=200, windows_per_epoch=6):
    """Random words of a small alphabet."""
    letters = torch.randint(97, 101, (length,), generator=torch.Generator().manual_seed(seed))
    return TextDataset("python-docs", [bytes(letters.tolist())], BYTES, context=16, windows_per_epoch=windows_per_epoch)


@pytest.fixture(scope="module")
def held_out():
    return rp.load_dataset("python-docs")


def test_the_shipped_documents_are_those_held_out(held_out):
    text = held_out.tokenizer.decode(held_out.text)
    assert len(text.split("\0")) == 18
    assert len(held_out) == (len(held_out.text) - 1) // 128
    assert "what's new in python 3.0" in text.lower()
    assert is_held_out("library/queue.rst.txt")
    assert not is_held_out("library/os.rst.txt")
    inputs, targets = held_out[3]
    assert torch.equal(inputs[1:], targets[:-1])
    assert torch.equal(inputs, held_out.text[3 * 128 : 4 * 128])
    assert torch.equal(held_out[-1][0], held_out[len(held_out) - 1][0])
    with pytest.raises(IndexError):
        held_out[len(held_out)]


def test_documents_of_a_folder_are_split_by_name(tmp_path):
    (tmp_path / "library").mkdir()
    names = ["library/queue.rst.txt", "library/os.rst.txt", "library/re.rst.txt", "library/image.png"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 20)
    train_set = rp.load_dataset("python-docs", "train", tmp_path)
    test_set = rp.load_dataset("python-docs", "test", str(tmp_path))
    assert train_set.tokenizer.decode(train_set.text) == "\0".join(name * 20 for name in names[1:3])
    assert test_set.tokenizer.decode(test_set.text) == names[0] * 20


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_DEBIAN_PYTHON_DOCS", tmp_path / "absent")
    monkeypatch.setenv("RESNET_PATHS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ResnetPathsError, match=r"folder: .*absent.*'train'.*python3\.11-doc"):
        load_text("python-docs", "train", None)
    (tmp_path / "cache" / "python-docs").mkdir(parents=True)
    (tmp_path / "cache" / "python-docs" / "a.txt").write_bytes(b"some words " * 100)
    assert len(load_text("python-docs", "train", None)) >= 1
    with pytest.raises(ResnetPathsError, match="documents: got '3 tokens'; allowed: more than 128"):
        TextDataset("python-docs", [b"xyz"], BYTES)
    with pytest.raises(ResnetPathsError, match="zero byte"):
        TextDataset("python-docs", [b"xyz\0" * 100], BYTES)


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "python-docs"
    folder.mkdir()
    real = texts.shipped_folder("data") / "python-docs"
    (folder / "merges.txt").write_bytes((real / "merges.txt").read_bytes())
    (folder / "held_out.txt.xz").write_bytes(lzma.compress(b"another text"))
    monkeypatch.setattr(texts, "shipped_folder", lambda name: tmp_path)
    with pytest.raises(ResnetPathsError, match=r"held_out.*corrupt"):
        load_text("python-docs", "test", None)


def test_bits_per_byte_agree_with_a_loop_by_hand():
    """Each token's probability by torch, bytes counted in the text that was predicted."""
    data, model = small(), build_network("gpt-small", torch.Generator().manual_seed(0)).eval()
    loss, bits = evaluate(model, data, 4, task="language")
    nats, num_tokens, content = 0.0, 0, b""
    with torch.no_grad():
        for inputs, targets in data:
            logits = model(inputs[None])[0].double()
            nats -= sum(torch.log_softmax(logits[i], 0)[targets[i]].item() for i in range(len(targets)))
            num_tokens += len(targets)
            content += b"".join(BYTES.token_bytes[token] for token in targets)
    assert num_tokens == 16 * len(data)
    assert loss == pytest.approx(nats / num_tokens, rel=1e-5)
    assert bits == pytest.approx(nats / math.log(2) / len(content), rel=1e-5)


def test_windows_of_an_epoch_are_at_random_places():
    data = small(windows_per_epoch=7)
    batches = list(augmented_batches(data, SETTINGS, 0))
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]
    text = data.text.tolist()
    starts = []
    for inputs, targets in batches:
        for window, following in zip(inputs.tolist(), targets.tolist(), strict=True):
            starts += [i for i in range(len(text) - 16) if text[i : i + 17] == [*window, following[-1]]]
            assert window[1:] == following[:-1]
    assert len(set(starts)) == 7
    again, other = (list(augmented_batches(data, SETTINGS, epoch)) for epoch in (0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0][0], other[0][0])
    halves = [next(augmented_batches(data, SETTINGS, 0, rank, 2))[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), batches[0][0][[0, 2, 1]])


def test_gradients_are_clipped(monkeypatch, tmp_path, run_text):
    norms = []
    step = torch.optim.AdamW.step

    def measured(self, *args, **options):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    run_text(tmp_path, TrainingSettings("gpt-small", epochs=1, batch_size=3, max_gradient_norm=0.1))
    assert len(norms) == 2
    assert max(norms) <= 0.1001


@pytest.fixture
def run_text():
    def call(folder, settings):
        return train(settings, folder, accelerator="cpu", progress=False, train_set=small(), test_set=small(1, 100))

    return call


def test_a_language_model_is_trained_resumed_published_and_checked(run_text, tmp_path, monkeypatch):
    """Interrupted after an epoch, it ends at the same weights; the stored bits per byte are those measured."""
    whole = run_text(tmp_path / "whole", SETTINGS)
    calls = []

    def stop_in_the_second(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **options)

    measure = training._measure
    monkeypatch.setattr(training, "_measure", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_text(tmp_path / "parts", SETTINGS)
    monkeypatch.undo()
    same_run(run_text(tmp_path / "parts", SETTINGS), whole)
    metadata = read_metadata(whole)
    assert (metadata["dataset"], metadata["num_classes"]) == ("python-docs", 1024)
    log = metadata["log"]
    assert log[1]["test_loss"] == pytest.approx(metadata["test_loss"], rel=1e-5)
    assert 0 <= log[1]["test_error_rate"] <= 1
    model = load_network("gpt-small", whole)
    assert evaluate(model, small(1, 100), task="language")[1] == pytest.approx(metadata["test_bits_per_byte"], rel=1e-6)
    publish(whole, tmp_path / "networks", test_set=small(1, 100))
    found = published_errors(tmp_path / "networks", test_set=small(1, 100), progress=False)
    assert found["measure"].tolist() == ["test_bits_per_byte"]
    assert found["as_stated"].all()


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("gpt-small", {"dataset": "fashion-mnist"}, "dataset: got 'fashion-mnist'; allowed: one of 'python-docs'"),
        ("plain-20", {"dataset": "python-docs"}, "dataset: got 'python-docs'; allowed: one of"),
        ("gpt-small", {"max_gradient_norm": 0}, "max_gradient_norm: got 0; allowed: a positive number"),
        ("gpt-small", {"max_gradient_norm": "1"}, "max_gradient_norm: got '1'"),
        ("gpt-small", {"max_gradient_norm": float("nan")}, "max_gradient_norm: got nan"),
    ],
)
def test_settings_that_do_not_fit(network, options, message):
    with pytest.raises(ResnetPathsError, match=message):
        TrainingSettings(network, **options)


def test_the_recipe_may_be_overruled():
    assert TrainingSettings("gpt-small").max_gradient_norm == 1.0
    assert TrainingSettings("gpt-small", max_gradient_norm=math.inf).max_gradient_norm == math.inf
    assert TrainingSettings("plain-20").max_gradient_norm is None


def test_the_loss_is_that_of_torch():
    outputs = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    by_hand = torch.stack([F.cross_entropy(outputs[i], targets[i]) for i in range(3)])
    torch.testing.assert_close(TASKS["language"].loss(outputs, targets), by_hand.mean())
    torch.testing.assert_close(TASKS["language"].loss(outputs, targets, "sum"), by_hand.sum())
    wrong = sum(outputs[i, j].argmax() != targets[i, j] for i in range(3) for j in range(5)) / 5
    torch.testing.assert_close(TASKS["language"].num_wrong(outputs, targets), wrong)
