"""Mutations of the papers' experiments, killed by counts, small cases worked out by hand, and runs that go on."""

ROOM = "lets_kernels/experiment/"
TESTS = "tests/programs/test_experiment.py -k '{}'"

GROUPS = [
    (
        ROOM + "networks.py",
        TESTS.format("weights or pyramid or wide"),
        [
            ("16 + alpha * (index + 1) / (3 * each)", "16 + alpha * index / (3 * each)"),
            ("(0, 0, 0, 0, 0, self.more)", "(0, 0, 0, 0, self.more, 0)"),
            ("return past + self.conv2", "return self.conv2"),
            ("for index in range((depth - 4) // 6)", "for index in range((depth - 10) // 6)"),
            ("[nn.BatchNorm2d(last), nn.ReLU()] if after", "[nn.BatchNorm2d(last), nn.ReLU()] if not after"),
        ],
    ),
    (
        ROOM + "images.py",
        TESTS.format("cifar or jpegs or folder_of or augmentation or random_parts or wrong or smoothing or accuracy"),
        [
            ("(images.float() / 255 - mean) / deviation", "(images.float() / 255 - mean) * deviation"),
            ("torch.where(mirrored, right.flip(1), right)", "right"),
            (
                "torch.randint(2 * most + 1, (n, 1), generator=random) + torch.arange(width)",
                "most + torch.arange(n, 1)",
            ),
            ("torch.randint(1, classes,", "torch.randint(0, classes,"),
            ("round(share * len(labels))", "round(share * len(labels)) + 1"),
            ("length = 0.875 * min(width, height)", "length = max(width, height)"),
            ("(0.08 + 0.92 * share)", "(0.04 + 0.92 * share)"),
            (
                "Arrays(images, labels, statistics), Arrays(*test, statistics)",
                "*[Arrays(images, labels, statistics)] * 2",
            ),
            ("return 100 * right / seen", "return 100 * right / len(batch.targets)"),
            ('b"labels" if classes == 10 else b"fine_labels"', 'b"labels"'),
        ],
    ),
    (
        ROOM + "train.py",
        TESTS.format("stopped or pairs or epoch or rates or chooses or autocast"),
        [
            ('            scheduler.load_state_dict(saved["scheduler"])\n', ""),
            ('            _set_random(saved["random"])\n', ""),
            ('            optimizer.load_state_dict(saved["optimizer"])\n', ""),
            ("self.seed + OTHER, epoch", "self.seed, epoch"),
            ("2**20 * seed + epoch", "2**20 * seed"),
            ("return math.sqrt(warm / (t + 1))", "return warm / (t + 1)"),
            ("(t - warm) / (steps - warm)", "t / steps"),
            ("Batch(tuple(x[chosen] for x in batch.inputs), batch.targets[chosen])", "batch"),
        ],
    ),
    (
        ROOM + "campaign.py",
        TESTS.format("campaign or command"),
        [
            ('return found if found["settings"] == wanted else None', "return found"),
            ("range(recipe.seeds if seeds is None else seeds)", "range(recipe.seeds)"),
        ],
    ),
    (
        ROOM + "report.py",
        TESTS.format("table"),
        [
            ('[run["score"] for run in runs if run["score"] is not None]', '[run["score"] or 0.0 for run in runs]'),
            ("max(means, key=means.__getitem__, default=None)", "min(means, key=means.__getitem__, default=None)"),
            ("{median(times):.3g} s", "{max(times):.3g} s"),
        ],
    ),
    (
        ROOM + "figures.py",
        TESTS.format("figures"),
        [
            ("if len(points) >= 3}", "if len(points) >= 2}"),
            ("[fmean(values) for values in found.values()]", "[max(values) for values in found.values()]"),
        ],
    ),
    (
        ROOM + "hours.py",
        TESTS.format("hours or plan"),
        [
            ("PASSES = 3", "PASSES = 2"),
            ("gradients * recipe.epochs * recipe.data.samples", "gradients * recipe.data.samples"),
        ],
    ),
]
