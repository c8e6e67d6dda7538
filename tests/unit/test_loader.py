"""The loader: every sample once, its augmentation its own, the same at any number of ranks."""

from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from torch import Tensor

from dist_adv.data import Batch, Dataset, Loader, When
from dist_adv.data.files import Files
from dist_adv.data.image import Framing
from dist_adv.data.records import Paths
from dist_adv.errors import RankFailure, UserError

N, BATCH, SEED = 37, 8, 5


def made_up(n: int = N, padding: int = 2, flip: bool = True, size: tuple[int, int] = (6, 9)):
    """Noise; the label of an image is its number, which tells it in any batch."""
    noise = torch.randint(256, (n, 3, *size), generator=torch.Generator().manual_seed(0))
    classes = [str(k) for k in range(n)]
    return Dataset("made up", noise.to(torch.uint8), torch.arange(n), classes, padding, flip)


def loader(data: Dataset | None = None, batch_size: int = BATCH, **more) -> Loader:
    return Loader(data or made_up(), batch_size, SEED, torch.device("cpu"), **more)


def same(one: Batch, two: Batch) -> bool:
    tensors = ("x", "y", "keys")
    return all(getattr(one, name).equal(getattr(two, name)) for name in tensors) and (
        one.weight == two.weight
    )


@pytest.mark.parametrize("augment", [True, False])
def test_every_sample_once_an_epoch(augment):
    orders = []
    for epoch in range(3):
        batches = list(loader(augment=augment).epoch(epoch))
        assert [len(batch.y) for batch in batches] == [8, 8, 8, 8, 5]
        orders.append(torch.cat([batch.y for batch in batches]))
        assert orders[-1].sort().values.equal(torch.arange(N))
    assert not orders[0].equal(orders[1])
    assert not orders[1].equal(orders[2])


def test_order_depends_on_the_seed():
    first, second = (
        torch.cat([b.y for b in Loader(made_up(), BATCH, seed, torch.device("cpu")).epoch(0)])
        for seed in (0, 1)
    )
    assert not first.equal(second)


