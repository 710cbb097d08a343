"""Training in phases: next tokens of a LLaVA model, and a folder that keeps what each phase has made."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from cache_schema.progress import Progress, task
from demo.language_model import IGNORE, padded
from demo.teacher_texts import Row, attention_of
from demo.vision_tower import one_cycle


def train_phase(
    name: str,
    model: LlavaForConditionalGeneration,
    pixels_of: Callable[[list[int]], Tensor],
    batches: Iterator[tuple[list[int], list[Row]]],
    *,
    trained: Sequence[nn.Module],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    progress: Progress,
    check: Callable[[], str] | None = None,
) -> None:
    """Next-token training of the `trained` modules on supervised positions; everything else is frozen.

    Args:
        pixels_of: pixel values (B, 3, H, W) of the B pictures that `batches` names by number.
    """
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, steps))
    with task(progress, name, steps):
        running = 0.0
        for step, (chosen, rows) in enumerate(batches, start=1):
            ids = padded([row.ids for row in rows], model.config.text_config.pad_token_id)
            labels = padded([row.labels for row in rows], IGNORE)
            supervised = labels[:, 1:] != IGNORE
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if any(any(row.parts) for row in rows):
                    mask, positions = attention_of(rows)
                    attention = {"attention_mask": {"full_attention": mask}, "position_ids": positions}
                else:  # padding is on the right and attention is causal: supervised positions need no mask
                    attention = {}
                outputs = model.model(input_ids=ids, pixel_values=pixels_of(chosen), **attention)
                logits = model.lm_head(outputs.last_hidden_state[:, :-1][supervised])
            loss = nn.functional.cross_entropy(logits.float(), labels[:, 1:][supervised])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
            progress.update(step, loss=f"{running:.4f}")
            if check is not None and (step % 200 == 0 or step == steps):
                progress.message(f"{name}, step {step}: {check()}")


class WorkFolder:
    """Finished phases, each a folder with its settings; a phase whose settings differ is made again."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path = path
        self._progress = progress

    def phase(self, name: str, settings: dict[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of phase `name`, made by `make` unless it is there; renamed into place when complete."""
        folder, partial = self._path / name, self._path / f"{name}.partial"
        stamp = folder / "settings.json"
        if stamp.exists() and json.loads(stamp.read_text()) == settings:
            self._progress.message(f"{name}: kept from {folder}")
            return folder
        for stale in (folder, partial):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        started = time.monotonic()
        make(partial)
        (partial / "seconds.json").write_text(json.dumps(round(time.monotonic() - started, 1)))
        (partial / "settings.json").write_text(json.dumps(settings, indent=1))
        partial.rename(folder)
        return folder


class Lines:
    """Progress as plain lines, one per ten seconds."""

    def __init__(self) -> None:
        self._what, self._total, self._began, self._told = "", 0, 0.0, 0.0

    def begin(self, what: str, total: int | None) -> None:
        self._what, self._total, self._began = what, total or 0, time.monotonic()

    def update(self, done: int, **fields: str) -> None:
        now = time.monotonic()
        if now - self._told < 10 and done != self._total:
            return
        self._told = now
        shown = ", ".join(f"{name} {value}" for name, value in fields.items())
        print(f"{self._what} {done}/{self._total}: {shown}, {now - self._began:.0f} s", flush=True)

    def message(self, line: str) -> None:
        print(line, flush=True)

    def end(self) -> None: ...
