"""The whole tokenizer is part of a cache's identity: what decides ids, not the vocabulary alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cache_schema import IdentityMismatch, TargetSpec, open_cache
from cache_schema.format.identity import compare
from cache_schema.progress import Silent
from models.folder import load_model, load_processor
from models.tokens import digest_of_tokenizer, tokenizer_parts
from pipeline import job
from pipeline.capture import BuildConfig, build
from student.checks import check_student
from student.stages import SFT
from tests.tiny_models import tiny_dataset, tiny_llava


def swap_merges(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def normalise(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "NFC"}


def split_digits(document: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}


def strip_blanks(document: dict[str, Any]) -> None:
    document["added_tokens"][0]["lstrip"] = True


def decode_otherwise(document: dict[str, Any]) -> None:
    document["decoder"] = {"type": "Sequence", "decoders": [{"type": "Fuse"}, document["decoder"]]}


def drop_out(document: dict[str, Any]) -> None:
    document["model"]["ignore_merges"] = True


CHANGES = {
    "merges": swap_merges,
    "normalizer": normalise,
    "pre_tokenizer": split_digits,
    "added_tokens": strip_blanks,
    "decoder": decode_otherwise,
    "model": drop_out,
}


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("part", CHANGES)
def test_every_part_is_told_apart(tmp_path: Path, part: str) -> None:
    tiny_llava(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    change(tmp_path, CHANGES[part])
    after = AutoTokenizer.from_pretrained(tmp_path)
    ours, theirs = tokenizer_parts(before), tokenizer_parts(after)
    assert digest_of_tokenizer(before) == digest_of_tokenizer(after)
    assert [name for name in ours if ours[name] != theirs[name]] == [part]


def test_what_is_saved_and_loaded_again_is_the_same(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer(["padded", "a batch of two"], padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path / "b")
    assert tokenizer_parts(AutoTokenizer.from_pretrained(tmp_path / "b")) == tokenizer_parts(tokenizer)


def test_older_forms_of_the_file_are_the_same(tmp_path: Path) -> None:
    """Merges as text, and what is off left out."""
    tiny_llava(tmp_path)
    before = tokenizer_parts(AutoTokenizer.from_pretrained(tmp_path))

    def as_before(document: dict[str, Any]) -> None:
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
        for name in ("dropout", "ignore_merges", "fuse_unk", "byte_fallback"):
            document["model"].pop(name, None)

    change(tmp_path, as_before)
    assert tokenizer_parts(AutoTokenizer.from_pretrained(tmp_path)) == before


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, line: str) -> None:
        self.lines.append(line)


def test_builds_and_students_of_other_merges_are_refused_and_old_caches_compared_as_far_as_they_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_llava(tmp_path / "teacher")
    dataset = tiny_dataset(tmp_path / "data", rows=4)
    spec = TargetSpec(targets=("response",), top_k=4)
    config = BuildConfig(
        teacher=teacher,
        data=dataset.data,
        image_root=dataset.image_root,
        out=str(tmp_path / "new"),
        spec=spec,
        device="cpu",
    )
    build(config, Silent())
    whole = job.fingerprint_of

    def of_an_older_version(**options: Any) -> Any:
        made = whole(**options)
        for part in (made.capture, made.training):
            del part["tokenizer_parts"]
        return made

    with monkeypatch.context() as patched:
        patched.setattr(job, "fingerprint_of", of_an_older_version)
        build(replace(config, out=str(tmp_path / "old")), Silent())
    notes = Notes()
    assert build(replace(config, out=str(tmp_path / "old")), notes).already_done
    assert any("could not be compared" in line for line in notes.lines)
    new, old = open_cache(tmp_path / "new"), open_cache(tmp_path / "old")
    found = compare(new.manifest.fingerprint, old.manifest.fingerprint)
    assert [(d.key, d.blocks) for d in found] == [("tokenizer_parts", "nothing")] * 2

    change(teacher, swap_merges)
    with pytest.raises(IdentityMismatch, match=r"tokenizer_parts\.merges"):
        build(config, Silent())
    assert build(replace(config, out=str(tmp_path / "old")), Silent()).already_done
    student, processor = load_model(teacher), load_processor(teacher)
    with pytest.raises(IdentityMismatch, match=r"the tokenizer's merges are not those of the cache"):
        check_student(new, student, processor, dataset.image_root, SFT)
    assert check_student(old, student, processor, dataset.image_root, SFT) is None
