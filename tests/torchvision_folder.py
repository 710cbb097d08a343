"""torchvision beside a CPU-only torch, for the processors that need it, in a folder of its own.

PyPI's wheel does not import there, because its compiled operators ask for CUDA; its Python parts work once
the schemas of `nms` and `qnms` are declared. `sitecustomize.py` in the folder declares them, so putting the
folder on PYTHONPATH is all that a process needs. Run as a module to prepare the folder, or with --hook to
make the hook part of this Python's own environment, which has torchvision already.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".venv-torchvision"
PACKAGES = ("torchvision==0.28.0", "num2words==0.5.14", "docopt==0.6.2", "bitsandbytes==0.50.2")
"""torchvision for torch 2.13; what SmolVLM's processor imports; and what quantised teachers need."""

HOOK = '''"""Declares what torchvision's compiled part would declare, just before torchvision is imported."""
import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.torchvision_schemas = self.library  # kept alive
        return None


sys.meta_path.insert(0, BeforeTorchvision())
'''


def prepared_folder() -> Path:
    """The folder with torchvision in it, installed when it is not there yet."""
    marker = FOLDER / "installed"
    if not marker.is_file() or marker.read_text() != " ".join(PACKAGES):
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*install, "--target", str(FOLDER), *PACKAGES], check=True)
        (FOLDER / "sitecustomize.py").write_text(HOOK)
        marker.write_text(" ".join(PACKAGES))
    return FOLDER


def environment() -> dict[str, str]:
    """This process's environment with torchvision importable."""
    paths = [str(prepared_folder()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def install_hook() -> None:
    """Runs HOOK at the start of every process of this environment."""
    packages = Path(sysconfig.get_path("purelib"))
    (packages / "torchvision_schemas.py").write_text(HOOK)
    (packages / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")


if __name__ == "__main__":
    install_hook() if "--hook" in sys.argv else prepared_folder()
