"""Benchmarks asked, written and scored: `kdcache evaluate --benchmark`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from cache_schema.datasets.image_roots import FolderRoot, ImageRoot, open_root, unpack_embedded
from cache_schema.errors import UNDECODABLE, KdcacheError, RowRejected
from cache_schema.output import require_folder, write_text
from cache_schema.progress import Progress, task
from models.device import choose_device
from student.answering import Answerer, Question, load_for_answers
from student.benchmarks.choices import MMB, MMB_CN, MMMU, SQA
from student.benchmarks.paper import COLUMNS, table
from student.benchmarks.questions import Benchmark, Item, write_answers
from student.benchmarks.short_answers import GQA, TEXTVQA, VIZWIZ, VQAV2
from student.benchmarks.written import WrittenAnswers
from student.benchmarks.yes_no import MME, POPE
from student.folder import folder_digest
from student.ranks import Ranks
from student.settings import EvaluateConfig

_ALL = {each.name: each for each in (VQAV2, GQA, VIZWIZ, SQA, TEXTVQA, MME, MMB, MMB_CN, POPE, MMMU)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A benchmark with its files: questions, the root of the images, annotations if they are there."""

    benchmark: Benchmark
    questions: Path
    images: ImageRoot
    annotations: Path | None
    items: list[Item]


def evaluate_benchmarks(config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
    """Answers, upload files, scores and results.json in `out`; one of several processes asks its share.

    Returns scores by benchmark under `benchmarks`, and `table` beside the paper's rows. A run that was
    stopped goes on after the answers that it has written; with other weights or questions it is refused.
    """
    assert config.out is not None
    started = time.perf_counter()
    names = [name for name in COLUMNS if name in config.benchmarks or "all" in config.benchmarks]
    ready = [_ready(_ALL[name], config) for name in names]
    require_folder(config.out, new=False)
    ranks = _ranks(config.device)
    weights = folder_digest(config.model)
    model, processor = load_for_answers(config.model, config.device)
    results: dict[str, Any] = {}
    for each in ready:
        answers = _answers(each, config, weights, model, processor, ranks, progress)
        if ranks.main:
            results[each.benchmark.name] = _result(each, answers, config)
    if not ranks.main:
        raise SystemExit(0)
    values = {name: result.get("value") for name, result in results.items()}
    document = {"model": str(config.model), "benchmarks": results, "table": table(config.model.name, values)}
    write_text(config.out / "results.json", json.dumps(document, indent=2))
    return {**document, "seconds": round(time.perf_counter() - started, 2)}


def _ready(benchmark: Benchmark, config: EvaluateConfig) -> Ready:
    """Where a benchmark's files are, and its questions. KdcacheError for what is missing."""
    file = config.data
    base = file.parent
    if config.data.is_dir():
        folder = config.data / benchmark.folder
        base = folder if folder.is_dir() else config.data
        known = [base / name for name in benchmark.questions if (base / name).exists()]
        file = known[0] if known else base / benchmark.questions[0]
        if not known and benchmark is POPE and any(base.glob("coco_pope_*.json")):
            file = base
    if not file.exists():
        raise KdcacheError(
            f"{benchmark.name}: {file} does not exist; give LLaVA's eval folder or the questions as --data"
        )
    images = open_root(config.image_root or base / benchmark.images, config.files)
    local = images.folder if isinstance(images, FolderRoot) else None
    annotations = config.annotations
    if annotations is None and benchmark.annotations and (base / benchmark.annotations).exists():
        annotations = base / benchmark.annotations
    if annotations is not None and not annotations.exists():
        raise KdcacheError(f"{benchmark.name}: annotations {annotations} do not exist; correct --annotations")
    try:
        items = _askable(benchmark.read(file), file)
    except UNDECODABLE as error:
        raise KdcacheError(f"{file} has not the form that is published ({error!r})") from error
    for item in items:
        named = local and item.content is None and item.image
        if local and named and not (local / named).is_file():
            raise KdcacheError(
                f"{benchmark.name}: {local / named} does not exist; give the folder as --image-root"
            )
    return Ready(benchmark=benchmark, questions=file, images=images, annotations=annotations, items=items)


def _askable(items: list[Item], file: Path) -> list[Item]:
    """The questions. KdcacheError without any; TypeError or ValueError for one that cannot be asked."""
    if not items:
        raise KdcacheError(f"{file} has no questions; give the published file")
    for item in items:
        if not isinstance(item.image, str | None):
            raise TypeError(f"the image of question {item.question_id} is no text")
        f"{item.question_id}{item.text}{item.image}".encode()  # lone surrogates, which JSON allows
    return items


def _ranks(device: str) -> Ranks:
    """The processes that `torchrun` or `accelerate launch` started; they may wait for each other for days."""
    AcceleratorState._reset_state()
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=7))
    return Ranks(Accelerator(cpu=choose_device(device) == "cpu", kwargs_handlers=[waiting]))


