"""LLaVA-KD's objective from sparse cached targets, without a (T, V) array."""

from models.head import Head
from student.loss_weights import LossWeights
from student.losses.functions import cross_entropy, relation_loss, sparse_kl
from student.losses.objective import DistillationLoss, LossParts
from student.losses.plan import PlannedTargets
from student.losses.preference import PreferenceLoss, PreferenceTargets
from student.losses.targets import (
    Denominators,
    DistillationTargets,
    PositionTargets,
    RelationTargets,
    TeacherStates,
)

__all__ = [
    "Denominators",
    "DistillationLoss",
    "DistillationTargets",
    "Head",
    "LossParts",
    "LossWeights",
    "PlannedTargets",
    "PositionTargets",
    "PreferenceLoss",
    "PreferenceTargets",
    "RelationTargets",
    "TeacherStates",
    "cross_entropy",
    "relation_loss",
    "sparse_kl",
]
