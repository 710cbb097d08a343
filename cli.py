"""The commands of kdcache, and nothing but the commands. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cache_schema.operations.settings import ArrowConfig, DiffConfig, MergeConfig, SelectConfig, VerifyConfig
from cache_schema.version import VERSION
from demo.settings import DemoConfig, RoundsConfig
from pipeline.settings import BuildConfig, ClusterConfig, DeriveConfig, ForecastConfig
from student.settings import AnswersConfig, EvaluateConfig, NewStudentConfig, ScoreConfig, TrainConfig
from views.options import by_stage, read_options, with_options
from views.outcome import run
from views.settings import ForecastFiles, PageConfig
from views.terminal import Bar, print_json, print_problems, print_summary, print_training

app = typer.Typer(
    name="kdcache",
    help="Run a vision-language teacher once, cache its distillation targets, train students from the cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TrainOptions = Annotated[dict[str, Any], TrainConfig]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
CachePath = Annotated[str, typer.Argument(help="A cache: a folder or an fsspec URL.")]
NewCache = Annotated[str, typer.Option(help="The new cache.")]


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command; its settings classes become options."""
    return lambda function: app.command(name)(with_options(function))


def _version(asked: bool) -> None:
    if asked:
        print(f"kdcache {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """`--debug` is read by `run` wherever it stands."""


@command()
def demo(config: DemoConfig, json_: Json = False) -> None:
    """Run everything on real data: teacher, caches, distilled and plain student, a result table."""
    from demo.story import run_demo
    from demo.table import print_table

    results = run_demo(config, Bar())
    print_json(results) if json_ else print_table(results, config.out)


@command()
def rounds(config: RoundsConfig, json_: Json = False) -> None:
    """Distil on-policy in rounds: answers, their cache, training; run again to continue."""
    from demo.rounds import run_rounds

    _show(run_rounds(config, _check_round), json_, "rounds")


@command()
def plan(config: ForecastConfig, files: ForecastFiles, json_: Json = False) -> None:
    """Measure on a few samples the size and the fidelity of a cache, and recommend a build command."""
    from pipeline.forecast.advice import forecast
    from pipeline.forecast.choice import write_command
    from views.forecast_page import draw_forecast, print_forecast

    document = forecast(config, Bar())
    if files.write is not None:
        write_command(files.write, document["arguments"])
    if files.plot is not None:
        draw_forecast(document, files.plot)
    print_json(document) if json_ else print_forecast(document)


@command()
def build(config: BuildConfig, place: ClusterConfig, json_: Json = False) -> None:
    """Run the teacher over a dataset once and write the cache; run again to continue."""
    from pipeline.capture import build as build_cache
    from pipeline.cluster import build_on_cluster

    made = build_on_cluster(config, place, Bar()) if place.cluster is not None else build_cache(config, Bar())
    _show(made.to_json(), json_, "cache")


@command()
def inspect(
    cache: CachePath,
    config: PageConfig,
    sample: Annotated[str | None, typer.Option(help="Show one sample, by row number or id.")] = None,
    image_root: Annotated[
        str | None, typer.Option(help="Folder or URL of the images. Default: the folder of the build.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page to this file.")] = None,
    json_: Json = False,
) -> None:
    """Summarise a cache, show one sample, or write an HTML page to browse."""
    from cache_schema.format.cache import open_cache
    from cache_schema.operations.summary import summarise
    from views.html_page import write_html
    from views.inspect_page import print_summary_page
    from views.sample_document import recorded_images, sample_document
    from views.sample_page import print_sample

    opened = open_cache(cache)
    images = image_root or recorded_images(opened)
    if html is not None:
        only = [] if sample is None else [sample]
        page = write_html(opened, html, config, only=only, image_root=images, progress=Bar())
        _show({"page": str(page)}, json_, "page")
    elif sample is not None:
        print_json(sample_document(opened, sample)) if json_ else print_sample(opened, sample, images)
    else:
        (print_json if json_ else print_summary_page)(summarise(opened))


@command()
def verify(cache: CachePath, config: VerifyConfig, json_: Json = False) -> None:
    """Check every file, count and number of a cache and report all problems at once."""
    from cache_schema.operations.verify import verify as verify_cache

    report = verify_cache(cache, repair=config.repair, quick=config.quick, jobs=config.jobs, progress=Bar())
    document = report.to_json()
    if not json_:
        print_problems(document.pop("problems"))
    _show(document, json_, f"verify {cache}")
    if not report.ok:
        raise typer.Exit(1)


@command()
def diff(
    a: Annotated[str, typer.Argument(help="A cache.")],
    b: Annotated[str, typer.Argument(help="The cache to compare it with.")],
    config: DiffConfig,
    json_: Json = False,
) -> None:
    """Compare two caches of the same data, whatever the engines. Exit code 1 when they differ."""
    from cache_schema.format.cache import open_cache
    from cache_schema.operations.diff import diff as diff_caches
    from views.diff_page import print_difference

    report = diff_caches(open_cache(a), open_cache(b), Bar(), config)
    print_json(report.to_json()) if json_ else print_difference(report.to_json(), a, b)
    if not report.same:
        raise typer.Exit(1)


@command()
def merge(
    caches: Annotated[list[str], typer.Argument(help="Caches of the same teacher and targets.")],
    out: NewCache,
    config: MergeConfig,
    json_: Json = False,
) -> None:
    """Merge caches of one teacher; a row in several caches is taken from the first.

    Whole shards become hard links on one file system (no space; valid without the old cache), else copies.
    """
    from cache_schema.operations.merge import merge as merge_caches

    _show(merge_caches(caches, out, Bar(), config), json_, "merged")


@command()
def select(
    cache: CachePath,
    out: NewCache,
    config: SelectConfig,
    where: Annotated[
        str | None,
        typer.Option(
            help="Such as 'tokens < 512 and \"cat\" in image', rows:FILE or ids:FILE; default: all."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Make a smaller cache of the samples that meet a condition, or of a draw of them.

    Fields: row (in the dataset), id (its label), tokens (length), images (how many), image (path of any),
    response_tokens; over the response positions confidence (of the teacher's most likely token), disagreement
    (share where that is not the label), perplexity (of the labels); after `kdcache score` reference (its
    log-likelihood per token) and advantage (the teacher's less that). quantile(SHARE) stands for a number.

    Whole shards become hard links on one file system, copies elsewhere; parts are rewritten as stored.
    """
    from cache_schema.operations.select import select as select_samples

    _show(select_samples(cache, where, out, Bar(), config), json_, "selected")


@command()
def score(cache: CachePath, config: ScoreConfig, json_: Json = False) -> None:
    """Add the log-likelihood of each sample under a small reference model; run again to continue."""
    from student.score import score_cache

    _show(score_cache(cache, config, Bar()), json_, "scored")


@command()
def derive(cache: CachePath, config: DeriveConfig, json_: Json = False) -> None:
    """Make a cache of other targets from stored hidden states, without the teacher; run again to continue."""
    from pipeline.derive import derive as derive_cache

    _show(derive_cache(cache, config, Bar()), json_, "derived")


@command("to-arrow")
def to_arrow(cache: CachePath, config: ArrowConfig, json_: Json = False) -> None:
    """Write the cache as a plain Parquet dataset, for notebooks, `datasets`, DuckDB and other trainers."""
    from cache_schema.operations.trainer_layouts import export

    _show(export(cache, config, Bar()), json_, "exported")


@command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A TinyLLaVA or LLaVA-KD checkpoint, split or single.")],
    out: Annotated[Path, typer.Option(help="Folder of the transformers model.")],
    json_: Json = False,
) -> None:
    """Turn a TinyLLaVA or LLaVA-KD checkpoint into a transformers Llava folder."""
    from pipeline.convert import convert as convert_checkpoint

    _show(convert_checkpoint(checkpoint, out, Bar()), json_, "converted")