@pytest.mark.parametrize("start", range(6))
def test_start_equals_skipping(start):
    """Bit for bit: what a run that goes on in the middle of an epoch gets."""
    skipped = list(islice(loader().epoch(2), start, None))
    begun = list(loader().epoch(2, start=start))
    assert len(begun) == 5 - start
    assert all(same(*pair) for pair in zip(skipped, begun, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_the_global_batch(ranks):
    """Pixels, labels and keys by position; ranks differ by one image at most."""
    whole = list(loader().epoch(1))
    shares = [list(loader(rank=r, world_size=ranks).epoch(1)) for r in range(ranks)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        for name in ("x", "y", "keys"):
            together = torch.empty_like(getattr(batch, name))
            for rank, part in enumerate(parts):
                together[rank::ranks] = getattr(part, name)
            assert together.equal(getattr(batch, name)), name
        sizes = [len(part.y) for part in parts]
        assert sum(sizes) == len(batch.y)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_weights_make_the_mean_over_ranks_the_global_mean(ranks):
    """As DDP takes it: the plain average of what the ranks' losses give."""
    loss = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = list(loader().epoch(0))
    shares = [list(loader(rank=r, world_size=ranks).epoch(0)) for r in range(ranks)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        average = sum(loss[part.y].mean() * part.weight for part in parts) / ranks
        torch.testing.assert_close(average, loss[batch.y].mean())
        assert sum(part.weight for part in parts) == pytest.approx(ranks)
    assert {batch.weight for batch in whole} == {1.0}


def test_weights_are_exactly_one_for_equal_shares():
    """So that an even batch's loss is not touched, not even in its last bit."""
    for batch in islice(loader(rank=1, world_size=4).epoch(0), 4):
        assert batch.weight == 1.0


# --- augmentation --------------------------------------------------------------------------------


def choices(data: Dataset) -> list[tuple[int, int, bool]]:
    """All (row, column, mirrored) that a crop may have."""
    offsets = range(2 * data.crop_padding + 1)
    return list(product(offsets, offsets, (False, True) if data.flip else (False,)))


def by_pil(image: Tensor, padding: int, row: int, column: int, mirrored: bool) -> Tensor:
    """RandomCrop with black borders, then a flip, as PIL does them."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    width, height = picture.size
    picture = ImageOps.expand(picture, padding, 0)
    picture = picture.crop((column, row, column + width, row + height))
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def found(data: Dataset, epochs: int, **more) -> list[tuple[int, int, bool]]:
    """Which crop each sample got in each epoch: exactly one of all must have its pixels."""
    possible = choices(data)
    crops = torch.stack(
        [torch.stack([by_pil(i, data.crop_padding, *c) for c in possible]) for i in data.images]
    )
    made = []
    for epoch in range(epochs):
        for batch in loader(data, **more).epoch(epoch):
            fits = (crops[batch.y] == batch.x[:, None]).flatten(2).all(2)
            assert (fits.sum(1) == 1).all()
            made += [possible[index] for index in fits.int().argmax(1).tolist()]
    return made


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True), (1, False)])
def test_augmentation_is_pil_s(padding, flip):
    """Pixel by pixel, black borders included, on images that are not square."""
    found(made_up(padding=padding, flip=flip), epochs=2)


def test_augmentation_is_uniform_over_all_choices():
    """Rows, columns and flips are independent of each other and of the sample."""
    data = made_up(40, padding=1)
    made = found(data, epochs=60)
    counts = [made.count(choice) for choice in choices(data)]
    assert len(counts) == 18
    assert stats.chisquare(counts).pvalue > 1e-3


def test_augmentation_differs_from_epoch_to_epoch():
    first, second = (
        {
            int(y): x
            for batch in loader().epoch(epoch)
            for x, y in zip(batch.x, batch.y, strict=True)
        }
        for epoch in (0, 1)
    )
    changed = sum(not first[sample].equal(second[sample]) for sample in range(N))
    assert changed > 0.8 * N  # one of 50 crops is the same by chance


def test_augmentation_does_not_depend_on_the_batch():
    """A sample's crop is its own, whatever the size of the batches that it comes in."""
    by_size = [
        {
            int(y): x
            for batch in loader(batch_size=size).epoch(3)
            for x, y in zip(batch.x, batch.y, strict=True)
        }
        for size in (5, 16)
    ]
    assert all(by_size[0][sample].equal(by_size[1][sample]) for sample in range(N))


def test_no_augmentation_is_the_image():
    data = made_up()
    for batch in loader(data, augment=False).epoch(0):
        assert batch.x.equal(data.images[batch.y].float() / 255)
        assert batch.x.dtype == torch.float32


def test_noise_differs_from_sample_to_sample_and_epoch_to_epoch():
    keys = torch.cat([batch.keys for epoch in range(3) for batch in loader().epoch(epoch)])
    assert len(keys.unique()) == 3 * N


# --- sizes ---------------------------------------------------------------------------------------


def test_drop_last():
    batches = list(loader(drop_last=True).epoch(0))
    assert [len(batch.y) for batch in batches] == [8] * 4
    assert loader(drop_last=True).batches == 4
    assert loader(drop_last=False).batches == 5
    assert loader(made_up(32), drop_last=False).batches == 4


def test_batch_larger_than_the_data():
    assert [len(batch.y) for batch in loader(batch_size=100).epoch(0)] == [N]


@pytest.mark.parametrize(
    ("batch_size", "options", "said"),
    [
        (3, {"world_size": 4}, "smaller than the 4 ranks; use at least 4"),
        (12, {"world_size": 2}, "last batch has 1 images for 2 ranks"),
        (34, {"world_size": 4}, "last batch has 3 images for 4 ranks"),
        (38, {"drop_last": True}, "larger than the 37 images"),
    ],
)
def test_sizes_that_leave_a_rank_without_work(batch_size, options, said):
    with pytest.raises(UserError, match=f"^train.batch_size: .*{said}"):
        loader(batch_size=batch_size, **options)


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [(12, {"world_size": 2, "drop_last": True}), (4, {"world_size": 1}), (33, {"world_size": 4})],
)
def test_sizes_that_do(batch_size, options):
    last = options["world_size"] - 1
    assert all(
        len(batch.y) for batch in loader(batch_size=batch_size, rank=last, **options).epoch(0)
    )


@pytest.fixture
def files(tmp_path):
    """`files(images)`: the images of a data set as files, read by two processes."""

    def write(images: Tensor) -> Files:
        paths = [str(tmp_path / f"{k}.png") for k in range(len(images))]
        for path, pixels in zip(paths, images, strict=True):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
        return Files(Paths(paths), Framing(), 2)

    return write


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("start", [0, 3])
def test_images_read_off_the_disk_give_the_same_batches(ranks, start, files):
    resident = made_up()
    streamed = replace(resident, images=files(resident.images))
    for rank in range(ranks):
        sides = [loader(data, rank=rank, world_size=ranks) for data in (resident, streamed)]
        batches = [list(side.epoch(2, start)) for side in sides]
        assert len(batches[0]) == len(batches[1]) == 5 - start
        assert all(same(*pair) for pair in zip(*batches, strict=True))
        assert batches[1][0].x.is_contiguous(memory_format=torch.channels_last)


def test_held_out_images_and_statistics_of_files(files):
    resident = made_up()
    streamed = replace(resident, images=files(resident.images))
    assert streamed.statistics() == resident.statistics()
    for one, other in zip(resident.hold_out(5), streamed.hold_out(5), strict=True):
        assert torch.equal(one.images, other.images.all())
        assert torch.equal(one.labels, other.labels)


def test_image_that_breaks_while_it_is_needed(files, tmp_path):
    streamed = replace(made_up(), images=files(made_up().images))
    (tmp_path / "30.png").write_bytes(b"no more")
    with pytest.raises(RankFailure, match=r"^data\.root: .*30\.png: not a readable image"):
        list(loader(streamed).epoch(0))


def test_batches_say_what_they_hold_and_when_they_are() -> None:
    """The same on every rank, but for the samples; a key for each batch of each epoch."""
    keys = set()
    for epoch in (0, 1):
        sides = [loader(rank=rank, world_size=2).epoch(epoch, start=2) for rank in (0, 1)]
        for number, (one, two) in enumerate(zip(*sides, strict=True), 2):
            assert one.when == two.when == When(epoch, number, 5, one.when.key)
            assert one.total == two.total == len(one.x) + len(two.x)
            for side in (one, two):  # a label is the number of its image
                assert side.samples.equal(side.y)
            assert not set(one.samples.tolist()) & set(two.samples.tolist())
            keys.add(one.when.key)
    assert len(keys) == 6
