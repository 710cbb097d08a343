"""The files of a model folder, looked at before transformers reads them: what half a download leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError

_POINTER = b"version https://git-lfs"
_LONGEST_HEADER = 100 << 20  # bytes, as safetensors itself allows


def require_whole_files(folder: Path) -> dict[str, Any]:
    """The folder's config.json. KdcacheError where a file is a git-lfs pointer, JSON that is none or no
    object, or weights that are cut off or lack a shard."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt") and path.is_file():
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise KdcacheError(
                        f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in {folder}"
                    )
    read = ["config.json", *(path.name for path in sorted(folder.glob("*config.json")) if path.is_file())]
    read += [path.name for path in sorted(folder.glob("*.index.json"))]
    documents = {name: _document(folder / name) for name in read}
    for name, document in documents.items():
        shards = document.get("weight_map") if name.endswith(".index.json") else None
        named = set(shards.values()) if isinstance(shards, dict) else set()
        missing = sorted(shard for shard in named if not (folder / str(shard)).is_file())
        if missing:
            raise KdcacheError(
                f"{folder} lacks {len(missing)} of {len(named)} weights files of {name} ({missing[0]}, ...); "
                "fetch them"
            )
    for path in sorted(folder.glob("*.safetensors")):
        _require_whole_weights(path)
    return documents["config.json"]


def weights_files(folder: Path) -> list[Path]:
    """The weights in `folder`: .safetensors, else .bin. KdcacheError when there are none."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise KdcacheError(f"{folder} holds no weights (*.safetensors); give the whole checkpoint")
    return files


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise KdcacheError(f"{path} is not valid JSON: {error}; fetch it again") from error
    if not isinstance(document, dict):
        if path.name == "config.json":
            kind = type(document).__name__
            raise KdcacheError(f"{path} holds a {kind}, not an object; fetch it again")
        return {}
    return document


def _require_whole_weights(path: Path) -> None:
    """A safetensors file says in its header how long it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= min(size, _LONGEST_HEADER) else b""
    try:
        tensors = json.loads(header)
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        raise KdcacheError(f"{path} is cut off or damaged: it has no header; fetch it again") from None
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise KdcacheError(f"{path} has {size} of {whole} bytes: it is cut off or damaged; fetch it again")