@command("new-student")
def new_student(config: NewStudentConfig, json_: Json = False) -> None:
    """Assemble a student: vision tower, fresh projector, language model."""
    from student.assemble import new_student as assemble

    _show(assemble(config), json_, "student")


@command()
def train(
    options: TrainOptions,
    image_root: list[str] | None = None,
    cache: list[str] | None = None,
    stage: str | None = None,
    recipe: Annotated[
        str | None, typer.Option(help="A YAML or TOML recipe, or llava-kd for its three stages.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Only these of the stage's targets; none: cross entropy alone.")
    ] = None,
    json_: Json = False,
) -> None:
    """Train a student from a cache: one stage, or a recipe of stages."""
    from student.recipe import train_recipe
    from student.stages import open_recipe, stage_named
    from student.train import train as train_stage

    if (stage is None) == (recipe is None):
        raise typer.BadParameter("give either --stage or --recipe")
    if recipe and targets is not None:
        raise typer.BadParameter("a recipe sets the losses of its stages", param_hint="--targets")
    chosen = stage_named(stage or "dft", targets)
    opened = None if recipe is None else open_recipe(recipe)
    names = [chosen.name] if opened is None else [entry.stage.name for entry in opened.stages]
    every_cache, caches = by_stage("--cache", cache or [], names)
    every_root, roots = by_stage("--image-root", image_root or [], names)
    only = chosen.name if opened is None else ""
    cache_of_all, root_of_all = caches.get(only, every_cache), roots.get(only, every_root)
    set_by_recipe = {} if opened is None else opened.image_roots
    if bare := {*names} - {*roots, *set_by_recipe} if image_root and root_of_all is None else set():
        raise typer.BadParameter(f"none for stage {', '.join(sorted(bare))}", param_hint="--image-root")
    config = TrainConfig(stage=chosen, cache=cache_of_all, image_root=root_of_all, **options)
    per_stage = {"caches": caches, "image_roots": roots}
    result = train_recipe(opened, config, Bar(), **per_stage) if opened else train_stage(config, Bar())
    print_json(result) if json_ else print_training(result)


