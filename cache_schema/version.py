"""The version of kdcache: pyproject.toml reads it here, and everything that is written records it."""

VERSION = "0.2.0"
