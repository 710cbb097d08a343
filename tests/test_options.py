"""From the fields of settings to options of a command and back."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer

from cache_schema.errors import WrongUsage
from cache_schema.format.spec import TargetSpec
from cache_schema.operations.settings import DiffConfig
from cache_schema.settings import Help, Only, at_least, check, positive, settings_of, within
from demo.settings import DemoConfig
from pipeline.settings import BuildConfig, ForecastConfig
from student.loss_weights import LossWeights
from student.settings import EvaluateConfig, NewStudentConfig, TrainConfig
from student.stages import Stage
from views.options import with_options
from views.settings import ForecastFiles, PageConfig

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    *(TargetSpec, BuildConfig, ForecastConfig, DiffConfig, DemoConfig, LossWeights, Stage, TrainConfig),
    *(EvaluateConfig, NewStudentConfig, ForecastFiles, PageConfig),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    kept: Annotated[int, at_least(1), Help("Kept [per position].", "Inner")] = 8
    share: Annotated[float, within(0.0, 1.0, "(]"), Help("A share.")] = 0.5
    hidden: Annotated[int, Help("Not for plan.")] = 3

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    inner: Annotated[Inner, Only("share", kept=16)]
    folder: Annotated[Path, Help("A folder.")]
    rate: Annotated[float, positive, Help("A rate.")] | None = None
    form: Annotated[Literal["plain", "packed"], Help("A form.")] = "plain"
    bounds: Annotated[
        tuple[Annotated[float, within(0.0, 1.0, "()")] | Literal["exact"], ...],
        Help("Bounds.", option="bound"),
    ] = (1e-3,)
    names: Annotated[tuple[str, ...], Help("Names.")] = ("a",)
    angle: Annotated[Mapping[Literal["one", "two"], Annotated[float, positive]], Help("Angles.")] = field(
        default_factory=lambda: {"one": 5.0, "two": 5.0}
    )
    flag: Annotated[bool, Help("A flag.")] = False
    either: Annotated[bool | None, Help("Yes, no, or as it is.")] = None
    secret: Annotated[int, Help("Set by the program.", option="")] = 0

    def __post_init__(self):
        check(self, {"rate and flag do not go together": self.rate is not None and self.flag})


@pytest.fixture
def made():
    """A function from words to what the command `outer` receives."""
    app = typer.Typer(rich_markup_mode="rich")

    @app.callback()
    def root() -> None: ...

    @app.command()
    @with_options
    def outer(config: Outer, extra: Annotated[str, typer.Option(help="More.")] = "x") -> None:
        received.append((config, extra))

    received: list[Any] = []

    def run(*words):
        typer.main.get_command(app).main(["outer", *words], standalone_mode=False)
        return received.pop()

    return run


def test_defaults_come_from_the_fields_and_the_nested_class(made):
    config, extra = made("--folder", "f")
    assert config == Outer(inner=Inner(kept=16), folder=Path("f"))
    assert config.inner.hidden == 3
    assert extra == "x"


def test_values_come_back_as_their_types(made):
    words = ("--folder", "f", "--kept", "2", "--share", "1", "--rate", "0.25", "--form", "packed")
    more = ("--bound", "exact, 1e-2", "--names", "b,c", "--names", "d", "--angle", "3,two=15", "--no-either")
    config, extra = made(*words, *more, "--extra", "y")
    assert config == Outer(
        inner=Inner(kept=2, share=1.0),
        folder=Path("f"),
        rate=0.25,
        form="packed",
        bounds=("exact", 0.01),
        names=("b", "c", "d"),
        angle={"one": 3.0, "two": 15.0},
        either=False,
    )
    assert extra == "y"
    assert made("--folder", "f", "--flag")[0].flag


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kept", "0"), "kept must be at least 1, not 0"),
        (("--share", "0"), r"share must lie in \(0, 1\], not 0.0"),
        (("--rate", "inf"), "rate must be a finite number, not inf"),
        (("--form", "loose"), "form must be one of plain, packed, not 'loose'"),
        (("--bound", "exact,1"), r"bounds must lie in \(0, 1\), not 1.0"),
        (("--angle", "5,two=0"), "angle of two must be positive, not 0.0"),
        (("--rate", "1", "--flag"), "rate and flag do not go together"),
    ],
)
def test_what_is_out_of_range_is_named(made, words, said):
    with pytest.raises(WrongUsage, match=said):
        made("--folder", "f", *words)


@pytest.mark.parametrize(
    "words", [("--bound", "x"), ("--angle", ""), ("--angle", "two=3"), ("--secret", "1")]
)
def test_text_that_cannot_be_read_is_a_usage_error(made, words):
    with pytest.raises(typer.BadParameter.__mro__[1]):
        made("--folder", "f", *words)


@pytest.mark.parametrize("name", ["build", "train", "plan"])
def test_help_prints_every_documentation_line(name):
    owners = {"build": (BuildConfig, TargetSpec), "train": (TrainConfig,), "plan": (ForecastConfig,)}
    words = [sys.executable, "-m", "cli", name, "--help"]
    shown = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    for owner in owners[name]:
        for setting in settings_of(owner).values():
            if not setting.nested and setting.help.option != "":
                for word in setting.help.text.split():
                    assert word in shown, f"{setting.name}: {word}"


def test_help_prints_brackets_and_no_hidden_field(made, capsys):
    with pytest.raises(IndexError):  # nothing was received
        made("--help")
    shown = capsys.readouterr().out
    assert "Kept [per position]." in shown
    assert "Set by the program." not in shown
    assert "Not for plan." not in shown


def test_every_field_of_the_settings_is_documented():
    bare = [
        f"{owner.__name__}.{name}"
        for owner in SETTINGS
        for name, setting in settings_of(owner).items()
        if not setting.nested and not setting.help.text.rstrip().endswith(".")
    ]
    assert not bare
