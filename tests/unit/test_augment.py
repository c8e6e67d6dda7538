"""Augmentation: each operation against another implementation, and the same at any ranks.

The others draw their numbers anew, from the same keys and one image at a time.
"""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from timm.data import mixup as timm_mixup
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandAugment as TheirRandAugment
from torchvision.transforms import functional as TF
from torchvision.transforms.autoaugment import _apply_op

import published
from cases import CASES
from dist_adv import rng
from dist_adv.config import Config, parse_config
from dist_adv.data import Batch, Dataset, Loader, load_dataset
from dist_adv.data import randaugment as pillow_operations
from dist_adv.data.augment import Augmentation, crop_shift, cut_box, erased, jitter, mix
from dist_adv.data.extra import with_extra
from dist_adv.data.image import TRIES
from dist_adv.data.randaugment import RandAugment, apply, operations
from dist_adv.doctor import _steps
from dist_adv.errors import UserError
from dist_adv.methods.registry import find_method, own_methods
from dist_adv.models import build_model
from dist_adv.plan.measure import SETS, works_of
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter

SEED, CPU = 5, torch.device("cpu")
EVERYTHING = Augmentation(crop_shift=4, jitter=0.4, erase=0.5, mixup=0.8, cutmix=1.0)


def noise(n: int, channels: int = 3, height: int = 9, width: int = 14) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    shape = (n, channels, height, width)
    return torch.randint(256, shape, generator=draw, dtype=torch.uint8)


def made_up(n: int = 48, classes: int = 3, **more: Any) -> Dataset:
    labels, names = torch.arange(n) % classes, [str(label) for label in range(classes)]
    return Dataset("made up", noise(n, **more), labels, names, crop_padding=1, flip=True)


def batches(data: Dataset, augmentation: Augmentation, size: int = 16, epoch: int = 1, **more: Any):
    loader = Loader(data, size, SEED, CPU, augmentation=augmentation, **more)
    return loader.epoch(epoch)


def keys_of(n: int, epoch: int = 0) -> Tensor:
    return rng.sample_keys(rng.stream_key("test", epoch), torch.arange(n))


def draws(key: Tensor, name: str, n: int) -> list[float]:
    """n numbers in [0, 1) of one image."""
    return rng.uniform(rng.substream(key[None], name), (n,))[0].tolist()


# --- colours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_jitter_is_torchvision_s(channels, strength):
    x, keys = noise(40, channels).float() / 255, keys_of(40)
    ours = x.clone(memory_format=torch.channels_last)
    jitter(ours, keys, strength)
    changed = 0
    for image, key, mine in zip(x, keys, ours, strict=True):
        b, c, s = (1 - strength + 2 * strength * u for u in draws(key, "jitter", 3))
        theirs = TF.adjust_contrast(TF.adjust_brightness(image, b), c)
        theirs = TF.adjust_saturation(theirs, s) if channels == 3 else theirs
        torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=0)
        changed += not theirs.allclose(image, atol=0.01)
    assert changed > 35


def test_jitter_is_the_same_for_an_image_in_any_batch():
    """Bit for bit."""
    x, keys = noise(33, height=50, width=61).float() / 255, keys_of(33)
    together = x.clone(memory_format=torch.channels_last)
    jitter(together, keys, 0.4)
    for part in (slice(0, 1), slice(3, 33, 3), slice(7, 30)):
        alone = x[part].clone()
        jitter(alone, keys[part], 0.4)
        assert alone.equal(together[part])


