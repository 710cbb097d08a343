"""Training from a cache equals training with the teacher in memory and dense losses.

`python -m tests.test_losses_live_teacher` trains all three and writes the golden curve anew.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cache_schema import IdentityMismatch, TargetSpec, open_cache
from cache_schema.datasets.image_roots import open_root
from cache_schema.progress import Silent
from models.folder import load_model
from models.stored_head import head_of
from pipeline.capture import BuildConfig, build
from student.collate import Collator
from student.losses import LossWeights
from student.model import DistilledStudent
from student.pixels import PixelInputs
from student.settings import TrainConfig
from student.stages import DPT
from student.train import train
from tests.dense_twins import dense_kl, relation_twin
from tests.tiny_models import tiny_dataset, tiny_llava

GOLDEN = Path(__file__).parent / "golden" / "loss_curve_k32_compact.json"
STEPS, ROWS, BATCH = 50, 12, 4
VOCABULARY = 340  # of the tokenizer; the heads have 352 rows
WEIGHTS = LossWeights(prompt=0.3)
TARGETS = ("response", "visual", "relation", "prompt")
FULL = TargetSpec(targets=TARGETS, top_k=VOCABULARY, precision="full", relation="exact")
COMPACT = TargetSpec(targets=TARGETS, top_k=32)
HIDDEN = TargetSpec(targets=("response", "visual", "relation", "hidden"), top_k=2, relation="exact")


class World:
    """A teacher, a smaller student and a data set; every fifth row is text only."""

    def __init__(self, folder):
        self.folder = folder
        self.teacher = tiny_llava(folder / "teacher", seed=1, hidden=48)
        self.student = tiny_llava(folder / "student", seed=2)
        self.data = tiny_dataset(folder / "data", rows=ROWS)

    def capture(self, name, spec):
        """The cache of the teacher's targets."""
        config = BuildConfig(
            teacher=self.teacher,
            data=self.data.data,
            image_root=self.data.image_root,
            out=str(self.folder / name),
            spec=spec,
            shard_size=5,
        )
        assert build(config, Silent()).captured == ROWS
        return open_cache(config.out)

    def batches(self, cache, targets=TARGETS):
        """The micro-batches of one epoch, the same rows in the same order for every cache."""
        samples = sorted((cache[i] for i in range(len(cache))), key=lambda sample: sample.row)
        collator = Collator(
            pixels=PixelInputs(processor_of(self.student)),
            image_root=open_root(self.data.image_root),
            pad_token_id=1,
            image_token_id=2,
            targets=targets,
        )
        return [collator(samples[start : start + BATCH]) for start in range(0, ROWS, BATCH)]

    def new_student(self, weights=WEIGHTS):
        """The untrained student, in float64 so that two curves differ only by what they are made from."""
        parts = ("projector", "language_model")
        student = DistilledStudent(
            load_model(self.student, torch.float32), weights, vocab_size=VOCABULARY, trainable=parts
        )
        return student.double().eval()

    def live_loss(self, weights=WEIGHTS):
        """The dense objective with the teacher in memory, as a function of student, inputs and batch."""
        teacher = load_model(self.teacher, torch.float32).double().eval()
        return lambda student, inputs, batch: dense_loss(student.model, teacher, inputs, batch, weights)

    def train(self, batches, loss_of, student):
        """The loss at each of STEPS steps."""
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        curve = []
        for step in range(STEPS):
            batch = batches[step % len(batches)]
            loss = loss_of(student, wide(batch), batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        return curve


def wide(batch):
    """The batch's inputs, floating ones in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()}


def processor_of(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def cached_loss(student, inputs, batch):
    return student(inputs, batch.labels, batch.targets, batch.denominators).total


def dense_loss(student, teacher, inputs, batch, weights=WEIGHTS):
    """The objective from both models' own logits, sample by sample."""
    with torch.no_grad():
        wanted = teacher(**inputs).logits
    made = student(**inputs).logits
    no_token = torch.arange(made.shape[-1]) >= VOCABULARY
    length, total = made.shape[1], 0.0
    for b, labels in enumerate(batch.labels):
        total = total + F.cross_entropy(made[b, :-1], labels[1:])
        for kind in ("response", "visual", "prompt"):
            if not weights.by_target[kind]:
                continue
            record = batch.targets.positions[kind]
            positions = record.positions[record.samples == b] - b * length
            if len(positions):
                teacher_logits = wanted[b, positions].masked_fill(no_token, -torch.inf)
                kl = dense_kl(made[b, positions], teacher_logits).mean()
                total = total + weights.by_target[kind] * kl
        images = [r.positions - b * length for r in batch.targets.relations if r.sample == b]
        for positions in images:
            theirs, ours = (logits[b, positions, :VOCABULARY] for logits in (wanted, made))
            total = total + weights.relation * relation_twin(ours, theirs @ theirs.T) / len(images)
    return total / len(batch.labels)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("live"))


