"""A teacher that sleeps in place of a device: what a build's host does beside it, without a GPU.

Its folder has the tokenizer (151,936 tokens), processor and token counts of LLaVA-KD's teacher (729 visual
tokens) and a tiny model. The engine sleeps, the interpreter released, and records come from a store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig

from benchmarks._random_cache import random_records
from benchmarks._smollm2 import IMAGE_TOKEN, save_llava
from cache_schema import TargetSpec
from models.head import Head
from pipeline.relation import RelationMaker, groups_of
from pipeline.samples import PreparedSample
from pipeline.targets import Asked, PendingRecords, TargetMaker

VOCAB, VISUAL = 151_936, 729
_IMAGES = 8  # different relation records


def stand_in_folder(folder: Path, *, side: int = 384, patch: int = 14) -> Path:
    """The teacher's folder; its tokenizer has merges learned from the Python manual. side, patch: pixels of
    its images and of a visual token, along one edge."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(topics.values(), trainer)
    document = json.loads(core.to_str())
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"<unused {number}>": number for number in range(len(vocabulary), VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    language = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        vision_use_head=False,
    )
    return save_llava(
        folder,
        tokenizer=tokenizer,
        language=LlamaForCausalLM(language),
        vision=vision,
    )


class StandInEngine:
    """Hidden states (T, 1) of nothing, after `seconds` per sample."""

    can_pack = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.samples = 0
        self.description = {"engine": "stand-in"}
        self.head = Head(weight=torch.zeros(VOCAB, 1), vocab_size=VOCAB)

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        time.sleep(self.seconds * len(samples))
        self.samples += len(samples)
        return [torch.zeros(len(sample), 1) for sample in samples]


class StoredTargets(TargetMaker):
    """A target maker whose tensors come from a store: top-k records of random ids, relation records of images
    with a flat spectrum of `rank`."""

    def __init__(self, spec: TargetSpec, *, rank: int) -> None:
        self._spec = spec
        torch.manual_seed(0)
        random = np.random.default_rng(0)
        records = random_records(random, 4096, VOCAB, spec.top_k)
        names = ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy")
        self._fields_of = {name: torch.from_numpy(getattr(records, name)) for name in names}
        self._fields_of["label_logprob"] = torch.full((4096,), -1.5)
        self._fields_of["finite"] = torch.ones(4096, dtype=torch.bool)
        self._relations = RelationMaker(Head(weight=torch.randn(2048, rank), vocab_size=2048), spec)
        places = np.arange(_IMAGES * VISUAL).reshape(_IMAGES, VISUAL)
        ((_, self._images),) = self._relations.batch(torch.randn(places.size, rank), list(places))

    def batch(self, states: Tensor, asked: Asked) -> PendingRecords:
        chosen = torch.from_numpy(
            np.random.default_rng(int(asked.rows[0])).integers(0, 4096, len(asked.places))
        )
        fields = {name: values[chosen] for name, values in self._fields_of.items()}
        groups = [
            (
                group,
                {
                    name: values[torch.from_numpy(group.images) % _IMAGES]
                    for name, values in self._images.items()
                },
            )
            for group in groups_of([len(image) for image in asked.images])
        ]
        return PendingRecords(self, fields, groups)
