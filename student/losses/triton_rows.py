"""The device side of `kernels.row_kernel`: losses and gradient of a row of logits, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

_NONE = tl.constexpr(-3.0e38)  # a maximum of nothing: finite, so that differences with it are numbers
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logit(raw, bias, scale, cap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """The logit of a product hidden weight^T; -inf, which marks a column as taken out, stays."""
    x = raw
    if HAS_BIAS:
        x += bias
    x *= scale
    if CAPPED:
        x = cap * (2.0 / (1.0 + tl.exp(-2.0 * x / cap)) - 1.0)
    return tl.where(raw == -float("inf"), raw, x)


@triton.jit
def _slope(x, scale, cap, CAPPED: tl.constexpr):
    """d logit / d (product + bias)."""
    if CAPPED:
        return scale * (1.0 - (x / cap) * (x / cap))
    return scale + 0.0 * x


@triton.jit
def _fold(top, total, plain, x, cold, APART: tl.constexpr):
    """The sums of `_sums` so far with one more logit x each; cold = log2(e) / T."""
    ahead = x - top
    grown = ahead > 0
    small = tl.exp2(-tl.abs(ahead) * cold)
    total = tl.where(grown, total * small + 1.0, total + small)
    if APART:
        small = tl.exp2(-tl.abs(ahead) * _LOG2E)
        plain = tl.where(grown, plain * small + 1.0, plain + small)
    return tl.maximum(top, x), total, plain


@triton.jit
def _sums(
    row,
    bias,
    begin,
    end,
    columns,
    scale,
    cap,
    cold,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(top, sum exp((x - top) / T), sum exp(x - top)) of the columns begin..end; cold = log2(e) / T.

    A mask whose edge is no multiple of 16 makes loads 4 bytes wide: whole blocks are loaded without one, the
    others up to `columns`.
    """
    top = tl.full((BLOCK,), _NONE, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    place = tl.arange(0, BLOCK)
    first = tl.cdiv(begin, BLOCK) * BLOCK
    whole = tl.maximum(end // BLOCK * BLOCK, first)
    for start in tl.range(first, whole, BLOCK, num_stages=STAGES):
        at = tl.multiple_of(start, BLOCK) + place
        offset = tl.load(bias + at) if HAS_BIAS else 0.0
        x = _logit(tl.load(row + at).to(tl.float32), offset, scale, cap, HAS_BIAS, CAPPED)
        top, total, plain = _fold(top, total, plain, x, cold, APART)
    # What lies before the first whole block and behind the last one.
    for edge in tl.static_range(2):
        start = begin // BLOCK * BLOCK if edge == 0 else whole
        stop = tl.minimum(first, end) if edge == 0 else end
        if tl.maximum(start, begin) < stop:
            at = tl.multiple_of(start, BLOCK) + place
            raw = tl.load(row + at, mask=at < columns, other=-float("inf")).to(tl.float32)
            raw = tl.where((at >= begin) & (at < stop), raw, -float("inf"))
            offset = tl.load(bias + at, mask=at < columns, other=0.0) if HAS_BIAS else 0.0
            x = _logit(raw, offset, scale, cap, HAS_BIAS, CAPPED)
            top, total, plain = _fold(top, total, plain, x, cold, APART)
    most = tl.max(top, axis=0)
    total_sum = tl.sum(total * tl.exp2((top - most) * cold), axis=0)
    plain_sum = tl.sum(plain * tl.exp2((top - most) * _LOG2E), axis=0) if APART else total_sum
    return most, total_sum, plain_sum


@triton.jit
def _add_logs(a, b):
    """log(exp a + exp b), also where one or both are -inf."""
    high = tl.maximum(a, b)
    base = tl.where(high == -float("inf"), 0.0, high)
    return tl.log(tl.exp(a - base) + tl.exp(b - base)) + base


@triton.jit
def rows_on_device(
    logits,
    grads,
    bias,
    ids,
    logprobs,
    log_tails,
    pads,
    weights,
    labels,
    label_weights,
    kl_out,
    ce_out,
    events_out,
    count,
    tokens,
    columns,
    logits_stride,
    grads_stride,
    scale,
    cap,
    temperature,
    E,
    E_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    APART: tl.constexpr,
    INSIDE_ONLY: tl.constexpr,
    PADDED: tl.constexpr,
    GRADIENT: tl.constexpr,
    REPORT: tl.constexpr,
    GIVEN: tl.constexpr,
):
    infinity = float("inf")
    cold = 1.0 / temperature
    fast = cold * _LOG2E
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        line = tl.cast(number, tl.int64)
        row = logits + line * logits_stride
        place = tl.arange(0, E_BLOCK)
        token = tl.load(ids + line * E + place, mask=place < E, other=columns)
        real = (token >= 0) & (token < columns)
        log_p = tl.load(logprobs + line * E + place, mask=place < E, other=0.0 if GIVEN else -infinity)
        log_tail = tl.load(log_tails + line)
        kl_weight = tl.load(weights + line) * temperature
        label = tl.load(labels + line)
        labelled = (label >= 0) & (label < columns)
        ce_weight = tl.load(label_weights + line)
        found = tl.load(row + token, mask=real, other=-infinity)
        inside = found.to(tl.float32)
        own = tl.load(row + label, mask=labelled, other=-infinity).to(tl.float32)
        inside_bias = tl.load(bias + token, mask=real, other=0.0) if HAS_BIAS else 0.0
        own_bias = tl.load(bias + label, mask=labelled, other=0.0) if HAS_BIAS else 0.0
        inside = _logit(inside, inside_bias, scale, cap, HAS_BIAS, CAPPED)
        own = _logit(own, own_bias, scale, cap, HAS_BIAS, CAPPED)
        tl.debug_barrier()
        tl.store(row + token, -infinity, mask=real)
        tl.debug_barrier()

        top_out, sum_out, plain_out = _sums(
            row, bias, 0, tokens, columns, scale, cap, fast, HAS_BIAS, CAPPED, APART, BLOCK, STAGES
        )
        top_in = tl.maximum(tl.max(inside, axis=0), _NONE)
        top = tl.maximum(top_out, top_in)
        if PADDED:
            top_pad, sum_pad, plain_pad = _sums(
                row, bias, tokens, columns, columns, scale, cap, fast, HAS_BIAS, CAPPED, APART, BLOCK, STAGES
            )
            top = tl.maximum(top, top_pad)
        inside = inside - top
        sum_in = tl.sum(tl.exp((inside - (top_in - top)) * cold), axis=0)
        log_in = (top_in - top) * cold + tl.log(sum_in)
        log_out = (top_out - top) * cold + tl.log(sum_out)
        log_all = _add_logs(log_in, log_out)
        if PADDED:
            log_pad = (top_pad - top) * cold + tl.log(sum_pad)
            log_all = _add_logs(log_all, log_pad)
        log_plain = log_all
        if APART:
            plain_in = tl.sum(tl.exp(inside), axis=0)
            plain = plain_in + plain_out * tl.exp(top_out - top)
            if PADDED:
                plain += plain_pad * tl.exp(top_pad - top)
            log_plain = tl.log(plain)

        log_norm = log_all
        if INSIDE_ONLY:
            log_norm = tl.where(log_in == -infinity, 0.0, log_in)
        log_q = inside * cold - log_norm
        log_q_tail = log_out - log_all
        if GIVEN:
            p = log_p
            p_tail = log_tail
        else:
            p = tl.exp(log_p)
            p_tail = tl.exp(log_tail)
            kl = tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), axis=0)
            kl += tl.where(p_tail > 0, p_tail * (log_tail - log_q_tail), 0.0)
            kl = tl.where(kl_weight != 0, kl * temperature * temperature, 0.0)
            tl.store(kl_out + line, kl)
        ce = tl.where(ce_weight != 0, log_plain - (own - top), 0.0)
        tl.store(ce_out + line, ce)
        if REPORT:
            events = events_out + line * (E + 2)
            tl.store(events + place, log_q, mask=place < E)
            tl.store(events + E, log_q_tail)
            tl.store(events + E + 1, (log_pad - log_all) if PADDED else -infinity)
            tl.debug_barrier()
            tl.store(row + token, found, mask=real)

        if GRADIENT:
            mass = tl.sum(p, axis=0) + p_tail
            p_pad = tl.load(pads + line) if GIVEN else 0.0
            mass += p_pad
            push = kl_weight * mass
            pull = kl_weight * p_tail
            if INSIDE_ONLY:
                push *= 0.0
                pull *= 0.0
            fused_ce = ce_weight
            if APART:
                fused_ce *= 0.0
            push += fused_ce
            pushed_out = (push * tl.exp(log_q_tail) - pull) / tl.where(sum_out > 0, sum_out, 1.0)
            pushed_out = tl.where(sum_out > 0, pushed_out, 0.0)
            pushed_pad = 0.0
            if PADDED:
                pushed_pad = push * tl.exp(log_pad - log_all) - kl_weight * p_pad
                pushed_pad /= tl.where(sum_pad > 0, sum_pad, 1.0)
                pushed_pad = tl.where(sum_pad > 0, pushed_pad, 0.0)
            target = grads + line * grads_stride
            whole = tokens // BLOCK * BLOCK
            place = tl.arange(0, BLOCK)
            for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
                at = tl.multiple_of(start, BLOCK) + place
                raw = tl.load(row + at).to(tl.float32)
                # Gradients of half the width lie where other threads may still have logits to read.
                tl.debug_barrier()
                offset = tl.load(bias + at) if HAS_BIAS else 0.0
                x = _logit(raw, offset, scale, cap, HAS_BIAS, CAPPED)
                slope = pushed_out * tl.exp2((x - top_out) * fast)
                if APART:
                    slope += ce_weight * tl.exp2((x - top - log_plain) * _LOG2E)
                slope *= _slope(x, scale, cap, CAPPED)
                slope = tl.where(raw == -infinity, 0.0, slope)
                tl.store(target + at, slope.to(grads.dtype.element_ty))
            for start in range(whole, columns, BLOCK):
                at = tl.multiple_of(start, BLOCK) + place
                raw = tl.load(row + at, mask=at < columns, other=-infinity).to(tl.float32)
                tl.debug_barrier()
                offset = tl.load(bias + at, mask=at < columns, other=0.0) if HAS_BIAS else 0.0
                x = _logit(raw, offset, scale, cap, HAS_BIAS, CAPPED)
                slope = pushed_out * tl.exp2((x - top_out) * fast)
                if PADDED:
                    padding = pushed_pad * tl.exp2((x - top_pad) * fast)
                    slope = tl.where(at < tokens, slope, padding)
                if APART:
                    slope += ce_weight * tl.exp2((x - top - log_plain) * _LOG2E)
                slope *= _slope(x, scale, cap, CAPPED)
                slope = tl.where(raw == -infinity, 0.0, slope)
                tl.store(target + at, slope.to(grads.dtype.element_ty), mask=at < columns)
            tl.debug_barrier()
            slope = kl_weight * (mass * tl.exp(log_q) - p)
            slope += ce_weight * tl.exp(inside - log_plain)
            met = (token == label) & real
            slope = tl.where(met, slope - ce_weight, slope)
            slope = tl.where(real, slope * _slope(inside + top, scale, cap, CAPPED), 0.0)
            tl.store(target + token, slope.to(grads.dtype.element_ty), mask=real)
            alone = pushed_out * tl.exp((own - top_out) * cold)
            if APART:
                alone += ce_weight * tl.exp(own - top - log_plain)
            alone = (alone - ce_weight) * _slope(own, scale, cap, CAPPED)
            lonely = labelled & (tl.sum(met.to(tl.int32), axis=0) == 0)
            tl.store(target + label, alone.to(grads.dtype.element_ty), mask=lonely)
        tl.debug_barrier()
