"""Samples as requests of vLLM: with the pixels that were prepared, where it makes the same."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch

from cache_schema.datasets.image_roots import ImageRoot
from models.inputs import open_recorded
from pipeline.samples import PreparedSample


class Prompts:
    """Samples as vLLM takes them: ids before the images' expansion, and the images."""

    def __init__(self, tokenizer: Any, image_root: ImageRoot) -> None:
        self._tokenizer = tokenizer
        self._image_root = image_root

    def of(self, samples: Sequence[PreparedSample]) -> list[dict[str, Any]]:
        """One prompt per sample. RowRejected when an image has changed since it was prepared."""
        opened: dict[str, Any] = {}
        prompts: list[dict[str, Any]] = []
        for sample in samples:
            prompt: dict[str, Any] = {"prompt_token_ids": self._ids(sample)}
            for record in sample.images:
                if record.path not in opened:
                    opened[record.path] = open_recorded(
                        self._image_root, record, recorded="when it was prepared"
                    )
            if sample.images:
                prompt["multi_modal_data"] = {"image": [opened[record.path] for record in sample.images]}
            prompts.append(prompt)
        return prompts

    def _ids(self, sample: PreparedSample) -> list[int]:
        ids: list[int] = []
        done = 0
        for expansion in sample.expansions:
            ids.extend(sample.input_ids[done : expansion.start].tolist())
            ids.extend(self._tokenizer(expansion.mark, add_special_tokens=False)["input_ids"])
            done = expansion.end
        ids.extend(sample.input_ids[done:].tolist())
        return ids


class Requests:
    """Samples as requests of one vllm.LLM."""

    def __init__(self, llm: Any, prompts: Prompts) -> None:
        self._llm = llm
        self._prompts = prompts
        self._names = map("kdcache-{}".format, count())
        self.as_prepared = False
        """Whether vLLM takes the prepared pixels; else it reads and processes the images again."""

    def try_prepared(self, samples: Sequence[PreparedSample]) -> None:
        """Sets `as_prepared` if vLLM's own reading of every one of the samples is what was prepared of it."""
        pictured = [sample for sample in samples if sample.images]
        try:
            renderer = self._llm.llm_engine.renderer
            theirs = renderer.render_cmpl(self._prompts.of(pictured), skip_mm_cache=True)
            same = [_same(self._prepared(one), other) for one, other in zip(pictured, theirs, strict=True)]
        except (AttributeError, ImportError, LookupError, NotImplementedError, TypeError, ValueError):
            return  # a model with inputs of its own, or another version
        self.as_prepared = bool(same) and all(same)

    def run(self, samples: Sequence[PreparedSample], params: Any, *, ask: str, **options: Any) -> list[Any]:
        """vLLM's output of each sample. ask: the method of LLM that takes prompts."""
        if not self.as_prepared:
            prompts = self._prompts.of(samples)
            return list(getattr(self._llm, ask)(prompts, params, use_tqdm=False, **options))
        engine, names = self._llm.llm_engine, []
        try:
            for sample in samples:
                names.append(next(self._names))
                engine.add_request(names[-1], self._prepared(sample), params)
        except ValueError:
            engine.abort_request(names)
            raise
        found: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            found |= {output.request_id: output for output in engine.step()}
        return [found[name] for name in names]

    def _prepared(self, sample: PreparedSample) -> dict[str, Any]:
        """The sample as vLLM has it after its own processing."""
        given: dict[str, Any] = {"type": "token", "prompt_token_ids": sample.input_ids.tolist()}
        if not sample.images:
            return given
        inputs = importlib.import_module("vllm.multimodal.inputs")
        pixels = importlib.import_module("transformers").BatchFeature(dict(sample.pixel_inputs))
        processor = self._llm.llm_engine.renderer.get_mm_processor()
        fields = processor._get_mm_fields_config(pixels, {})
        places = []
        for image in sample.images:
            start, end = int(image.positions[0]), int(image.positions[-1]) + 1
            mask = torch.zeros(end - start, dtype=torch.bool)
            mask[torch.from_numpy(image.positions).long() - start] = True
            whole = bool(mask.all())
            places.append(
                inputs.PlaceholderRange(offset=start, length=end - start, is_embed=None if whole else mask)
            )
        number = len(sample.images)  # some processors tile an image by how many there are
        return given | {
            "type": "multimodal",
            "mm_kwargs": inputs.MultiModalKwargsItems.from_hf_inputs(pixels, fields),
            "mm_hashes": {"image": [f"{image.sha256}-{number}" for image in sample.images]},
            "mm_placeholders": {"image": places},
        }


def _same(prepared: Mapping[str, Any], rendered: Mapping[str, Any]) -> bool:
    """Whether two inputs are the same, their images' names aside."""
    if list(rendered["prompt_token_ids"]) != prepared["prompt_token_ids"]:
        return False
    if rendered["mm_placeholders"] != prepared["mm_placeholders"]:
        return False
    mine, theirs = ([dict(item) for item in one["mm_kwargs"]["image"]] for one in (prepared, rendered))
    return len(mine) == len(theirs) and all(
        one.keys() == other.keys()
        and all(one[name].data.dtype == other[name].data.dtype for name in one)
        and all(torch.equal(one[name].data, other[name].data) for name in one)
        for one, other in zip(mine, theirs, strict=True)
    )
