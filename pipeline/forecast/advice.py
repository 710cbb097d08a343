"""`kdcache plan`: size, time and fidelity of a cache at several settings, measured on a few samples."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cache_schema.errors import KdcacheError
from cache_schema.format.codecs.relation import RelationBlock, pack_relations
from cache_schema.format.codecs.topk import topk_at
from cache_schema.format.records import Relation, TopK
from cache_schema.format.spec import KINDS, TARGETS, Precision, TargetSpec
from cache_schema.operations.divergence import kl
from cache_schema.progress import Progress, task
from models.head import Head
from models.stored_head import head_tensors, states_on
from pipeline.entry_rules import cut
from pipeline.forecast.choice import build_arguments, choose, chosen_spec
from pipeline.forecast.fidelity import as_stored, covered, relation_angle
from pipeline.forecast.footprint import (
    Footprint,
    hidden_footprint,
    relation_footprint,
    table_footprint,
    topk_footprint,
)
from pipeline.forecast.stand_in import (
    GivenStudent,
    NoisyTeacher,
    StandIn,
    agreement_at,
    exact_relations,
    kl_between,
)
from pipeline.forecast.survey import GivenModel, Survey, Surveyor, draw_rows, sharing_of
from pipeline.forecast.workload import Workload, break_even, bytes_by_part, workload_of
from pipeline.hidden_states import hidden_record, rounded_states
from pipeline.job import open_job
from pipeline.settings import ForecastConfig, RelationChoice
from pipeline.teachers import load_with_transformers

_ENCODED = 32768  # positions of a kind whose bytes are measured


def forecast(config: ForecastConfig, progress: Progress) -> dict[str, Any]:
    """The result as a JSON object.

    KdcacheError in one line when the teacher, the data or the student cannot be used, or when no row that
    was drawn can be captured; rows that cannot are counted by reason.
    """
    job = open_job(config.build, progress)
    config = _within_vocabulary(config, job.vocab_size, progress)
    engine, head, sharing, packing, batch_tokens = load_with_transformers(job, progress)
    stored_head = (
        head_tensors(head) if config.build.spec.hidden else {}
    )  # refused before anything is captured
    student = None
    if config.student is not None:
        with task(progress, "loading the student"):
            student = GivenModel(config.student, job)
    draw = draw_rows(job, config.samples, config.seed)
    alike = sharing_of(job, draw, config.seed, progress) if sharing else None
    surveyor = Surveyor(
        job,
        engine,
        head,
        replace(config.widest, top_k=min(max(rule.most for rule in config.rules), job.vocab_size)),
        sharing=sharing,
        batch_tokens=batch_tokens,
        positions=config.positions,
        seed=config.seed,
    )
    survey = surveyor.run(draw, student, progress)
    kinds = [kind for kind in KINDS if kind in survey.records]
    targets = config.widest.targets
    missing = [
        name for name in targets if name not in kinds and not (name == "relation" and survey.relations)
    ]
    if len(missing) == len(targets):
        raise KdcacheError(
            f"none of the {len(draw.rows)} samples that were drawn has {' or '.join(targets)} targets; draw "
            "more (--samples) or choose other --targets"
        )
    for name in missing:
        progress.message(f"no sample has {name} targets: they are not measured")
    workload = workload_of(
        job.plan,
        job.dataset.first_images,
        draw.by_side,
        survey.samples,
        kinds,
        sharing=(1.0 if alike is None else alike) if sharing else 0.0,
        packing=packing,
    )
    stand_in: StandIn
    if student is not None:
        stand_in = GivenStudent(student.head, survey.student, student.name)
    else:
        with task(progress, "finding the noise of the stand-in student"):
            stand_in = NoisyTeacher(head, survey.teacher, kl=config.noise_kl, seed=config.seed)
    footprints: dict[Any, Footprint] = {}
    positions: list[dict[str, Any]] = []
    reached: dict[str, float] = {}
    for kind in kinds:
        rows, reached[kind] = _measure_positions(
            config, survey, head, stand_in, kind, workload, footprints, progress
        )
        positions += rows
    relations = _measure_relations(config, survey, head, stand_in, workload, footprints, progress)
    hidden = _measure_hidden(config, survey, head, workload, batch_tokens, footprints)
    return _document(
        config,
        survey,
        workload,
        positions,
        relations,
        hidden,
        footprints,
        student={**stand_in.describe(), "kl": reached},
        sharing={"allowed": sharing, "packed": packing, "share_of_equal_prefixes": alike},
        teacher=_teacher(engine.model, head, str(config.build.teacher), engine.description),
        drawn=len(draw.rows),
        head_bytes=sum(tensor.nbytes for tensor in stored_head.values()),
    )


def _within_vocabulary(config: ForecastConfig, vocab: int, progress: Progress) -> ForecastConfig:
    """Without the numbers of entries that exceed the vocabulary."""
    kept = tuple(sorted({k for k in config.top_ks if k <= vocab}))
    if config.top_ks and not kept:
        raise KdcacheError(f"every top-k of {list(config.top_ks)} exceeds the teacher's {vocab} tokens")
    if len(kept) < len(set(config.top_ks)):
        progress.message(f"numbers of entries above the teacher's {vocab} tokens are skipped")
    return replace(config, top_ks=kept)


def _measure_positions(
    config: ForecastConfig,
    survey: Survey,
    head: Head,
    student: StandIn,
    kind: str,
    workload: Workload,
    footprints: dict[Any, Footprint],
    progress: Progress,
) -> tuple[list[dict[str, Any]], float]:
    """One row per rule for entries and precision, and the student's mean KL at these positions."""
    whole, picked = survey.records[kind], survey.picked_records[kind]
    part = topk_at(whole, slice(_ENCODED))
    stored: dict[tuple[str, Precision], TopK] = {}
    rows = []
    for rule in config.rules:
        narrow = cut(picked, rule)
        mass, entries = covered(whole, rule)
        for precision in config.precisions:
            stored[rule.name, precision] = as_stored(narrow, precision)
            footprint = topk_footprint(cut(part, rule), precision, head.columns)
            footprints[kind, rule.name, precision] = footprint
            error = kl(narrow, stored[rule.name, precision])
            total = footprint.total(workload.positions[kind], workload.shards)
            rows.append(
                {
                    "target": kind,
                    "rule": rule.name,
                    "entries": entries,
                    "precision": precision,
                    "mass": mass,
                    "bytes": total / workload.positions[kind],
                    "kl": max(float(error.mean()), 0.0),
                    "kl_max": max(float(error.max()), 0.0),
                    "dataset_bytes": total,
                }
            )
    hidden = survey.teacher.positions[kind]
    with task(progress, f"comparing gradients at {kind} positions", len(hidden)):
        sums = agreement_at(head, hidden, student, kind, stored, progress.update)
    for row in rows:
        agreement = sums[row["rule"], row["precision"]]
        row |= {"unseen_kl": agreement.unseen_kl, "angle": agreement.angle}
    return rows, next(iter(sums.values())).mean_kl


