"""`check_method` accepts methods that keep to the rules, and says which one a method breaks."""

import pytest

import forked
import odd_methods
from dist_adv import testing
from dist_adv.errors import UserError
from dist_adv.methods import Method, MethodOptions
from dist_adv.methods.free import Free
from dist_adv.testing import check_method

WRONG = {
    "LossOfEach": "has a loss of shape (2,); take the mean over the batch's samples",
    "OneOfTwo": "OneOfTwo yields 1 and not the 2 objective(s) that steps_per_batch says",
    "Fragile": f"fails in training: rank 0 of 1: {odd_methods.__file__}, line ",
    "NotOnEveryRank": "let every rank call net.sum_over_ranks as often, in the same order",
    "ThroughNet": "the weights get 2 gradients a step and not 1",
    "TorchsNumbers": "draw random numbers from batch.keys by dist_adv.rng",
    "Hides": "something that it keeps between batches is not saved (self.delta)",
    "MeanOfARank": "self.all is an Everywhere and differs between ranks",
    "Sum": "its loss is a sum over the batch's samples; take the mean",
    "NormOfARank": "and so depends on how the batch is shared",
    "Neighbour": "or what it carries, depends on how the batch is shared",
    "SmallDifference": "in bf16 and ",
}

pytestmark = [pytest.mark.slow]


@pytest.fixture(autouse=True)
def forked_ranks(monkeypatch):
    monkeypatch.setattr(testing, "subprocess", forked)


@pytest.mark.parametrize(
    ("method", "options"),
    [(Free, {"replays": 3}), (odd_methods.Remembers, {})],
)
def test_right_methods_pass(method, options):
    check_method(method, **options)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_methods_are_told_what_is_wrong(name):
    with pytest.raises(AssertionError) as told:
        check_method(getattr(odd_methods, name))
    text = str(told.value)
    assert text.startswith(f"odd_methods:{name}: ")
    assert WRONG[name] in text
    assert "\n" not in text


def test_a_class_that_no_other_process_can_import_is_refused():
    class Local(Method[MethodOptions]):
        pass

    with pytest.raises(UserError, match="put the class at the top of a module"):
        check_method(Local)


def test_options_are_those_of_the_method():
    with pytest.raises(UserError, match="replay: unknown key; did you mean 'replays'"):
        check_method(Free, replay=3)
