"""`lets-kernels experiment`: data in the real formats, the papers' networks, runs that go on, tables and figures."""

import dataclasses
import json
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lets_kernels.experiment import campaign, cli, figures, hours, images, networks, report, toy_images
from lets_kernels.experiment.data import KINDS, Source, toy
from lets_kernels.experiment.methods import Setting, label, method, methods
from lets_kernels.experiment.recipes import RECIPES, TABLES, Data, Recipe
from lets_kernels.experiment.task import Batch, MissingData
from lets_kernels.experiment.train import OTHER, STATE, Options, Stopped, _shape, batches, train
from support.lengths import at_length

QUIET = Options(say=lambda text: None)


class Tiny(nn.Module):
    """Batch norm, so that something beside the weights has to be saved; dropout, so that random numbers have to be."""

    def __init__(self, classes):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Linear(4, classes)

    def forward(self, x):
        x = nn.functional.dropout(self.bn(self.conv(x)).relu(), 0.2, self.training)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def recipe(monkeypatch):
    """A small one; of CIFAR-10's format."""
    monkeypatch.setitem(networks.NETWORKS, "tiny", Tiny)
    made = Recipe("small", "here", Data("cifar10", 40), "tiny", 3, 8, 0.05, ("base", "sam@0.1", "lets-sam"), seeds=1)
    monkeypatch.setitem(RECIPES, "small", made)
    return made


@pytest.fixture
def folder(tmp_path):
    return toy_images.write_cifar(tmp_path / "data", 10, 40)


def loaded(recipe, folder, seed=0):
    return KINDS[recipe.data.kind].load(recipe, Source(folder), seed)


# ---- networks --------------------------------------------------------------------------------------------------------

