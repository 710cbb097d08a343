"""The easy-VQA set as LLaVA rows: 4,000 training and 1,000 test images of one colored shape, with questions.

Source: the PyPI package `easy-vqa` 1.0 (MIT). Its questions.json files hold [question, answer, image id].
"""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cache_schema.errors import KdcacheError

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("shape", "color", "yesno")
DESCRIBE = "Describe the image."
MOST_TURNS = 8
"""Of a conversation that the teacher is trained on; what it says in later turns means little."""

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoData:
    """The files that `write_dataset` wrote."""

    image_root: Path
    captions: Path
    conversations: Path
    held_out: Path
    test: Path


class Described(Protocol):
    """An image of which questions with their answers and captions are known."""

    @property
    def questions(self) -> Sequence[tuple[str, str]]: ...

    @property
    def captions(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What the questions and answers about one image determine; None: unknown."""

    shape: str | None
    color: str | None

    @property
    def captions(self) -> tuple[str, ...]:
        """Phrases, for example ("red circle", "circle in red"); one phrase where an attribute is unknown.

        No article: the first word after `<image>` must depend on the image.
        """
        if self.shape and self.color:
            return f"{self.color} {self.shape}", f"{self.shape} in {self.color}"
        return (self.shape or f"{self.color or 'plain'} shape",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image of the set with its (question, answer) pairs in published order."""

    image_id: int
    path: Path
    questions: tuple[tuple[str, str], ...]
    attributes: Attributes

    @property
    def captions(self) -> tuple[str, ...]:
        """As `Attributes.captions`."""
        return self.attributes.captions


def question_kind(answer: str) -> str:
    """The kind of question that `answer` answers: "shape", "color" or "yesno".

    Raises:
        ValueError: the answer is none of easy-VQA's thirteen.
    """
    if answer in SHAPES:
        return "shape"
    if answer in COLORS:
        return "color"
    if answer in ("yes", "no"):
        return "yesno"
    raise ValueError(f"answer {answer!r} is not an easy-VQA answer: expected a shape, a color, yes or no")


def attributes_of(questions: Sequence[tuple[str, str]]) -> Attributes:
    """Shape and color from questions and answers alone: named, affirmed, or the only one not denied."""
    known: dict[str, str] = {}
    denied: dict[str, set[str]] = {"shape": set(), "color": set()}
    for question, answer in questions:
        words = question.rstrip("?").split()
        mentioned = [(kind, word) for word in words for kind in ("shape", "color") if _is_value(kind, word)]
        answer_kind = question_kind(answer)
        if answer_kind != "yesno":
            known[answer_kind] = answer
            known.update(mentioned)  # "what color is the circle?" gives the shape as well
            continue
        negated = "not" in words or "no" in words
        present = (answer == "yes") != negated
        for kind, word in mentioned:
            if present:
                known[kind] = word
            else:
                denied[kind].add(word)
    for kind, values in (("shape", SHAPES), ("color", COLORS)):
        left = [value for value in values if value not in denied[kind]]
        if kind not in known and len(left) == 1:
            known[kind] = left[0]
    return Attributes(shape=known.get("shape"), color=known.get("color"))


def load_pictures(split: Split) -> list[Picture]:
    """Reads one published split, in order of image id.

    Raises:
        KdcacheError: easy-vqa is not installed.
    """
    folder = _package_folder() / "data" / split
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image_id in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        questions.setdefault(image_id, []).append((question, answer))
    return [
        Picture(
            image_id=image_id,
            path=folder / "images" / f"{image_id}.png",
            questions=tuple(pairs),
            attributes=attributes_of(pairs),
        )
        for image_id, pairs in sorted(questions.items())
    ]


def write_dataset(
    out: Path,
    *,
    train_images: int | None = None,
    test_images: int | None = None,
    held_out_images: int | None = None,
    max_yesno_per_image: int | None = None,
    max_turns: int | None = None,
    seed: int = 0,
) -> DemoData:
    """Writes images, captions.json, conversations.json and test.json under `out`, in LLaVA's row format.

    A caption row and a conversation row for each training image, the caption's wording and the order of turns
    drawn from (seed, image id); one single-turn row for each test question, with its "kind".
    Same arguments, same bytes.

    Args:
        out: folder to write to, made when absent; files of the same names are overwritten.
        train_images, test_images: how many images, drawn with `seed`; None takes all.
        held_out_images: how many of the test images also get a conversation row; None takes all.
        max_yesno_per_image: keep at most so many yes/no questions of a test image; None keeps all.
        max_turns: keep so many turns, the first in their drawn order, of a conversation; None keeps all.
        seed: decides the draw of images, the order of turns and the kept yes/no questions.

    Raises:
        KdcacheError: easy-vqa is not installed.
        ValueError: more images are asked for than there are.
    """
    train = _draw(load_pictures("train"), train_images, f"train-{seed}")
    test = _draw(load_pictures("test"), test_images, f"test-{seed}")
    data = DemoData(
        image_root=out / "images",
        captions=out / "captions.json",
        conversations=out / "conversations.json",
        held_out=out / "held_out.json",
        test=out / "test.json",
    )
    captions, conversations, held_out, questions = [], [], [], []
    for picture in train:
        image = _copy_image(picture, data.image_root, "train")
        rng = random.Random(f"row-{seed}-{picture.image_id}")
        caption = rng.choice(picture.captions)
        captions.append(llava_row(f"caption-{picture.image_id}", image, [(DESCRIBE, caption)]))
        conversations.append(_conversation(picture, image, max_turns, rng))
    for place, picture in enumerate(test):
        image = _copy_image(picture, data.image_root, "test")
        if held_out_images is None or place < held_out_images:
            rng = random.Random(f"row-{seed}-{picture.image_id}")
            held_out.append(_conversation(picture, image, max_turns, rng))
        for number in _kept_questions(picture, max_yesno_per_image, seed):
            pair = picture.questions[number]
            row = llava_row(f"test-{picture.image_id}-{number}", image, [pair])
            questions.append({**row, "kind": question_kind(pair[1])})
    for path, rows in (
        (data.captions, captions),
        (data.conversations, conversations),
        (data.held_out, held_out),
        (data.test, questions),
    ):
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return data


def llava_row(row_id: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A conversation about one image in LLaVA's row format."""
    conversations = []
    for number, (question, answer) in enumerate(turns):
        human = f"<image>\n{question}" if number == 0 else question
        conversations += [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {"id": row_id, "image": image, "conversations": conversations}


def _package_folder() -> Path:
    try:
        import easy_vqa
    except ImportError as error:
        raise KdcacheError(
            "the demo's data, the package easy-vqa, is not installed: pip install 'kdcache[demo]'"
        ) from error
    return Path(easy_vqa.__file__).parent


def _is_value(kind: str, word: str) -> bool:
    return word in (SHAPES if kind == "shape" else COLORS)


def _draw(pictures: list[Picture], count: int | None, seed: str) -> list[Picture]:
    if count is None:
        return pictures
    if not 0 < count <= len(pictures):
        raise ValueError(f"cannot take {count} images: the split has {len(pictures)}")
    return sorted(random.Random(seed).sample(pictures, count), key=lambda picture: picture.image_id)


def _kept_questions(picture: Picture, max_yesno: int | None, seed: int) -> list[int]:
    numbers = list(range(len(picture.questions)))
    yesno = [number for number in numbers if question_kind(picture.questions[number][1]) == "yesno"]
    if max_yesno is None or len(yesno) <= max_yesno:
        return numbers
    kept = random.Random(f"yesno-{seed}-{picture.image_id}").sample(yesno, max_yesno)
    return [number for number in numbers if number not in yesno or number in kept]


def _copy_image(picture: Picture, image_root: Path, split: Split) -> str:
    image = f"{split}/{picture.image_id}.png"
    target = image_root / image
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture.path, target)
    return image


def _conversation(picture: Picture, image: str, max_turns: int | None, rng: random.Random) -> dict[str, Any]:
    turns = list(picture.questions)
    rng.shuffle(turns)
    return llava_row(f"conversation-{picture.image_id}", image, turns[:max_turns])
