"""Every batch follows from seed and epoch, and holds crops and flips of its own images, however many share it."""

import pytest
import torch

from resnet_paths.reproduce.datasets import ImageDataset
from resnet_paths.reproduce.training import TrainingSettings
from resnet_paths.reproduce.training.batches import augmented_batches


def random_images(num_images, name="fashion-mnist", shape=(1, 28, 28)):
    """Every pixel random, so that no two crops are alike; no pixel zero, so that the padding is seen."""
    generator = torch.Generator().manual_seed(8)
    images = torch.randint(1, 256, (num_images, *shape), generator=generator, dtype=torch.uint8)
    return ImageDataset(name, images, torch.arange(num_images) % 10)


def all_crops(images, padding):
    """Where every possible augmented image comes from: bytes to (number, row, column, flipped), by slicing alone."""
    origin = {}
    for number, image in enumerate(images.images.numpy()):
        channels, height, width = image.shape
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=torch.uint8).numpy()
        padded[:, padding : padding + height, padding : padding + width] = image
        for row in range(2 * padding + 1):
            for column in range(2 * padding + 1):
                crop = padded[:, row : row + height, column : column + width]
                origin[crop.tobytes()] = (number, row, column, False)
                origin[crop[:, :, ::-1].tobytes()] = (number, row, column, True)
    return origin


def to_bytes(images, inputs):
    """Undo the normalisation."""
    values = (inputs.double() * images._std.double() + images._mean.double()) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8).numpy()


@pytest.mark.parametrize("padding", [0, 2, 3])
@pytest.mark.parametrize(("name", "shape"), [("fashion-mnist", (1, 28, 28)), ("cifar-10", (3, 32, 32))])
def test_every_augmented_image_is_a_crop_or_flip_of_its_own_original(name, shape, padding):
    images = random_images(11, name, shape)
    settings = TrainingSettings("plain-20", dataset=name, batch_size=4, crop_padding=padding, seed=3)
    origin = all_crops(images, padding)
    assert len(origin) == 11 * 2 * (2 * padding + 1) ** 2
    seen = []
    for epoch in range(20):
        order = []
        batches = list(augmented_batches(images, settings, epoch, 0, 1))
        assert [len(labels) for _, labels in batches] == [4, 4, 3]
        for inputs, labels in batches:
            assert inputs.dtype == torch.float32
            for image, label in zip(to_bytes(images, inputs), labels.tolist(), strict=True):
                number, *change = origin[image.tobytes()]
                assert label == images.labels[number]
                order.append(number)
                seen.append((number, *change))
        assert sorted(order) == list(range(11))  # each image once an epoch
    _, rows, columns, flips = zip(*seen, strict=True)
    # 220 draws: every offset turns up, and flips are about half.
    assert set(rows) == set(columns) == set(range(2 * padding + 1))
    assert 70 < sum(flips) < 150
    if padding:
        assert len(set(zip(rows, columns, strict=True))) > (2 * padding + 1) ** 2 // 2  # drawn apart from each other


def test_order_and_crops_follow_from_seed_and_epoch_alone():
    images = random_images(30)

    def epoch_of(seed, epoch):
        torch.manual_seed(99 + epoch)
        settings = TrainingSettings("plain-20", batch_size=8, seed=seed)
        return torch.cat([inputs for inputs, _ in augmented_batches(images, settings, epoch, 0, 1)])

    assert torch.equal(epoch_of(1, 2), epoch_of(1, 2))
    assert not torch.equal(epoch_of(1, 2), epoch_of(1, 3))
    assert not torch.equal(epoch_of(1, 2), epoch_of(2, 2))


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_together_see_the_batches_of_one(world_size):
    images = random_images(23)
    settings = TrainingSettings("plain-20", batch_size=8)
    whole = list(augmented_batches(images, settings, 1, 0, 1))
    parts = [list(augmented_batches(images, settings, 1, rank, world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, (inputs, labels) in enumerate(whole):
        put_back, labels_back = torch.empty_like(inputs), torch.empty_like(labels)
        for rank, part in enumerate(parts):
            put_back[rank::world_size], labels_back[rank::world_size] = part[step]
        assert torch.equal(put_back, inputs)
        assert torch.equal(labels_back, labels)


def test_digits_are_cropped_by_one_pixel_and_never_flipped():
    images = random_images(11, "digits", (1, 8, 8))
    settings = TrainingSettings("plain-20", dataset="digits", batch_size=11)
    assert settings.crop_padding == 1
    origin = all_crops(images, 1)
    seen = [
        origin[image.tobytes()]
        for epoch in range(20)
        for inputs, _ in augmented_batches(images, settings, epoch)
        for image in to_bytes(images, inputs)
    ]
    assert {(row, column) for _, row, column, _ in seen} == {(row, column) for row in range(3) for column in range(3)}
    assert not any(flipped for *_, flipped in seen)
