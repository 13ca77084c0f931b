"""The recipes: what each experiment of the papers trains, on what, how long, and with which optimizers."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer


@dataclass(frozen=True)
class Data:
    """What a recipe reads.

    Args:
        kind: the loader's name: ``cifar10``, ``cifar100``, ``imagenet``, ``glue`` or ``translation``.
        samples: in the training set of the paper, for the estimate of the time.
        options: for the loader.
        tokens: of a sample of text, assumed for the estimate; 0 for images.
    """

    kind: str
    samples: int
    options: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Args:
        name: on the command line.
        shows: what of the papers it repeats.
        data: what is read.
        network: its name, as in the papers.
        epochs, batch_size: batches that are not full are left out.
        base: the base optimizer's class, with ``lr`` and ``options``.
        schedule: of the learning rate, step by step: up over ``warmup`` of all steps, then to zero (``cosine``,
            ``linear``) or down with the root of the step (``inverse-sqrt``).
        methods: names of :mod:`~lets_kernels.experiment.methods`.
        seeds: runs of each method.
        source: where the settings are from.
        differs: from the paper, in words.
    """

    name: str
    shows: str
    data: Data
    network: str
    epochs: int
    batch_size: int
    lr: float
    methods: tuple[str, ...]
    base: type[Optimizer] = SGD
    options: dict[str, Any] = field(default_factory=lambda: {"momentum": 0.9, "weight_decay": 5e-4})
    schedule: str = "cosine"
    warmup: float = 0.0
    seeds: int = 5
    source: str = ""
    differs: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's file says of it; a run with other settings is another run."""
        common = {"data": self.data.kind, "network": self.network, "epochs": self.epochs, "batch_size": self.batch_size}
        base = {"base": self.base.__name__, "lr": self.lr, **self.options}
        schedule = {"schedule": self.schedule, **({"warmup": self.warmup} if self.warmup else {})}
        return {**common, **self.data.options, **base, **schedule}


RECIPES: dict[str, Recipe] = {}
#: The recipes of each table or figure.
TABLES: dict[str, tuple[str, ...]] = {}


def _add(*recipes: Recipe) -> tuple[str, ...]:
    RECIPES.update((recipe.name, recipe) for recipe in recipes)
    return tuple(recipe.name for recipe in recipes)


# ---- what is compared ------------------------------------------------------------------------------------------------

#: The papers choose the radius of SAM and ASAM on a grid; here each is a line. "auto" is ours.
SAMS, ASAMS = ("sam@0.05", "sam@0.1", "sam@0.2"), ("asam@0.5", "asam@1", "asam@2")
COMPARED = ("base", "esam", "rst", "looksam", "ae-sam", *SAMS, *ASAMS, "lets-sam", "lets-asam", "auto")
FEW = ("base", *SAMS, *ASAMS, "lets-sam", "lets-asam", "auto")
STARTS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
#: Every method that goes without more arguments; MSAM's radius is of another kind.
ALL = (
    *("base", "sam", "asam", "auto", "lets-sam", "lets-asam", "esam", "delta-sam", "fisher-sam", "gsam"),
    *("gradient-norm-penalty", "looksam", "r-sam", "r-gsam", "rst", "random-sam", "sparse-sam", "usam", "ae-sam"),
    *("ae-looksam", "vasso", "wsam", "friendly-sam", "le-sam", "lightsam", "late-sam", "stable-sam", "functional-sam"),
    *("multi-step-sam", "lookbehind", "sampa", "base-step-sam"),
)

# ---- LETS (Wang, Jiang, Fu & Zhang, ECML-PKDD 2024) ------------------------------------------------------------------

STATED = "the paper; unchecked: the number of epochs, as AE-SAM has it"
MEMORY = "unchecked: AE-SAM's as we remember them, which the paper follows"
NU = "ν by Adam at 1e-2, as the paper's plain step of 1e-4 does not move it"