@contextmanager
def _together(ranks: Ranks) -> Iterator[None]:
    """What any rank fails at ends all of them, with the error where it happened."""
    fault: Exception | None = None
    try:
        yield
    except (KdcacheError, OSError, RuntimeError, ValueError) as error:
        fault = error
    if (ends := ranks.agree(fault)) is not None:
        raise ends


def _answers(
    ready: Ready,
    config: EvaluateConfig,
    weights: str,
    model: Any,
    processor: Any,
    ranks: Ranks,
    progress: Progress,
) -> list[str]:
    """Every answer, those of earlier runs included. On other ranks than the first: none."""
    assert config.out is not None
    benchmark, items = ready.benchmark, ready.items
    limit = config.max_new_tokens or benchmark.max_new_tokens
    written = WrittenAnswers(config.out / "answers", benchmark.name)
    with _together(ranks):
        asked = repr([(item.question_id, item.text, item.image) for item in items])
        questions = hashlib.sha256(asked.encode()).hexdigest()
        identity = {"weights": weights, "questions": questions, "max_new_tokens": limit}
        written.agree(identity | {"template": processor.chat_template}, ranks.main)
    known = written.read()
    ranks.wait()  # nobody writes before all have read
    with _together(ranks):
        share = _share(items, known, ranks)
        _ask(ready, share, config, Answerer(model, processor, limit, config.batch_size), written, progress)
    if not ranks.main:
        return []
    known = written.read() | {row: item.preset for row, item in enumerate(items) if item.preset is not None}
    if lost := len(items) - len(known):
        raise KdcacheError(
            f"{benchmark.name}: {lost} questions have no answer; all processes must share {config.out}"
        )
    return [known[row] for row in range(len(items))]


def _share(items: Sequence[Item], known: dict[int, str], ranks: Ranks) -> list[int]:
    """The open questions of this rank; those of one image go to one rank."""
    groups: dict[str | None, list[int]] = {}
    for row, item in enumerate(items):
        if row not in known and item.preset is None:
            groups.setdefault(item.image or f"row {row}", []).append(row)
    return [row for rows in list(groups.values())[ranks.rank :: ranks.count] for row in rows]


def _ask(
    ready: Ready,
    rows: Sequence[int],
    config: EvaluateConfig,
    answerer: Answerer,
    written: WrittenAnswers,
    progress: Progress,
) -> None:
    """Asks the questions `rows` and writes every batch of answers as it comes."""
    assert config.out is not None
    images = ready.images
    asked = []
    for row in rows:
        item = ready.items[row]
        if item.content is not None and item.image is not None:
            images = open_root(config.out / "images")
            unpack_embedded(images, {item.image: item.content})
        content = [{"type": "image"}] if item.image is not None else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": item.text}]}]
        prompt = answerer.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        shown = () if item.image is None else (item.image,)
        asked.append(Question(row=row, images=shown, prompt=prompt))
    done = 0
    with task(progress, f"answering {ready.benchmark.name}", len(rows)), written.part() as add:
        try:
            for batch in answerer.answer(asked, images):
                add({rows[place]: text for place, text in batch.items()})
                done += len(batch)
                progress.update(done)
        except RowRejected as error:
            shown_by = [ready.items[row] for row in rows if (ready.items[row].image or "\n") in error.detail]
            where = "".join(f", question {item.question_id}" for item in shown_by[:1])
            raise KdcacheError(
                f"{ready.benchmark.name}{where}: {error.detail}; correct it, then the same command goes on"
            ) from error


def _result(ready: Ready, answers: list[str], config: EvaluateConfig) -> dict[str, Any]:
    """Writes the answer and upload files, and scores."""
    assert config.out is not None
    benchmark, items, annotations = ready.benchmark, ready.items, ready.annotations
    path = config.out / "answers" / f"{benchmark.name}.jsonl"
    write_answers(path, items, answers, config.model.name)
    files = {"answers": str(path)}
    upload = None
    try:
        scores = benchmark.score(items, answers, annotations)
        if benchmark.upload is not None:
            out = config.out / "uploads" / benchmark.name
            upload = benchmark.upload(items, answers, ready.questions, annotations, out)
    except UNDECODABLE as error:
        raise KdcacheError(
            f"{benchmark.name}: {annotations or ready.questions} has not the form that is published "
            f"({error!r}); the answers are in {path}"
        ) from error
    if upload is not None:
        files["upload"] = str(upload)
    return {**(scores or {"questions": len(items), "unscored": "no annotations"}), **files}
