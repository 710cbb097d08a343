"""Compiled layers of a language model, kept only if they give what the plain ones give."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import nn

from cache_schema.errors import first_line


def compile_layers(layers: Sequence[nn.Module], check: Callable[[], str | None]) -> str | None:
    """Compiles each of `layers` on its own, so that one compilation serves all alike.

    check: runs the model and returns what is wrong with it, None where nothing is. Returns that, or what the
    compiler raised; the layers are then as they were before.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compilers warn of their own parts
            for layer in layers:
                layer.compile()
            problem = check()
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the model runs without it
        problem = f"torch.compile fails: {first_line(error)}"
    if problem is not None:
        for layer in layers:
            layer._compiled_call_impl = None
    return problem
