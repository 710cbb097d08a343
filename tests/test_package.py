"""What people install: the sdist, the wheel made from it, and the commands in a folder that is not theirs."""

import json
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cache_schema.version import VERSION
from tests.test_house import FOLDERS, source_files
from tests.tiny_models import tiny_dataset, tiny_llava

ROOT = Path(__file__).resolve().parent.parent
BACKEND = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"

pytestmark = pytest.mark.slow


def run(*words, cwd):
    done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def packed(hook, source, out):
    """The file that a hook of the build backend makes of a source folder."""
    out.mkdir(exist_ok=True)
    name = run(sys.executable, "-W", "ignore", "-c", BACKEND, hook, out, cwd=source).splitlines()[-1]
    return out / name


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The sdist of the sources, and the wheel of what is in the sdist."""
    folder = tmp_path_factory.mktemp("package")
    names = [*FOLDERS, "cli.py", "pyproject.toml", "README.md", "LICENSE"]
    (folder / "source").mkdir()
    names += ["MANIFEST.in", "docs/examples"]
    (folder / "source/docs").mkdir()
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    sdist = packed("build_sdist", folder / "source", folder / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    wheel = packed("build_wheel", folder / f"kdcache-{VERSION}", folder / "dist")
    return SimpleNamespace(sdist=sdist, wheel=wheel)


@pytest.fixture(scope="module")
def installed(package, tmp_path_factory):
    """An environment with the wheel and this one's libraries, and a folder with a file cli.py to work in."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, package.wheel, cwd=folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    work = folder / "work"
    work.mkdir()
    (work / "cli.py").write_text("raise SystemExit('the wrong cli.py was run')\n")
    return SimpleNamespace(python=python, kdcache=python.with_name("kdcache"), work=work)


def test_the_wheel_holds_the_product_and_nothing_else(package):
    assert (package.sdist.name, package.wheel.name) == (
        f"kdcache-{VERSION}.tar.gz",
        f"kdcache-{VERSION}-py3-none-any.whl",
    )
    names = {name for name in zipfile.ZipFile(package.wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == {
        str(path.relative_to(ROOT)) for path in source_files()
    }
    data = {
        path
        for folder in ("views/page", "pipeline/templates", "demo/teacher")
        for path in (ROOT / folder).iterdir()
    }
    assert {str(path.relative_to(ROOT)) for path in data} <= names
    assert {name.split("/")[0] for name in names} == {*FOLDERS, "cli.py"}


def test_the_sdist_holds_the_examples(package):
    with tarfile.open(package.sdist) as archive:
        names = set(archive.getnames())
    examples = {path.name for path in (ROOT / "docs/examples").iterdir()}
    assert {"slurm_build.sh", "kubernetes_build.yaml", "accelerate_fsdp2.yaml"} <= examples
    assert {f"kdcache-{VERSION}/docs/examples/{name}" for name in examples} <= names


def test_the_installed_commands_run_in_a_folder_with_another_cli(installed, tmp_path):
    teacher, data = tiny_llava(tmp_path / "teacher"), tiny_dataset(tmp_path / "data", rows=6)
    cache, out = tmp_path / "cache", tmp_path / "run"
    assert "build" in run(installed.kdcache, "--help", cwd=installed.work)
    assert run(installed.kdcache, "--version", cwd=installed.work) == f"kdcache {VERSION}\n"
    made = run(
        *(installed.kdcache, "build", "--teacher", teacher, "--data", data.data, "--out", cache),
        *("--image-root", data.image_root, "--dtype", "float32", "--device", "cpu", "--json"),
        cwd=installed.work,
    )
    assert json.loads(made)["captured"] == 6
    manifest = json.loads((cache / "manifest.json").read_text())
    commit = json.loads((cache / "commits" / "00000.json").read_text())
    assert manifest["kdcache_version"] == commit["kdcache_version"] == VERSION
    launch = (installed.python, "-P", "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu")
    run(
        *(*launch, "--num_processes", 1, "--no_python", installed.kdcache, "train", "--stage", "sft"),
        *("--student", teacher, "--cache", cache, "--image-root", data.image_root, "--out", out),
        *("--global-batch", 2, "--micro-batch", 2, "--max-steps", 1, "--device", "cpu"),
        cwd=installed.work,
    )
    assert json.loads((out / "result.json").read_text())["steps"] == 1
    assert f"kdcache: {VERSION}" in (out / "recipe.yaml").read_text()
    run(installed.kdcache, "export", "--model", out, "--out", tmp_path / "exported", cwd=installed.work)
    assert f"- versions: kdcache {VERSION}, torch " in (tmp_path / "exported" / "README.md").read_text()
    step = f"from demo.story import kdcache; assert kdcache(['verify', {str(cache)!r}])['ok']"
    run(installed.python, "-P", "-c", step, cwd=installed.work)  # as the demo runs its commands