def _measure_relations(
    config: ForecastConfig,
    survey: Survey,
    head: Head,
    student: StandIn,
    workload: Workload,
    footprints: dict[Any, Footprint],
    progress: Progress,
) -> list[dict[str, Any]]:
    """One row per relation form and precision; none without images."""
    if not survey.relations:
        return []
    ours, theirs = exact_relations(head), exact_relations(student.head)
    grid = [(form, precision) for form in config.relations for precision in config.precisions]
    stored: dict[Any, list[Any]] = {cell: [] for cell in grid}
    angles: dict[Any, list[float]] = {cell: [] for cell in grid}
    with task(progress, "comparing relations of images", len(survey.relations)):
        for number, hidden in enumerate(survey.teacher.images):
            exact = ours(hidden)
            of_student = theirs(student.image(number))
            for cell in grid:
                record = ours.stored(hidden, _relation_spec(config.build.spec, *cell))
                stored[cell].append(record)
                read: Relation = RelationBlock(pack_relations([record]))[0]
                angles[cell].append(relation_angle(exact, read, of_student))
            progress.update(number + 1)
    rows = []
    for form, precision in grid:
        records = stored[form, precision]
        footprint = relation_footprint(records)
        footprints["relation", form, precision] = footprint
        total = footprint.total(workload.stored_images, workload.shards)
        rows.append(
            {
                "relation": form,
                "precision": precision,
                "rank": float(np.mean([record.rank for record in records])),
                "residual": float(np.mean([record.residual for record in records])),
                "residual_max": max(record.residual for record in records),
                "bytes": total / workload.stored_images,
                "angle": float(np.mean(angles[form, precision])),
                "dataset_bytes": total,
            }
        )
    return rows


def _measure_hidden(
    config: ForecastConfig,
    survey: Survey,
    head: Head,
    workload: Workload,
    batch_tokens: int,
    footprints: dict[Any, Footprint],
) -> list[dict[str, Any]]:
    """One row per kind of position whose hidden states are to be stored: there is nothing to choose."""
    rows = []
    tables = workload.computed_tokens / workload.shards / batch_tokens
    for kind in config.build.spec.hidden:
        if kind not in survey.teacher.positions:
            continue
        exact = survey.teacher.positions[kind].float()
        stored = hidden_record({name: a.cpu().numpy() for name, a in rounded_states(exact).items()})
        footprint = footprints[f"hidden_{kind}"] = hidden_footprint(stored, tables)
        decoded = states_on(stored, exact.device)
        total = footprint.total(workload.positions[kind], workload.shards)
        rows.append(
            {
                "target": kind,
                "channels": exact.shape[1],
                "bytes": total / workload.positions[kind],
                "kl": max(kl_between(head, exact, head, decoded.__getitem__), 0.0),
                "dataset_bytes": total,
            }
        )
    return rows


