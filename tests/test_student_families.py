"""Students of other families than Llava: captured, trained and asked like any other."""

from dataclasses import replace

import pytest

from cache_schema import TargetSpec, open_cache
from cache_schema.progress import Silent
from cache_schema.runs import read_metrics
from pipeline.capture import build
from pipeline.settings import BuildConfig
from student.evaluate import evaluate
from student.settings import EvaluateConfig, TrainConfig
from student.stages import DFT
from student.train import train
from tests.tiny_families import make, names
from tests.tiny_models import tiny_dataset


# PaliGemmaProcessor turns tensors into arrays in a way that NumPy 2 frowns upon.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", names(torchvision=False))
def test_family(name, tmp_path):
    """DFT lowers the loss, and the student is nearer to its teacher afterwards than before."""
    teacher, student = (make(name, tmp_path / folder, seed=seed) for folder, seed in (("t", 1), ("s", 2)))
    data = tiny_dataset(tmp_path / "data", rows=10)
    chats = name != "paligemma"  # its processor has no chat template, and wants an image
    config = BuildConfig(
        teacher=teacher,
        data=data.data,
        image_root=data.image_root,
        out=str(tmp_path / "cache"),
        spec=TargetSpec(top_k=16),
        template=None if chats else "plain",
        shard_size=4,
    )
    build(config, Silent())
    assert len(open_cache(tmp_path / "cache")) == (10 if chats else 8)
    run = TrainConfig(
        stage=replace(DFT, global_batch=5, max_steps=6, learning_rate=3e-3),
        student=student,
        cache=str(tmp_path / "cache"),
        image_root=data.image_root,
        out=tmp_path / "run",
        eval_cache=str(tmp_path / "cache"),
        eval_every=1,
        micro_batch=3,
        trackers=(),
    )
    train(run, Silent())
    measured = [line["loss"] for line in read_metrics(tmp_path / "run") if line["group"] == "held-out"]
    assert measured[-1] < measured[0]
    if not chats:
        return
    asked = EvaluateConfig(
        model=tmp_path / "run/model", data=data.data, image_root=data.image_root, max_new_tokens=3
    )
    assert evaluate(asked, Silent())["questions"] == 21
