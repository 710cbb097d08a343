"""`python -m ablations`, or `make results`: the paper's ablations on two small sets, and their page."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

from ablations.arms import Budget
from ablations.page import write_page
from ablations.study import Study, StudySettings, run_study
from cache_schema.errors import KdcacheError
from demo.phases import Lines

FULL = StudySettings(
    budgets={
        "easy-vqa": Budget(images=400, fewer=(100, 200)),
        "mosaics": Budget(images=400, fewer=(100, 200), factors=(1.0, 2.0)),
    }
)
QUICK = replace(
    FULL,
    budgets={name: replace(budget, factors=(1.0,)) for name, budget in FULL.budgets.items()},
    seeds=3,
    live=None,
    sizes=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ablations", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results-run"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="the page to write; default: OUT/results.md")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", choices=tuple(FULL.budgets), help="the one set to work on this time")
    parser.add_argument("--quick", action="store_true", help="3 seeds, no search, Tables 2 to 4 alone")
    parser.add_argument("--page-only", action="store_true", help="write the page of the runs that are there")
    options = parser.parse_args()
    study = Study(options.out, QUICK if options.quick else FULL, options.only)
    # As Ctrl-C: the processes of the runs end with this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not options.page_only:
            run_study(study, options.jobs, Lines())
        write_page(study, options.page or options.out / "results.md")
    except KdcacheError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to continue")


if __name__ == "__main__":
    main()