def _cifar(classes: int, network: str, shows: str = "LETS: CIFAR", **changed: Any) -> Recipe:
    name = network.lower().replace("wideresnet", "wrn").replace("/", "-")
    settings: dict[str, Any] = {"epochs": 200, "batch_size": 128, "lr": 0.1, "methods": COMPARED, "source": STATED}
    data = Data(f"cifar{classes}", 50_000)
    recipe = Recipe(f"cifar{classes}-{name}", shows, data, network, differs=(NU,), **settings)
    return replace(recipe, **changed)


_VIT: dict[str, Any] = {
    "epochs": 1200,
    "batch_size": 64,
    "lr": 1e-4,
    "base": Adam,
    "options": {},
    "source": MEMORY,
    "differs": (NU, "patches of 4 x 4: whether the paper has 16 x 16 on enlarged images could not be read"),
}
TABLES["lets-cifar"] = _add(
    *(_cifar(classes, network) for classes in (10, 100) for network in ("ResNet-18", "WideResNet-28-10")),
    *(_cifar(classes, "PyramidNet-110", epochs=300) for classes in (10, 100)),
    *(_cifar(classes, "ViT-S/4", **_VIT) for classes in (10, 100)),
)
TABLES["lets-imagenet"] = _add(
    Recipe(
        "imagenet-resnet-50",
        "LETS: ImageNet",
        Data("imagenet", 1_281_167),
        "ResNet-50",
        epochs=90,
        batch_size=512,
        lr=0.1,
        methods=FEW,
        options={"momentum": 0.9, "weight_decay": 1e-4},
        seeds=1,
        source=MEMORY,
        differs=(NU,),
    )
)
TABLES["lets-translation"] = _add(
    Recipe(
        "iwslt14-de-en",
        "LETS, ASAM: IWSLT'14 DE-EN",
        Data("translation", 160_239, {"source": "de", "target": "en"}, tokens=25),
        "Transformer",
        epochs=50,
        batch_size=128,
        lr=5e-4,
        methods=FEW,
        base=Adam,
        options={"betas": (0.9, 0.98), "weight_decay": 1e-4},
        schedule="inverse-sqrt",
        warmup=0.064,
        source="fairseq's recipe for this data; unchecked: 50 epochs, as ASAM has it",
        differs=(NU, "batches of 128 sentences, not of 4,096 tokens; 4,000 steps of warm-up are a share of the steps"),
    )
)
#: Training sentences or pairs, epochs, batch size and learning rate.
_GLUE = {
    "cola": (8551, 6, 32, 2e-5),
    "sst2": (67_349, 3, 32, 2e-5),
    "mrpc": (3668, 6, 32, 2e-5),
    "stsb": (5749, 6, 32, 2e-5),
    "qqp": (363_846, 3, 64, 2e-5),
    "mnli": (392_702, 3, 64, 2e-5),
    "qnli": (104_743, 3, 64, 2e-5),
    "rte": (2490, 8, 16, 8e-6),
}
TABLES["lets-glue"] = _add(
    *(
        Recipe(
            f"glue-{task}",
            "LETS: GLUE",
            Data("glue", samples, {"task": task}, tokens=40),
            "DeBERTa",
            epochs=epochs,
            batch_size=size,
            lr=lr,
            methods=FEW,
            base=AdamW,
            options={"weight_decay": 0.01},
            schedule="linear",
            warmup=0.1,
            source="DeBERTa's scripts for CoLA, MNLI and RTE, the nearest of them for the others",
            differs=(NU, "the score is that of dev: the labels of the test set are not public"),
        )
        for task, (samples, epochs, size, lr) in _GLUE.items()
    )
)
TABLES["lets-noise"] = _add(
    *(
        _cifar(
            10,
            "ResNet-18",
            "LETS: wrong labels",
            name=f"noise-{percent}",
            data=Data("cifar10", 50_000, {"noise": percent / 100}),
        )
        for percent in (20, 40, 60, 80)
    )
)
TABLES["lets-metric"] = _add(
    _cifar(
        10,
        "ResNet-18",
        "LETS: what the radius minimises",
        name="metric",
        methods=("lets-sam", "lets-sam-gap", "lets-sam-loss", "lets-sam-secant"),
    )
)
TABLES["lets-starts"] = _add(
    _cifar(
        10,
        "ResNet-18",
        "LETS: the first radius",
        name="starts",
        methods=("base", *(f"{kind}@{rho:g}" for kind in ("sam", "lets-sam", "auto") for rho in STARTS)),
    )
)

