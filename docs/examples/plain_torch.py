"""Distillation from a cache in plain PyTorch.

python plain_torch.py STUDENT CACHE IMAGES OUT [STEPS]
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from student.dataset import CachedSamples
from student.losses import Denominators, DistillationLoss, Head, LossWeights

folder, cache, images, out = sys.argv[1:5]
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 100

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
data = CachedSamples(cache, processor, batch_size=4, image_root=images)
loader = DataLoader(data, batch_size=4, collate_fn=data.collate)
loss = DistillationLoss(LossWeights())  # CE + KL at answers + KL at visual tokens + 0.5 relation
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

step = 0
while step < steps:
    for batch in loader:  # an epoch; the next one has another order
        labels, targets = batch.pop("labels"), batch.pop("targets")
        hidden = model.model(**batch).last_hidden_state  # (B, T, D); no logits are made
        head = Head(weight=model.lm_head.weight, vocab_size=len(processor.tokenizer))
        parts = loss(hidden, labels, targets, head, Denominators.of(labels, targets))
        parts.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(f"step {step}: loss {parts.total.item():.4f}")
        if step == steps:
            break
model.save_pretrained(out)
processor.save_pretrained(out)
torch.save({"data": data.state_dict(), "step": step}, f"{out}/place.pt")  # where to go on
