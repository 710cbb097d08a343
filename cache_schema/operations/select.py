"""A smaller cache: samples of another that meet a condition, or a draw, without running the teacher."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.format.cache import Cache, open_cache
from cache_schema.format.store import refuse_inside
from cache_schema.operations.condition import FROM_REFERENCE, FROM_TARGETS, NUMBERS, Columns, Mask, parse
from cache_schema.operations.partial_shards import Piece
from cache_schema.operations.reference_scores import read_scores
from cache_schema.operations.reshard import arrange, plan_of, write_cache
from cache_schema.operations.scores import scores_of
from cache_schema.operations.settings import SelectConfig
from cache_schema.progress import Progress, Silent, task
from cache_schema.version import VERSION


def select(
    cache: str,
    where: str | None,
    out: str,
    progress: Progress | None = None,
    config: SelectConfig | None = None,
) -> dict[str, Any]:
    """Write the samples of `cache` that meet `where` (see `condition`; None: all) as the cache `out`.

    config: draws some of them. Rows keep their numbers; quarantine and scores of a reference model are not
    copied. Shards that are kept whole are hard-linked where both lie on one file system (else copied), the
    others are joined as stored, so every decoded value is bit-identical. Run again to continue. KdcacheError
    for an invalid condition or one that no sample meets, and where a field needs scores that are not there.
    """
    progress, config = progress or Silent(), config or SelectConfig()
    condition = parse(where or "row >= 0")
    source = open_cache(cache)
    refuse_inside(out, [source.store])
    fields = condition.fields | {"row"} | ({_field(config.by)} if config.by else set())
    needs_targets = sorted(fields & FROM_TARGETS)
    if needs_targets and "response" not in source.spec.targets:
        named = ", ".join(needs_targets)
        raise KdcacheError(f"{cache}: has no response targets, which {named} is computed from")
    columns = []
    with task(progress, "reading", len(source.shards)):
        for number, shard in enumerate(source.shards):
            columns.append(columns_of(source, shard, fields))
            progress.update(number + 1)
    quantiles = condition.quantiles_of(
        {name: np.concatenate([each[name] for each in columns]) for name, _ in condition.quantiles.values()}
    )
    masks = [condition.mask({**each, **quantiles}) for each in columns]
    if config.sample is not None:
        masks = _drawn(masks, columns, config.sample, config.by, config.seed)
    pieces = []
    for shard, each, mask in zip(source.shards, columns, masks, strict=True):
        keep = np.flatnonzero(mask)
        rows = each["row"].astype(np.int64)[keep]
        pieces.append(Piece(cache=source, shard=shard, keep=keep, rows=rows))
    shards = arrange(pieces, source.plan.shard_size)
    if not shards:
        raise KdcacheError(
            f"{cache}: none of its {len(source):,} samples meets {where!r}; nothing was written"
        )
    drawn = {} if config.sample is None else {"sampled": asdict(config)}
    manifest = replace(
        source.manifest,
        plan=plan_of(shards),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kdcache_version=VERSION,
        dataset=source.manifest.dataset | {"selected": where or "all"} | drawn,
    )
    return {"of_samples": len(source)} | write_cache(out, manifest, shards, "writing", progress)


def _field(name: str) -> str:
    if name not in NUMBERS:
        raise WrongUsage(f"--by {name!r} is not a number field; fields: {', '.join(NUMBERS)}")
    return name


def _drawn(masks: list[Mask], columns: list[Columns], count: int, by: str | None, seed: int) -> list[Mask]:
    """The masks with `count` of their samples, drawn without replacement: each at a time with a probability
    in proportion to its rank by the field, 1 for the lowest; without a field with the same one.

    Samples whose field is not a number are not drawn.
    """
    mask = np.concatenate(masks)
    weights = np.ones(len(mask))
    if by is not None:
        values = np.concatenate([each[by] for each in columns]).astype(np.float64)
        mask &= ~np.isnan(values)
        among = np.flatnonzero(mask)
        weights[among[np.argsort(values[among], kind="stable")]] = np.arange(1, len(among) + 1)
    # The largest u^(1/w) are such a draw (Efraimidis and Spirakis, 2006).
    keys = np.log(np.random.default_rng(seed).random(len(mask))) / weights
    chosen = np.flatnonzero(mask)
    chosen = chosen[np.argsort(-keys[chosen], kind="stable")][:count]
    kept = np.zeros(len(mask), dtype=bool)
    kept[chosen] = True
    return np.split(kept, np.cumsum([len(each) for each in masks])[:-1])


def columns_of(cache: Cache, shard: int, fields: Collection[str]) -> Columns:
    """The fields of `condition` for the samples of a shard, as `Condition.mask` takes them; response targets
    are read if needed."""
    scored, referred = set(fields) & FROM_TARGETS, set(fields) & FROM_REFERENCE
    plain = set(fields) - FROM_TARGETS - FROM_REFERENCE
    columns: dict[str, list[Any]] = {name: [] for name in plain}
    scores = []
    block = cache.read_shard(shard, parts=("response",) if scored else ())
    for j in range(len(block)):
        sample = block.sample(j)
        for name in plain:
            columns[name].append(_FIELD[name](sample))
        if scored:
            scores.append(scores_of(sample))
    made = {name: _array(values) for name, values in columns.items()}
    made |= {name: np.array([getattr(each, name) for each in scores]) for name in scored - FROM_REFERENCE}
    if referred:
        total, tokens, _ = read_scores(cache, shard)
        made["reference"] = np.divide(total, tokens, out=np.full(len(total), np.nan), where=tokens > 0)
        if "advantage" in referred:
            ours = np.array([each.log_likelihood for each in scores], dtype=np.float64)
            made["advantage"] = ours - made["reference"]
    return made


_FIELD = {
    "row": lambda sample: sample.row,
    "id": lambda sample: sample.sample_id,
    "tokens": lambda sample: len(sample.input_ids),
    "images": lambda sample: len(sample.images),
    "image": lambda sample: tuple(image.path for image in sample.images),
    "response_tokens": lambda sample: len(sample.response_positions),
}


def _array(values: list[Any]) -> Any:
    """Numbers as an array; texts and tuples of texts as a list."""
    return values if values and isinstance(values[0], (str, tuple)) else np.array(values)
