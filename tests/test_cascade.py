"""A recipe whose later stages read another teacher's cache."""

import json
from pathlib import Path

import yaml

from cache_schema import open_cache
from cache_schema.progress import Silent
from student.recipe import train_recipe
from student.settings import TrainConfig
from student.stages import DFT, open_recipe
from tests.student_caches import fake_capture, make_world
from tests.tiny_models import tiny_llava

RECIPE = Path(__file__).resolve().parent.parent / "docs/recipes/cascade.yaml"


def test_later_stages_learn_from_another_teacher(tmp_path):
    world = make_world(tmp_path, rows=12)
    large = tiny_llava(tmp_path / "large", seed=8, hidden=64)
    far = fake_capture(tmp_path / "far", large, world.image_root, rows=12, seed=4)
    document = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for stage, cache in zip(document["stages"], (world.cache, world.cache, far), strict=True):
        stage |= {"cache": str(cache), "image_root": str(world.image_root)}
    (tmp_path / "cascade.yaml").write_text(yaml.safe_dump(document))
    config = TrainConfig(
        stage=DFT,
        student=world.student,
        cache=None,
        out=tmp_path / "run",
        max_steps=1,
        global_batch=4,
        trackers=(),
        device="cpu",
    )
    result = train_recipe(open_recipe(str(tmp_path / "cascade.yaml")), config, Silent())
    teachers = [stage["identity"]["cache"]["identity"] for stage in result["stages"]]
    near, other = (open_cache(cache).manifest.identity for cache in (world.cache, far))
    assert near != other
    assert teachers == [near, near, other]
    history = json.loads((tmp_path / "run/3-far/model/training.json").read_text())["stages"]
    assert [stage["stage"]["name"] for stage in history] == ["dpt", "near", "far"]
    assert history[2]["student"] == str(tmp_path / "run/2-near/model")
