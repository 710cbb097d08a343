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
from student.losses.products import Gradients, HeadProducts
from student.losses.targets import RelationTargets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelationWork:
    """Images whose relation loss is asked, and the weight (I,) of each in the total."""

    images: tuple[RelationTargets, ...]
    weights: tuple[float, ...]


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


def cosine_distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos of two (P, P) matrices, and its gradient (P, P) in the first.

    As half the squared distance of the normalised matrices: 1 - cos as such has no digits left under 1e-7.
    A matrix of zeros has cosine 0 with everything, and no gradient.
    """
    norm, other = torch.linalg.vector_norm(student), torch.linalg.vector_norm(teacher)
    defined = (norm > 0) & (other > 0)
    unit = student / torch.where(defined, norm, 1.0)
    difference = unit - teacher / torch.where(defined, other, 1.0)
    distance = torch.where(defined, difference.square().sum() / 2, 1.0)
    gradient = torch.where(defined, (difference - distance * unit) / norm, 0.0)
    return distance, gradient


def run_relations(
    hidden: Tensor,
    head: Head,
    work: RelationWork,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
) -> Tensor:
    """The loss (I,) of each image of `work` at hidden (N, D); adds the weighted gradients to `gradients`."""
    values = torch.zeros(len(work.images), dtype=products.dtype, device=hidden.device)
    gram = moment = None
    if takes_gram(head, [len(image.positions) for image in work.images], gradients):
        gram = gram_of(head, products)
        moment = torch.zeros_like(gram)
    for number, (image, weight) in enumerate(zip(work.images, work.weights, strict=True)):
        states = hidden.index_select(0, image.positions).to(products.dtype)  # (P, D)
        teacher = _teacher_gram(image).to(products.dtype)
        if gram is None or moment is None:
            values[number], pulled = _through_logits(
                states, teacher, weight, products, gradients, memory_budget
            )
        else:
            values[number], pulled = _through_gram(states, teacher, weight, gram, moment)
        if gradients.hidden is not None and pulled is not None:
            gradients.hidden.index_add_(0, image.positions, pulled)
    if moment is not None:
        _add_head_gradients(moment, products, gradients)
    return values


def _teacher_gram(image: RelationTargets) -> Tensor:
    if image.gram is not None:
        return image.gram
    assert image.factor is not None
    factor = image.factor.float() if image.factor.dtype.itemsize < 4 else image.factor
    return factor @ factor.t()


def _through_gram(
    states: Tensor, teacher: Tensor, weight: float, gram: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, and the weighted gradient (P, D) in hidden; adds 2 H~^T dR H~ to `moment`."""
    width = states.shape[1]
    if len(gram) > width:
        states = torch.cat([states, states.new_ones(len(states), 1)], dim=1)  # H~
    pushed = states @ gram
    value, slope = cosine_distance(pushed @ states.t(), teacher)
    slope = 2.0 * weight * slope
    moment.addmm_(states.t(), slope @ states)
    return value, (slope @ pushed)[:, :width]


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
    weight: float,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the weighted gradient (P, D) in hidden, by way of logits in blocks, made twice."""
    most = max(1, memory_budget // (3 * len(states) * products.dtype.itemsize))
    gram = torch.zeros_like(teacher)
    for block, matrix in products.blocks(products.columns, most):
        logits = states.new_empty(len(states), len(matrix))
        products.logits(states, block, matrix, logits)
        gram.addmm_(logits, logits.t())
    value, slope = cosine_distance(gram, teacher)
    if not gradients.wanted:
        return value, None
    pulled = torch.zeros_like(states)
    for block, matrix in products.blocks(products.columns, most):
        logits = states.new_empty(len(states), len(matrix))
        curve = products.logits(states, block, matrix, logits)
        grad = products.unscale((2.0 * weight * slope) @ logits, curve)
        pulled += products.product(grad, matrix)
        if gradients.weight is not None:
            gradients.weight.add(block, grad.t(), states)
        if gradients.bias is not None:
            gradients.bias[block] += grad.sum(dim=0)
    return value, pulled
