"""The student and its loss as one module, so that DDP and FSDP see every use of the head's weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cache_schema.errors import KdcacheError
from cache_schema.format.spec import KINDS, Kind
from models.head import Head, verified_head
from models.known import known_mask
from models.parts import Part, part_of
from student.folder import freeze
from student.losses import (
    Denominators,
    DistillationLoss,
    DistillationTargets,
    LossParts,
    LossWeights,
    PreferenceLoss,
)
from student.timing import Stopwatch

_AGREEMENT_ROWS = 1024
_AGREEMENT_KINDS: tuple[Kind, ...] = ("response", "visual")
EVERY_TERM = LossWeights(relation=1.0, prompt=1.0, reduction="token_mean")
"""What `DistilledStudent.measure` computes: batches prepared for it are measured without a wait."""
_SUMS = Denominators(samples=1.0, ce_tokens=1.0, tokens=dict.fromkeys(KINDS, 1.0), images=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The number of positions where the student's most likely token is the teacher's."""

    response: Tensor
    visual: Tensor


class DistilledStudent(nn.Module):
    """A vision-language model of transformers with the distillation loss on top.

    model: its base model must return the final hidden states, after the last norm, that its output
    embeddings turn into logits (`check_head` proves it). Of its parameters only the `trainable` parts
    require gradients; the vision tower stays in eval mode and autograd keeps nothing of it unless it is
    trainable. needs_mask: whether padding at the right must be masked (`Optimization.tune` finds out).
    autocast: mixed precision of `measure`; that of `forward` comes with the wrapping by accelerate.
    preference: beta of preference distillation, which then is the loss; 0: `weights` are.
    vocab_size: logits at and above it are padding of the matrix, which `Head` says how to count.

    With `LossWeights.dual_head` the terms from the cache go through `second_head`, a trained copy of the
    model's output embeddings beside the model; the cross entropy and `measure` go through the model's own.
    """

    def __init__(
        self,
        model: Any,
        weights: LossWeights,
        *,
        vocab_size: int,
        trainable: tuple[Part, ...] = (),
        preference: float = 0.0,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        distilled, labelled = weights.by_head if weights.dual_head else (weights, None)
        self.loss = PreferenceLoss(preference) if preference else DistillationLoss(distilled)
        self.label_loss = None if labelled is None else DistillationLoss(labelled)
        self.second_head = copy.deepcopy(model.get_output_embeddings()) if weights.dual_head else None
        self.measure_loss = DistillationLoss(EVERY_TERM)
        self.vocab_size = vocab_size
        self.caps_logits = True
        self.needs_mask = True
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        freeze(model, trainable)
        if self.second_head is not None:
            self.second_head.requires_grad_(True)
        self._stopwatch = stopwatch or Stopwatch()

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that accelerate's FSDP shards on their own: those of the language model. A rank without
        an image never calls the tower's layers, and the others would wait."""
        kinds: dict[bool, set[str]] = {True: set(), False: set()}
        for name, module in self.model.named_modules():
            kinds[part_of(f"{name}.") == "language_model"].add(type(module).__name__)
        return sorted((kinds[True] - kinds[False]) & set(self.model._no_split_modules or ()))

    def tie_weights(self) -> None:
        """Shares again what accelerate's FSDP takes apart on the meta device."""
        self.model.tie_weights()

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Around the micro-batches of a step, in which no weight changes: the losses keep the head's matrix
        as their products take it, also where FSDP gathers its weight anew for each."""
        with ExitStack() as stack:
            for loss in (self.loss, self.label_loss):
                if loss is not None:
                    stack.enter_context(loss.matrix.kept())
            yield

    def reshard(self) -> None:
        """Gives back what FSDP has gathered for a forward pass that no backward pass follows: until then
        the parameters are not those that the optimizer knows."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def train(self, mode: bool = True) -> DistilledStudent:
        """Training mode for all but a frozen vision tower."""
        super().train(mode)
        tower = [
            (part_of(name), parameter.requires_grad) for name, parameter in self.model.named_parameters()
        ]
        if ("vision_tower", True) in tower:
            return self
        for name, module in self.model.named_modules():
            if name and part_of(f"{name}.") == "vision_tower":
                module.training = False
        return self

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        targets: DistillationTargets | None,
        denominators: Denominators,
        world_size: int = 1,
    ) -> LossParts:
        """The loss of a micro-batch: inputs as `Batch.inputs`, labels (B, T), counts of the global batch."""
        with self._stopwatch.lap("forward"):
            hidden = self.hidden_states(inputs)  # (B, T, D)
        compute = _autocast_dtype(hidden.device)
        with self._stopwatch.lap("loss"), _full_precision(hidden.device):
            head = self.head
            batch = (hidden, labels, targets)
            with_second = self._second(head)
            parts = self.loss(*batch, with_second, denominators, world_size=world_size, compute=compute)
            if self.label_loss is not None:
                own = self.label_loss(*batch, head, denominators, world_size=world_size, compute=compute)
                parts = replace(parts, total=parts.total + own.total, ce=own.ce)
            if torch.is_grad_enabled() and ("pixel_values" not in inputs or not parts.total.requires_grad):
                parts = self._touch(parts, hidden)
        return parts

    @torch.no_grad()
    def measure(
        self, inputs: Mapping[str, Tensor], labels: Tensor, targets: DistillationTargets | None
    ) -> tuple[LossParts, Agreement]:
        """Sums over tokens (over images for the relation) of the terms, whatever the stage weighs, and the
        top-1 agreement with the teacher."""
        with self.autocast():
            hidden = self.hidden_states(inputs)
            compute = _autocast_dtype(hidden.device)
        targets = targets or DistillationTargets()
        with _full_precision(hidden.device):
            parts = self.measure_loss(hidden, labels, targets, self.head, _SUMS, compute=compute)
            rows = hidden.reshape(-1, hidden.shape[-1])
            response, visual = (
                torch.zeros((), device=hidden.device)
                if (target := targets.positions.get(kind)) is None
                else _same(
                    rows[target.positions.to(rows.device)], self.head, target.token_ids[:, 0].to(rows.device)
                )
                for kind in _AGREEMENT_KINDS
            )
        return parts, Agreement(response=response, visual=visual)

    def trained(self) -> dict[str, Tensor]:
        """The trainable parameters by their names in the model, whole: every rank must ask when sharded.
        Those of the second head are `second_head.` and their names there."""
        second = () if self.second_head is None else self.second_head.named_parameters(prefix="second_head")
        return {
            name: unsharded(tensor.detach())
            for name, tensor in (*self.model.named_parameters(), *second)
            if tensor.requires_grad
        }

    @torch.no_grad()
    def load_trained(self, weights: Mapping[str, Tensor]) -> None:
        """Loads the trainable parameters of a checkpoint, which must be exactly these."""
        ours = self.trained()
        if ours.keys() != weights.keys():
            different = sorted(ours.keys() ^ weights.keys())
            raise KdcacheError(
                f"the checkpoint trains other parameters than this stage: {len(different)} differ, first "
                f"{different[0]}; give the same stage and student"
            )
        for name, tensor in ours.items():
            tensor.copy_(weights[name])

    @property
    def head(self) -> Head:
        """The output head over the tokenizer's columns."""
        head = Head.of(self.model, self.vocab_size)
        return head if self.caps_logits else replace(head, softcap=None)

    def _second(self, head: Head) -> Head:
        """The head of the terms from the cache."""
        second = self.second_head
        return head if second is None else replace(head, weight=second.weight, bias=second.bias)

    def hidden_states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The final hidden states (B, T, D), without any logits. Those at padding mean nothing."""
        if not self.needs_mask and (mask := inputs.get("attention_mask")) is not None:
            # One of ones: without any, transformers looks on the device for packed sequences.
            inputs = {**inputs, "attention_mask": known_mask(torch.ones_like(mask), mask.numel())}
        hidden: Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def check_head(self, input_ids: Tensor) -> None:
        """Verifies on input_ids (1, T) that hidden states and head give the model's own logits, with or
        without the soft-cap that the configuration names. KdcacheError when neither does."""
        hidden = self.hidden_states({"input_ids": input_ids})[0]  # (T, D)
        own = self.model(input_ids=input_ids, use_cache=False).logits[0]
        head = verified_head(self.head, [hidden], [own], model=type(self.model).__name__)
        self.caps_logits = head.softcap is not None

    def _touch(self, parts: LossParts, hidden: Tensor) -> LossParts:
        """Adds 0 times the unused parameters, so that every rank has a gradient for every parameter."""
        unused = [
            parameter.sum()
            for name, parameter in self.model.named_parameters()
            if part_of(name) == "projector"
        ]
        for head in (self.model.get_output_embeddings(), self.second_head):
            unused += [] if head is None else [parameter.sum() for parameter in head.parameters()]
        nothing: Tensor = 0.0 * sum(unused, hidden.sum())
        return replace(parts, total=parts.total + nothing)


def unsharded(tensor: Tensor) -> Tensor:
    """The full tensor of one that FSDP has spread over the ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _full_precision(device: torch.device) -> Any:
    """The losses choose their own precision: autocast would reduce that of their fp32 products."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.is_autocast_enabled(device.type)
        else nullcontext()
    )


def _same(hidden: Tensor, head: Head, token_ids: Tensor) -> Tensor:
    """The number of hidden (N, D) whose most likely token is token_ids (N,), in bounded memory."""
    same = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), _AGREEMENT_ROWS):
        stop = start + _AGREEMENT_ROWS
        same = same + (head.logits(hidden[start:stop]).argmax(-1) == token_ids[start:stop]).sum()
    return same
