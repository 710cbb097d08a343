"""Head.of reads what turns a transformers model's final hidden states into its logits."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2Model,
)

from student.losses import Head, cross_entropy
from tests.dense_twins import dense_logits
from tests.tiny_models import tiny_llava

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "plain": (Qwen2Config(**SMALL), (None, 1.0)),
    "softcap": (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0), (5.0, 1.0)),
    "scaled": (CohereConfig(**SMALL, logit_scale=0.25), (None, 0.25)),
    "divided": (GraniteConfig(**SMALL, logits_scaling=4.0), (None, 0.25)),
    "bias": (PhiConfig(**SMALL), (None, 1.0)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_head_give_the_models_own_logits(name):
    torch.manual_seed(0)
    config, (softcap, scale) = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=2.0)
    ids = torch.randint(40, (2, 7))
    hidden = model.base_model(input_ids=ids).last_hidden_state.detach()
    head = Head.of(model)
    assert (head.softcap, head.logit_scale, head.columns) == (softcap, scale, 40)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == (name == "bias")
    form = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
    ours = dense_logits(hidden.reshape(14, 16), head.weight, **form)
    own = model(input_ids=ids).logits.reshape(14, 40)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-4)


def test_a_vision_language_model_and_its_padded_vocabulary(tmp_path):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_llava(tmp_path))
    head = Head.of(model, vocab_size=340)
    assert (head.columns, len(head.weight)) == (340, 352)
    ids = torch.randint(3, 300, (1, 6))
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    own = model(input_ids=ids).logits[0]
    labels = torch.tensor([5, -100, 339, 7, 8, -100])
    ours = cross_entropy(hidden, head.weight, labels, vocab_size=340)
    torch.testing.assert_close(ours, nn.functional.cross_entropy(own, labels), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="Qwen2Model has no linear output head"):
        Head.of(Qwen2Model(Qwen2Config(**SMALL)))