# ---- SAM, ASAM, ESAM: as their authors' code has it ------------------------------------------------------------------

TABLES["sam"] = _add(
    *(
        _cifar(
            classes,
            "WideResNet-28-10",
            "SAM: CIFAR",
            name=f"sam-cifar{classes}",
            batch_size=256,
            options={"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            methods=("base", f"sam@{rho}", "auto"),
            source="the authors' code (google-research/sam); unchecked: ρ",
            differs=("gradients are not clipped at 5",),
        )
        for classes, rho in ((10, 0.05), (100, 0.1))
    )
)
TABLES["asam"] = _add(
    *(
        _cifar(
            classes,
            "WideResNet-28-10",
            "ASAM: CIFAR",
            name=f"asam-cifar{classes}",
            data=Data(f"cifar{classes}", 50_000, {"smoothing": 0.1}),
            methods=("base", f"sam@{rho}", f"asam@{adaptive}", "asam-auto"),
            source="the authors' code (SamsungLabs/ASAM)",
            differs=("the last epoch counts, not the best one on the test set", "ξ is 0.01, in their example 0"),
        )
        for classes, rho, adaptive in ((10, 0.05, 0.5), (100, 0.1, 1.0))
    )
)
TABLES["esam"] = _add(
    *(
        _cifar(
            classes,
            network,
            "ESAM: CIFAR",
            name=f"esam-cifar{classes}-{short}",
            epochs=epochs,
            lr=0.05,
            options={"momentum": 0.9, "weight_decay": decay},
            methods=("base", f"sam@{rho}", f"esam@{rho}", "auto"),
            source="the authors' code (dydjw9/Efficient_SAM)",
            differs=("one process with the batch of two", "β is 0.5 for each network"),
        )
        for classes in (10, 100)
        for network, short, epochs, decay, rho in (
            ("ResNet-18", "resnet-18", 200, 1e-3, 0.05),
            ("WideResNet-28-10", "wrn-28-10", 200, 1e-3, 0.1),
            ("PyramidNet-110", "pyramidnet-110", 300, 5e-4, 0.2),
        )
    )
)

# ---- R-SAM, and a survey ---------------------------------------------------------------------------------------------

TABLES["r-sam"] = _add(
    _cifar(
        10,
        "ResNet-18",
        "R-SAM: CIFAR",
        name="r-sam-cifar10",
        methods=("base", "sam", "gsam", "r-sam", "r-gsam", "auto"),
        source="LETS's for this network",
        differs=("the paper's own settings could not be read",),
    ),
    Recipe(
        "r-sam-imagenet",
        "R-SAM, GSAM: ImageNet",
        Data("imagenet", 1_281_167),
        "ViT-S/16",
        epochs=90,
        batch_size=1024,
        lr=1e-3,
        base=AdamW,
        options={"weight_decay": 1e-4},
        warmup=0.09,
        methods=("base", "sam@0.2", "gsam@0.2", "r-sam@0.2", "r-gsam@0.2", "auto"),
        seeds=1,
        source="public code that trains ViT-S/32 with SAM: AdamW, 90 epochs, eight of them warm-up, ρ 0.2",
        differs=("the paper's own settings could not be read", "gradients are not clipped at 1"),
    ),
)
TABLES["survey"] = _add(
    _cifar(
        10,
        "ResNet-18",
        "surveys: every method, accuracy and time",
        name="survey",
        methods=ALL,
        seeds=3,
        source="LETS's for this network",
        differs=("each method at its default radius",),
    )
)

# ---- what one core can do --------------------------------------------------------------------------------------------

_add(
    _cifar(
        10,
        "ResNet-18, width 16",
        "none: what one core can do",
        name="cifar10-small",
        epochs=6,
        methods=("base", "sam", "auto", "lets-sam"),
        seeds=1,
        source="LETS's for ResNet-18, but for the epochs",
        differs=("a quarter of ResNet-18's width", "six epochs", "one seed", NU),
    )
)
