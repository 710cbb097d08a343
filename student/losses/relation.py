"""The relation loss 1 - cos(R_s, R_t) on Gram matrices R = Z Z^T of raw logits (LLaVA-KD eq. 4, 5).

With H~ = [H, 1] and W~ = [W, b], Z = H~ W~^T and R = H~ A H~^T with A = W~^T W~ (D, D): no logits are
made, and a bias stays exact. Only a head that is not linear (soft-capping) needs Z; it is then made in
column blocks, as it is where that takes fewer operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from student.losses.head import Head
from student.losses.positions import Gradients
from student.losses.products import HeadProducts
from student.losses.targets import RelationTargets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelationWork:
    """Images whose relation loss is asked, with the weights (I,) of each in the total, and the way there.

    gram (D + b, D + b): A above, b = 1 with a bias, or None where the logits are made in blocks.
    """

    images: tuple[RelationTargets, ...]
    weights: tuple[float, ...]
    gram: Tensor | None


_frozen_grams: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gram_of(head: Head, products: HeadProducts) -> Tensor:
    """A = W~^T W~ (D + b, D + b). That of a frozen head is kept until the matrix or bias change."""
    frozen = not (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad))
    bias_key = None if head.bias is None else (id(head.bias), head.bias._version)
    key = (head.weight._version, head.weight.data_ptr(), bias_key, products.columns, products.dtype)
    if frozen and head.weight in _frozen_grams:
        kept_key, kept = _frozen_grams[head.weight]
        if kept_key == key:
            return kept
    gram = _gram(products)
    if frozen:
        _frozen_grams[head.weight] = (key, gram)
    return gram


@torch.no_grad()
def _gram(products: HeadProducts) -> Tensor:
    width = products.weight.shape[1]
    size = width + (products.bias is not None)
    gram = torch.zeros((size, size), dtype=products.dtype, device=products.weight.device)
    for block, weight in products.blocks():
        gram[:width, :width].addmm_(weight.t(), weight)
        if products.bias is not None:
            gram[:width, width].addmv_(weight.t(), products.bias[block])
    if products.bias is not None:
        gram[width, :width] = gram[:width, width]
        gram[width, width] = products.bias.dot(products.bias)
    return gram


def takes_gram(head: Head, images: tuple[RelationTargets, ...]) -> bool:
    """Whether A is the cheaper way: always for a frozen linear head, for a trained one by operation count.

    A and its gradient take 4 V D^2 for all images together; logits in blocks, made twice, with their Gram
    matrix and three gradients, take V (8 P D + 4 P^2) an image.
    """
    if head.softcap is not None:
        return False
    if not head.weight.requires_grad:
        return True
    width = head.weight.shape[1]
    return 4 * width**2 <= sum(8 * len(i.positions) * width + 4 * len(i.positions) ** 2 for i in images)


def cosine_distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos of two (P, P) matrices, and its gradient in the first.

    As half the squared distance of the normalised matrices: 1 - cos itself loses every digit under 1e-7.
    A matrix of zeros has cosine 0 with everything, and no gradient.
    """
    norm, other = torch.linalg.vector_norm(student), torch.linalg.vector_norm(teacher)
    defined = (norm > 0) & (other > 0)
    unit = student / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    difference = unit - teacher / other.clamp(min=torch.finfo(norm.dtype).tiny)
    distance = torch.where(defined, difference.square().sum() / 2, 1.0)
    gradient = torch.where(defined, (difference - distance * unit) / norm, 0.0)
    return distance, gradient


def run_relations(
    hidden: Tensor,
    work: RelationWork,
    products: HeadProducts,
    gradients: Gradients,
    *,
    softcap: float | None,
    logit_scale: float,
    memory_budget: int,
) -> Tensor:
    """The loss (I,) of each image of `work`; adds the weighted gradients to `gradients`."""
    values = torch.zeros(len(work.images), dtype=products.dtype, device=hidden.device)
    moment = None if work.gram is None else torch.zeros_like(work.gram)
    for number, (image, weight) in enumerate(zip(work.images, work.weights, strict=True)):
        states = hidden.index_select(0, image.positions).to(products.dtype)  # (P, D)
        if image.gram is not None:
            teacher = image.gram.to(products.dtype)
        else:
            assert image.factor is not None
            factor = image.factor.to(products.dtype)
            teacher = factor @ factor.t()
        if moment is None:
            values[number] = _through_logits(
                states,
                image.positions,
                teacher,
                weight,
                products,
                gradients,
                softcap,
                logit_scale,
                memory_budget,
            )
            continue
        assert work.gram is not None
        extended = (
            states if products.bias is None else torch.cat([states, states.new_ones(len(states), 1)], 1)
        )
        values[number], slope = cosine_distance(extended @ work.gram @ extended.t(), teacher)
        pulled = (2 * weight * slope) @ extended  # (P, D + b)
        if gradients.hidden is not None:
            gradients.hidden.index_add_(0, image.positions, (pulled @ work.gram)[:, : states.shape[1]])
        moment.addmm_(pulled.t(), extended)
    if moment is not None:
        _add_head_gradients(moment, products, gradients)
    return values


def _add_head_gradients(moment: Tensor, products: HeadProducts, gradients: Gradients) -> None:
    """dW~ = W~ moment, with moment = sum of 2 H~^T dR H~."""
    width = products.weight.shape[1]
    for block, weight in products.blocks():
        if gradients.weight is not None:
            gradients.weight.add(block, weight, moment[:width, :width])
            if products.bias is not None:
                gradients.weight.add(block, products.bias[block, None], moment[width:, :width])
        if gradients.bias is not None:
            assert products.bias is not None
            gradients.bias[block].addmv_(weight, moment[:width, width])
            gradients.bias[block].add_(products.bias[block] * moment[width, width])


def _through_logits(
    states: Tensor,
    positions: Tensor,
    teacher: Tensor,
    weight: float,
    products: HeadProducts,
    gradients: Gradients,
    softcap: float | None,
    logit_scale: float,
    memory_budget: int,
) -> Tensor:
    """The loss of one image by way of its logits, in column blocks that are made twice."""
    columns = max(1, memory_budget // (3 * len(states) * products.dtype.itemsize))
    gram = torch.zeros_like(teacher)
    for block, matrix in products.blocks(columns):
        logits, _ = _logits(states, block, matrix, products, softcap, logit_scale)
        gram.addmm_(logits, logits.t())
    value, slope = cosine_distance(gram, teacher)
    if not gradients.wanted:
        return value
    for block, matrix in products.blocks(columns):
        logits, curve = _logits(states, block, matrix, products, softcap, logit_scale)
        grad = (2 * weight * logit_scale * slope) @ logits
        if curve is not None:
            grad.mul_(curve)
        if gradients.hidden is not None:
            gradients.hidden.index_add_(0, positions, grad @ matrix)
        if gradients.weight is not None:
            gradients.weight.add(block, grad.t(), states)
        if gradients.bias is not None:
            gradients.bias[block] += grad.sum(dim=0)
    return value


def _logits(
    states: Tensor,
    block: slice,
    matrix: Tensor,
    products: HeadProducts,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Logits (P, v) of a column block, and the slope of the soft-capping there."""
    logits = states @ matrix.t()
    if products.bias is not None:
        logits += products.bias[block]
    logits *= logit_scale
    if softcap is None:
        return logits, None
    logits.div_(softcap).tanh_()
    slope = 1.0 - logits.square()
    return logits.mul_(softcap), slope