@command()
def evaluate(config: EvaluateConfig, json_: Json = False) -> None:
    """Answer questions by greedy decoding and score them; with --cache also KL and relation loss."""
    from student.evaluate import evaluate as evaluate_model
    from views.benchmark_page import print_evaluation

    result = evaluate_model(config, Bar())
    print_json(result) if json_ else print_evaluation(result)


@command()
def answers(config: AnswersConfig, json_: Json = False) -> None:
    """Write a model's own answers as rows of a dataset, for on-policy distillation."""
    from student.own_answers import write_answers

    _show(write_answers(config, Bar()), json_, "answers")


@command()
def export(
    model: Annotated[Path, typer.Option(help="Folder of a trained model: RUN/model.")],
    out: Annotated[Path, typer.Option(help="Folder of the exported model.")],
    json_: Json = False,
) -> None:
    """Write a model folder with a model card, for transformers and vLLM."""
    from student.export import export as export_model

    _show(export_model(model, out, Bar()), json_, "exported")


@command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    out: Annotated[Path | None, typer.Option(help="A .html or .png file; default: RUN/report.html.")] = None,
    json_: Json = False,
) -> None:
    """Write curves and tables of a training run."""
    from views.run_report import report as report_run

    _show({"report": str(report_run(run, out))}, json_, "report")


def _check_round(words: Mapping[str, list[str]], training: Mapping[str, Any]) -> None:
    """WrongUsage where a command of a round would end so."""
    read_options("answers", words["answers"], AnswersConfig)
    read_options("build", words["build"], BuildConfig, ClusterConfig)
    TrainConfig.check_alone(training, read_options("train", words["train"], TrainOptions))


def _show(document: dict[str, Any], json_: bool, title: str) -> None:
    print_json(document) if json_ else print_summary(title, document)


def main() -> None:
    """Run a command and exit with its code."""
    sys.exit(run(app, sys.argv[1:]))


if __name__ == "__main__":
    main()
