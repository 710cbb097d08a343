"""The demo: teacher, caches, distilled and plain student, each step through the command that a user would
run.

Finished steps are written to state.json in the run's folder and are not redone; Ctrl-C is safe at any time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError, StoppedEarly, WrongUsage
from cache_schema.format.cache import open_cache
from cache_schema.output import require_folder, write_text, writing
from cache_schema.progress import Progress
from demo.curves import draw_curves
from demo.easy_vqa import MOST_TURNS, write_dataset
from demo.settings import DemoConfig
from views.terminal import notes

SHIPPED_TEACHER = Path(__file__).parent / "teacher"
KINDS_OF_STUDENT = ("distilled", "plain")
STAGE_NAMES = {
    "distilled": {"dpt": "DPT", "sft": "SFT", "dft": "DFT"},
    "plain": {"dpt": "PT", "sft": "SFT", "dft": "more SFT"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo: those of docs/results.md on this set, with the learning rates that were best for the
    plain student."""

    train_images: int = 400
    test_images: int = 1000
    held_out_images: int = 150
    yesno_per_image: int = 2
    max_turns: int = MOST_TURNS
    hidden_size: int = 48
    layers: int = 2
    heads: int = 4
    language_model_steps: int = 60
    dpt_epochs: float = 2
    sft_epochs: float = 1
    dft_epochs: float = 5
    global_batch: int = 8
    dpt_learning_rate: float = 3e-3
    learning_rate: float = 2e-3


