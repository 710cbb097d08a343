"""Settings of pages and files for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cache_schema.output import require_file
from cache_schema.settings import Help, at_least, check

_PAGE = "The page of --html"


@dataclass(frozen=True, slots=True, kw_only=True)
class PageConfig:
    """Which samples the page shows."""

    samples: Annotated[int, at_least(1), Help("Number of samples.", _PAGE)] = 50
    order: Annotated[
        str, Help("worst: most labels that the teacher finds unlikely; random; or rows and ids.", _PAGE)
    ] = "worst"
    seed: Annotated[int, at_least(0), Help("Seed of the random order.", _PAGE)] = 0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastFiles:
    """Files that `plan` writes. Checked first, since the work takes minutes."""

    write: Annotated[Path | None, Help("Save the command: FILE.sh, or else one argument per line.")] = None
    plot: Annotated[Path | None, Help("Draw bytes against angles: a .png, .svg or .pdf file.")] = None

    def __post_init__(self) -> None:
        pictures = (".png", ".svg", ".pdf")
        faults: dict[str, object] = {
            f"the folder {file.parent} does not exist": not file.parent.is_dir()
            for file in (self.write, self.plot)
            if file is not None
        }
        other = self.plot is not None and self.plot.suffix.lower() not in pictures
        for file in (self.write, self.plot):
            if file is not None and file.parent.is_dir():
                require_file(file)
        check(self, {f"{self.plot} is not a {', '.join(pictures)} file": other, **faults})
