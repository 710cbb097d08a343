"""Distillation from a cache with the Trainer of transformers.

python hf_trainer.py STUDENT CACHE IMAGES OUT [STEPS]
"""

import sys
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from student.dataset import CachedSamples
from student.losses import Denominators, DistillationLoss, Head, LossWeights


class DistillationTrainer(Trainer):
    loss = DistillationLoss(LossWeights())

    def get_train_dataloader(self) -> DataLoader:
        # The dataset yields this rank's samples only: a prepared loader would split them a second time.
        data = self.train_dataset
        return DataLoader(data, batch_size=self.args.per_device_train_batch_size, collate_fn=data.collate)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        labels, targets = inputs.pop("labels"), inputs.pop("targets").to(self.args.device)
        plain = self.accelerator.unwrap_model(model)
        hidden = plain.model(**inputs).last_hidden_state
        head = Head(weight=plain.lm_head.weight, vocab_size=len(self.processing_class.tokenizer))
        parts = self.loss(hidden, labels, targets, head, Denominators.of(labels, targets))
        self.log({name: value.item() for name, value in parts.by_term.items()})
        return (parts.total, {}) if return_outputs else parts.total


folder, cache, images, out = sys.argv[1:5]
processor = AutoProcessor.from_pretrained(folder)
trainer = DistillationTrainer(
    model=AutoModelForImageTextToText.from_pretrained(folder),
    args=TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=4,
        max_steps=int(sys.argv[5]) if len(sys.argv) > 5 else 100,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    ),
    train_dataset=CachedSamples(cache, processor, batch_size=4, image_root=images),
    processing_class=processor,
)
trainer.train()
trainer.save_model(out)
processor.save_pretrained(out)
