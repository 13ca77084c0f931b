"""An argument that nobody has is answered by the method's class, which says what is meant."""

import inspect
import re

import pytest
import torch

import lets_kernels as lk
from lets_kernels.methods import catalogue

SGD = torch.optim.SGD
METHODS = {method.cls: method for method in catalogue.methods()}
ELSEWHERE = [pytest.param(cls, name, id=f"{cls.__name__}-{name}") for cls in METHODS for name in cls.called]


def build(cls, base=SGD, **given):
    """A method as the first row of its page, with an argument more."""
    options = eval(f"dict({METHODS[cls].rows[0].arguments})", {name: getattr(lk, name) for name in lk.__all__})
    bases = () if METHODS[cls].own_base else (base,)
    return cls([torch.nn.Parameter(torch.ones(2))], *bases, **options, **given)


def test_the_methods_whose_authors_have_other_names():
    found = {cls.__name__ for cls in METHODS if cls.called}
    assert found == {
        *("ASAM", "LETSASAM", "GSAM", "RGSAM", "GradientNormPenalty", "FriendlySAM"),
        *("SparseSAM", "BSAM", "LESAM", "USAM", "Lookbehind", "SAMPa"),
    }


@pytest.mark.parametrize("cls, name", ELSEWHERE)
def test_a_name_of_the_authors_code_is_answered_by_ours(cls, name):
    ours = cls.called[name]
    with pytest.raises(TypeError) as found:
        build(cls, **{name: 0.5})
    assert str(found.value) == f"{cls.__name__} has no argument {name!r}; it is called {ours} here"


@pytest.mark.parametrize("cls, name", ELSEWHERE)
def test_the_name_that_is_said_is_one_of_the_class(cls, name):
    method, argument = re.fullmatch(r"(?:(\w+)\()?(\w+)(?:=\.\.\.\))?", cls.called[name]).groups()
    takes = inspect.signature(getattr(cls, method) if method else cls).parameters
    assert argument in takes or (method is None and argument in inspect.signature(lk.SAM).parameters)
    assert name not in takes


@pytest.mark.parametrize("cls", [lk.SAM, lk.ESAM, lk.LETSSAM, lk.LETSASAM], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ["curvature", "metric", "validation", "per_group"])
def test_an_option_of_a_learned_radius_goes_into_the_radius(cls, name):
    message = rf"^{cls.__name__} has no argument '{name}'; it goes into the radius: rho=LearnedRadius\(..., {name}="
    with pytest.raises(TypeError, match=message):
        build(cls, **{name: "secant"})


@pytest.mark.parametrize(
    "cls, name, near",
    [
        (lk.SAM, "adaptiv", "adaptive"),
        (lk.SAM, "rho_warm_up", "rho_warmup"),
        (lk.SAM, "momentun", "momentum"),  # of SGD
        (lk.GSAM, "alhpa", "alpha"),
        (lk.AESAM, "lamda1", "lambda1"),
        (lk.SparseSAM, "sparcity", "sparsity"),
        (lk.LETSASAM, "filter_wise", "filterwise"),
        (lk.LETSASAM, "backand", "backend"),  # of SAM, two classes above
        (lk.BSAM, "beta_1", "beta1"),
    ],
)
def test_a_misspelt_name_is_answered_by_the_nearest(cls, name, near):
    with pytest.raises(TypeError, match=rf"^{cls.__name__} has no argument '{name}'; did you mean {near}\?$"):
        build(cls, **{name: 0.5})


def test_a_name_that_is_near_to_none_is_neither_ours_nor_the_base_optimizers():
    with pytest.raises(TypeError, match=r"^GSAM has no argument 'zzz', and SGD has none either$"):
        build(lk.GSAM, zzz=1)


def test_a_name_that_the_base_optimizer_lists_is_the_base_optimizers():
    opt = build(lk.USAM, torch.optim.ASGD, lambd=0.125)
    assert opt.param_groups[0]["lambd"] == 0.125


class TakesAll(SGD):
    def __init__(self, params, **options):
        self.options = options
        super().__init__(params, lr=options["lr"])


def test_a_base_optimizer_that_takes_any_name_gets_what_nobody_knows_to_be_ours():
    assert build(lk.FriendlySAM, TakesAll, lamda=0.9).base_optimizer.options == {"lr": 0.1, "lamda": 0.9}
    with pytest.raises(TypeError, match="it is called decay here"):
        build(lk.FriendlySAM, TakesAll, lmbda=0.9)


class Unreadable(SGD):
    __signature__ = "none"


def test_a_base_optimizer_without_a_signature_says_itself_what_it_does_not_take():
    with pytest.raises(TypeError, match="unexpected keyword argument 'lmbda'"):
        build(lk.FriendlySAM, Unreadable, lmbda=0.9)


def test_an_instance_is_asked_too():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"^GSAM has no argument 'gsam_alpha'; it is called alpha here$"):
        lk.GSAM([p], SGD([p], lr=0.1), gsam_alpha=0.4)
    with pytest.raises(ValueError, match="is an instance already; set momentum"):
        lk.GSAM([p], SGD([p], lr=0.1), momentum=0.9)