def _relation_spec(spec: TargetSpec, form: RelationChoice, precision: Precision) -> TargetSpec:
    if form == "exact":
        return replace(spec, relation="exact", precision=precision)
    return replace(spec, relation="factor", relation_bound=form, precision=precision)


def _document(
    config: ForecastConfig,
    survey: Survey,
    workload: Workload,
    positions: list[dict[str, Any]],
    relations: list[dict[str, Any]],
    hidden: list[dict[str, Any]],
    footprints: Mapping[Any, Footprint],
    *,
    student: dict[str, Any],
    sharing: dict[str, Any],
    teacher: dict[str, Any],
    drawn: int,
    head_bytes: int,
) -> dict[str, Any]:
    bounds = {str(name): bound for name, bound in config.max_angle.items()}
    choice = choose(positions, relations, max_angle=bounds, max_kl=config.max_kl)
    chosen: dict[str, Footprint] = {
        kind: footprints[kind, choice["rules"][kind], choice["precision"]] for kind in workload.positions
    }
    if relations:
        chosen["relation"] = footprints["relation", choice["relation"], choice["precision"]]
    chosen |= {f"hidden_{row['target']}": footprints[f"hidden_{row['target']}"] for row in hidden}
    spec = chosen_spec(config.build.spec, choice)
    tables = table_footprint(survey.bare, spec, sharing=sharing["allowed"])
    by_part = bytes_by_part(workload, chosen, tables)
    if spec.hidden:
        by_part["head"] = float(head_bytes)
    arguments = build_arguments(replace(config.build, spec=spec))
    even = break_even(survey.speed, workload)
    return {
        "samples": {
            "drawn": drawn,
            "measured": len(survey.samples),
            "bad": dict(sorted(survey.bad.items())),
            "example_of_bad": survey.example or None,
            "seed": config.seed,
            "positions": {kind: len(record) for kind, record in survey.records.items()},
            "compared_positions": {kind: len(record) for kind, record in survey.picked_records.items()},
            "compared_images": len(survey.relations),
        },
        "teacher": teacher,
        "student": student,
        "positions": positions,
        "relations": relations,
        "hidden": hidden,
        "dataset": {**workload.to_json(), "sharing": sharing},
        "speed": {
            "seconds": survey.speed.seconds,
            "tokens_per_second": survey.speed.tokens / survey.speed.seconds,
            "samples_per_second": len(survey.samples) / survey.speed.seconds,
            "preparing_seconds_per_sample": survey.speed.preparing,
            "preparing_threads": survey.speed.threads,
        },
        "recommended": {
            **choice,
            "max_angle": {
                name: config.max_angle[name] for name in TARGETS if name in config.build.spec.targets
            },
            "max_kl": config.max_kl,
            "bytes": by_part,
            "total_bytes": sum(by_part.values()),
            "standard_error_bytes": _standard_error(workload, by_part),
            "capture_seconds": even["capture_seconds"],
        },
        "break_even": {
            **even,
            "teacher_bytes": teacher["bytes"],
            "dense_logits_bytes_per_sample": 4
            * teacher["vocabulary"]
            * workload.tokens
            / max(workload.captured, 1),
        },
        "arguments": arguments,
        "command": shlex.join(["kdcache", *arguments]),
    }


def _standard_error(workload: Workload, by_part: Mapping[str, float]) -> float:
    """Standard error of the total bytes from sampling rows. Errors of parts that grow with the images are
    correlated."""
    of_images = (
        sum(by_part.get(part, 0.0) for part in ("visual", "relation", "hidden_visual"))
        * workload.errors["images"]
    )
    of_kinds = [
        (by_part.get(kind, 0.0) + by_part.get(f"hidden_{kind}", 0.0)) * workload.errors.get(kind, 0.0)
        for kind in KINDS
    ]
    of_rows = by_part["samples"] * workload.errors["tokens"]
    return float(np.sqrt(np.square([of_images, *of_kinds, of_rows]).sum()))


def _teacher(model: torch.nn.Module, head: Head, folder: str, engine: dict[str, str]) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "teacher": folder,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "bytes": sum(parameter.nbytes for parameter in parameters),
        "vocabulary": head.columns,
        "hidden_size": head.weight.shape[1],
        "engine": engine,
    }