# Published: WideResNet 36.5 M, PyramidNet (alpha 270) 28.3 M for ten classes, ResNet-50 25.6 M, ViT-S/16 22.1 M,
# ResNet-32 0.46 M and ResNet-18 11.2 M. To the weight, by hand from the papers' tables:
WEIGHTS = {
    "ResNet-18": (10, 32, 11_173_962),
    "ResNet-32": (10, 32, 466_906),  # He's 464,154 and two convolutions of 1 x 1 with batch norm as shortcuts: 2,752
    "WideResNet-28-10": (10, 32, 36_479_194),
    "PyramidNet-110": (10, 32, 28_485_477),
    "ResNet-50": (1000, 224, 25_557_032),
    "ViT-S/16": (1000, 224, 22_050_664),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_networks_have_the_weights_of_the_papers(name):
    classes, side, weights = WEIGHTS[name]
    with torch.device("meta"):
        model = networks.NETWORKS[name](classes)
        assert model(torch.empty(2, 3, side, side)).shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == weights


def test_a_pyramid_grows_evenly_and_its_shortcut_adds_zeros():
    model = networks.pyramidnet(20, 9, 10)
    assert [block.conv2.out_channels for block in model.features if isinstance(block, networks.Pyramid)] == [
        *range(17, 26)
    ]
    block = networks.Pyramid(2, 3, 2).eval()
    nn.init.zeros_(block.bn3.weight)
    x = torch.randn(1, 2, 4, 4)
    y = block(x)
    torch.testing.assert_close(y[:, :2], nn.functional.avg_pool2d(x, 2))
    assert y.shape == (1, 3, 2, 2) and not y[:, 2].any()


def test_a_wide_block_adds_what_came_in():
    block = networks.Wide(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_as_it_is_published(tmp_path, classes):
    folder = toy_images.write_cifar(tmp_path, classes, 7)
    task = images.cifar(folder, classes, "ResNet-32", 0.0, 0.0, 0)
    names = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    rows = [pickle.loads((folder / name).read_bytes()) for name in names]
    pixels = np.concatenate([row[b"data"] for row in rows])
    labels = np.concatenate([row[b"labels" if classes == 10 else b"fine_labels"] for row in rows])
    batch = task.train.batch([6, 2], None)
    assert len(task.train) == len(task.test) == 7 and batch.targets.tolist() == [labels[6], labels[2]]
    mean, deviation = images.CIFAR10 if classes == 10 else images.CIFAR100
    # Row-major colour planes of 32 rows of 32: the pixel in row 3, column 5 of the green plane.
    wanted = (pixels[2, 1024 + 3 * 32 + 5] / 255 - mean[1]) / deviation[1]
    assert batch.inputs[0].shape == (2, 3, 32, 32)
    torch.testing.assert_close(batch.inputs[0][1, 1, 3, 5].item(), float(wanted), rtol=1e-6, atol=1e-6)  # one rounding


def test_a_file_of_jpegs_is_decoded_in_its_order(tmp_path):
    file = toy_images.write_jpegs(tmp_path / "pack.npz", 3)
    task = images.cifar(file, 10, "ResNet-32", 0.0, 0.0, 0)
    with np.load(file) as arrays:
        at = arrays["test_offsets"]
        (tmp_path / "one.jpg").write_bytes(arrays["test_jpeg"][at[1] : at[2]].tobytes())
        labels = arrays["test_labels"].tolist()
    decoded = torch.from_numpy(np.array(Image.open(tmp_path / "one.jpg"))).permute(2, 0, 1)
    assert torch.equal(task.test.images[1], decoded) and task.test.labels.tolist() == labels
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(MissingData, match="train_jpeg"):
        images.cifar(tmp_path / "other.npz", 10, "ResNet-32", 0.0, 0.0, 0)


def test_a_folder_of_classes_is_read_in_the_order_of_their_names(tmp_path):
    folder = toy_images.write_imagenet(tmp_path, classes=3, images=2)
    (folder / "train" / "n00000000" / "notes.txt").write_text("not an image")
    task = images.imagenet(folder, "ResNet-50", 0.0)
    batch = task.test.batch([0, 3, 5], None)
    assert batch.inputs[0].shape == (3, 3, 224, 224) and batch.targets.tolist() == [0, 1, 2] and len(task.train) == 6
    # The square in the middle: the image is 80 x 60, the square 52.5 wide. A picture of one colour stays it.
    Image.new("RGB", (80, 60), (10, 200, 30)).save(folder / "val" / "n00000000" / "0.JPEG", quality=100)
    plain = task.test.batch([0], None).inputs[0]
    deviation = torch.tensor(images.IMAGENET[1]).view(3, 1, 1)
    spread = (plain.amax((2, 3)) - plain.amin((2, 3))) * 255 * deviation.view(1, 3)
    assert spread.max() < 0.01  # of a pixel's 255 steps: nothing but float32's rounding


@pytest.mark.parametrize("kind", KINDS)
def test_missing_files_are_named(tmp_path, kind):
    made = dataclasses.replace(RECIPES["cifar10-small"], data=Data(kind, 1, {"task": "rte"} if kind == "glue" else {}))
    with pytest.raises(MissingData, match=str(tmp_path)):
        KINDS[kind].load(made, Source(tmp_path), 0)


def test_augmentation_moves_and_mirrors_whole_images():
    picture = torch.arange(1, 3 * 8 * 8 + 1, dtype=torch.uint8).view(1, 3, 8, 8).repeat(200, 1, 1, 1)
    moved = images.shifted(picture, torch.Generator().manual_seed(0), most=2)
    padded = nn.functional.pad(picture[0], (2,) * 4)
    windows = {
        (row, column, flip): (padded.flip(2) if flip else padded)[:, row : row + 8, column : column + 8]
        for row in range(5)
        for column in range(5)
        for flip in (False, True)
    }
    seen = []
    for image in moved:
        places = [place for place, window in windows.items() if torch.equal(window, image)]
        assert len(places) == 1  # each is one of the fifty windows of the picture or of its mirror image
        seen += places
    assert len(set(seen)) > 40 and 60 < sum(flip for *_, flip in seen) < 140  # 200 draws of fifty; half are mirrored


def test_random_parts_of_an_image_are_in_it():
    random = torch.Generator().manual_seed(0)
    parts = [images._part(80, 60, random) for _ in range(300)]
    for left, top, right, bottom in parts:
        area = (right - left) * (bottom - top) / 4800
        assert left >= 0 and top >= 0 and right <= 80 and bottom <= 60
        assert area >= 0.08 - 1e-9 and 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9
    assert np.std([left for left, *_ in parts]) > 5  # they are not all in one place


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
def test_wrong_labels_are_exactly_so_many_and_all_wrong(share):
    labels = torch.arange(1000) % 10
    changed = images.with_wrong_labels(labels, share, 10, 3)
    wrong = changed != labels
    assert wrong.sum() == 1000 * share and changed.min() >= 0 and changed.max() < 10
    assert torch.equal(changed, images.with_wrong_labels(labels, share, 10, 3))
    assert not share or not torch.equal(changed, images.with_wrong_labels(labels, share, 10, 4))
    assert not share or len(set(((changed - labels) % 10)[wrong].tolist())) == 9  # any of the nine others


def test_wrong_labels_are_those_of_the_training_set_only(folder):
    noisy, clean = (images.cifar(folder, 10, "ResNet-32", share, 0.0, 0) for share in (0.5, 0.0))
    assert (noisy.train.labels != clean.train.labels).sum() == 20
    assert torch.equal(noisy.test.labels, clean.test.labels)


def test_smoothing_is_in_the_training_loss_only(folder):
    smooth, plain = (images.cifar(folder, 10, "ResNet-32", 0.0, smoothing, 0) for smoothing in (0.1, 0.0))
    batch = plain.test.batch(range(4), None)
    model = plain.network().eval()
    logits = model(*batch.inputs).double().log_softmax(1)
    wanted = -(0.9 * logits.gather(1, batch.targets[:, None]).mean() + 0.1 * logits.mean())
    torch.testing.assert_close(smooth.loss(model, batch).double(), wanted, rtol=1e-5, atol=1e-6)  # float32 sums of ten
    assert smooth.score(model, [batch]) == plain.score(model, [batch])


def test_accuracy_counts_over_batches_of_any_size():
    batches_ = [Batch((torch.eye(3)[[0, 1]],), torch.tensor([0, 2])), Batch((torch.eye(3)[[2]],), torch.tensor([2]))]
    assert images.accuracy(nn.Identity(), batches_) == pytest.approx(100 * 2 / 3)


# ---- methods and recipes ---------------------------------------------------------------------------------------------


def test_every_method_builds_its_optimizer(recipe):
    for name in methods():
        if name == "msam" or name in recipe.methods:
            continue
        model = Tiny(10)
        optimizer = method(name).build(Setting(recipe, model, 30, 5, 0), method(name).rho)
        assert optimizer.param_groups[0]["lr"] == 0.05 and optimizer.param_groups[0]["momentum"] == 0.9
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "message"),
    [("adam", "no method 'adam'"), ("sam@0", "above 0"), ("sam@x", "above 0"), ("base@0.1", "takes no radius")],
)
def test_a_method_that_is_none_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        method(name)


