"""Distillation from a cache with the Trainer of transformers, on any number of processes.

python hf_trainer.py STUDENT CACHE IMAGES OUT [STEPS], or with torchrun
"""

import sys
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from student.dataset import CachedSamples
from student.losses import Denominators, LossWeights
from student.model import DistilledStudent


class Student(DistilledStudent):
    """The loss uses the head's weight inside the forward that Trainer wraps: DDP sees every gradient."""

    @property
    def config(self) -> Any:  # Trainer asks for it
        return self.model.config


class DistillationTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        # The dataset yields this rank's samples only: a prepared loader would split them a second time.
        data = self.train_dataset
        return DataLoader(data, batch_size=self.args.per_device_train_batch_size, collate_fn=data.collate)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        labels, targets = inputs.pop("labels"), inputs.pop("targets").to(self.args.device)
        parts = model(inputs, labels, targets, Denominators.of(labels, targets))
        self.log({name: value.item() for name, value in parts.by_term.items()})
        return (parts.total, {}) if return_outputs else parts.total


folder, cache, images, out = sys.argv[1:5]
processor = AutoProcessor.from_pretrained(folder)
student = Student(
    AutoModelForImageTextToText.from_pretrained(folder),
    LossWeights(),
    vocab_size=len(processor.tokenizer),
    trainable=("projector", "language_model"),
)
arguments = TrainingArguments(
    output_dir=out,
    per_device_train_batch_size=4,
    max_steps=int(sys.argv[5]) if len(sys.argv) > 5 else 100,
    learning_rate=1e-4,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    remove_unused_columns=False,
)
data = CachedSamples(
    cache,
    processor,
    batch_size=4,
    image_root=images,
    rank=arguments.process_index,
    world_size=arguments.world_size,
)
trainer = DistillationTrainer(model=student, args=arguments, train_dataset=data)
trainer.train()
if trainer.is_world_process_zero():
    student.model.save_pretrained(out)
    processor.save_pretrained(out)
