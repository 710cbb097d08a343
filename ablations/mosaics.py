"""Mosaics of Fashion-MNIST: four photographs in a square, with questions about what stands where.

Source: the Debian package `dataset-fashion-mnist` (MIT), 60,000 training and 10,000 test images of 28 x 28.
"""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import KdcacheError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIDE = 32
"""Pixels of a cell: an item and a margin of two pixels around it."""
ITEMS = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
CELLS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("where", "count", "present", "same")

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """The photographs of a split: pixels (N, 28, 28) uint8 and their places in ITEMS (N,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mosaic:
    """Four photographs by their numbers in a split, in the order of CELLS, and their places in ITEMS."""

    photographs: tuple[int, int, int, int]
    labels: tuple[int, int, int, int]
    questions: tuple[tuple[str, str], ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """The items row by row, in two wordings."""
        a, b, c, d = (ITEMS[label] for label in self.labels)
        return f"{a} {b} above {c} {d}", f"{c} {d} below {a} {b}"

    def pixels(self, items: Items) -> NDArray[np.uint8]:
        """(64, 64, 3)."""
        canvas = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
        for place, number in enumerate(self.photographs):
            row, column = divmod(place, 2)
            canvas[row * SIDE + 2 : row * SIDE + 30, column * SIDE + 2 : column * SIDE + 30] = items.pixels[
                number
            ]
        return np.repeat(canvas[:, :, None], 3, axis=2)


def load_items(split: Split, folder: Path = FOLDER) -> Items:
    """Reads a split as Debian installs it. KdcacheError where it is not installed."""
    name = "train" if split == "train" else "t10k"
    files = [folder / f"{name}-images-idx3-ubyte.gz", folder / f"{name}-labels-idx1-ubyte.gz"]
    if missing := [path for path in files if not path.is_file()]:
        raise KdcacheError(
            f"Fashion-MNIST is not installed: {missing[0]} is missing; apt-get install dataset-fashion-mnist"
        )
    pixels, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in files)
    return Items(pixels=pixels[16:].reshape(-1, 28, 28), labels=labels[8:])


def draw_mosaics(items: Items, count: int, seed: str) -> list[Mosaic]:
    """Mosaics in which kinds repeat: a cell's is one of two to four. Same arguments, same mosaics."""
    rng = random.Random(seed)
    of_kind = [np.flatnonzero(items.labels == kind) for kind in range(len(ITEMS))]
    mosaics = []
    for _ in range(count):
        kinds = rng.sample(range(len(ITEMS)), rng.randint(2, 4))
        labels = [rng.choice(kinds) for _ in CELLS]
        photographs = [int(rng.choice(of_kind[label])) for label in labels]
        mosaics.append(
            Mosaic(
                photographs=tuple(photographs),  # type: ignore[arg-type]
                labels=tuple(labels),  # type: ignore[arg-type]
                questions=tuple(_questions(labels, rng)),
            )
        )
    return mosaics


def question_kind(question: str) -> str:
    """The kind of a question of `draw_mosaics`: one of KINDS."""
    for beginning, kind in (("what ", "where"), ("how ", "count"), ("is ", "present"), ("are ", "same")):
        if question.startswith(beginning):
            return kind
    raise ValueError(f"{question!r} is no question about a mosaic")


def _questions(labels: Sequence[int], rng: random.Random) -> list[tuple[str, str]]:
    """Eight, two of a kind: an answer of `count`, `present` and `same` does not follow from how often it is
    right."""
    names = [ITEMS[label] for label in labels]
    counts = Counter(names)
    absent = [name for name in ITEMS if name not in counts]
    made = [(f"what is {CELLS[place]}?", names[place]) for place in rng.sample(range(4), 2)]
    asked = [rng.choice(sorted(counts)), rng.choice([*sorted(counts), rng.choice(absent)])]
    made += [(f"how many items are a {name}?", NUMBERS[counts[name]]) for name in asked]
    made += [
        (f"is there a {rng.choice(sorted(counts))}?", "yes"),
        (f"is there a {rng.choice(absent)}?", "no"),
    ]
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    alike = [pair for pair in pairs if names[pair[0]] == names[pair[1]]]
    unlike = [pair for pair in pairs if pair not in alike]
    for group, answer in ((alike, "same"), (unlike, "different")):
        if group:
            a, b = rng.choice(group)
            made.append((f"are {CELLS[a]} and {CELLS[b]} the same?", answer))
    rng.shuffle(made)
    return made
