"""The code of docs/notebook.md runs on an exported cache as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cache_schema.operations.arrow_export import to_arrow
from tests.fake_caches import make_cache

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebook.md"


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path / "cache", tmp_path / "images", rows=12)
    cache.write_assets(tmp_path / "assets")
    to_arrow(str(tmp_path / "cache"), tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", NOTEBOOK.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(NOTEBOOK), "exec"), names)
    told = capsys.readouterr().out
    wrong = sum(
        int((sample.response.token_ids[:, 0] != sample.labels[sample.response_positions + 1]).sum())
        for sample in (cache[i] for i in range(len(cache)))
    )
    assert len(names["doubtful"]) == wrong
    assert "response: mean k=1 0." in told
    assert names["asked"] >= names["named"] >= names["right"]
