"""The condition of `select --where` means what it says, and nothing else is ever run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_schema.errors import KdcacheError
from cache_schema.operations.condition import FIELDS, parse

COLUMNS = {
    "row": np.array([0, 1, 2, 3]),
    "id": ["cat-1", "dog-2", "cat-3", ""],
    "tokens": np.array([10, 20, 30, 40]),
    "images": np.array([1, 0, 2, 1]),
    "image": [("a.png",), (), ("b/cat.png", "a.png"), ("c.png",)],
    "confidence": np.array([0.1, 0.5, 0.9, np.nan]),
    "disagreement": np.array([0.9, 0.5, 0.0, np.nan]),
    "perplexity": np.array([100.0, 3.0, 1.5, np.nan]),
    "response_tokens": np.array([5, 25, 5, 0]),
    "reference": np.array([-2.0, -1.0, -3.0, np.nan]),
    "advantage": np.array([0.5, -0.5, 1.5, np.nan]),
}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("tokens < 25", [0, 1]),
        ("25 > tokens", [0, 1]),
        ("15 <= tokens < 40", [1, 2]),
        ("tokens == 10 or row == 3", [0, 3]),
        ("tokens > 10 and images > 0", [2, 3]),
        ("not (tokens > 10 and images > 0)", [0, 1]),
        ("row in [0, 3]", [0, 3]),
        ("row not in (0, 3)", [1, 2]),
        ("row > -1 and row != 2", [0, 1, 3]),
        ("id == 'dog-2'", [1]),
        ("id != 'dog-2'", [0, 2, 3]),
        ("'cat' in id", [0, 2]),
        ("'cat' not in id", [1, 3]),
        ("id in ['cat-1', 'dog-2']", [0, 1]),
        ("image == 'a.png'", [0, 2]),
        ("image != 'a.png'", [1, 3]),
        ("'cat' in image", [2]),
        ("image in ['c.png', 'a.png']", [0, 2, 3]),
        ("confidence > 0.4", [1, 2]),
        ("not confidence > 0.4", [0, 3]),
        ("disagreement <= 0.5 and perplexity < 2", [2]),
        ("response_tokens > tokens", [1]),
        ("  tokens < 25 ", [0, 1]),
    ],
)
def test_conditions(text: str, rows: list[int]) -> None:
    assert np.flatnonzero(parse(text).mask(COLUMNS)).tolist() == rows


def test_a_condition_knows_its_fields() -> None:
    assert parse("tokens < 5 or confidence > 0.1").fields == {"tokens", "confidence"}
    assert set(COLUMNS) == set(FIELDS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a condition"),
        ("tokens <", "not a condition"),
        ("tokens < 5; row", "not a condition"),
        ("x\0", "not a condition"),
        ("tokens", "expected a comparison"),
        ("True", "expected a comparison"),
        ("tokens + 1", "expected a comparison"),
        ("tokens < row + 1", "expected a number or a text"),
        ("tokns < 5", "no field 'tokns'"),
        ("tokens < 'five'", "compared with a number"),
        ("id == 5", "compared with a text"),
        ("id < 'b'", "id is text"),
        ("tokens is 5", "use =="),
        ("id == image", "only numbers"),
        ("5 < 6", "one side must be a field"),
        ("tokens < True", "expected a number"),
        ("tokens in 5", "`in` needs"),
        ("'1' in tokens", "is a number"),
        ("row in [1, 'a']", "compared with a number"),
        ("__import__('os').system('true') == 0", "one side must be a field"),
        ("tokens < (lambda: 5)()", "expected a number"),
        ("tokens.real < 5", "one side must be a field"),
        ("[row for row in id] == 1", "one side must be a field"),
        ("(tokens := 5) < 6", "one side must be a field"),
        ("f'{row}' == id", "expected a number or a text"),
    ],
)
def test_anything_else_is_refused_with_its_place(text: str, told: str) -> None:
    with pytest.raises(KdcacheError, match="--where") as caught:
        parse(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_endless_nesting_is_refused() -> None:
    with pytest.raises(KdcacheError, match="--where"):
        parse("(" * 5000 + "tokens < 5" + ")" * 5000)
    with pytest.raises(KdcacheError, match="--where"):
        parse("not " * 5000 + "tokens < 5")


def test_rows_and_ids_from_a_file(tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("3\n\n 1 \n77\n", encoding="utf-8")
    assert np.flatnonzero(parse(f"rows:{rows}").mask(COLUMNS)).tolist() == [1, 3]
    ids = tmp_path / "ids.txt"
    ids.write_text("cat-3\ndog-2\n", encoding="utf-8")
    assert np.flatnonzero(parse(f"ids:{ids}").mask(COLUMNS)).tolist() == [1, 2]
    with pytest.raises(KdcacheError, match="one row number per line"):
        parse(f"rows:{ids}")
    with pytest.raises(KdcacheError, match="cannot read"):
        parse(f"rows:{tmp_path / 'absent'}")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("advantage >= quantile(0.5)", [0, 2]),
        ("tokens > quantile(0.5) or advantage == quantile(0)", [1, 2, 3]),
        ("quantile(1) > reference", [0, 2]),
        ("quantile(0.25) <= tokens <= quantile(0.75)", [1, 2]),
    ],
)
def test_quantiles_are_those_of_the_samples_that_have_the_field(text, rows):
    condition = parse(text)
    mask = condition.mask({**COLUMNS, **condition.quantiles_of(COLUMNS)})
    assert np.flatnonzero(mask).tolist() == rows


@pytest.mark.parametrize(
    "text",
    [
        "quantile(0.5) > 3",
        "advantage > quantile(2)",
        "advantage > quantile('a')",
        "id == quantile(0.5)",
        "advantage > mean(0.5)",
        "advantage > quantile(0.5, 0.6)",
        "advantage > quantile(share=0.5)",
        "advantage in [quantile(0.5)]",
    ],
)
def test_what_is_no_quantile_is_refused(text):
    with pytest.raises(KdcacheError, match="fields: row"):
        parse(text)


def test_a_field_that_no_sample_has_has_no_quantile():
    condition = parse("advantage > quantile(0.5)")
    with pytest.raises(KdcacheError, match="no sample has the field advantage"):
        condition.quantiles_of({"advantage": np.full(3, np.nan)})
