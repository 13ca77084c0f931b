"""A few generated images in the real formats, for ``--toy`` and the tests: pictures of noise, as files."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def write_cifar(folder: Path, classes: int, images: int = 4) -> Path:
    """The python version of CIFAR-10 or CIFAR-100, with so many images to train on in all; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    each = [len(part) for part in np.array_split(np.arange(images), 5)]
    sizes = {f"data_batch_{i + 1}": n for i, n in enumerate(each)} | {"test_batch": images}
    for name, size in (sizes if classes == 10 else {"train": images, "test": images}).items():
        pixels = random.integers(0, 256, (size, 3 * 32 * 32), dtype=np.uint8)
        labels = random.integers(0, classes, size).tolist()
        content = {b"data": pixels, b"labels" if classes == 10 else b"fine_labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    return folder


def write_jpegs(file: Path, images: int = 4) -> Path:
    """An ``.npz`` file of JPEGs, with so many images to train on and to test; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        files = [_jpeg(random, 32, 32) for _ in range(images)]
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = random.integers(0, 10, images).astype(np.uint8)
    np.savez(file, **arrays)
    return file


def write_imagenet(folder: Path, classes: int = 2, images: int = 2) -> Path:
    """``train`` and ``val`` with so many classes, and images of each; returns the folder."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(classes):
            inside = folder / part / f"n{label:08d}"
            inside.mkdir(parents=True, exist_ok=True)
            for index in range(images):
                (inside / f"{index}.JPEG").write_bytes(_jpeg(random, 80, 60))
    return folder


def _jpeg(random: np.random.Generator, width: int, height: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()
