"""The losses written naively: all logits at once, autograd, one sample at a time. And makers of targets."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def dense_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """(N, V) logits as a model makes them; vocab_size cuts the padding columns away."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits[:, :vocab_size]


def sparse_record(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...] = (1.0,),
    *,
    draws: int = 0,
    sample_temperature: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """The record that a capture keeps of a teacher's logits (N, V), made in float64, as tensors."""
    logits = logits.detach().double()
    ids = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    logprobs = logits.log_softmax(1).gather(1, ids)
    tails, conditional = [], None
    for temperature in temperatures:
        outside = (logits / temperature).log_softmax(1).scatter(1, ids, -math.inf)
        tails.append(outside.logsumexp(1))
        if temperature == sample_temperature:
            conditional = outside.exp()
    record = SimpleNamespace(
        token_ids=ids,
        logprobs=logprobs.to(dtype),
        tail_logprob=torch.stack(tails, dim=1).to(dtype),
        temperatures=torch.tensor(temperatures, dtype=torch.float32),
        sampled_ids=None,
        sampled_counts=None,
        sample_temperature=sample_temperature,
    )
    if draws:
        record.sampled_ids = torch.multinomial(conditional, draws, replacement=True, generator=generator)
        record.sampled_counts = torch.ones_like(record.sampled_ids)
    return record


