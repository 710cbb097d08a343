"""Distillation from a cache with accelerate alone, on any number of processes.

accelerate launch with_accelerate.py STUDENT CACHE IMAGES OUT [STEPS]
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from student.dataset import CachedSamples
from student.losses import Denominators, LossWeights
from student.model import DistilledStudent

folder, cache, images, out = sys.argv[1:5]
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 100

accelerator = Accelerator()
processor = AutoProcessor.from_pretrained(folder)
# The loss uses the head's weight inside the forward that is wrapped, so that DDP sees every gradient.
student = DistilledStudent(
    AutoModelForImageTextToText.from_pretrained(folder),
    LossWeights(),
    vocab_size=len(processor.tokenizer),
    trainable=("projector", "language_model"),
)
trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
model, optimizer = accelerator.prepare(student, torch.optim.AdamW(trained, lr=1e-4))
# The dataset yields this rank's samples only: a prepared loader would split them a second time.
data = CachedSamples(
    cache,
    processor,
    batch_size=4,
    image_root=images,
    rank=accelerator.process_index,
    world_size=accelerator.num_processes,
)
loader = DataLoader(data, batch_size=4, collate_fn=data.collate)

step = 0
while step < steps:
    for batch in loader:
        inputs = send_to_device(batch, accelerator.device)
        labels, targets = inputs.pop("labels"), inputs.pop("targets")
        counts = Denominators.of(labels, targets)
        parts = model(inputs, labels, targets, counts)  # DDP averages the gradients of the processes
        accelerator.backward(parts.total)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        accelerator.print(f"step {step}: loss {parts.total.item():.4f}")
        if step == steps:
            break
if accelerator.is_main_process:
    student.model.save_pretrained(out)
    processor.save_pretrained(out)
accelerator.end_training()