class Story:
    """The steps of one run in `folder`: each is done once, timed, and its result kept in state.json."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._file = folder / "state.json"
        require_folder(folder, new=False)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._state: dict[str, Any] = {"settings": dict(settings), "steps": {}}
        if self._file.exists():
            self._state = json.loads(self._file.read_text(encoding="utf-8"))
            if self._state["settings"] != dict(settings):
                raise KdcacheError(
                    f"{folder} holds a run with other settings ({self._state['settings']} instead of "
                    f"{dict(settings)}): choose another --out or remove the folder"
                )

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each finished step took."""
        return {name: step["seconds"] for name, step in self._state["steps"].items()}

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Do `work` unless the step is finished; return its JSON result either way."""
        done = self._state["steps"].get(name)
        if done is not None:
            notes.print(f"✓ {name}: done before ({done['seconds']:.0f} s)", markup=False)
            return done["result"]
        notes.rule(name, align="left")
        began = time.perf_counter()
        result = work()
        seconds = round(time.perf_counter() - began, 1)
        self._state["steps"][name] = {"seconds": seconds, "result": result}
        write_text(self._file, json.dumps(self._state, indent=2))
        notes.print(f"✓ {name}: {seconds:.0f} s", markup=False)
        return result

    def command(self, name: str, *arguments: str | Path) -> Any:
        """Run `kdcache ARGUMENTS --json` in its own process as a step; the result is the JSON it prints."""
        return self.step(name, lambda: kdcache([str(argument) for argument in arguments]))


def kdcache(arguments: Sequence[str]) -> Any:
    """Run a command in its own process; the progress goes to the terminal, the JSON on stdout is returned."""
    notes.print("$ kdcache " + " ".join(arguments), markup=False, soft_wrap=True, style="dim")
    # -P: a file cli.py of the folder that the user is in is not run.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    try:
        printed, _ = process.communicate()
    except StoppedEarly:
        # Ctrl-C reaches the command too: let it save before the demo exits.
        process.wait(timeout=120)
        raise
    if process.returncode == 3:
        raise StoppedEarly("stopped, everything is saved; run the same command again to continue")
    if process.returncode != 0:
        refused = WrongUsage if process.returncode == 2 else KdcacheError
        raise refused(f"kdcache {arguments[0]} ended with exit code {process.returncode}; its error is above")
    return json.loads(printed)


def run_demo(config: DemoConfig, progress: Progress, settings: DemoSettings | None = None) -> dict[str, Any]:
    """Run every step of the demo in folder `config.out` and return what results.json holds.

    Teacher, data and caches are the same for all seeds.

    Raises: KdcacheError when a step fails or the folder holds another run; StoppedEarly on Ctrl-C.
    """
    out, settings = config.out, settings or DemoSettings()
    story = Story(out, asdict(settings))
    data, teacher, tower = out / "data", out / "teacher", out / "vision-tower"
    held_out: list[str | Path] = ["--data", data / "test.json", "--image-root", data / "images"]
    held_out += ["--cache", out / "cache-held-out"]
    results: dict[str, Any] = {"settings": asdict(settings), "caches": {}, "students": {}}

    story.step("data: easy-VQA as LLaVA rows", lambda: write_data(data, settings))
    story.step("teacher: unpack the shipped one", lambda: unpack_teacher(teacher, tower))
    for name, rows, template in (
        ("captions", "captions.json", ("--template", "plain")),
        ("conversations", "conversations.json", ()),
        ("held-out", "held_out.json", ()),
    ):
        results["caches"][name] = story.command(
            f"cache: build {name}",
            *("build", "--teacher", teacher, "--data", data / rows, "--image-root", data / "images"),
            *("--out", out / f"cache-{name}", "--dtype", "float32", "--shard-size", "256", *template),
        )
    results["verify"] = story.command("cache: verify", "verify", out / "cache-conversations")
    results["inspect"] = story.command("cache: inspect", "inspect", out / "cache-conversations")
    results["teacher"] = story.command("teacher: evaluate", "evaluate", "--model", teacher, *held_out)

    # From here on the teacher does not exist: students learn from the caches alone.
    story.step("teacher: remove its folder", lambda: shutil.rmtree(teacher, ignore_errors=True))
    for number in range(config.seed, config.seed + config.seeds):
        results["students"][str(number)] = _students(story, number, settings, held_out, progress)

    results["seconds"] = story.seconds
    write_text(out / "results.json", json.dumps(results, indent=2))
    draw_curves({kind: out / f"seed-{config.seed}" / kind for kind in KINDS_OF_STUDENT}, out / "curves.png")
    return results


def _students(
    story: Story, seed: int, settings: DemoSettings, held_out: Sequence[str | Path], progress: Progress
) -> dict[str, Any]:
    """Trains both students of one seed from the same start, and evaluates them on the test images."""
    folder = story.folder / f"seed-{seed}"
    text_model = folder / "language-model"
    story.step(
        f"seed {seed}: student's language model, from text alone",
        lambda: train_text_model(story, seed, settings, text_model, progress),
    )
    story.command(
        f"seed {seed}: assemble the student",
        *("new-student", "--vision-tower", story.folder / "vision-tower", "--language-model", text_model),
        *("--like", story.folder / "cache-conversations", "--out", folder / "student", "--seed", str(seed)),
    )
    evaluations = {}
    for kind in KINDS_OF_STUDENT:
        student = folder / "student"
        for stage, cache, epochs, rate in (
            ("dpt", "captions", settings.dpt_epochs, settings.dpt_learning_rate),
            ("sft", "conversations", settings.sft_epochs, settings.learning_rate),
            ("dft", "conversations", settings.dft_epochs, settings.learning_rate),
        ):
            run = folder / kind / stage
            story.command(
                f"seed {seed}, {kind}: {STAGE_NAMES[kind][stage]}",
                *(
                    "train",
                    "--stage",
                    stage,
                    "--student",
                    student,
                    "--cache",
                    story.folder / f"cache-{cache}",
                ),
                *(
                    "--image-root",
                    story.folder / "data" / "images",
                    "--out",
                    run,
                    "--seed",
                    str(seed),
                    "--resume",
                ),
                *("--epochs", str(epochs), "--learning-rate", str(rate)),
                *("--global-batch", str(settings.global_batch), "--micro-batch", str(settings.global_batch)),
                *(() if kind == "distilled" else ("--targets", "none")),
            )
            student = run / "model"
        evaluations[kind] = story.command(
            f"seed {seed}, {kind}: evaluate", "evaluate", "--model", student, *held_out
        )
    return evaluations


def write_data(data: Path, settings: DemoSettings) -> None:
    write_dataset(
        data,
        train_images=settings.train_images,
        test_images=settings.test_images,
        held_out_images=settings.held_out_images,
        max_yesno_per_image=settings.yesno_per_image,
        max_turns=settings.max_turns,
    )


def unpack_teacher(teacher: Path, tower: Path) -> None:
    shutil.copytree(SHIPPED_TEACHER, teacher, dirs_exist_ok=True)
    from demo.language_model import extract_vision_tower

    extract_vision_tower(teacher, tower)


def train_text_model(story: Story, seed: int, settings: DemoSettings, out: Path, progress: Progress) -> None:
    from transformers import AutoTokenizer

    from demo.language_model import LanguageSize, conversation_texts, train_language_model

    # The teacher is gone, but a cache contains its tokenizer.
    words = out.with_name("tokenizer")
    open_cache(story.folder / "cache-conversations").write_assets(words)
    tokenizer = AutoTokenizer.from_pretrained(words)
    rows = json.loads((story.folder / "data" / "conversations.json").read_text(encoding="utf-8"))
    train_language_model(
        conversation_texts(rows, tokenizer),
        tokenizer,
        out,
        LanguageSize(settings.hidden_size, settings.layers, settings.heads),
        steps=settings.language_model_steps,
        seed=seed,
        progress=progress,
    )
