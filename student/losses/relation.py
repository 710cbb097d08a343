"""The relation loss 1 - cos(R_s, R_t) on Gram matrices R = Z Z^T of raw logits (LLaVA-KD eq. 4, 5).

With H~ = [H, 1] and W~ = [W, b], Z = H~ W~^T and R = H~ A H~^T with A = W~^T W~: no logits are made, and a
bias stays exact. A head that is not linear (soft-capping) needs Z; it is made in blocks of columns, as it
is where that takes fewer operations. A logit scale cancels in the cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from models.head import Head
from student.losses.graph import graph_distance
from student.losses.plan import RelationGroup
from student.losses.products import Gradients, HeadProducts, add_product


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelationWork:
    """Images whose relation loss is asked, and the weight (I,) of each in the total, group after group.
    neighbours: 0 for 1 - cos, else those of each token in the graph that takes its place."""

    groups: tuple[RelationGroup, ...]
    weights: Tensor
    neighbours: int = 0


_frozen_grams: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gram_of(head: Head, products: HeadProducts) -> Tensor:
    """A = W~^T W~ (D + b, D + b), b = 1 with a bias.

    That of a frozen head is kept for as long as its weight lives and neither weight nor bias change by
    operations that autograd's version counter sees (writes through `.data` it does not).
    """
    if not _frozen(head):
        return products.gram()
    bias = None if head.bias is None else (id(head.bias), head.bias._version)
    state = (head.weight.data_ptr(), head.weight._version, bias, products.columns, products.operand)
    known_state, gram = _frozen_grams.get(head.weight, (None, None))
    if gram is None or known_state != state:
        gram = products.gram()
        _frozen_grams[head.weight] = (state, gram)
    assert isinstance(gram, Tensor)
    return gram


def takes_gram(head: Head, lengths: list[int], gradients: Gradients) -> bool:
    """Whether the way through A takes fewer operations than logits in blocks, for images of P tokens each.

    A: 2 V D^2, and as much for the gradient of a trained head, for all images together; nothing for a frozen
    head, whose A is made once. Blocks, for each image: logits 2 P D V and their Gram matrix 2 P^2 V; for
    gradients both again, and 2 P D V for each of hidden states and head.
    """
    if head.softcap is not None:
        return False
    width, trained = head.weight.shape[1], gradients.weight is not None
    through_gram = 2 * width**2 * ((not _frozen(head)) + trained)
    products_of_width = 1 + gradients.wanted + (gradients.hidden is not None) + trained
    through_blocks = sum(
        2 * length * width * products_of_width + 2 * length**2 * (1 + gradients.wanted) for length in lengths
    )
    return through_gram <= through_blocks


def _frozen(head: Head) -> bool:
    return not (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad))


def cosine_distance(
    student: Tensor, teacher: Tensor, factors: Tensor, slopes: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """1 - cos (I,) of matrices (I, P, P), and its gradient (I, P, P) in the first, times factors (I,), in the
    dtype `slopes`; None: no gradient.

    As half the squared distance of the normalised matrices: 1 - cos as such has no digits left under 1e-7.
    A matrix of zeros has cosine 0 with everything, and no gradient.
    """
    norms = student.new_empty(2, len(student))
    for each, norm in zip((student, teacher), norms, strict=True):
        torch.linalg.vector_norm(each, dim=(1, 2), out=norm)
    absent = (norms == 0).any(dim=0)
    inverse, other = norms[:, :, None, None].reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)
    difference = (student * inverse).addcmul_(teacher, other, value=-1)
    distance = torch.linalg.vector_norm(difference, dim=(1, 2)).square_().div_(2).masked_fill_(absent, 1.0)
    if slopes is None:
        return distance, None
    scale = (inverse[:, 0, 0] * factors).masked_fill_(absent, 0.0)
    difference.addcmul_(student, inverse * distance[:, None, None], value=-1)
    count, length = difference.shape[:2]
    # Rows begin on 16 bytes, without which matrix units cannot load them.
    gradient = difference.new_empty(count, length, -(-length // 8) * 8, dtype=slopes)[:, :, :length]
    return distance, torch.mul(difference, scale[:, None, None], out=gradient)


def run_relations(
    hidden: Tensor,
    head: Head,
    work: RelationWork,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
) -> Tensor:
    """The loss (I,) of each image of `work` at hidden (N, D); adds the weighted gradients to `gradients`."""
    lengths = [length for group in work.groups for length in group.lengths]
    # R is symmetric: dL = 2 <dR H~ A, dH~>.
    factors = (2.0 * work.weights).split([len(group.lengths) for group in work.groups])
    groups = [group.decoded() for group in work.groups]
    values: list[Tensor] = []
    if takes_gram(head, lengths, gradients):
        gram = _in_two(gram_of(head, products), 0, products)
        moment: Tensor | None = None
        for group, shares in zip(groups, factors, strict=True):
            count, length = group.places.shape
            room = max(1, memory_budget // (8 * products.dtype.itemsize * max(1, length**2)))
            for start in range(0, count, room):
                part = slice(start, start + room)
                found, moment = _through_gram(
                    hidden, group.cut(part), shares[part], gram, moment, products, gradients, work.neighbours
                )
                values.append(found)
        if moment is not None:
            _add_head_gradients(moment, products, gradients)
        return values[0] if len(values) == 1 else torch.cat(values)
    for group, shares in zip(groups, factors, strict=True):
        for number, length in enumerate(group.lengths):
            places = group.places[number, :length]
            states = hidden.index_select(0, places).to(products.dtype)  # (P, D)
            teacher = _teacher_grams(group.cut(slice(number, number + 1)), products.dtype)[0]
            value, pulled = _through_logits(
                states,
                teacher[:length, :length],
                shares[number],
                products,
                gradients,
                memory_budget,
                work.neighbours,
            )
            values.append(value[None])
            if gradients.hidden is not None and pulled is not None:
                gradients.hidden.index_add_(0, places, pulled)
    return torch.cat(values)


def _distance(
    student: Tensor,
    teacher: Tensor,
    real: Tensor | None,
    neighbours: int,
    factors: Tensor,
    slopes: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """`graph_distance`, or without neighbours `cosine_distance`."""
    if neighbours:
        return graph_distance(student, teacher, real, neighbours, factors, slopes)
    return cosine_distance(student, teacher, factors, slopes)


def _teacher_grams(group: RelationGroup, dtype: torch.dtype) -> Tensor:
    """R (I, P, P) of the images of a group."""
    if group.gram is not None:
        return group.gram.to(dtype)
    assert group.factor is not None
    factors = group.factor.float() if group.factor.dtype.itemsize < 4 else group.factor
    return torch.bmm(factors, factors.transpose(1, 2)).to(dtype)


def _through_gram(
    hidden: Tensor,
    group: RelationGroup,
    factors: Tensor,
    gram: Tensor,
    moment: Tensor | None,
    products: HeadProducts,
    gradients: Gradients,
    neighbours: int,
) -> tuple[Tensor, Tensor | None]:
    """The loss (I,) of a group, and H~^T dR H~ of all so far, `moment` before, with dR times factors (I,);
    adds the gradient in hidden. gram: A as `_in_two` makes it."""
    (count, length), width = group.places.shape, hidden.shape[1]
    places = group.places.flatten()
    states = hidden.index_select(0, places).to(products.operand)  # (I P, D)
    if gram.shape[1] > width:
        states = torch.cat([states, states.new_ones(len(states), 1)], dim=1)  # H~
    if group.real is not None:
        states *= group.real.to(states.dtype).flatten()[:, None]  # what fills up counts as zeros
    stack, twice = (each.unflatten(0, (count, length)) for each in (states, _twice(states, products)))
    pushed = _in_two(products.product(twice.flatten(0, 1), gram), 1, products)
    pushed = pushed.unflatten(0, (count, length))
    values, slopes = _distance(
        products.batched(pushed, twice.transpose(1, 2)),
        _teacher_grams(group, products.dtype),
        group.real,
        neighbours,
        factors,
        products.operand if gradients.wanted else None,
    )
    if slopes is None:
        return values, moment
    if gradients.weight is not None or gradients.bias is not None:
        spread = products.batched(slopes, stack).flatten(0, 1).to(products.operand)
        if moment is None:
            moment = products.product(states.t(), spread)
        else:
            add_product(moment, states.t(), spread)
    if gradients.hidden is not None:
        pulled = products.batched(slopes, pushed[:, :, :width]).flatten(0, 1)
        gradients.hidden.index_add_(0, places, pulled)
    return values, moment


def _in_two(values: Tensor, dim: int, products: HeadProducts) -> Tensor:
    """values (a, b) as a factor; one narrower than they are gets them in two parts, one after the other along
    `dim`, whose sum has their digits. `_twice` is what meets it in a product."""
    if products.operand == values.dtype:
        return values
    shape = [2 * size if place == dim else size for place, size in enumerate(values.shape)]
    made = values.new_empty(shape, dtype=products.operand)
    coarse, rest = made.chunk(2, dim)
    coarse.copy_(values)
    torch.sub(values, coarse, out=rest)
    return made


def _twice(states: Tensor, products: HeadProducts) -> Tensor:
    """states (N, D) to multiply with `_in_two`."""
    return states if products.operand == products.dtype else torch.cat([states, states], dim=1)


def _add_head_gradients(moment: Tensor, products: HeadProducts, gradients: Gradients) -> None:
    """dW~ = W~ moment."""
    if gradients.weight is None and gradients.bias is None:
        return
    width = products.weight.shape[1]
    for block, matrix in products.blocks(products.columns):
        if gradients.weight is not None:
            gradients.weight.add(block, matrix, moment[:width, :width])
            if products.bias is not None:
                gradients.weight.add(block, products.bias[block, None], moment[width:, :width])
        if gradients.bias is not None and products.bias is not None:
            gradients.bias[block] += matrix.to(products.dtype) @ moment[:width, width]
            gradients.bias[block] += products.bias[block] * moment[width, width]


def _through_logits(
    states: Tensor,
    teacher: Tensor,
    factor: Tensor,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
    neighbours: int,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient (P, D) in hidden with dR times `factor`, by way of logits in blocks, made
    twice."""
    most = max(1, memory_budget // (3 * len(states) * products.dtype.itemsize))
    gram = torch.zeros_like(teacher)
    for block, matrix in products.blocks(products.columns, most):
        logits = states.new_empty(len(states), len(matrix))
        products.logits(states, block, matrix, logits)
        narrow = products.narrowed(logits)
        add_product(gram, narrow, narrow.t())
    slopes_in = products.operand if gradients.wanted else None
    values, slopes = _distance(gram[None], teacher[None], None, neighbours, factor[None], slopes_in)
    if slopes is None:
        return values[0], None
    pulled = torch.zeros_like(states)
    for block, matrix in products.blocks(products.columns, most):
        logits = states.new_empty(len(states), len(matrix))
        curve = products.logits(states, block, matrix, logits)
        grad = products.unscale(products.product(slopes[0], logits), curve)
        pulled += products.product(grad, matrix)
        if gradients.weight is not None:
            gradients.weight.add(block, grad.t(), states)
        if gradients.bias is not None:
            gradients.bias[block] += grad.sum(dim=0)
    return values[0], pulled