def ragged_record(
    logits: Tensor, counts: Tensor, temperatures: tuple[float, ...] = (1.0,), **rest: Any
) -> Any:
    """The record of logits (N, V) with counts (N,) entries at each position, filled up with id 0 and -inf;
    rest: see `sparse_record`."""
    rows = [
        sparse_record(row[None], count, temperatures, **rest)
        for row, count in zip(logits, counts.tolist(), strict=True)
    ]
    width = int(counts.max())

    def joined(name: str, fill: float | None = None) -> Any:
        parts = [getattr(row, name) for row in rows]
        if parts[0] is None:
            return None
        if fill is not None:
            parts = [F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
        return torch.cat(parts)

    return SimpleNamespace(
        token_ids=joined("token_ids", 0),
        logprobs=joined("logprobs", -math.inf),
        tail_logprob=joined("tail_logprob"),
        temperatures=rows[0].temperatures,
        sampled_ids=joined("sampled_ids"),
        sampled_counts=joined("sampled_counts"),
        sample_temperature=rows[0].sample_temperature,
        counts=counts,
    )


def dense_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(N,) T^2 KL(teacher || student) of two sets of logits (N, V)."""
    log_p, log_q = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    terms = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0)
    return temperature**2 * terms.sum(1)


def _entries_at(record: Any, n: int) -> tuple[Tensor, Tensor]:
    """ids and log-probabilities of the entries that are there at position n."""
    counts = getattr(record, "counts", None)
    kept = slice(None if counts is None else int(counts[n]))
    return record.token_ids[n, kept].long(), record.logprobs[n, kept]


def sparse_kl_twin(
    student: Tensor,
    record: Any,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """(N,) T^2 KL from a sparse record, position by position, over the student's logits (N, V), padding from
    vocab_size on included."""
    column = record.temperatures.tolist().index(temperature)
    values = []
    for n in range(len(student)):
        log_q = (student[n] / temperature).log_softmax(0)
        ids, log_p = _entries_at(record, n)
        outside = torch.ones(student.shape[1], dtype=torch.bool)
        outside[vocab_size:] = vocab_size is None
        outside[ids] = False
        tail_mass = record.tail_logprob[n, column].exp()
        # p at T: proportional to p^(1/T) inside, and what the tail leaves in sum.
        p = torch.softmax(log_p / temperature, dim=0) * (1.0 - tail_mass)
        if tail == "renormalize":
            p = torch.softmax(log_p / temperature, dim=0)
            log_q = student[n][ids] / temperature - (student[n][ids] / temperature).logsumexp(0)
            value = _kl_terms(p, log_q).sum()
        elif tail == "drop":
            value = _kl_terms(p, log_q[ids]).sum()
        elif tail == "bucket":
            value = _kl_terms(p, log_q[ids]).sum()
            if outside.any():
                value = value + _kl_terms(tail_mass, log_q[outside].logsumexp(0))
        else:
            target = torch.zeros_like(log_q.detach())
            target[ids] = p
            counts = record.sampled_counts[n].to(target.dtype)
            target.index_add_(0, record.sampled_ids[n], tail_mass * counts / counts.sum())
            value = _kl_terms(target, log_q).sum()
        values.append(temperature**2 * value)
    return torch.stack(values)


def event_twin(
    student: Tensor,
    record: Any,
    divergence: str,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """(N,) T^2 D over entries, tail and padding, from probabilities: sums of numbers, position by
    position."""
    column = record.temperatures.tolist().index(temperature)
    values = []
    for n in range(len(student)):
        q = (student[n] / temperature).softmax(0)
        ids, log_p = _entries_at(record, n)
        outside = torch.ones(len(q), dtype=torch.bool)
        outside[vocab_size:] = vocab_size is None
        outside[ids] = False
        p_tail = record.tail_logprob[n, column].exp()
        inside = torch.softmax(log_p / temperature, dim=0) * (1.0 - p_tail)
        padding = torch.zeros(()) if vocab_size is None else q[vocab_size:].sum()
        teacher = torch.cat([inside, p_tail[None]])
        events = torch.cat([q[ids], q[outside].sum()[None]])
        values.append(temperature**2 * _divergence_twin(divergence, teacher, events, padding))
    return torch.stack(values)


def taid_twin(
    student: Tensor, record: Any, t: float, *, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """(N,) T^2 KL(softmax((1 - t) z + t z_teacher) || softmax(z)), every token's logits by itself; the
    teacher's outside of its entries all equal."""
    column = record.temperatures.tolist().index(temperature)
    tokens = student.shape[1] if vocab_size is None else vocab_size
    values = []
    for n in range(len(student)):
        ids, log_p = _entries_at(record, n)
        tail = record.tail_logprob[n, column].exp()
        teacher = torch.full((tokens,), 1e-300, dtype=torch.float64)
        if len(ids) < tokens:
            teacher += tail / (tokens - len(ids))
        teacher[ids] = torch.softmax(log_p / temperature, dim=0) * (1.0 - tail)
        own = (student[n] / temperature).log_softmax(0)
        target = ((1.0 - t) * own[:tokens].detach() + t * teacher.log()).softmax(0)
        values.append(temperature**2 * _kl_terms(target, own[:tokens]).sum())
    return torch.stack(values)


def sinkhorn_twin(
    student: Tensor,
    record: Any,
    epsilon: float,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    batch: int = 16,
) -> Tensor:
    """(N,) T^2 sum_j P_ij W_ij, from probabilities, pair by pair; rows in batches of consecutive ones."""
    column = record.temperatures.tolist().index(temperature)
    tokens = student.shape[1] if vocab_size is None else vocab_size
    values = []
    for start in range(0, len(student), batch):
        rows = range(start, min(start + batch, len(student)))
        costs = []
        for i in rows:
            q = (student[i] / temperature).softmax(0)
            for j in rows:
                ids, log_p = _entries_at(record, j)
                tail = record.tail_logprob[j, column].exp()
                p = torch.softmax(log_p / temperature, dim=0) * (1.0 - tail)
                rest = torch.ones(tokens, dtype=torch.bool)
                rest[ids] = False
                apart = (q[:tokens][rest].sum() - tail).abs() + q[tokens:].sum()
                costs.append((q[ids] - p).abs().sum() + apart)
        cost = torch.stack(costs).reshape(len(rows), len(rows))
        plan = (-cost / epsilon).exp()
        for _ in range(20):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        values.append(temperature**2 * (plan * cost).sum(1))
    return torch.cat(values)


def _divergence_twin(text: str, p: Tensor, q: Tensor, padding: Tensor) -> Tensor:
    """D of p and q, whose last event is the tail; the padding's p is 0."""
    name, _, parameter = text.partition(":")
    value = float(
        parameter
        or {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1, "adaptive_kl": 0.5, "dac_kl": 0.95}.get(
            name, 0
        )
    )
    everywhere = torch.cat([q, padding[None]])
    teacher = torch.cat([p, torch.zeros(1, dtype=p.dtype)])

    def kl(a: Tensor, b: Tensor) -> Tensor:
        real = a > 0
        return (a[real] * (a[real] / b[real]).log()).sum()

    def reverse() -> Tensor:
        joined = torch.cat([q[:-1], (q[-1] + padding)[None]])
        return kl(joined, p.clamp(min=math.exp(-30.0)))

    if name == "forward_kl" or (name == "jsd" and value == 0):
        return kl(p, q)
    if name == "reverse_kl" or (name == "jsd" and value == 1):
        return reverse()
    if name == "jsd":
        mixed = value * teacher + (1 - value) * everywhere
        return value * kl(teacher, mixed) + (1 - value) * kl(everywhere, mixed)
    if name == "total_variation":
        return 0.5 * (teacher - everywhere).abs().sum()
    if name == "skew_kl":
        return kl(p, value * p + (1 - value) * q)
    if name == "skew_reverse_kl":
        return kl(everywhere, (1 - value) * teacher + value * everywhere)
    if name == "dac_kl":
        count = 1  # as few as have the mass
        while count < len(p) - 1 and p[:count].sum() * (1 + 1e-6) < value:
            count += 1
        return kl(p[:count] / p[:count].sum(), q[:count])
    if name == "first":
        count = min(5, len(p) - 1)
        return kl((p[:count].log() / value).softmax(0), q[:count] / q[:count].sum())
    if name == "dbild":
        return _dbild_twin(p[:-1], q[:-1], int(value))
    if name == "adaptive_kl":
        head = [0]  # the first entry, and those after it while the mass stays within mu
        while len(head) < len(p) - 1 and p[: len(head) + 1].sum() <= value * (1 + 1e-6):
            head.append(len(head))
        gaps = (teacher - everywhere).detach().abs()
        ours, rest = gaps[head].sum(), gaps.sum() - gaps[head].sum()
    else:
        ours, rest = (-(x[x > 0] * x[x > 0].log()).sum().detach() for x in (teacher, everywhere))
    share = ours / (ours + rest) if ours + rest > 0 else 0.5
    return share * kl(p, q) + (1 - share) * reverse()


def _dbild_twin(p: Tensor, q: Tensor, k: int) -> Tensor:
    """Pair by pair; k = 0: up to the rank furthest below the line between first and last log-probability."""
    logs = p.log()
    if k == 0:
        k, furthest = 2, 1e-6
        for rank in range(1, len(logs) - 1):
            line = logs[0] + (logs[-1] - logs[0]) * rank / (len(logs) - 1)
            distance = (line - logs[rank]) / (logs[0] - logs[-1])
            if distance > furthest + 1e-6:
                k, furthest = rank + 1, distance
    pairs = [(i, j) for i in range(min(k, len(p))) for j in range(i + 1, min(k, len(p)))]
    if not pairs:
        return 0.0 * q.sum()
    of_p, of_q = (
        torch.stack([each[i].log() - each[j].log() for i, j in pairs]).softmax(0) for each in (p, q)
    )
    return (of_p * (of_p / of_q).log()).sum()


def _kl_terms(p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (torch.where(p > 0, p, 1.0).log() - log_q), 0.0)


def relation_twin(student: Tensor, teacher_gram: Tensor) -> Tensor:
    """1 - cos of the Gram matrix of the student's logits (P, V) and the teacher's (P, P)."""
    gram = student @ student.T
    return 1.0 - F.cosine_similarity(gram.flatten(), teacher_gram.flatten(), dim=0)


def objective_twin(
    hidden: Tensor,
    labels: Tensor,
    samples: list[Any],
    weights: Any,
    *,
    head: dict[str, Any],
) -> dict[str, Tensor]:
    """The loss of a WHOLE global batch, sample by sample as the method's text says it.

    hidden (B, T, D), labels (B, T). samples: for each, a namespace of response, visual, prompt (None or a
    namespace of positions into the sample and its record) and relations (list of (positions, gram)).
    """
    temperature, tail = weights.temperature, weights.tail
    forms = weights.divergences
    tokens: dict[str, list[list[Tensor]]] = {
        k: [] for k in ("ce", "response", "visual", "prompt", "relation")
    }
    for b, sample in enumerate(samples):
        logits = dense_logits(hidden[b], **{**head, "vocab_size": None})  # padding is in the softmax,
        tokens_only = logits[:, : head.get("vocab_size")]  # not in the Gram matrix
        per_token = F.cross_entropy(logits[:-1], labels[b, 1:], ignore_index=-100, reduction="none")
        tokens["ce"].append(list(per_token[labels[b, 1:] != -100]))
        for kind in ("response", "visual", "prompt"):
            part = getattr(sample, kind)
            options = {"temperature": temperature, "vocab_size": head.get("vocab_size")}
            if part is None:
                values = []
            elif forms[kind].name == "forward_kl":
                values = sparse_kl_twin(logits[part.positions], part.record, tail=tail, **options)
            elif forms[kind].name == "sinkhorn":
                values = sinkhorn_twin(logits[part.positions], part.record, forms[kind].value, **options)
            elif forms[kind].name == "taid":
                values = taid_twin(logits[part.positions], part.record, forms[kind].value, **options)
            else:
                text = f"{forms[kind].name}:{forms[kind].value}"
                values = event_twin(logits[part.positions], part.record, text, **options)
            tokens[kind].append(list(values))
        tokens["relation"].append([relation_twin(tokens_only[p], gram) for p, gram in sample.relations])
    zero = (hidden * 0).sum()
    parts = {}
    for name, lists in tokens.items():
        if weights.reduction == "sample_mean":
            means = [torch.stack(values).mean() if values else zero for values in lists]
            parts[name] = torch.stack(means).mean()
        else:
            flat = [value for values in lists for value in values]
            parts[name] = torch.stack(flat).mean() if flat else zero
    parts["total"] = sum(getattr(weights, name) * parts[name] for name in tokens)
    return parts


def imitate_wide_products(monkeypatch: Any) -> list[int]:
    """Makes this CPU take bfloat16 factors into float32 products, as CUDA does. Returns a list that grows by
    the multiplications of each."""
    products: list[int] = []
    exact = {name: getattr(torch, name) for name in ("mm", "bmm", "addmm")}

    def wide(name: str) -> Any:
        def product(*factors: Tensor, out_dtype: Any = None, out: Tensor | None = None) -> Tensor:
            if out_dtype is None:
                return exact[name](*factors, out=out)
            left, right = factors[-2:]
            assert left.dtype == right.dtype == torch.bfloat16
            assert out_dtype == torch.float32
            products.append(left.numel() * right.shape[-1])
            made = exact[name](*factors[:-2], left.float(), right.float())
            return made if out is None else out.copy_(made)

        return product

    for name in exact:
        monkeypatch.setattr(torch, name, wide(name))
    monkeypatch.setattr("student.losses.products.multiplies_wide", lambda device: True)
    return products


class Operations(TorchDispatchMode):
    """Counts the multiplications of matrix products, and notes the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_"):
            left, right = args[:2] if name in ("aten::mm", "aten::bmm") else args[1:3]
            self.multiplications += left.numel() * right.shape[-1]
        if isinstance(result, Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result