def test_jitter_does_not_depend_on_the_order_of_pixels():
    """Which devices sum in theirs: bit for bit."""
    x, keys = noise(8, height=50, width=61).float() / 255, keys_of(8)
    order = torch.randperm(50 * 61, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[:, :, order].view_as(x)
    jitter(x, keys, 0.4)
    jitter(moved, keys, 0.4)
    assert moved.equal(x.flatten(2)[:, :, order].view_as(x))


def test_brightness_is_uniform():
    grey = torch.full((4000, 3, 2, 2), 0.25)  # which contrast and saturation leave as it is
    jitter(grey, keys_of(4000), 0.4)
    factors = grey[:, 0, 0, 0] / 0.25
    assert stats.kstest(factors.numpy(), stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3


# --- erasing --------------------------------------------------------------------------------------


def erased_by_loop(image: np.ndarray, key: Tensor, share: float) -> np.ndarray:
    """As torchvision's RandomErasing, an image (C, H, W) at a time."""
    u = draws(key, "erase", 41)
    _, height, width = image.shape
    image = image.copy()
    if u[0] >= share:
        return image
    for area, aspect, row, column in np.array(u[1:]).reshape(10, 4):
        target = height * width * (0.02 + 0.31 * area)
        low, high = math.log(0.3), math.log(3.3)
        ratio = math.exp(low + (high - low) * math.floor(aspect * 1024) / 1023)
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if h < height and w < width:
            top, left = math.floor(row * (height - h + 1)), math.floor(column * (width - w + 1))
            image[:, top : top + h, left : left + w] = 0
            return image
    return image


@pytest.mark.parametrize(("height", "width"), [(9, 14), (32, 32), (40, 5), (30, 2)])
def test_erasing_is_a_plain_loop_s(height, width):
    """In narrow ones many tries do not fit, or none."""
    data = made_up(64, height=height, width=width)
    data = replace(data, crop_padding=0, flip=False)
    for batch in batches(data, Augmentation(erase=0.7), 16):
        for x, key, sample in zip(batch.x, batch.keys, batch.samples, strict=True):
            image = (data.images[sample].float() / 255).numpy()
            assert np.array_equal(erased_by_loop(image, key, 0.7), x.numpy())


def test_erased_boxes_are_as_likely_as_the_paper_says():
    boxes = erased(keys_of(20_000), 0.25, torch.Size((64, 64)))
    some = boxes[boxes[:, 2] > 0].double()
    assert stats.binomtest(len(some), 20_000, 0.25).pvalue > 1e-3
    assert not boxes[boxes[:, 2] == 0].any()
    top, left, h, w = some.T
    area, aspect = h * w / 64**2, h / w
    assert (area.min() > 0.015) & (area.max() < 0.345)
    assert (aspect.min() > 0.25) & (aspect.max() < 3.9)
    # Wide and tall are nearly as likely; places are uniform over what fits.
    assert abs((aspect > 0.995).double().mean() - 0.5) < 0.03
    for place, side in ((top, h), (left, w)):
        assert ((place >= 0) & (place + side <= 64)).all()
        assert abs((place / (64 - side)).mean() - 0.5) < 0.02
    assert stats.kstest(area.numpy(), stats.uniform(0.02, 0.31).cdf).statistic < 0.03


# --- CropShift ------------------------------------------------------------------------------------


def crop_shifted_by_loop(image: np.ndarray, key: Tensor, most: int, mirrored: bool) -> np.ndarray:
    """As the published code: crop, pad all around, and crop again; then the mirror image."""
    _, height, width = image.shape
    u = draws(key, "crop shift", 6)
    strength = math.floor(u[0] * (most + 1))
    across = math.floor(u[1] * (strength + 1))
    down = strength - across
    top, left = math.floor(u[2] * (down + 1)), math.floor(u[3] * (across + 1))
    kept = image[:, top : top + height - down, left : left + width - across]
    padded = np.pad(kept, ((0, 0), (down, down), (across, across)))
    top = down - math.floor(u[4] * (down + 1))
    left = across - math.floor(u[5] * (across + 1))
    shifted = padded[:, top : top + height, left : left + width]
    return shifted[:, :, ::-1] if mirrored else shifted


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_crop_shift_is_the_published_loop_s(where, tmp_path):
    data = made_up(48)
    if where == "disk":
        data = on_disk(tmp_path, data)
    pixels = made_up(48).images
    for epoch in range(3):
        for batch in batches(data, Augmentation(crop_shift=7), epoch=epoch):
            mirrored = rng.integers(rng.substream(batch.keys, "flip"), 2)
            for x, key, sample, flip in zip(
                batch.x, batch.keys, batch.samples, mirrored, strict=True
            ):
                expected = crop_shifted_by_loop(pixels[sample].numpy(), key, 7, bool(flip))
                assert np.array_equal(x.mul(255).round().byte().numpy(), expected)


def test_crop_shift_is_uniform():
    """How much is lost; how it is shared; and where the rest comes from and goes to."""
    none = torch.zeros(30_000, dtype=torch.int64)
    corners, kept = crop_shift(keys_of(30_000), 5, torch.Size((20, 30)), none)
    down, across = 20 - kept[:, 2], 30 - kept[:, 3]
    lost = down + across
    assert stats.chisquare(lost.bincount()).pvalue > 1e-3
    assert stats.chisquare(down[lost == 5].bincount()).pvalue > 1e-3
    some = (lost == 5) & (down == 2)
    assert stats.chisquare(kept[some, 0].bincount(minlength=3)).pvalue > 1e-3
    begin = corners + kept[:, :2]
    places = kept[some, 1] * 4 + begin[some, 1]
    assert stats.chisquare(places.bincount(minlength=16)).pvalue > 1e-3


# --- RandAugment ----------------------------------------------------------------------------------


def picture(size: tuple[int, int]) -> Image.Image:
    """Smooth, so that no operation is lost in noise, and of few greys in a corner."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [np.sin(x / 5 + k) * np.cos(y / (4 + k)) for k in range(3)]
    pixels = (np.stack(waves, axis=2) * 90 + 120).astype(np.uint8)
    pixels[:5, :7] //= 3
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(32, 32), (331, 50)])
def test_operations_are_torchvision_s(size):
    """All 14, of every magnitude, in both directions; 331 pixels are shifted by whole numbers."""
    image, different = picture(size), Counter[str]()
    for magnitude in range(31):
        space = TheirRandAugment()._augmentation_space(31, (size[1], size[0]))
        for (theirs, (levels, both)), (name, level, signed) in zip(
            space.items(), operations(magnitude, *size), strict=True
        ):
            expected = levels[magnitude].item() if levels.ndim else 0.0
            assert (name, level, signed) == (theirs, expected, both)
            for side in (level, -level) if signed else (level,):
                reference = _apply_op(image, theirs, side, InterpolationMode.NEAREST, None)
                assert np.array_equal(apply(image, name, side), reference), (name, side)
                different[name] += not np.array_equal(image, reference)
    assert different["Identity"] == 0
    assert min(count for name, count in different.items() if name != "Identity") > 20


def test_operations_are_as_likely_as_each_other(monkeypatch):
    seen = Counter[tuple[str, bool]]()
    monkeypatch.setattr(
        pillow_operations,
        "apply",
        lambda image, name, level: seen.update([(name, level < 0)]) or image,
    )
    both = rng.uniform(keys_of(6000), (2, 4)).numpy()
    for each in both:
        RandAugment(ops=2, magnitude=9)(picture((8, 8)), each)
    names = [name for name, *_ in operations(9, 8, 8)]
    counts = [seen[name, False] + seen[name, True] for name in names]
    assert sum(counts) == 12_000
    assert stats.chisquare(counts).pvalue > 1e-3
    signed = [name for name, _, side in operations(9, 8, 8) if side]
    assert {name for name, negative in seen if negative} == set(signed)
    turned = sum(seen[name, True] for name in signed)
    of = turned + sum(seen[name, False] for name in signed)
    assert stats.binomtest(turned, of).pvalue > 1e-3


def on_disk(root: Path, data: Dataset, **options: Any) -> Dataset:
    """The same images and labels as PNG files; names keep their order within a class."""
    assert isinstance(data.images, Tensor)
    for split in ("train", "test"):
        for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            folder = root / split / str(label.item())
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04}.png")
    tree = {"name": "imagefolder", "root": str(root), "resident_gb": 0.0} | options
    found = load_dataset(config(data=tree).data, "train")
    if "crop_scale" in tree:
        return found
    order = data.labels.argsort(stable=True)
    back = order.argsort()
    assert found.labels[back].equal(data.labels)
    return replace(found._part(back), crop_padding=data.crop_padding)


def test_randaugment_of_files(tmp_path):
    """Pictures as they are, mirrored on the device; and boxes at random, mirrored before."""
    data = replace(made_up(24), crop_padding=0)
    chosen = {"ops": 3, "magnitude": 20}
    files = on_disk(tmp_path, data, randaugment=chosen)
    boxed = on_disk(tmp_path, data, randaugment=chosen, size=8, crop_scale=[0.3, 1.0])
    assert load_dataset(config(data={"name": "imagefolder", "root": str(tmp_path)}).data, "test")
    plain = replace(boxed, images=files_without_randaugment(boxed))
    for batch, box, unchanged in zip(
        batches(files, Augmentation()),
        batches(boxed, Augmentation()),
        batches(plain, Augmentation()),
        strict=True,
    ):
        for n, key in enumerate(batch.keys):
            image = Image.fromarray(data.images[batch.samples[n]].permute(1, 2, 0).numpy())
            expected = pixels_after(image, key)
            if rng.integers(rng.substream(key[None], "flip"), 2):
                expected = expected[:, ::-1]
            assert np.array_equal(pixels_of(batch.x[n]), expected)
            before = Image.fromarray(pixels_of(unchanged.x[n]))
            assert np.array_equal(pixels_of(box.x[n]), pixels_after(before, key))


def files_without_randaugment(boxed: Dataset) -> Any:
    files = boxed.images
    framing = replace(files.framing, randaugment=None)
    return type(files)(files.records, framing, files.workers)


def pixels_of(x: Tensor) -> np.ndarray:
    return x.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()


def pixels_after(image: Image.Image, key: Tensor) -> np.ndarray:
    """What torchvision makes of a picture by the numbers of its key."""
    space = TheirRandAugment()._augmentation_space(31, (image.height, image.width))
    u = rng.uniform(rng.substream(key[None], "randaugment"), (3, 4))[0].tolist()
    for which, side, *_ in u:
        name, (levels, signed) = list(space.items())[math.floor(which * 14)]
        level = levels[20].item() if levels.ndim else 0.0
        level = -level if signed and side < 0.5 else level
        image = _apply_op(image, name, level, InterpolationMode.NEAREST, None)
    return np.asarray(image)


def test_randaugment_of_generated_images(tmp_path):
    """Which are numbered on behind the real ones."""
    real, drawn = made_up(24), noise(30).flip(0).permute(0, 2, 3, 1).numpy()
    path = tmp_path / "extra.npz"
    np.savez(path, image=drawn, label=np.arange(30) % 3)
    chosen = {"ops": 3, "magnitude": 20}
    data = replace(on_disk(tmp_path, real, randaugment=chosen), crop_padding=0, flip=False)
    options = {"name": "packed", "randaugment": chosen, "extra": {"path": str(path)}}
    data = with_extra(data, config(data=options).data)
    for batch in batches(data, Augmentation()):
        for n, number in enumerate(batch.samples.tolist()):
            pixels = drawn[number - 24] if number >= 24 else real.images[number].permute(1, 2, 0)
            expected = pixels_after(Image.fromarray(np.asarray(pixels)), batch.keys[n])
            assert np.array_equal(pixels_of(batch.x[n]), expected)
        assert 0 < (batch.samples >= 24).sum() < 16


def test_augment_false_turns_all_of_it_off():
    assert config(data=MIXED).data.augmentation() == Augmentation(3, 0.4, 0.5, 0.8, 1.0)
    assert config(data=MIXED | {"augment": False}).data.augmentation() == Augmentation()


def test_randaugment_is_of_training_alone(tmp_path):
    data = made_up(24)
    files = on_disk(tmp_path, data, randaugment={}, validation=6)
    rest, held = files.hold_out(6)
    assert rest.images.framing.drawn == TRIES + 3
    numbers = torch.tensor([int(Path(path).stem) for path in held.images.records.paths])
    assert held.images[torch.arange(6)].equal(data.images[numbers])
    tree = {"name": "imagefolder", "root": str(tmp_path), "randaugment": {}, "resident_gb": 0.0}
    assert load_dataset(config(data=tree).data, "test").images.framing.drawn == 0
    off = tree | {"augment": False}
    assert load_dataset(config(data=off).data, "train").images.framing.drawn == 0


# --- mixup and CutMix -----------------------------------------------------------------------------


class Centres:
    """Gives boxes the centres that are wanted."""

    def __init__(self, *centres: int) -> None:
        self.centres = iter(centres)

    def randrange(self, side: int) -> int:
        return next(self.centres)


@pytest.mark.parametrize("cut", [False, True])
def test_mixing_is_timm_s(cut, monkeypatch):
    """timm mixes image i with n - 1 - i; in that order ours are the same pairs."""
    dice, n = random.Random(0), 12
    labels = torch.arange(n) % 4
    paired = torch.cat([torch.arange(n // 2), torch.arange(n // 2, n).flip(0)])
    back = paired.argsort()
    for _ in range(60):
        share, row, column = dice.betavariate(1, 1), dice.randrange(9), dice.randrange(14)
        x = noise(n).float() / 255
        ours, box = (cut_box(share, Centres(row, column), x.shape[-2:])) if cut else (share, None)
        mixed, y = mix(x.clone(), F.one_hot(labels, 4).float(), ours, box)
        theirs = timm_mixup.Mixup(mixup_alpha=1, cutmix_alpha=1, label_smoothing=0, num_classes=4)
        monkeypatch.setattr(theirs, "_params_per_batch", lambda share=share: (share, cut))
        centres = iter((row, column))
        monkeypatch.setattr(np.random, "randint", lambda *_, centres=centres, **__: next(centres))
        other, soft = theirs(x[paired].clone(), labels[paired])
        assert mixed.equal(other[back])
        torch.testing.assert_close(y, soft[back])
        torch.testing.assert_close(y.sum(1), torch.ones(n))


def test_a_label_s_share_is_its_image_s():
    """Images as bright as their labels: the mean of a mixed one tells the share."""
    labels = torch.tensor([0, 1] * 8).repeat_interleave(8)
    x = labels[:, None, None, None].expand(-1, 3, 8, 8) * 255
    data = Dataset("made up", x.to(torch.uint8), labels, ["black", "white"], 0, False)
    for augmentation in (Augmentation(mixup=0.5), Augmentation(cutmix=0.5)):
        seen = []
        for epoch in range(20):
            for batch in batches(data, augmentation, epoch=epoch):
                torch.testing.assert_close(batch.x.mean((1, 2, 3)), batch.y[:, 1])
                seen += batch.y[:, 1].tolist()
        assert len(set(seen)) > 30


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_shares_are_of_beta(alpha):
    size = torch.Size((8, 8))
    found = [Augmentation(mixup=alpha)._mixture(key, size) for key in range(-1000, 1000)]
    shares = [share for share, box in found if box is None]
    assert len(shares) == len(set(shares)) == 2000
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_one_of_both_is_drawn_for_a_batch():
    size = torch.Size((64, 64))
    found = [Augmentation(mixup=0.1, cutmix=1.0)._mixture(key, size) for key in range(2000)]
    cut = [share for share, box in found if box]
    assert stats.binomtest(len(cut), 2000).pvalue > 1e-3
    shares = [share for share, box in found if box is None]
    assert stats.kstest(shares, stats.beta(0.1, 0.1).cdf).pvalue > 1e-3
    # Each has its own alpha: 0.1 would leave nearly all or nothing of most.
    assert np.mean([0.02 < share < 0.98 for share in cut]) > 0.9
    alone = [Augmentation(cutmix=1.0)._mixture(key, size)[1] for key in range(50)]
    assert None not in alone


# --- the same batches wherever they are ----------------------------------------------------------


def same(one: Batch, two: Batch) -> bool:
    return all(getattr(one, name).equal(getattr(two, name)) for name in ("x", "y", "keys"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_what_one_has(ranks):
    data = made_up()
    whole = list(batches(data, EVERYTHING))
    shares = [list(batches(data, EVERYTHING, rank=rank, world_size=ranks)) for rank in range(ranks)]
    for number, batch in enumerate(whole):
        assert batch.y.shape == (16, 3)
        for name in ("x", "y", "keys"):
            together = torch.empty_like(getattr(batch, name))
            for rank in range(ranks):
                together[rank::ranks] = getattr(shares[rank][number], name)
            assert together.equal(getattr(batch, name)), name


@pytest.mark.parametrize("start", [1, 2])
def test_any_batch_can_be_the_first(start):
    skipped = list(islice(batches(made_up(), EVERYTHING), start, None))
    loader = Loader(made_up(), 16, SEED, CPU, augmentation=EVERYTHING)
    begun = list(loader.epoch(1, start=start))
    assert len(begun) == 3 - start
    assert all(same(*pair) for pair in zip(skipped, begun, strict=True))


def test_files_give_what_memory_gives(tmp_path):
    data = made_up()
    files = on_disk(tmp_path, data)
    pairs = zip(batches(data, EVERYTHING), batches(files, EVERYTHING), strict=True)
    assert all(same(*pair) for pair in pairs)


def test_no_generator_is_asked():
    """And none needs a seed."""
    generators = torch.get_rng_state(), random.getstate()
    first = list(batches(made_up(), EVERYTHING))
    assert torch.get_rng_state().equal(generators[0])
    assert random.getstate() == generators[1]
    torch.manual_seed(3)
    random.seed(3)
    assert all(map(same, first, batches(made_up(), EVERYTHING)))


def test_epochs_and_operations_draw_by_themselves():
    """Another epoch is another augmentation; erasing more often moves nothing else."""
    one, two = (next(iter(batches(made_up(), EVERYTHING, epoch=epoch))) for epoch in (1, 2))
    assert not one.x.equal(two.x)
    some, all_of_it = (
        next(iter(batches(made_up(), Augmentation(crop_shift=4, jitter=0.4, erase=share))))
        for share in (0.0, 1.0)
    )
    kept = (all_of_it.x != 0).any(1, keepdim=True)
    assert 0.5 < kept.float().mean() < 0.98
    assert torch.equal(all_of_it.x, some.x * kept)


def test_images_and_labels_are_as_before_without_it(tmp_path):
    """The operations off, one by one, leave batches what a loader without them gives."""
    plain = [(batch.x, batch.y) for batch in Loader(made_up(), 16, SEED, CPU).epoch(1)]
    for x, y in plain:
        assert y.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last)
    off = Augmentation(*[0] * 5)
    for (x, y), batch in zip(plain, batches(made_up(), off), strict=True):
        assert batch.x.equal(x)
        assert batch.y.equal(y)
    mixed = next(iter(batches(made_up(), EVERYTHING)))
    assert mixed.x.is_contiguous(memory_format=torch.channels_last)
    assert mixed.labels.equal(mixed.y.argmax(1))


# --- training -------------------------------------------------------------------------------------

TREE: dict[str, Any] = {
    "threat": {"eps": 0.1},
    "model": {"name": "wide_resnet", "depth": 8, "widen": 1, "width": 8, "norm": "batch"},
    "optim": {"lr": 0.1},
    "train": {"epochs": 2, "batch_size": 16, "seed": 4, "threads": 1, "precision": "fp32"},
    "eval": {"every": 0},
    "track": {"wandb": {"mode": "disabled"}},
}
MIXED = {"crop_shift": 3, "jitter": 0.4, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0}


def config(method: dict[str, Any] | None = None, **sections: Any) -> Config:
    tree = TREE | {"method": method or {"name": "natural"}}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree, "test")


def after_training(
    settings: Config, data: Dataset, accelerator: Any
) -> tuple[dict[str, Tensor], Meter]:
    learner, meter = Learner(settings, accelerator, data), Meter(CPU)
    for epoch in range(2):
        for batch in learner.loader.epoch(epoch):
            learner.learn(batch, meter)
    return learner.net.bare.state_dict(), meter


def after_plain_loop(case: str, settings: Config, data: Dataset, fused: bool) -> dict[str, Tensor]:
    """The published loop of a case, on the same batches."""
    method, loop, _, _ = CASES[case]
    extras = published.Extras(smoothing=settings.train.label_smoothing)
    loader = Loader(data, 16, 4, CPU, augmentation=settings.data.augmentation())
    size = data.images.shape[2:]
    model = build_model(settings.model, *data.statistics(), data.classes, 4, size)
    total = 2 * loader.batches * method.get("replays", 1)
    run = published.Recipe(model, 0.1, 0.1, total, fused, extras, total // 2)

    def all_batches():
        for epoch in range(2):
            for run.batch in loader.epoch(epoch):
                yield run.batch.x, run.batch.y, run.batch.keys

    loop(run, all_batches(), lambda keys: rng.uniform(keys, (3, 8, 8)))
    assert run.done == total
    return model.state_dict()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pgd_on_mixed_images_is_a_plain_loop_bit_for_bit(smoothing, accelerator):
    data = made_up(height=8, width=8)
    settings = config(CASES["pgd-random"].method, data=MIXED, train={"label_smoothing": smoothing})
    ours, meter = after_training(settings, data, accelerator)
    theirs = after_plain_loop("pgd-random", settings, data, fused=True)
    assert all(each.equal(theirs[name]) for name, each in ours.items())
    _, correct, images, _ = meter.take(accelerator)
    assert 0 < correct < images == 96


SOFT = sorted(name for name in own_methods() if find_method(name).soft_labels)
ITS_CASE = {"pgd": "pgd-random", "fast": "fast-random"}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", SOFT)
def test_methods_that_claim_to_learn_from_mixed_labels(method, accelerator, double):
    """By the published loop, whose cross-entropy has probabilities for labels."""
    case = ITS_CASE.get(method, method)
    data = made_up(height=8, width=8)
    settings = config(CASES[case].method, data=MIXED)
    ours, _ = after_training(settings, data, accelerator)
    theirs = after_plain_loop(case, settings, data, fused=False)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-10


def test_these_methods_claim_it():
    """The others' formulas have a true class, or a target of their own."""
    names = "aaer fast free gat gradalign n-fgsm natural nuat pgd sora trades"
    assert names.split() == SOFT


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"erase": 1.5}, "data.erase: "),
        ({"jitter": -0.1}, "data.jitter: "),
        ({"mixup": -1}, "data.mixup: "),
        ({"crop_shift": 3, "crop_padding": 4}, "data: crop_shift: takes the place of crop_padding"),
        (
            {"name": "packed", "size": 8, "crop_scale": [0.1, 1], "crop_shift": 3},
            "data: crop_shift: is a crop, and crop_scale is another; leave one out",
        ),
        ({"randaugment": {}}, "pictures as they are read, and those of cifar10 are in memory"),
        ({"name": "packed", "randaugment": {"magnitude": 31}}, "data.randaugment.magnitude: "),
        ({"name": "packed", "randaugment": {"opps": 2}}, "did you mean 'ops'"),
    ],
)
def test_options_are_refused_in_a_line(data, line):
    with pytest.raises(UserError) as error:
        config(data=data)
    assert line.replace("data: ", "data.") in str(error.value).replace("data: ", "data.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(set(own_methods()) - set(SOFT)))
def test_methods_that_need_one_class_are_refused(name):
    average = {"average": {}} if name == "adr" else {}
    with pytest.raises(UserError, match=f"data.cutmix: makes labels probabilities, which {name} "):
        config({"name": name}, data={"cutmix": 1.0}, **average)
    config({"name": name}, data={"cutmix": 1.0, "augment": False}, **average)


def test_wong_s_guard_is_refused():
    method = {"name": "fast", "guard": "stop", "guard_rule": "wong"}
    with pytest.raises(UserError, match=r"method\.guard_rule: wong compares training batches"):
        config(method, data={"mixup": 0.8})
    config(method | {"guard": "none"}, data={"mixup": 0.8})


@pytest.mark.parametrize(
    ("images", "size", "ranks", "drop_last", "line"),
    [
        (48, 15, 1, True, r"train.batch_size: 15 images .* on 1 rank; use a multiple of 2"),
        (48, 6, 2, False, r"train.batch_size: 6 images .* on 2 ranks; use a multiple of 4"),
        (45, 16, 1, False, "data.drop_last: the last batch has 13 images, .* data.drop_last=true"),
        (42, 16, 4, False, "data.drop_last: the last batch has 10 images, .* data.drop_last=true"),
        (45, 16, 4, True, None),
        (44, 16, 2, False, None),
    ],
)
def test_batches_without_pairs_are_refused(images, size, ranks, drop_last, line):
    def all_batches():
        more = {"drop_last": drop_last, "world_size": ranks}
        return list(batches(made_up(images), Augmentation(mixup=0.8), size, **more))

    if line is None:
        assert all_batches()
        return
    with pytest.raises(UserError, match=line):
        all_batches()


def test_plan_and_doctor_foresee_it():
    settings = config(data={"mixup": 0.8}, train={"batch_size": 128})  # 50,000 images: the last 80
    (plan,) = works_of(settings, SETS["cifar10"])
    assert plan.batches(128, 8) == 391
    with pytest.raises(UserError, match="on 3 ranks; use a multiple of 6"):
        plan.batches(128, 3)
    assert _steps(settings).level == "ok"
    odd = config(data={"mixup": 0.8}, train={"batch_size": 129})
    assert "cannot be mixed in pairs" in _steps(odd).found


def test_images_that_cannot_be_augmented_so_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.crop_shift: 9 pixels .* of 14x9; use less"):
        batches(made_up(), Augmentation(crop_shift=9))
    with pytest.raises(UserError, match=r"data.jitter: .* and these have 4; use 0"):
        batches(made_up(channels=4), Augmentation(jitter=0.1))
    on_disk(tmp_path, made_up(24))
    tree = {"name": "imagefolder", "root": str(tmp_path), "randaugment": {}}
    with pytest.raises(UserError, match=r"data.randaugment: .* set data.resident_gb=0"):
        load_dataset(config(data=tree).data, "train")
    assert load_dataset(config(data=tree).data, "test")
    assert load_dataset(config(data=tree | {"augment": False}).data, "train")


def test_orders_of_magnitudes():
    """A larger magnitude moves a picture further."""
    image = np.asarray(picture((32, 32))).astype(int)
    for name in ("Rotate", "Brightness", "Color"):
        moved = [
            np.abs(np.asarray(apply(picture((32, 32)), name, level)).astype(int) - image).mean()
            for magnitude in (0, 10, 20, 30)
            for each, level, _ in operations(magnitude, 32, 32)
            if each == name
        ]
        assert all(one < two for one, two in pairwise(moved))
