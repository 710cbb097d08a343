"""Distillation from a cache with SFTTrainer of TRL, whose loss is replaced: on one process.

python trl_sft.py STUDENT CACHE IMAGES OUT [STEPS]
"""

import sys
from typing import Any

from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from student.dataset import CachedSamples
from student.losses import Denominators, DistillationLoss, Head, LossWeights


class DistilledSFTTrainer(SFTTrainer):
    objective = DistillationLoss(LossWeights())

    def get_train_dataloader(self) -> DataLoader:
        # The dataset yields this rank's samples only: a prepared loader would split them a second time.
        return DataLoader(data, batch_size=self.args.per_device_train_batch_size, collate_fn=data.collate)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        labels, targets = inputs.pop("labels"), inputs.pop("targets").to(self.args.device)
        plain = self.accelerator.unwrap_model(model)
        hidden = plain.model(**inputs).last_hidden_state
        head = Head(weight=plain.lm_head.weight, vocab_size=len(self.processing_class.tokenizer))
        parts = self.objective(hidden, labels, targets, head, Denominators.of(labels, targets))
        return (parts.total, {}) if return_outputs else parts.total


folder, cache, images, out = sys.argv[1:5]
processor = AutoProcessor.from_pretrained(folder)
data = CachedSamples(cache, processor, batch_size=4, image_root=images)
trainer = DistilledSFTTrainer(
    model=AutoModelForImageTextToText.from_pretrained(folder),
    args=SFTConfig(
        output_dir=out,
        per_device_train_batch_size=4,
        max_steps=int(sys.argv[5]) if len(sys.argv) > 5 else 100,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},  # the cache holds token ids
    ),
    train_dataset=IterableDataset.from_generator(lambda: iter(data)),  # TRL asks for one; see the loader
    processing_class=processor,
)
if trainer.args.world_size > 1:  # the loss is outside of what DDP wraps: it would not share the gradients
    sys.exit("this example is for one process; hf_trainer.py runs on several")
trainer.train()
trainer.save_model(out)
processor.save_pretrained(out)
