"""Real weights, real images, real text: a Llava of SmolLM2-135M teaches a third of itself.

    make acceptance          (or: python -m tests.acceptance [--out FOLDER])

The teacher sees through ImageNet's EfficientNet-Lite0. Its projector starts at random, so that it is blind
at first: our own `train --stage pt` gives it sight. Then every step is a command that a user gives: build,
verify, inspect, evaluate, the teacher's removal, new-student, DPT and DFT from the caches, evaluate again.
What must hold is checked; the exit code is 1 when any of it does not. Finished steps are not redone: after
Ctrl-C the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cache_schema.errors import KdcacheError, StoppedEarly
from cache_schema.runs import read_metrics
from demo.story import Story
from tests.acceptance.commands import kdcache
from tests.acceptance.data import Data, write_data
from tests.acceptance.models import save_models
from tests.acceptance.tower import TOKENS
from views.terminal import notes, results

TERMS = ("ce", "response_kl", "visual_kl", "relation", "response_top1", "visual_top1")
KINDS = ("shape", "color", "yesno")


class Checks:
    """What must hold, told as it is found."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, sentence: str, holds: bool) -> None:
        notes.print(f"{'✓' if holds else '✗ FAILED:'} {sentence}", markup=False, soft_wrap=True)
        if not holds:
            self.failed.append(sentence)


