"""A build in a process of its own.

    python -m tests.cache_build_child URL [rank world_size] [--version V] [--die-at N]

Prints the shards it committed, or with --moments the moments at which it could die.
"""

from __future__ import annotations

import argparse

from cache_schema.format.documents import FORMAT_VERSION
from tests.cache_faults import die, moments
from tests.cache_teacher import build_cache, disturbed_spec


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("workers", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--version", type=int, default=FORMAT_VERSION)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--moments", action="store_true")
    options = parser.parse_args()
    spec = disturbed_spec(options.version)
    with moments(options.die_at, die) as counter:
        made = build_cache(options.url, spec, workers=tuple(options.workers), version=options.version)
    print("\n".join(counter.names) if options.moments else " ".join(map(str, made)))


if __name__ == "__main__":
    main()
