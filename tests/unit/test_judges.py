"""Other libraries' attacks on the network of `load_model`, one by one, on colour images.

Each attack of torchattacks, foolbox and ART within an L-inf or L2 ball takes the network as it is:
contiguous images go in, finite ones within the ball come out. Attacks that are left out are named
with the reason. Budgets are tiny: here is tested that they run, not how strong they are.
"""

import inspect
import warnings
from typing import Any

import art.attacks.evasion
import foolbox.attacks
import numpy as np
import pyautoattack
import pytest
import torch
import torchattacks
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from colours import colours, learn
from dist_adv.models import Classifier, PreActResNet18Options, build_model, load_model, save_model

pytestmark = pytest.mark.slow

LINF, L2 = 16 / 255, 2.0
Case = tuple[dict[str, Any], str]
"""Options, and the ball in which the outcome has to be: linf, l2, or any for the whole cube."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    data = colours(400)
    net = build_model(PreActResNet18Options(width=4), [0.5] * 3, [0.25] * 3, data.classes, 0)
    learn(net, data, epochs=2)
    path = tmp_path_factory.mktemp("colours") / "model.safetensors"
    save_model(path, net.architecture, net.state_dict())
    return load_model(path)


@pytest.fixture(scope="module")
def batch(model: Classifier) -> tuple[Tensor, Tensor]:
    """Three images that the network is right about."""
    data = colours(20, seed=1)
    x = data.images.float() / 255
    with torch.no_grad():
        right = (model(x).argmax(1) == data.labels).nonzero().squeeze(1)[:3]
    assert len(right) == 3
    return x[right], data.labels[right]


def check(adversarial: Tensor, x: Tensor, ball: str) -> None:
    assert adversarial.shape == x.shape
    assert adversarial.isfinite().all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    delta = (adversarial - x).flatten(1)
    if ball == "linf":
        assert delta.abs().max() <= LINF + 1e-6
    if ball == "l2":
        assert delta.norm(dim=1).max() <= L2 + 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_input_gradients_have_the_images_layout(
    layout: torch.memory_format, model: Classifier, batch: tuple[Tensor, Tensor]
) -> None:
    """Of a network that kept its channels last, contiguous images would have such gradients."""
    x = batch[0].clone(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert gradient.is_contiguous(memory_format=layout)


def names(module: Any, base: type) -> set[str]:
    """The attacks of a library, under one name each."""
    kinds = [each for each in vars(module).values() if inspect.isclass(each)]
    return {each.__name__ for each in kinds if issubclass(each, base)}


# --- torchattacks --------------------------------------------------------------------------------

BY_STEPS = {"eps": LINF, "steps": 2}
TORCHATTACKS: dict[str, list[Case]] = {
    "APGD": [(BY_STEPS, "linf"), ({"norm": "L2", "eps": L2, "steps": 2}, "l2")],
    "APGDT": [
        (BY_STEPS | {"n_classes": 3}, "linf"),
        ({"norm": "L2", "eps": L2, "steps": 2, "n_classes": 3}, "l2"),
    ],
    "BIM": [(BY_STEPS, "linf")],
    "CW": [({"steps": 2}, "any")],
    "DIFGSM": [(BY_STEPS, "linf")],
    "DeepFool": [({"steps": 1}, "any")],
    "EOTPGD": [(BY_STEPS, "linf")],
    "FAB": [
        (BY_STEPS | {"n_classes": 3}, "linf"),
        ({"norm": "L2", "eps": L2, "steps": 2, "n_classes": 3}, "l2"),
    ],
    "FFGSM": [({"eps": LINF}, "linf")],
    "FGSM": [({"eps": LINF}, "linf")],
    "Jitter": [(BY_STEPS, "linf")],
    "MIFGSM": [(BY_STEPS, "linf")],
    "NIFGSM": [(BY_STEPS, "linf")],
    "PGD": [(BY_STEPS, "linf")],
    "PGDL2": [({"eps": L2, "steps": 2}, "l2")],
    "PGDRS": [(BY_STEPS | {"noise_batch_size": 2}, "linf")],
    "PGDRSL2": [({"eps": L2, "steps": 2, "noise_batch_size": 2}, "l2")],
    "PIFGSM": [({"max_epsilon": LINF, "num_iter_set": 2}, "linf")],
    "PIFGSMPP": [({"max_epsilon": LINF, "num_iter_set": 2}, "linf")],
    "RFGSM": [(BY_STEPS, "linf")],
    "SINIFGSM": [(BY_STEPS, "linf")],
    "SPSA": [({"eps": LINF, "nb_sample": 4}, "linf")],
    "SparseFool": [({"steps": 1}, "any")],  # L0, but what the layout of gradients stopped
    "Square": [
        ({"eps": LINF, "n_queries": 5}, "linf"),
        ({"norm": "L2", "eps": L2, "n_queries": 5}, "l2"),
    ],
    "TIFGSM": [(BY_STEPS, "linf")],
    "TPGD": [(BY_STEPS, "linf")],
    "UPGD": [(BY_STEPS, "linf")],
    "VMIFGSM": [(BY_STEPS, "linf")],
    "VNIFGSM": [(BY_STEPS, "linf")],
}
NOT_OF_TORCHATTACKS = {
    "L0 or L1": {"EADEN", "EADL1", "JSMA", "OnePixel", "Pixle"},
    "no attack": {"GN", "VANILA"},
    "runs other attacks": {"AutoAttack", "LGV", "MultiAttack"},
}


def test_torchattacks_are_all_here() -> None:
    found = names(torchattacks, torchattacks.attack.Attack)
    assert found == TORCHATTACKS.keys() | set().union(*NOT_OF_TORCHATTACKS.values())


@pytest.mark.parametrize("name", TORCHATTACKS)
def test_torchattacks(name: str, model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    x, y = (each[:1] for each in batch) if name == "SparseFool" else batch
    for options, ball in TORCHATTACKS[name]:
        adversarial = getattr(torchattacks, name)(model, **options)(
            x.clone(), y
        )  # some keep a gradient
        check(adversarial.detach(), x, ball)


# --- foolbox -------------------------------------------------------------------------------------

NEEDS_ANOTHER_NORM = {"L0FMNAttack", "EADAttack", "SparseL1DescentAttack", "SpatialAttack"}
NOT_OF_FOOLBOX = {
    "L0 or L1, or no norm": NEEDS_ANOTHER_NORM
    | {"SaltAndPepperNoiseAttack", "PointwiseAttack", "GenAttack"},
    "needs numba": {
        "L0BrendelBethgeAttack",
        "L1BrendelBethgeAttack",
        "L2BrendelBethgeAttack",
        "LinfinityBrendelBethgeAttack",
    },
    "needs another attack's outcome, or other images": {
        "BinarizationRefinementAttack",
        "DatasetAttack",
    },
    "no gradients and no ball: blurs, inverts or changes contrast": {
        "BinarySearchContrastReductionAttack",
        "GaussianBlurAttack",
        "InversionAttack",
        "LinearSearchBlendedUniformNoiseAttack",
        "LinearSearchContrastReductionAttack",
    },
}
FOOLBOX = sorted(
    name
    for name in names(foolbox.attacks, foolbox.attacks.Attack)
    - {"Attack"}
    - set().union(*NOT_OF_FOOLBOX.values())
    if not name.startswith("L1")
)
SMALL = {
    "steps": 2,
    "binary_search_steps": 1,
    "repeats": 2,
    "initial_gradient_eval_steps": 2,
    "max_gradient_eval_steps": 2,
    "init_attack": foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(steps=5),
}


@pytest.mark.parametrize("name", FOOLBOX)
def test_foolbox(name: str, model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    kind = getattr(foolbox.attacks, name)
    options = {
        key: SMALL[key] for key in inspect.signature(kind.__init__).parameters.keys() & SMALL
    }
    ball = "linf" if name.lower().startswith("linf") else "l2"
    judge = foolbox.PyTorchModel(model, bounds=(0, 1))
    _, adversarial, _ = kind(**options)(judge, *batch, epsilons=LINF if ball == "linf" else L2)
    check(adversarial, batch[0], ball)


# --- ART -----------------------------------------------------------------------------------------

QUIET = {"verbose": False}
ITERATES = {"eps": LINF, "eps_step": 0.01, "max_iter": 2} | QUIET
ITERATES_L2 = {"norm": 2, "eps": L2, "eps_step": 0.5, "max_iter": 2} | QUIET
BOTH = [(ITERATES, "linf"), (ITERATES_L2, "l2")]
ONE_START = {"nb_random_init": 1}
FROM_ONE_START = [(ITERATES | ONE_START, "linf"), (ITERATES_L2 | ONE_START, "l2")]
FEW_QUERIES = {"max_iter": 1, "max_eval": 4, "init_eval": 2, "init_size": 5} | QUIET
FGSM = {"attacker": "fgsm", "attacker_params": {"eps": LINF}, "max_iter": 1} | QUIET
ART: dict[str, list[Case]] = {
    "AutoConjugateGradient": FROM_ONE_START,
    "AutoProjectedGradientDescent": FROM_ONE_START,
    "BasicIterativeMethod": [(ITERATES, "linf")],
    "BoundaryAttack": [
        ({"targeted": False, "max_iter": 2, "num_trial": 2, "sample_size": 2} | QUIET, "any")
    ],
    "CarliniL2Method": [({"max_iter": 2, "binary_search_steps": 1} | QUIET, "any")],
    "CarliniLInfMethod": [
        ({"max_iter": 1, "initial_const": 1, "largest_const": 1.5, "decrease_factor": 0.1} | QUIET,
         "any"),
    ],
    "DeepFool": [({"max_iter": 1} | QUIET, "any")],
    "FastGradientMethod": [({"eps": LINF}, "linf"), ({"norm": 2, "eps": L2}, "l2")],
    "HopSkipJump": [(FEW_QUERIES, "any"), (FEW_QUERIES | {"norm": np.inf}, "any")],
    "MomentumIterativeMethod": BOTH,
    "NewtonFool": [({"max_iter": 2} | QUIET, "any")],
    "ProjectedGradientDescent": BOTH,
    "ProjectedGradientDescentNumpy": BOTH,
    "ProjectedGradientDescentPyTorch": BOTH,
    "RescalingAutoConjugateGradient": FROM_ONE_START,
    "SquareAttack": [
        ({"eps": LINF, "max_iter": 3} | QUIET, "linf"),
        ({"norm": 2, "eps": L2, "max_iter": 3} | QUIET, "l2"),
    ],
    "UniversalPerturbation": [
        (FGSM | {"eps": LINF}, "linf"),
        (FGSM | {"eps": L2, "norm": 2}, "l2"),
    ],
    "ZooAttack": [
        ({"max_iter": 1, "nb_parallel": 2, "use_resize": False, "use_importance": False} | QUIET,
         "any"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ART)
def test_art(name: str, model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """Left out: attacks for other norms, data and libraries, those that ask for probabilities
    (SimBA, VirtualAdversarialMethod) or for more packages (AutoAttack), and GeoDA and SignOPT,
    which take thousands of queries."""
    x, y = batch
    judge = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1), device_type="cpu"
    )
    one_hot = np.eye(10, dtype=np.float32)[y]
    for options, ball in ART[name]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attack = getattr(art.attacks.evasion, name)(judge, **options)
            adversarial = attack.generate(x.numpy(), y=one_hot)
        check(torch.from_numpy(np.asarray(adversarial, np.float32)), x, ball)


# --- AutoAttack ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("linf", LINF), ("l2", L2)])
def test_autoattack_stays_within_the_ball(
    norm: str,
    eps: float,
    model: Classifier,
    batch: tuple[Tensor, Tensor],
) -> None:
    """The authors', as packaged in pyautoattack, with few iterations and queries."""
    x, y = batch
    attack = pyautoattack.AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps)
    for part in (attack.apgd, attack.apgd_targeted, attack.fab):
        part.n_iter = 1
    attack.square.n_queries = 2
    images, _ = attack.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
    check(images, x, norm)
