"""What does not fit together, said before anything is trained."""

from torch import nn

from dist_adv.config import Config
from dist_adv.data import Dataset
from dist_adv.errors import UserError
from dist_adv.text import few


def check_statistics(config: Config, smallest_share: int, network: nn.Module | None = None) -> None:
    """Raise UserError where BatchNorm would have a single image to take statistics of.

    network: where there is one already; somebody's own says nothing of its norms in its options.
    """
    modules = network.modules() if network else ()
    batchnorm = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in modules)
    if (batchnorm or getattr(config.model, "norm", "") == "batch") and smallest_share == 1:
        raise UserError(
            "train.batch_size: leaves a rank 1 image in some batch, of which BatchNorm has no "
            "statistics; set data.drop_last=true, another batch size or model.norm=group"
        )


def check_splits(train: Dataset, test: Dataset) -> None:
    """Raise UserError where the splits have other classes, or images of other sizes."""
    for one, name, other in ((train, "train", test), (test, "test", train)):
        missing = [each for each in one.classes if each not in set(other.classes)]
        if missing:
            raise UserError(
                f"data.root: the train split has {len(train.classes)} classes and the test split "
                f"{len(test.classes)}; {len(missing)} are in the {name} split alone "
                f"({few(missing)}); they must be the same"
            )
    (height, width), (h, w) = train.images.shape[2:], test.images.shape[2:]
    if (height, width) != (h, w):
        raise UserError(
            f"data.size: the images for training are {width}x{height} and those for testing "
            f"{w}x{h} pixels; set data.size, for example data.size={min(height, width)}"
        )