class Acceptance:
    """One run in a folder."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self.out = out
        self.options = options
        self.story = Story(out, {name: value for name, value in vars(options).items() if name != "out"})
        self.check = Checks()
        self.data: Data = write_data(
            out / "data",
            images=options.images,
            conversations=options.conversations,
            texts=options.texts,
            held_out_images=options.held_out,
            held_out_texts=max(1, options.held_out // 4),
        )
        self.root = ("--image-root", self.data.image_root)

    def kdcache(self, name: str, *arguments: str | Path) -> Any:
        """A command as a step of the run: its JSON, kept in state.json and not made again."""
        return self.story.step(name, lambda: kdcache(*arguments))

    def run(self) -> dict[str, Any]:
        """The whole story; what was measured."""
        sizes = self.story.step("models", lambda: save_models(self.out))
        teacher = self.out / "teacher"
        sight = self.give_sight(self.out / "blind-teacher", teacher)
        caches = {name: self.capture(teacher, name) for name in ("captions", "conversations", "held-out")}
        self.story.step("remove the teacher", lambda: self.remove("teacher", "blind-teacher", "sight"))
        return {"sizes": sizes, "sight": sight, "caches": caches, "student": self.distil()}

    def remove(self, *folders: str) -> None:
        """From here on nobody can read the teacher."""
        for folder in folders:
            shutil.rmtree(self.out / folder, ignore_errors=True)

    def give_sight(self, blind: Path, teacher: Path) -> dict[str, Any]:
        """Trains the teacher's projector; what it answered before and after."""
        for name in ("captions", "held-out"):
            labels = self.out / f"labels-{name}"
            self.build(f"labels of {name}", blind, name, labels, "--targets", "response", "--top-k", "1")
        before = self.evaluate("evaluate the blind teacher", blind, self.out / "labels-held-out")
        trained = self.kdcache(
            "give the teacher sight",
            *("train", "--stage", "pt", "--student", blind, "--cache", self.out / "labels-captions"),
            *(*self.root, "--out", self.out / "sight", "--epochs", self.options.sight_epochs),
            *("--global-batch", "8", "--learning-rate", self.options.sight_rate, "--save-every", "0"),
            "--resume",
        )
        self.story.step("the teacher", lambda: str(shutil.copytree(trained["model"], teacher)))
        after = self.evaluate("evaluate the teacher", teacher, self.out / "labels-held-out")
        self.check(
            "the teacher's projector learns: cross entropy on held-out answers falls "
            f"({before['teacher']['ce']:.3f} to {after['teacher']['ce']:.3f})",
            after["teacher"]["ce"] < before["teacher"]["ce"],
        )
        return {"before": before, "after": after, "steps": trained["steps"]}

    def build(self, step: str, teacher: Path, name: str, out: Path, *more: str) -> Any:
        """`build` of one of the data files."""
        file = {
            "captions": self.data.captions,
            "conversations": self.data.conversations,
            "held-out": self.data.held_out,
        }[name]
        return self.kdcache(
            step,
            *("build", "--teacher", teacher, "--data", file, *self.root, "--out", out),
            *("--shard-size", "64", "--batch-tokens", "2048", *more),
        )

    def evaluate(self, step: str, model: Path, cache: Path) -> Any:
        """`evaluate` on the held-out questions and a held-out cache."""
        return self.kdcache(
            step,
            *("evaluate", "--model", model, "--data", self.data.questions, *self.root),
            *("--cache", cache, "--max-new-tokens", "8"),
        )

    def capture(self, teacher: Path, name: str) -> dict[str, Any]:
        """Builds a cache with all targets and holds it against the data."""
        cache, check = self.out / f"cache-{name}", self.check
        template: tuple[str, ...] = ()
        rows = self.data.rows[name]
        if name == "captions":
            rows = min(rows, self.options.captions)
            template = ("--template", "plain", "--limit", str(rows))
        built = self.build(f"build {name}", teacher, name, cache, *template)
        again = self.build(f"build {name} again", teacher, name, cache, *template)
        verified = self.kdcache(f"verify {name}", "verify", cache)
        seen = self.kdcache(f"inspect {name}", "inspect", cache)
        counts = seen["counts"]
        refused = sum(built["quarantined"].values())
        missing = {"missing_image": 1} if name == "conversations" else {}
        check(
            f"{name}: verify finds all of {verified['shards']} shards whole",
            verified["ok"] and not verified["problems"],
        )
        check(f"{name}: a second build finds nothing to do", again["already_done"])
        check(
            f"{name}: {built['captured']} samples and {refused} in quarantine are all {rows} rows",
            built["captured"] + refused == rows
            and built["quarantined"] == missing
            and counts["samples"] == built["captured"]
            and seen["quarantine"] == missing,
        )
        images = counts["images"]
        check(
            f"{name}: {images} images have targets at {TOKENS} visual tokens each, and a relation",
            seen["built"]["complete"]
            and seen["positions"]["visual"]["positions"] == images * TOKENS
            and seen["relation"]["relations"] == images
            and seen["relation"]["max_residual"] <= 1e-5,
        )
        return {"built": built, "inspect": seen}

    def distil(self) -> dict[str, Any]:
        """A third of the teacher learns from the caches alone."""
        held_out, options = self.out / "cache-held-out", self.options
        student = self.out / "student"
        made = self.kdcache(
            "new student",
            *("new-student", "--vision-tower", self.out / "tower"),
            *("--language-model", self.out / "small-language-model"),
            *("--like", self.out / "cache-conversations", "--out", student),
        )
        self.check(f"the student sees images in {TOKENS} tokens", made["visual_tokens"] == TOKENS)
        stages = {"start": self.evaluate("evaluate the new student", student, held_out)}
        for stage, cache, rate, batch in (
            ("dpt", "captions", options.dpt_rate, 8),
            ("dft", "conversations", options.dft_rate, 4),
        ):
            run = self.out / stage
            trained = self.kdcache(
                f"train by {stage}",
                *("train", "--stage", stage, "--student", student, "--cache", self.out / f"cache-{cache}"),
                *(*self.root, "--out", run, "--epochs", "1", "--learning-rate", rate, "--log-every", "1"),
                *("--global-batch", str(batch), "--micro-batch", str(batch), "--save-every", "0"),
                "--resume",
            )
            student = run / "model"
            stages[stage] = {
                **self.evaluate(f"evaluate after {stage}", student, held_out),
                "training": trained,
            }
            first, last = loss_ends(run)
            self.check(f"{stage}: the training loss falls ({first:.3f} to {last:.3f})", last < first)
        start, end = stages["start"]["teacher"], stages["dft"]["teacher"]
        for term in ("response_kl", "visual_kl", "relation", "ce"):
            self.check(
                f"held out, {term} falls ({start[term]:.3f} to {end[term]:.3f})", end[term] < start[term]
            )
        for term in ("response_top1", "visual_top1"):
            self.check(
                f"held out, {term} rises ({start[term]:.3f} to {end[term]:.3f})", end[term] > start[term]
            )
        exported = self.kdcache("export", "export", "--model", student, "--out", self.out / "exported")
        return {"made": made, "stages": stages, "exported": exported}