def test_a_full_cache_gives_the_curve_of_a_live_teacher(world):
    batches = world.batches(world.capture("full", FULL))
    # The dense run looks at the batches' inputs and positions, not at their targets.
    dense = world.train(batches, world.live_loss(), world.new_student())
    cached = world.train(batches, cached_loss, world.new_student())
    assert max(abs(a - b) for a, b in zip(dense, cached, strict=True)) < 1e-5
    assert cached[-1] < 0.7 * cached[0]  # something was learnt


def test_the_cached_run_keeps_its_golden_curve(world):
    """k = 32, 8-bit log-probabilities, relation factors: the default cache."""
    curve = world.train(world.batches(world.capture("compact", COMPACT)), cached_loss, world.new_student())
    assert curve == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8"))["loss"], rel=1e-3)


def test_hidden_states_and_head_give_the_curve_of_a_live_teacher(world):
    """Two entries a position are stored; the whole distribution comes from hidden states in 8 bits."""
    weights = replace(WEIGHTS, prompt=0.0, tail="dense")
    cache = world.capture("hidden", HIDDEN)
    batches = world.batches(cache, HIDDEN.targets)
    dense = world.train(batches, world.live_loss(weights), world.new_student(weights))
    student = world.new_student(weights)
    student.loss.teacher = head_of(cache)
    cached = world.train(batches, cached_loss, student)
    assert max(abs(a - b) for a, b in zip(dense, cached, strict=True)) < 1e-2
    assert cached[-1] < 0.7 * cached[0]
    with torch.no_grad():  # two entries are not enough
        sparse = world.new_student(replace(weights, tail="bucket"))
        assert dense[0] - cached_loss(sparse, wide(batches[0]), batches[0]).item() > 0.1


def test_a_run_learns_from_hidden_states_where_the_cache_has_them(world, tmp_path):
    stage = replace(DPT, global_batch=4, max_steps=2, losses=LossWeights(tail="dense"))
    config = TrainConfig(
        stage=stage,
        student=world.student,
        cache=str(world.folder / "hidden"),
        image_root=str(world.data.image_root),
        out=tmp_path / "run",
        micro_batch=2,
        trackers=(),
        workers=1,
    )
    train(config, Silent())
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    without = replace(config, cache=str(world.folder / "full"), out=tmp_path / "other")
    with pytest.raises(
        IdentityMismatch, match="needs hidden states of response, visual positions, the cache"
    ):
        train(without, Silent())


def main():
    """Trains with the live teacher, from a full cache and from a compact one, and tells them apart."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        full = world.batches(world.capture("full", FULL))
        compact = world.batches(world.capture("compact", COMPACT))
        live_loss = world.live_loss()
        runs = {"live": (full, live_loss), "full": (full, cached_loss), "compact": (compact, cached_loss)}
        curves = {}
        for name, (batches, loss_of) in runs.items():
            student = world.new_student()
            curves[name] = world.train(batches, loss_of, student)
            with torch.no_grad():
                end = sum(live_loss(student, wide(batch), batch).item() for batch in full) / len(full)
            apart = [abs(a - b) for a, b in zip(curves["live"], curves[name], strict=True)]
            print(
                f"{name}: loss {curves[name][0]:.5f} -> {curves[name][-1]:.5f}; to the live curve: mean"
                f" {sum(apart) / STEPS:.1e}, most {max(apart):.1e}; dense loss of its student {end:.5f}"
            )
    GOLDEN.write_text(json.dumps({"loss": [round(loss, 6) for loss in curves["compact"]]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
