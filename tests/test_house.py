"""The house: who may import whom, the order of files in docs/architecture.md, and what must stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cache_schema", "models", "pipeline", "student", "views", "demo", "ablations")
MAY_IMPORT = {
    "cache_schema": {"cache_schema"},
    "models": {"models", "cache_schema"},
    "pipeline": {"pipeline", "models", "cache_schema"},
    "student": {"student", "models", "cache_schema"},
    "views": {"views", "cache_schema"},
    "demo": {"demo", "views", "cache_schema"},
    "ablations": {*FOLDERS},
    "cli": {*FOLDERS} - {"ablations"},
}
# Rooms of the contract; a file that stands in none of them is below all of them.
ROOMS_MAY_IMPORT = {
    "format": {"format"},
    "datasets": {"datasets"},
    "operations": {"operations", "format"},
    "": set(),
}
# Pillow decodes images in one file only, since teacher and student must decode them identically.
CONTRACT_LIBRARIES = {"numpy", "numcodecs", "msgspec", "zarr", "pyarrow", "fsspec"}


def source_files() -> list[Path]:
    return [ROOT / "cli.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def imports_of(path: Path) -> set[str]:
    """Full dotted names of the modules that a file imports, anywhere in it."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]).strip(".")
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def drawn_tree() -> list[str]:
    """Paths of the annotated tree of docs/architecture.md, in order."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```tree\n(.*?)```", text, re.DOTALL)
    assert block, "docs/architecture.md has no ```tree block"
    paths: list[str] = []
    folders: list[str] = []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        paths.append("/".join([*folders, name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return paths


def test_every_package_imports_only_what_stands_below_it():
    wrong = []
    for path in source_files():
        owner = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports_of(path):
            target = name.split(".")[0]
            if target in {*FOLDERS, "cli"} and target not in MAY_IMPORT[owner]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_rooms_of_the_contract_import_one_way():
    wrong = []
    for path in sorted((ROOT / "cache_schema").rglob("*.py")):
        inner = path.relative_to(ROOT / "cache_schema").parts
        room = inner[0] if len(inner) > 1 else ""
        if inner == ("__init__.py",):
            continue  # offers names of every room, loaded when used
        for name in imports_of(path):
            parts = name.split(".")
            target = parts[1] if parts[0] == "cache_schema" and len(parts) > 2 else ""
            if target in ROOMS_MAY_IMPORT and target and target not in ROOMS_MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_contract_is_free_of_engines():
    wrong = []
    for path in sorted((ROOT / "cache_schema").rglob("*.py")):
        for name in imports_of(path):
            library = name.split(".")[0]
            allowed = library in CONTRACT_LIBRARIES | {"cache_schema"} | set(sys.stdlib_module_names)
            if not allowed and not (library == "PIL" and path.name == "images.py"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_drawn_tree_is_the_tree_on_disk():
    listed = [path for path in drawn_tree() if path.endswith(".py")]
    real = {str(path.relative_to(ROOT)) for path in source_files() if path.name != "__init__.py"}
    in_house = [path for path in listed if path.split("/")[0].removesuffix(".py") in {*FOLDERS, "cli"}]
    assert set(in_house) == real
    assert len(in_house) == len(set(in_house))
    for path in drawn_tree():
        assert (ROOT / path).exists(), f"docs/architecture.md names {path}, which does not exist"


def test_files_import_only_files_above_them_in_the_tree():
    order = {path: place for place, path in enumerate(drawn_tree())}
    wrong = []
    for path in source_files():
        relative = str(path.relative_to(ROOT))
        if path.name == "__init__.py":
            continue
        for name in imports_of(path):
            target = name.replace(".", "/") + ".py"
            same_package = target.split("/")[0] == relative.split("/")[0]
            if same_package and target in order and order[target] > order[relative]:
                wrong.append(f"{relative} imports {target}, which stands below it")
    assert not wrong


def test_no_file_is_long_and_no_name_says_nothing():
    for path in source_files():
        longest = 350 if path.name == "cli.py" else 400
        assert len(path.read_text(encoding="utf-8").splitlines()) <= longest, path
        assert path.stem not in {"utils", "util", "common", "helpers", "manager", "misc"}, path


def test_help_of_every_command_needs_no_heavy_import():
    code = (
        "import sys, cli\n"
        "from typer.main import get_command\n"
        "commands = list(get_command(cli.app).commands)\n"
        "assert len(commands) > 15\n"
        "for words in ([], *([name] for name in commands)):\n"
        "    sys.argv = ['kdcache', *words, '--help']\n"
        "    try:\n        cli.main()\n"
        "    except SystemExit as stop:\n        assert stop.code in (0, None)\n"
        "heavy = {'torch', 'transformers', 'zarr', 'pyarrow', 'numpy', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60)


def test_optional_engines_stay_unimported():
    code = (
        "import sys, pipeline.capture, student.train\n"
        "assert not {'vllm', 'easy_vqa', 'peft', 's3fs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)


def test_every_option_has_a_help_text():
    import typer

    import cli

    group = typer.main.get_command(cli.app)
    bare = [
        f"{name} {parameter.name}"
        for name, command in group.commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert not bare
    assert all(command.help for command in group.commands.values())