def loss_ends(run: Path) -> tuple[float, float]:
    """Mean loss of the first and of the last quarter of a run's steps."""
    losses = [line["loss"] for line in read_metrics(run) if line["group"] == "train"]
    part = max(1, len(losses) // 4)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part


def print_tables(found: dict[str, Any]) -> None:
    """What was measured, as a person reads it."""
    wide = Console(width=110, highlight=False)
    caches = Table(
        "cache", "samples", "tokens", "positions", "mass", "MB", "bytes per position", "an image", "rank"
    )
    for name, cache in found["caches"].items():
        seen = cache["inspect"]
        positions, size = seen["positions"], seen["bytes"]
        caches.add_row(
            name,
            str(cache["built"]["captured"]),
            str(cache["built"]["tokens"]),
            " + ".join(str(positions[kind]["positions"]) for kind in ("response", "visual")),
            f"{positions['response']['mean_covered_mass']:.2f}",
            f"{size['total'] / 1e6:.2f}",
            " / ".join(f"{size['per_position'][kind]:.0f}" for kind in ("response", "visual")),
            f"{size['per_relation']:.0f} bytes",
            f"{seen['relation']['mean_rank']:.1f}",
        )
    wide.print(caches)
    models = Table("held out", *(term.replace("_", " ") for term in TERMS), *KINDS)
    rows = {
        "teacher, blind": found["sight"]["before"],
        "teacher": found["sight"]["after"],
        **{f"student, {name}": stage for name, stage in found["student"]["stages"].items()},
    }
    for name, row in rows.items():
        # A teacher is held against labels alone: the blind one made that cache.
        terms = TERMS if name.startswith("student") else ("ce",)
        measured = [f"{row['teacher'][term]:.3f}" if term in terms else "" for term in TERMS]
        models.add_row(
            name, *measured, *(f"{100 * row['by_kind'][kind]['exact_match']:.0f}%" for kind in KINDS)
        )
    wide.print(models)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("acceptance-run"), help="Folder of the run, 2.5 GB.")
    parser.add_argument(
        "--images",
        type=int,
        default=240,
        help="Training images with a caption, which give the teacher sight.",
    )
    parser.add_argument("--captions", type=int, default=160, help="Of them in the cache that DPT reads.")
    parser.add_argument("--conversations", type=int, default=64, help="Of them with questions and answers.")
    parser.add_argument("--texts", type=int, default=32, help="Training rows of text alone.")
    parser.add_argument("--held-out", type=int, default=24, help="Held-out images.")
    parser.add_argument("--sight-epochs", default="3", help="Passes that give the teacher sight.")
    parser.add_argument("--sight-rate", default="1e-3", help="Their learning rate.")
    parser.add_argument("--dpt-rate", default="1e-3", help="Learning rate of DPT.")
    parser.add_argument("--dft-rate", default="2e-4", help="Learning rate of DFT.")
    options = parser.parse_args()
    try:
        run = Acceptance(options.out, options)
        found = run.run()
    except (KdcacheError, StoppedEarly) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, StoppedEarly) else 1
    seconds = run.story.seconds
    (options.out / "results.json").write_text(json.dumps({**found, "seconds": seconds}, indent=1))
    print_tables(found)
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    results.print(f"{sum(seconds.values()):.0f} s: {parts}", markup=False, soft_wrap=True)
    for sentence in run.check.failed:
        results.print(f"FAILED: {sentence}", markup=False, soft_wrap=True)
    return int(bool(run.check.failed))


if __name__ == "__main__":
    sys.exit(main())
