"""The commands of kdcache, and nothing but the commands. Heavy imports wait until a command needs them."""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, NoReturn

import typer

from cache_schema.errors import KdcacheError, StoppedEarly, WrongUsage

app = typer.Typer(
    name="kdcache",
    help="Run a vision-language teacher once, keep what a student needs of it, train students from it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
ImageRoot = Annotated[Path, typer.Option(help="Folder that the image paths of the dataset start from.")]
CachePath = Annotated[str, typer.Argument(help="A cache: a folder or an fsspec URL.")]

# What `plan` and `build` both take.
Teacher = Annotated[
    Path, typer.Option(help="Folder of the teacher: a transformers image-text-to-text model.")
]
Data = Annotated[
    Path, typer.Option(help="Dataset: LLaVA JSON or JSONL, or `messages` rows in JSONL or Parquet.")
]
Targets = Annotated[str, typer.Option(help="Comma-separated: response, visual, relation, prompt.")]
Temperatures = Annotated[str, typer.Option(help="Comma-separated temperatures whose tail mass is kept.")]
Template = Annotated[
    str | None, typer.Option(help="plain, llava_v1 or a Jinja file; default: the processor's own.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]
Quantization = Annotated[str | None, typer.Option(help="8bit or 4bit, through bitsandbytes.")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread one teacher over devices, as in accelerate.")]
BatchTokens = Annotated[int, typer.Option(help="Padded tokens in a batch; shrinks by itself out of memory.")]
ShardSize = Annotated[int, typer.Option(help="Rows in a shard: the unit that is written and resumed.")]
MaxLength = Annotated[int, typer.Option(help="Longest sample in tokens, images included.")]
Limit = Annotated[int | None, typer.Option(help="Only the first rows of the dataset.")]


class Engine(StrEnum):
    """What runs the teacher."""

    transformers = "transformers"
    vllm = "vllm"


class EngineMode(StrEnum):
    """What vLLM is asked for."""

    hidden = "hidden"
    logprobs = "logprobs"


class OverLong(StrEnum):
    """What becomes of a sample that is longer than --max-length."""

    quarantine = "quarantine"
    cut = "cut"


OverLongRows = Annotated[OverLong, typer.Option(help="What becomes of longer ones.")]


class TrainPrecision(StrEnum):
    """Number format of the products in training."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Precision(StrEnum):
    """How targets are stored."""

    compact = "compact"
    full = "full"


class RelationForm(StrEnum):
    """How relation targets are stored."""

    factor = "factor"
    exact = "exact"


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; `--debug` is read by `main` wherever it stands."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; finished steps in it are not redone.")] = Path(
        "demo-run"
    ),
    seed: Annotated[
        int, typer.Option(help="Seed of the first student: new weights and order of samples.")
    ] = 0,
    seeds: Annotated[
        int, typer.Option(help="How many seeds, each with a distilled and a plain student.")
    ] = 1,
    json_: Json = False,
) -> None:
    """The whole story on real data: teacher, caches, distilled and plain student, a table at the end."""
    from demo.story import run_demo
    from demo.table import print_table
    from views.terminal import Bar, print_json

    results = run_demo(out, seed=seed, seeds=seeds, progress=Bar())
    print_json(results) if json_ else print_table(results, out)


@app.command()
def plan(
    teacher: Teacher,
    data: Data,
    image_root: ImageRoot,
    out: Annotated[str, typer.Option(help="The cache that the recommended command will make.")] = "cache",
    samples: Annotated[int, typer.Option(help="Rows that are drawn and measured.")] = 64,
    targets: Targets = "response,visual,relation",
    top_k: Annotated[str, typer.Option(help="Comma-separated numbers of entries to try.")] = "8,16,32,64,128",
    precision: Annotated[str, typer.Option(help="Comma-separated: compact, full or both.")] = "compact,full",
    relation: Annotated[
        str, typer.Option(help="Comma-separated bounds of 1 - cos to try, and the word exact.")
    ] = "1e-3,1e-4,1e-5,1e-6",
    student: Annotated[
        Path | None, typer.Option(help="A student to try; default: the teacher with noise.")
    ] = None,
    noise_kl: Annotated[float, typer.Option(help="Mean KL in nats between teacher and noisy teacher.")] = 0.7,
    max_angle: Annotated[
        str,
        typer.Option(help="Degrees that a stored target's gradient may be off; 5,visual=15 for one target."),
    ] = "5",
    max_kl: Annotated[float, typer.Option(help="Mean nats that storing may change a record by.")] = 1e-4,
    positions: Annotated[
        int, typer.Option(help="Positions of each kind whose gradients are compared.")
    ] = 2048,
    write: Annotated[
        Path | None, typer.Option(help="Save the command: FILE.sh, or else one argument a line.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw bytes against angles: a .png, .svg or .pdf file.")
    ] = None,
    temperatures: Temperatures = "1",
    template: Template = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantization = None,
    device_map: DeviceMap = None,
    batch_tokens: BatchTokens = 16384,
    shard_size: ShardSize = 512,
    max_length: MaxLength = 2048,
    over_long: OverLongRows = OverLong.quarantine,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw and of the noise.")] = 0,
    json_: Json = False,
) -> None:
    """Measure on a few samples what a cache costs and loses, and recommend how to build it."""
    from cache_schema.format.spec import TARGETS, TargetSpec
    from pipeline.forecast.advice import ForecastConfig, forecast
    from pipeline.forecast.choice import write_command
    from pipeline.settings import BuildConfig
    from views.forecast_page import draw_forecast, print_forecast
    from views.terminal import Bar, print_json

    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{plot} is no .png, .svg or .pdf file", param_hint="--plot")
    for option, file in (("--write", write), ("--plot", plot)):  # said before minutes have gone by
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"the folder {file.parent} does not exist", param_hint=option)
    forms = [word if word == "exact" else _numbers("--relation", word)[0] for word in _words(relation)]
    config = ForecastConfig(
        build=BuildConfig(
            teacher=teacher,
            data=data,
            image_root=image_root,
            out=out,
            spec=TargetSpec(
                targets=tuple(_words(targets)),  # type: ignore[arg-type]
                temperatures=tuple(_numbers("--temperatures", temperatures)),
            ),
            template=template,
            dtype=dtype,
            device=device,
            quantization=quantization,
            device_map=device_map,
            batch_tokens=batch_tokens,
            shard_size=shard_size,
            max_length=max_length,
            over_long=over_long.value,
            limit=limit,
        ),
        samples=samples,
        top_ks=tuple(_whole_numbers("--top-k", top_k)),
        precisions=tuple(_words(precision)),  # type: ignore[arg-type]
        relations=tuple(forms),  # type: ignore[arg-type]
        student=student,
        noise_kl=noise_kl,
        positions=positions,
        max_angle=_by_target("--max-angle", max_angle, TARGETS),
        max_kl=max_kl,
        seed=seed,
    )
    document = forecast(config, Bar())
    if write is not None:
        write_command(write, document["arguments"])
    if plot is not None:
        draw_forecast(document, plot)
    print_json(document) if json_ else print_forecast(document)


@app.command()
def build(
    teacher: Teacher,
    data: Data,
    image_root: ImageRoot,
    out: Annotated[str, typer.Option(help="The cache to make or to continue: a folder or an fsspec URL.")],
    targets: Targets = "response,visual,relation",
    top_k: Annotated[int, typer.Option(help="Entries kept at a position.")] = 32,
    temperatures: Temperatures = "1",
    tail_samples: Annotated[
        int, typer.Option(help="Ids drawn from the tail at a position, for --tail sampled.")
    ] = 0,
    precision: Annotated[
        Precision, typer.Option(help="8-bit log-probabilities, or exact float32.")
    ] = Precision.compact,
    relation: Annotated[
        RelationForm, typer.Option(help="Low-rank factor, or the exact triangle.")
    ] = RelationForm.factor,
    relation_bound: Annotated[
        float, typer.Option(help="Largest 1 - cos of a stored relation factor.")
    ] = 1e-5,
    template: Template = None,
    engine: Annotated[Engine, typer.Option(help="What runs the teacher; vllm is an extra.")] = (
        Engine.transformers
    ),
    engine_mode: Annotated[
        EngineMode, typer.Option(help="vllm: logprobs serve response and prompt targets alone.")
    ] = EngineMode.hidden,
    memory_share: Annotated[float, typer.Option(help="vllm: its share of the accelerator's memory.")] = 0.8,
    spot_check: Annotated[int, typer.Option(help="vllm: samples compared with transformers first.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantization = None,
    device_map: DeviceMap = None,
    batch_tokens: BatchTokens = 16384,
    shard_size: ShardSize = 512,
    max_length: MaxLength = 2048,
    over_long: OverLongRows = OverLong.quarantine,
    limit: Limit = None,
    max_bad: Annotated[
        float | None, typer.Option(help="Stop when more than this share of rows is bad.")
    ] = None,
    retry_quarantine: Annotated[bool, typer.Option(help="Try rows in quarantine again.")] = False,
    rank: Annotated[
        int | None, typer.Option(help="This worker's number; default: from the launcher, or 0.")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(help="Number of workers; default: from the launcher, or 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the tail draws.")] = 0,
    json_: Json = False,
) -> None:
    """Run the teacher over a dataset once and write the cache; run again to continue."""
    from cache_schema.format.spec import TargetSpec
    from pipeline.capture import BuildConfig
    from pipeline.capture import build as build_cache
    from views.terminal import Bar, print_json, print_summary

    spec = TargetSpec(
        targets=tuple(_words(targets)),  # type: ignore[arg-type]
        top_k=top_k,
        temperatures=tuple(_numbers("--temperatures", temperatures)),
        tail_samples=tail_samples,
        precision=precision.value,
        relation=relation.value,
        relation_bound=relation_bound,
        seed=seed,
    )
    config = BuildConfig(
        teacher=teacher,
        data=data,
        image_root=image_root,
        out=out,
        spec=spec,
        template=template,
        engine=engine.value,
        engine_mode=engine_mode.value,
        memory_share=memory_share,
        spot_check=spot_check,
        dtype=dtype,
        device=device,
        device_map=device_map,
        quantization=quantization,
        batch_tokens=batch_tokens,
        shard_size=shard_size,
        max_length=max_length,
        over_long=over_long.value,
        limit=limit,
        max_bad=max_bad,
        retry_quarantine=retry_quarantine,
        rank=rank,
        world_size=world_size,
    )
    summary = build_cache(config, Bar()).to_json()
    print_json(summary) if json_ else print_summary("cache", summary)


@app.command()
def inspect(
    cache: CachePath,
    sample: Annotated[
        str | None,
        typer.Option(help="Look into one sample, or put it alone on the page: its row number or id."),
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images to show; default: where the build had them.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page to this file.")] = None,
    samples: Annotated[int, typer.Option(help="Samples on the page.")] = 50,
    order: Annotated[str, typer.Option(help="Which: worst, random, or rows and ids with commas.")] = "worst",
    json_: Json = False,
) -> None:
    """See what a cache is and holds, look into one sample, or write a page to browse."""
    from cache_schema.format.cache import open_cache
    from cache_schema.operations.summary import summarise
    from views.inspect_page import print_summary_page
    from views.sample_document import recorded_images, sample_document
    from views.sample_page import print_sample
    from views.terminal import Bar, print_json, print_summary

    opened = open_cache(cache)
    images = image_root or recorded_images(opened)
    if html is not None:
        from views.html_page import write_html

        chosen = order if order in ("worst", "random") else _words(order)
        chosen = chosen if sample is None else [sample]
        page = write_html(opened, html, samples=samples, order=chosen, image_root=images, progress=Bar())
        print_json({"page": str(page)}) if json_ else print_summary("page", {"file": str(page)})
    elif sample is not None:
        print_json(sample_document(opened, sample)) if json_ else print_sample(opened, sample, images)
    else:
        summary = summarise(opened)
        print_json(summary) if json_ else print_summary_page(summary)


@app.command()
def verify(
    cache: CachePath,
    repair: Annotated[bool, typer.Option(help="Set damaged shards aside and sweep leftovers.")] = False,
    json_: Json = False,
) -> None:
    """Check every file, count and number of a cache and report all problems at once."""
    from cache_schema.operations.verify import verify as verify_cache
    from views.terminal import Bar, print_json, print_problems, print_summary

    report = verify_cache(cache, repair=repair, progress=Bar())
    document = report.to_json()
    if json_:
        print_json(document)
    else:
        print_problems(document.pop("problems"))
        print_summary(f"verify {cache}", document)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A cache.")],
    b: Annotated[str, typer.Argument(help="The cache to hold against it.")],
    kl_bound: Annotated[float, typer.Option(help="Largest mean KL, in nats a position, of the same.")] = 1e-2,
    relation_bound: Annotated[float, typer.Option(help="Largest mean 1 - cos of relations.")] = 1e-3,
    may_differ: Annotated[str, typer.Option(help="Comma-separated keys that may differ, as dtype.")] = "",
    json_: Json = False,
) -> None:
    """Are two caches of the same thing the same, by whatever engine? Exit code 1 when they differ."""
    from cache_schema.format.cache import open_cache
    from cache_schema.operations.diff import diff as diff_caches
    from views.diff_page import print_difference
    from views.terminal import Bar, print_json

    bounds = {"kl_bound": kl_bound, "relation_bound": relation_bound}
    report = diff_caches(open_cache(a), open_cache(b), Bar(), may_differ=_words(may_differ), **bounds)
    print_json(report.to_json()) if json_ else print_difference(report.to_json(), a, b)
    if not report.same:
        raise typer.Exit(1)


@app.command()
def merge(
    caches: Annotated[list[str], typer.Argument(help="Two or more caches of the same teacher and targets.")],
    out: Annotated[str, typer.Option(help="The new cache.")],
    json_: Json = False,
) -> None:
    """One cache of several of one teacher; a row that several hold is taken from the first.

    Whole shards become hard links on one file system (they take no room, and stay when an old cache is
    removed: no file is ever changed in place), copies elsewhere.
    """
    from cache_schema.operations.merge import merge as merge_caches
    from views.terminal import Bar, print_json, print_summary

    summary = merge_caches(caches, out, progress=Bar())
    print_json(summary) if json_ else print_summary("merged", summary)


@app.command()
def select(
    cache: CachePath,
    where: Annotated[
        str,
        typer.Option(
            help="Such as 'tokens < 512 and not (\"cat\" in image or confidence > 0.5)'; "
            "or rows:FILE, ids:FILE with one a line."
        ),
    ],
    out: Annotated[str, typer.Option(help="The new cache.")],
    json_: Json = False,
) -> None:
    """A smaller cache: the samples that meet a condition.

    Fields: row (in the dataset), id (its label), tokens (length), images (how many), image (path of any),
    response_tokens; over the response positions confidence (mean probability of the teacher's likeliest
    token), disagreement (share where that is not the label), perplexity (of the labels).

    Whole shards become hard links on one file system (they take no room, and stay when the old cache is
    removed: no file is ever changed in place), copies elsewhere; parts are written anew as stored.
    """
    from cache_schema.operations.select import select as select_samples
    from views.terminal import Bar, print_json, print_summary

    summary = select_samples(cache, where, out, progress=Bar())
    print_json(summary) if json_ else print_summary("selected", summary)


@app.command("to-arrow")
def to_arrow(
    cache: CachePath,
    out: Annotated[Path, typer.Option(help="Folder of the Parquet files.")],
    json_: Json = False,
) -> None:
    """A plain Parquet dataset of the cache, for notebooks, `datasets` and DuckDB."""
    from cache_schema.operations.arrow_export import to_arrow as export_arrow
    from views.terminal import Bar, print_json, print_summary

    summary = export_arrow(cache, out, progress=Bar())
    print_json(summary) if json_ else print_summary("exported", summary)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A TinyLLaVA or LLaVA-KD checkpoint, split or single.")],
    out: Annotated[Path, typer.Option(help="Folder of the transformers model.")],
    json_: Json = False,
) -> None:
    """Turn a TinyLLaVA or LLaVA-KD checkpoint into a transformers Llava folder."""
    from pipeline.convert import convert as convert_checkpoint
    from views.terminal import Bar, print_json, print_summary

    summary = convert_checkpoint(checkpoint, out, Bar())
    print_json(summary) if json_ else print_summary("converted", summary)


@app.command("new-student")
def new_student(
    vision_tower: Annotated[
        Path, typer.Option(help="Folder of the vision tower, or of a model that has it.")
    ],
    language_model: Annotated[Path, typer.Option(help="Folder of the student's language model.")],
    out: Annotated[Path, typer.Option(help="Folder of the student.")],
    like: Annotated[
        str | None,
        typer.Option(help="Take image token, tokenizer, feature layer and template from this cache."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the fresh projector.")] = 0,
    json_: Json = False,
) -> None:
    """Assemble a student: vision tower, fresh projector, language model."""
    from student.assemble import new_student as assemble
    from views.terminal import print_json, print_summary

    summary = assemble(
        vision_tower=vision_tower, language_model=language_model, out=out, like=like, seed=seed
    )
    print_json(summary) if json_ else print_summary("student", summary)


@app.command()
def train(
    image_root: Annotated[
        list[str], typer.Option(help="Folder that image paths start from; STAGE=FOLDER for one stage.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; of a recipe: a folder a stage in it.")],
    student: Annotated[Path, typer.Option(help="Folder of the student to start from.")],
    cache: Annotated[
        list[str] | None, typer.Option(help="The cache to learn from; STAGE=CACHE for one stage of a recipe.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="A stage with the paper's settings: dpt, sft, dft or pt.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A YAML or TOML recipe, or llava-kd for its three stages in a row.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
    targets: Annotated[
        str | None, typer.Option(help="Only these of the stage's targets; `none` for cross entropy alone.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate instead of the stage's.")
    ] = None,
    global_batch: Annotated[int | None, typer.Option(help="Samples a step over all ranks.")] = None,
    micro_batch: Annotated[int, typer.Option(help="Samples a forward pass on one device.")] = 8,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the cache instead of the stage's.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    precision: Annotated[TrainPrecision, typer.Option(help="Of the forward and backward products.")] = (
        TrainPrecision.fp32
    ),
    eval_cache: Annotated[str | None, typer.Option(help="Held-out cache for the second curve.")] = None,
    eval_image_root: Annotated[Path | None, typer.Option(help="Its image root, where it is another.")] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between measurements on it; 0: at the end.")] = 0,
    early_stop: Annotated[
        int | None, typer.Option(help="Stop after so many of them without improvement.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: only when stopped.")] = 500,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 10,
    keep: Annotated[int, typer.Option(help="Newest checkpoints that stay, beside the best.")] = 2,
    workers: Annotated[int, typer.Option(help="Threads that decode images.")] = 2,
    window: Annotated[int, typer.Option(help="Shards that the shuffle mixes.")] = 8,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations; default: on an accelerator.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train the language model through adapters of this rank (needs peft).")
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="Trackers of accelerate; default: tensorboard.")
    ] = None,
    adopt_template: Annotated[
        bool, typer.Option("--adopt-template", help="Give the student the cache's chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order of samples.")] = 0,
    json_: Json = False,
) -> None:
    """Train a student from a cache: one stage, or a recipe of stages."""
    from student.recipe import train_recipe
    from student.settings import TrainConfig
    from student.stages import DFT, STAGES, open_recipe
    from student.train import train as train_stage
    from views.terminal import Bar, print_json, print_training

    if (stage is None) == (recipe is None):
        raise typer.BadParameter("name either --stage or --recipe")
    if stage is not None and stage not in STAGES:
        raise typer.BadParameter(f"{stage!r} is not one of {', '.join(STAGES)}", param_hint="--stage")
    if recipe is not None and targets is not None:
        raise typer.BadParameter("a recipe names the losses of its stages", param_hint="--targets")
    every_cache, caches = _by_stage("--cache", cache or [])
    every_root, roots = _by_stage("--image-root", image_root)
    if stage is not None and not every_cache:
        raise typer.BadParameter("a stage needs a cache to learn from", param_hint="--cache")
    chosen = STAGES[stage] if stage else DFT
    if targets is not None:
        chosen = chosen.only(() if targets == "none" else tuple(_words(targets)))
    config = TrainConfig(
        stage=chosen,
        student=student,
        cache=every_cache or None,
        image_root=Path(every_root),
        out=out,
        resume=resume,
        seed=seed,
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        global_batch=global_batch,
        lora_rank=lora_rank,
        micro_batch=micro_batch,
        precision=precision.value,
        eval_cache=eval_cache,
        eval_image_root=eval_image_root,
        eval_every=eval_every,
        early_stop=early_stop,
        log_every=log_every,
        save_every=save_every,
        keep=keep,
        workers=workers,
        window=window,
        gradient_checkpointing=gradient_checkpointing,
        trackers=tuple(tracker or ("tensorboard",)),
        adopt_template=adopt_template,
    )
    if recipe is None:
        result = train_stage(config, Bar())
    else:
        folders = {name: Path(folder) for name, folder in roots.items()}
        result = train_recipe(open_recipe(recipe), config, Bar(), caches=caches, image_roots=folders)
    print_json(result) if json_ else print_training(result)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of the model: student, teacher or any other.")],
    data: Annotated[Path, typer.Option(help="Rows to answer, in the same formats as for `build`.")],
    image_root: ImageRoot,
    cache: Annotated[
        str | None, typer.Option(help="Also hold the model against the teacher in this cache.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Only so many rows, drawn with a fixed seed.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 32,
    json_: Json = False,
) -> None:
    """Answer questions freely and count exact matches, by kind; with --cache also KL and relation loss."""
    from student.evaluate import EvaluateConfig
    from student.evaluate import evaluate as evaluate_model
    from views.terminal import Bar, print_json, print_summary

    config = EvaluateConfig(
        model=model,
        data=data,
        image_root=image_root,
        cache=cache,
        batch_size=batch_size,
        limit=limit,
        max_new_tokens=max_new_tokens,
    )
    result = evaluate_model(config, Bar())
    print_json(result) if json_ else print_summary("evaluation", result)


@app.command()
def export(
    model: Annotated[Path, typer.Option(help="Folder of a trained model: RUN/model.")],
    out: Annotated[Path, typer.Option(help="Folder to hand over.")],
    json_: Json = False,
) -> None:
    """A transformers folder with a model card, for transformers and vLLM."""
    from student.export import export as export_model
    from views.terminal import Bar, print_json, print_summary

    summary = export_model(model, out, Bar())
    print_json(summary) if json_ else print_summary("exported", summary)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    out: Annotated[Path | None, typer.Option(help="A .html or .png file; default: RUN/report.html.")] = None,
    json_: Json = False,
) -> None:
    """Curves and tables of a training run."""
    from student.report import report as report_run
    from views.terminal import print_json, print_summary

    summary = {"report": str(report_run(run, out))}
    print_json(summary) if json_ else print_summary("report", summary)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _by_stage(option: str, values: list[str]) -> tuple[str, dict[str, str]]:
    """The value for every stage, and those of single stages given as STAGE=VALUE."""
    single = dict(value.split("=", 1) for value in values if "=" in value)
    every = [value for value in values if "=" not in value]
    if len(every) > 1:
        raise typer.BadParameter(f"given {len(every)} times without a stage's name", param_hint=option)
    return (every[0] if every else ""), single


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a comma-separated list of numbers", param_hint=option
        ) from None


def _by_target(option: str, text: str, targets: tuple[str, ...]) -> dict[str, float]:
    """A number for every target, NAME=NUMBER for one of them."""
    found: dict[str, float] = {}
    for word in sorted(_words(text), key=lambda word: "=" in word):
        name, _, number = word.rpartition("=")
        numbers = _numbers(option, number)
        if len(numbers) != 1 or (name not in targets if found else name):
            told = f"a number for all targets, then NAME=NUMBER for some of {', '.join(targets)}"
            raise typer.BadParameter(f"{text!r} is not {told}", param_hint=option)
        found |= {name: numbers[0]} if name else dict.fromkeys(targets, numbers[0])
    return found


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a comma-separated list of whole numbers", param_hint=option
        ) from None


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise StoppedEarly(f"stopped by {signal.Signals(signum).name}; run the same command again to go on")


def _one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    text = " ".join(str(error).split()) or "no further word"
    print(f"error: {kind.__name__}: {text} (--debug shows where)", file=sys.stderr)


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped early and resumable."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    if not debug:
        sys.excepthook = _one_line
    try:
        typer.main.get_command(app)(arguments, prog_name="kdcache")
    except StoppedEarly as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(3)
    except (KdcacheError, ValueError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, WrongUsage) else 1)


if __name__ == "__main__":
    main()