def test_a_radius_is_in_the_label_and_in_the_optimizer(recipe):
    made = method("sam@0.2").build(Setting(recipe, Tiny(10), 30, 5, 0), method("sam@0.2").rho)
    assert float(made.rho) == pytest.approx(0.2) and method("sam@0.2").label == "SAM, ρ = 0.2"
    assert method("lets-sam@0.5").label == "LETS-SAM, from 0.5" and method("auto@1").label.endswith("from 1")


def test_every_recipe_can_be_read():
    for name, made in RECIPES.items():
        assert made.name == name and made.shows and made.seeds >= 1 and made.data.kind in KINDS
        assert [method(one).label for one in made.methods] and len(set(made.methods)) == len(made.methods)
    assert all(one in RECIPES for recipes in TABLES.values() for one in recipes)


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("cosine", 0.0, [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
        ("linear", 0.5, [0.5, 1, 1, 0.5]),
        ("inverse-sqrt", 0.25, [1, 2**-0.5, 3**-0.5, 0.5]),
    ],
)
def test_learning_rates_by_hand(recipe, schedule, warmup, rates):
    shape = _shape(dataclasses.replace(recipe, schedule=schedule, warmup=warmup), 4)
    assert [shape(t) for t in range(4)] == pytest.approx(rates)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_every_sample_once_in_an_order_of_its_own(folder, recipe):
    source = loaded(recipe, folder).train
    source.labels = torch.arange(40)
    orders = [
        torch.cat([batch.targets for batch in batches(source, 8, seed, epoch, QUIET)])
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (OTHER, 0))
    ]
    assert all(torch.equal(order.sort().values, torch.arange(40)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    again = torch.cat([batch.targets for batch in batches(source, 8, 0, 0, dataclasses.replace(QUIET, workers=1))])
    assert torch.equal(again, orders[0])  # whoever prepares them
    assert [len(batch.targets) for batch in batches(source, 12, 0, 0, QUIET)] == [12, 12, 12]  # full ones only


@pytest.mark.parametrize("name", ["base", "lets-sam", "auto", "friendly-sam"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, recipe, tmp_path, name):
    task = loaded(recipe, folder)
    whole = train(recipe, name, 1, task, tmp_path / "whole", QUIET)
    for _ in range(2):
        turns = iter([True, False])
        with pytest.raises(Stopped):
            train(recipe, name, 1, task, tmp_path / "parts", dataclasses.replace(QUIET, go_on=lambda: next(turns)))
        torch.manual_seed(77)  # another process has other random numbers
    parts = train(recipe, name, 1, task, tmp_path / "parts", QUIET)
    states = [torch.load(tmp_path / part / STATE, weights_only=True) for part in ("whole", "parts")]
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    same = [[{k: v for k, v in record.items() if k != "seconds"} for record in run["epochs"]] for run in (whole, parts)]
    assert same[0] == same[1] and len(same[0]) == 3
    assert whole["gradients"] == parts["gradients"] == {"base": 15, "lets-sam": 60}.get(name, 30)


def test_runs_of_one_seed_are_pairs(folder, recipe, tmp_path):
    """The same initial weights and batches for every method; of LETS the validation batches are others."""
    task, seen = loaded(recipe, folder), {}

    def run(name):
        calls = seen.setdefault(name, [])

        def loss(model, batch):
            calls.append((next(model.parameters()).detach().clone(), batch.inputs[0], batch.targets.tolist()))
            return task.loss(model, batch)

        train(recipe, name, 4, dataclasses.replace(task, loss=loss), tmp_path / name, QUIET)
        return calls

    base, sam, lets = map(run, ("base", "sam@0.1", "lets-sam"))
    assert torch.equal(base[0][0], sam[0][0]) and torch.equal(base[0][0], lets[0][0])
    for alone, two, four in zip(
        base, zip(sam[::2], sam[1::2], strict=True), zip(*[iter(lets)] * 4, strict=True), strict=True
    ):
        assert [targets for *_, targets in two] == [alone[2]] * 2 and [call[2] for call in four[:2]] == [alone[2]] * 2
        assert all(torch.equal(alone[1], inputs) for _, inputs, _ in (*two, *four[:2]))  # augmented alike, too
    validation = [
        [call[2] for call in four[2:] if call[2] != four[0][2]] for four in zip(*[iter(lets)] * 4, strict=True)
    ]
    assert all(len(found) == 1 for found in validation)  # one of the two after the step; eight of forty are never alike
    assert len({tuple(found[0]) for found in validation}) == 15


def test_a_method_that_chooses_samples_gets_their_losses(folder, recipe, tmp_path):
    task, sizes = loaded(recipe, folder), []

    def losses(model, batch):
        sizes.append(len(batch.targets))
        assert len(batch.inputs[0]) == sizes[-1]
        return task.losses(model, batch)

    found = train(recipe, "esam", 0, dataclasses.replace(task, losses=losses), tmp_path, QUIET)
    assert found["gradients"] == 30 and found["score"] is not None
    assert set(sizes) == {8, 4} and sizes.count(4) == 15  # all for the first pass and to choose, half for the second
    with pytest.raises(ValueError, match="loss of their own"):
        train(recipe, "esam", 0, dataclasses.replace(task, losses=None), tmp_path / "other", QUIET)


def test_autocast_is_around_every_pass_and_a_set_can_be_too_small(folder, recipe, tmp_path):
    task, seen = loaded(recipe, folder), []

    def loss(model, batch):
        seen.append(model(*batch.inputs).dtype)
        return task.loss(model, batch)

    amp = dataclasses.replace(QUIET, amp=True)
    found = train(recipe, "sam", 0, dataclasses.replace(task, loss=loss), tmp_path, amp)
    assert set(seen) == {torch.bfloat16} and found["settings"]["amp"] is True
    with pytest.raises(ValueError, match="40 samples are less than one batch of 41"):
        train(dataclasses.replace(recipe, batch_size=41), "sam", 0, task, tmp_path / "none", QUIET)


def test_tensorboard_gets_what_the_file_gets(folder, recipe, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:  # the package is not among what the tests install
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, *what):
            written.append(what)

        def close(self):
            written.append(self.folder)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    options = dataclasses.replace(QUIET, tensorboard=True, evaluate=2)
    found = train(recipe, "auto", 0, loaded(recipe, folder), tmp_path, options)
    names = ("loss", "score", "rho")
    wanted = [(n, e[n], e["epoch"]) for e in found["epochs"] for n in names if e[n] is not None]
    assert written == [*wanted, str(tmp_path)] and len(wanted) == 8  # the first of three epochs is not scored


def test_a_campaign_takes_again_what_has_other_settings_only(folder, recipe, tmp_path):
    loads = []

    def load(one, seed):
        loads.append((one.name, seed))
        return loaded(one, folder, seed)

    planned = campaign.runs([recipe], None, 2)
    first = list(campaign.campaign(planned, load, tmp_path, QUIET))
    assert [(run.method, run.seed) for run in planned] == [(m, s) for s in (0, 1) for m in recipe.methods]
    assert loads == [("small", 0), ("small", 1)] and len(first) == 6
    assert list(campaign.campaign(planned, load, tmp_path, QUIET)) == first and len(loads) == 2
    longer = dataclasses.replace(recipe, epochs=4)
    again = list(campaign.campaign(campaign.runs([longer], ["base"], 1), load, tmp_path, QUIET))
    assert len(again[0]["epochs"]) == 4 and again[0]["settings"]["epochs"] == 4
    for other in (dataclasses.replace(QUIET, amp=True), dataclasses.replace(QUIET, start="pretrained")):
        assert campaign.finished(planned[0], tmp_path, other) is None
    (planned[1].folder(tmp_path) / "run.json").write_text("{")
    assert campaign.finished(planned[1], tmp_path, QUIET) is None


# ---- tables, figures, hours ------------------------------------------------------------------------------------------


def run_of(score, epochs=(), commit="c0ffee"):
    machine = {"cpu": "a CPU", "threads": 1, "commit": commit}
    return {
        "score": score,
        "measure": "test accuracy, %",
        "epochs": list(epochs),
        "environment": machine,
    }


def test_a_table_by_hand(recipe):
    other = dataclasses.replace(recipe, name="other")
    found = {
        ("small", "base"): [run_of(80.0)],
        ("small", "sam"): [run_of(81.0), run_of(84.0), run_of(None)],
        ("other", "sam"): [run_of(None)],
    }
    assert report.table(found, [recipe, other], markdown=True).splitlines() == [
        "| method | small | other |",
        "| --- | --- | --- |",
        "| SGD | 80.00 (1 seed) | – |",
        "| SAM | **82.50 ± 2.12 (2 seeds, 1 failed)** | failed |",
    ]
    page = report.document(found, [recipe, other])
    assert "a CPU, 1 thread, commit c0ffee. Settings: ours. Differs from the paper: nothing that we know of." in page
    timed = {
        ("small", "sam"): [
            run_of(81.0, epochs=[{"seconds": 2.0}, {"seconds": 9.0}]),
            run_of(83.0, epochs=[{"seconds": 3.0}]),
        ]
    }
    assert report.table(timed, [recipe, other]).splitlines()[1].split() == "SAM 82.00 ± 1.41 (2 seeds) 3 s".split()


def test_figures_show_the_means(recipe, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **options: drawn.append(self))
    records = [[{"epoch": e, "score": s + e, "rho": 0.1 * e} for e in (1, 2)] for s in (10, 20)]
    found = {
        ("small", "base"): [run_of(12.0, [{"epoch": 1, "score": 12.0}])],
        ("small", "auto"): [run_of(12.0, one) for one in records],
        **{("small", f"sam@{rho}"): [run_of(50 + rho), run_of(52 + rho)] for rho in (0.2, 0.1, 0.4)},
    }
    figures.draw_training(found, recipe, tmp_path / "a.png")
    assert figures.draw_starts(found, recipe, tmp_path / "b.png")
    score, rho = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in score.lines}
    assert lines['SAM rho="auto"'] == [[1, 16], [2, 17]] and lines["SGD"] == [[1, 12]]
    assert [line.get_xydata().tolist() for line in rho.lines] == [[[1, 0.1], [2, 0.2]]]
    (curve,) = drawn[1].axes[0].containers
    assert curve.lines[0].get_xydata().tolist() == pytest.approx(np.array([[0.1, 51.1], [0.2, 51.2], [0.4, 51.4]]))
    del found["small", "sam@0.4"]
    assert not figures.draw_starts(found, recipe, tmp_path / "b.png")


def test_hours_are_counted_arithmetic_over_the_speed(folder, recipe):
    task = loaded(recipe, folder)
    # Tiny, one image: 3 x 3 x 3 weights to 4 channels at 8 x 8 places, and 4 to 10; two operations each, three passes.
    assert hours.gradient(task) == 3 * 2 * (27 * 4 * 64 + 40)
    planned = campaign.runs([recipe], None, None)
    # 1 + 2 + 4 gradients of 40 samples in three epochs, 1e12 operations each: 840 seconds at one TFLOP/s.
    assert hours.hours(recipe, planned, 1e12, 1.0) == pytest.approx(7 * 3 * 40 / 3600)


# ---- every recipe ----------------------------------------------------------------------------------------------------

#: For each network and kind of data a recipe with a method that is not its first; at length every recipe has several.
SHORT = {
    "cifar10-resnet-18": "lets-asam",
    "sam-cifar100": "auto",
    "esam-cifar10-pyramidnet-110": "esam@0.2",
    "cifar100-vit-s-4": "sam@0.1",
    "r-sam-imagenet": "r-sam@0.2",
    "noise-40": "lets-sam",
    "cifar10-small": "asam@0.5",
    "iwslt14-de-en": "lets-sam",
}


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_the_real_network_on_a_toy(name, tmp_path, capsys):
    made = RECIPES[name]
    every = made.methods if name == "survey" else made.methods[:: max(1, len(made.methods) - 2)]  # first, last but one
    methods_ = at_length(every, (SHORT.get(name, made.methods[0]),))
    assert cli.main([name, "--toy", "--output", str(tmp_path), "--device", "cpu", "--methods", *methods_]) == 0
    found = [json.loads(path.read_text()) for path in tmp_path.rglob("run.json")]
    small, source = toy(made, tmp_path / "again")
    with torch.device("meta"):
        weights = sum(p.numel() for p in KINDS[made.data.kind].load(small, source, 0).network().parameters())
    for run in found:
        assert run["score"] is not None and run["weights"] == weights and run["skipped_steps"] == 0
        # Two steps: the rates of the recipe's schedule, its base optimizer, its wrong labels.
        wanted = made.settings | {"epochs": 1, "batch_size": 2}
        assert {key: run["settings"][key] for key in wanted} == json.loads(json.dumps(wanted))
    assert len(found) == len(methods_) and label(methods_[0], [made]) in capsys.readouterr().out


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_trains_writes_and_goes_on(folder, recipe, tmp_path, capsys):
    arguments = ["small", "--data", str(folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*arguments, "--stop-after", "4"]) == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert len(list((tmp_path / "out").rglob("run.json"))) == 1
    assert cli.main([*arguments, "--networks"]) == 0
    said = capsys.readouterr().out
    assert "epoch 1/3" in said and "small sam@0.1 seed 0: epoch 1/3" not in said  # that one is not trained again
    found = {path.parent.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("run.json")}
    assert set(found) == set(recipe.methods)
    for name, run in found.items():
        assert f"{run['score']:.2f} (1 seed)" in (tmp_path / "out" / "small.md").read_text(), name
    assert all((tmp_path / "out" / "small" / f"{name}.png").stat().st_size for name in ("training", "networks"))
    without_data = ["small", "--report", *arguments[3:]]
    assert cli.main([*without_data, "--methods", "base"]) == 0
    assert "SAM" not in capsys.readouterr().out
    assert cli.main([*without_data, "--amp"]) == 1
    assert "give the --amp" in capsys.readouterr().err


def test_a_list_a_plan_and_what_is_missing(recipe, tmp_path, capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES) and all(kind.expects in listed for kind in KINDS.values())
    assert cli.main(["small", "--plan", "--tflops", "1e-6"]) == 0
    said = capsys.readouterr().out
    # 7 gradients of 40 samples in three epochs, 41,712 operations each, at a million a second.
    assert f"{7 * 3 * 40 * 3 * 2 * (27 * 4 * 64 + 40) / 1e6 / 60:.2g} minutes" in said and "assumed" in said
    assert cli.main(["small", "--plan", "--tflops", "1e-9", "--methods", "base", "--seeds", "2", "--epochs", "9"]) == 0
    said = capsys.readouterr().out
    assert "small --data PATH --epochs 9 --seeds 2 --methods base --amp" in said
    assert f"{2 * 9 * 40 * 3 * 2 * (27 * 4 * 64 + 40) / 1e3 / 3600:.3g} hours" in said
    assert cli.main(["small", "--data", str(tmp_path)]) == 1 and "data_batch_1" in capsys.readouterr().err
    assert cli.main(["small", "--data", str(tmp_path), "--report", "--output", str(tmp_path)]) == 1
    assert "no run of small with these settings has ended" in capsys.readouterr().err


def test_missing_packages_are_named_before_anything_is_trained(monkeypatch, capsys, tmp_path):
    there = cli.importlib.util.find_spec
    gone = {"PIL", "torchmetrics", "transformers", "tensorboard"}
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name in gone else there(name))
    for arguments, message in (
        (["glue-rte", "--toy"], "this needs torchmetrics, transformers: pip install 'lets_kernels[experiment]'"),
        (["cifar10-small", "--data", str(tmp_path / "a.npz")], "this needs PIL"),
        (["cifar100-vit-s-4", "--toy"], "this needs transformers"),
        (["cifar10-small", "--toy", "--tensorboard"], "pip install tensorboard"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--output", str(tmp_path)])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["large"], "no recipe or table 'large'"),
        (["cifar10-small"], "--data PATH is missing: the unpacked folder"),
        (["cifar10-small", "--report", "--networks"], "--data PATH is missing"),
        (["glue-rte", "--data", "."], "--checkpoint FOLDER is missing: glue-rte goes on from a pretrained network"),
        (["cifar10-small", "--toy", "--device", "gpu"], "no device 'gpu' here"),
        (["cifar10-small", "--toy", "--methods", "sam@-1"], "takes a radius above 0"),
        (["cifar10-small", "--toy", "--epochs", "0"], "must be a number from 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err
