"""From the fields of settings to options of a command and back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.main import get_command

import cli
from cache_schema.errors import WrongUsage
from cache_schema.format.spec import TargetSpec
from cache_schema.settings import Help, Only, at_least, check, positive, settings_of, within
from student.loss_weights import LossWeights
from student.settings import TrainConfig
from student.sources import Mixture, Source
from student.stages import Stage
from views.options import with_options
from views.outcome import run as run_command

COMMANDS = get_command(cli.app).commands
MODULES = ("cache_schema.operations", "demo", "pipeline", "student", "views")


def settings_classes() -> set[type]:
    """The classes of the commands' settings, those nested in them, and those of recipes."""
    found: set[type] = {Stage, LossWeights, Source, Mixture}
    for module in MODULES:
        content = [one for one in vars(import_module(f"{module}.settings")).values() if isinstance(one, type)]
        found |= {one for one in content if is_dataclass(one) and one.__name__.endswith(("Config", "Files"))}
    for owner in list(found):
        found |= {setting.kind for setting in settings_of(owner).values() if setting.nested}
    return found


SETTINGS = settings_classes()


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


def test_no_help_text_is_written_twice():
    written = {}
    for owner in SETTINGS:
        for name, setting in settings_of(owner).items():
            for note in setting.notes:
                if isinstance(note, Help):
                    assert written.setdefault(note.text, note) is note, f"{owner.__name__}.{name}"


def test_every_field_is_an_option_of_a_command():
    offered = {parameter.name for command in COMMANDS.values() for parameter in command.params}
    of_recipes = {Stage, LossWeights, Source, Mixture}
    absent = {
        name
        for owner in SETTINGS - of_recipes
        for name, setting in settings_of(owner).items()
        if not setting.nested and setting.help.option != "" and name not in offered
    }
    assert {TargetSpec, TrainConfig} <= SETTINGS
    assert not absent


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_every_documentation_line_and_panel(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("views.outcome.signal.signal", lambda *_: None)
    assert run_command(cli.app, [name, "--help"]) == 0
    shown = capsys.readouterr().out
    for parameter in COMMANDS[name].params:
        for word in f"{parameter.help} {parameter.rich_help_panel or ''}".replace("\\[", "[").split():
            assert word in shown, f"{parameter.name}: {word}"


def numbers_and_choices() -> Iterator[tuple[str, str]]:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            kind = str(parameter.bare_type())
            if parameter.param_type_name == "argument" or parameter.is_flag:
                continue
            if parameter.metavar or "int" in kind or "float" in kind:
                yield name, parameter.opts[0]


@pytest.mark.parametrize("value", ["nan", "-7"])
def test_every_number_and_choice_of_every_command_is_checked(value, tmp_path, monkeypatch, capsys):
    """Before anything is read or written, in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("views.outcome.signal.signal", lambda *_: None)
    for name, option in numbers_and_choices():
        if (option, value) == ("--feature-layer", "-7"):  # counted from the last
            continue
        given = ["--stage=dft", "--cache=c"] if name == "train" else []
        given += ["--image-root=i"] if name in ("train", "evaluate") else []
        for parameter in COMMANDS[name].params:
            if parameter.required:
                given += [f"{parameter.opts[0]}=x"] if parameter.param_type_name == "option" else ["x"]
        code = run_command(cli.app, [name, *given, f"{option}={value}"])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), f"{name} {option} {value}: {err}"
        assert err.startswith("error: ")
        assert not list(tmp_path.iterdir())


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
