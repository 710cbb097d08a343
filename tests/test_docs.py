"""What the pages say must hold: quarantine reasons, recipes, code that reads a cache, links of the README."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from cache_schema.settings import settings_of
from cli import app
from student.loss_weights import LossWeights
from student.stages import RECIPES, Stage, open_recipe
from tests.fake_caches import make_cache

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PACKAGES = ("cache_schema", "models", "pipeline", "student", "views", "demo")
RECIPE_FILES = sorted((DOCS / "recipes").glob("*.yaml"))


def nodes_of_the_code() -> Iterator[ast.AST]:
    for path in [ROOT / "cli.py", *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]:
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def reasons_in_the_code() -> set[str]:
    """The reasons that RowRejected and QuarantinedRow are given as literals anywhere in the packages."""
    found = set()
    for node in nodes_of_the_code():
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in ("RowRejected", "QuarantinedRow"):
            given = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "reason")]
            found |= {one.value for one in given if isinstance(one, ast.Constant)}
    return found


def test_every_quarantine_reason_is_explained():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    section = page.split("## Quarantine reasons")[1].split("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", section, re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert set(explained) == reasons_in_the_code()


def test_the_messages_that_are_explained_are_those_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sections = page.split("\n## Building")[1].split("\n## Frequent")[0]
    cells = re.findall(r"^\| ([^|]+) \|", sections, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall("`([^`]+)`", cell)]
    texts = [node.value for node in nodes_of_the_code() if isinstance(node, ast.Constant)]
    code = "\n".join(text for text in texts if isinstance(text, str))
    assert len(messages) > 20
    assert not [message for message in messages if message not in code]


def test_every_test_that_holds_a_failure_exists():
    """docs/failures.md names a test for every row."""
    page = (DOCS / "failures.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    named = [re.search(r"\| `(test_\w+\.py)::(test_\w+)` \|$", line) for line in rows]
    assert len(rows) > 25
    assert all(named), [row for row, found in zip(rows, named, strict=True) if not found]
    for found in named:
        tree = ast.parse((ROOT / "tests" / found[1]).read_text(encoding="utf-8"))
        assert found[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, found[0]


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_the_example_recipes_load(path):
    assert open_recipe(str(path)).stages
    assert f'"recipes/{path.name}"' in (DOCS / "recipes.md").read_text(encoding="utf-8")


def test_the_written_out_recipe_is_the_built_in_one():
    written = open_recipe(str(DOCS / "recipes" / "llava-kd.yaml"))
    assert tuple(entry.stage for entry in written.stages) == RECIPES[written.name]


def test_the_code_of_the_readme_reads_a_cache(tmp_path, monkeypatch, capsys):
    cache = make_cache(tmp_path / "cache", tmp_path / "images", rows=12)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "open_cache" in block
    )
    assert code in (DOCS / "getting-started.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    sample = cache[0]
    assert first == f"{len(cache)} samples; {len(sample.input_ids)} tokens in the first"
    right = sample.response.token_ids[:, 0] == sample.labels[sample.response_positions + 1]
    assert second.startswith(f"teacher agrees with {right.mean():.0%} of its labels; mass kept 0.")


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_site_lists_every_option_of_every_command_from_the_settings():
    fill = runpy.run_path(str(DOCS / "settings_pages.py"))["on_page_markdown"]
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    filled = fill(page)
    assert "<!--" not in filled
    for name, command in get_command(app).commands.items():
        section = filled.split(f"## kdcache {name}\n")[1].split("\n## ")[0]
        assert command.help in section
        rows = re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE)
        assert len(rows) == len(command.params), name
    assert "| `--top-k` | `32` | Entries stored per position" in filled


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("building.md", "| `--top-k` | `32` | Entries stored per position"),
        (
            "training.md",
            "| `dft` | projector, language model | CE + response + visual + 0.5 relation | 2e-05 | 128 |",
        ),
        ("training.md", "| `--micro-batch` | `8` | Samples per forward pass"),
    ],
)
def test_tables_of_settings_on_other_pages(page, rows):
    fill = runpy.run_path(str(DOCS / "settings_pages.py"))["on_page_markdown"]
    filled = fill((DOCS / page).read_text(encoding="utf-8"))
    assert "<!--" not in filled
    assert f"\n{rows}" in filled


def test_the_page_on_recipes_lists_every_key_of_a_stage():
    fill = runpy.run_path(str(DOCS / "settings_pages.py"))["on_page_markdown"]
    filled = fill((DOCS / "recipes.md").read_text(encoding="utf-8"))
    for owner in (Stage, LossWeights):
        assert all(f"| `{name}` |" in filled for name in settings_of(owner))
    assert "| `weight_decay` | `0.0` | Weight decay of AdamW. |" in filled


def test_every_example_stands_on_the_page_of_other_trainers():
    page = (DOCS / "trainers.md").read_text(encoding="utf-8")
    shown = re.findall(r'^--8<-- "(examples/.+)"$', page, re.MULTILINE)
    assert sorted(shown) == sorted(f"examples/{path.name}" for path in (DOCS / "examples").glob("*.py"))
