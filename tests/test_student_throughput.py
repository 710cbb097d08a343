"""Running a student fast: frozen weights in the compute dtype, masks only where they are needed, operations
counted."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks._random_cache import IMAGE_ID
from benchmarks._shapes import Shape
from models.folder import load_model
from student.folder import freeze
from student.throughput import StepFlops, activations_fit, compile_language_model, hold_frozen, needs_mask
from tests import tiny_families

VOCAB, WIDTH, LAYERS, PATCHES = 96, 64, 2, 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Shape(
        name="tiny",
        width=WIDTH,
        layers=LAYERS,
        heads=4,
        inner=128,
        tied=True,
        vision_width=32,
        vision_layers=2,
        vision_heads=2,
        vision_inner=64,
        image_size=32,
        vocab=VOCAB,
        patch_size=8,
    ).build()


def padded_inputs():
    torch.manual_seed(1)
    ids = torch.randint(4, VOCAB, (2, 30))
    ids[:, 2 : 2 + PATCHES] = IMAGE_ID
    mask = torch.ones_like(ids)
    mask[1, 22:] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32)}


def hidden_states(model):
    return lambda inputs: model.base_model(**inputs, use_cache=False).last_hidden_state


def test_a_causal_model_needs_no_mask_for_padding_at_the_right(model):
    inputs = padded_inputs()
    assert not needs_mask(hidden_states(model), inputs)
    real = inputs["attention_mask"].bool()
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(model)(inputs)[real], hidden_states(model)(bare)[real], rtol=1e-4, atol=1e-5
        )


def test_bidirectional_attention_needs_its_mask():
    """A prefix language model without its mask lets real tokens see the padding."""

    def states(inputs):
        ids = inputs["input_ids"].float()
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        mean = (ids * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return (ids + mean)[..., None]

    assert needs_mask(states, padded_inputs())


def test_nothing_is_told_without_padding_or_with_padding_at_the_left(model):
    inputs = padded_inputs()
    full = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    left = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    assert needs_mask(hidden_states(model), full)
    assert needs_mask(hidden_states(model), left)


@pytest.mark.parametrize("family", ["llava_next", "idefics3", "gemma3"])
def test_families_under_causal_attention_drop_the_mask_too(family, tmp_path):
    model = load_model(tiny_families.make(family, tmp_path), torch.float32)
    inputs = padded_inputs()
    del inputs["pixel_values"]
    inputs["input_ids"] = torch.randint(4, 60, inputs["input_ids"].shape)
    assert not needs_mask(hidden_states(model), inputs)


def test_frozen_parts_are_held_in_the_compute_dtype_and_trained_ones_stay(model):
    freeze(model, ("projector",))
    hold_frozen(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if "multi_modal_projector" in name else torch.bfloat16
        assert parameter.dtype == expected, name
        assert parameter.requires_grad == (expected == torch.float32)
    assert all(buffer.dtype != torch.bfloat16 for buffer in model.buffers())


def test_a_step_with_frozen_parts_in_bfloat16_agrees_with_autocast(model):
    inputs = padded_inputs()
    freeze(model, ("projector", "language_model"))

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = hidden_states(model)(inputs)
        hidden.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradients()
    hold_frozen(model, torch.bfloat16)
    after = gradients()
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.999
    assert not any(p.requires_grad for n, p in model.named_parameters() if "vision_tower" in n)


def test_a_trained_tower_stays_under_autocast(model):
    freeze(model, ("projector", "vision_tower"))
    hold_frozen(model, torch.bfloat16)
    tower = [p for n, p in model.named_parameters() if "vision_tower" in n]
    assert all(p.dtype == torch.float32 for p in tower)
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states(model)(padded_inputs()).float().sum().backward()
    assert any(p.grad is not None for p in tower)


def test_operations_of_a_step_equal_those_that_torch_counts(model):
    """torch counts matrix products alone, and full attention; the estimate is within 15% of it."""
    from torch.utils.flop_counter import FlopCounterMode

    freeze(model, ("projector", "language_model"))
    inputs = padded_inputs()
    with FlopCounterMode(display=False) as counter:
        hidden = hidden_states(model)(inputs)
        (hidden @ model.get_output_embeddings().weight.t()).sum().backward()
    assert StepFlops(model)(inputs, rows=60) == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_compiled_layers_give_the_same_states_or_are_left_alone(model):
    inputs = padded_inputs()
    del inputs["attention_mask"]
    before = hidden_states(model)(inputs).detach()
    assert compile_language_model(model, lambda: hidden_states(model)(inputs)) is None
    layers = model.model.language_model.layers
    assert all(layer._compiled_call_impl is not None for layer in layers)
    torch.testing.assert_close(hidden_states(model)(inputs), before, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_that_do_not_compile_are_left_as_they_are(model, monkeypatch):
    def broken(self, *_, **__):
        self._compiled_call_impl = lambda *_, **__: 1 / 0

    layer = type(model.model.language_model.layers[0])
    monkeypatch.setattr(layer, "compile", broken)
    reason = compile_language_model(model, lambda: hidden_states(model)(padded_inputs()))
    assert "division by zero" in reason
    hidden_states(model)(padded_inputs())


def test_states_pass_between_layers_in_the_dtype_of_autocast(model, monkeypatch):
    """Where that was asked for and changes little; outside of autocast nothing changes."""
    layer = model.model.language_model.layers[1]
    monkeypatch.setattr(type(layer), "compile", lambda self: None)
    inputs, seen = padded_inputs(), []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    exact = hidden_states(model)(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = hidden_states(model)(inputs)
        assert compile_language_model(model, lambda: hidden_states(model)(inputs), narrow=True) is None
        narrow = hidden_states(model)(inputs)
    assert seen[1] == torch.float32
    assert seen[-1] == torch.bfloat16
    assert 0 < (narrow - wide).float().square().mean().sqrt() < 0.02 * wide.float().std()
    assert torch.equal(hidden_states(model)(inputs), exact)
    assert seen[-1] == torch.float32


def test_states_that_differ_leave_the_model_as_it_was(model, monkeypatch):
    layer = model.model.language_model.layers[1]
    monkeypatch.setattr(type(layer), "compile", lambda self: None)
    monkeypatch.setattr("student.throughput._to_autocast", lambda _module, _inputs, made: -3.0 * made)
    inputs = padded_inputs()
    before = hidden_states(model)(inputs)
    reason = compile_language_model(model, lambda: hidden_states(model)(inputs), narrow=True)
    assert "its states differ by" in reason
    assert torch.equal(hidden_states(model)(inputs), before)


def test_the_estimate_of_activations_is_near_what_one_gpu_measured():
    """22.1 GB over the weights of a 1.03 B student, 14,240 tokens, bf16 autocast, H100, 2026-11-26; of them
    1.9 GB of gradients."""
    config = SimpleNamespace(num_hidden_layers=24, hidden_size=1024, intermediate_size=2816)
    empty = SimpleNamespace(
        parameters=list, named_parameters=list, config=SimpleNamespace(get_text_config=lambda: config)
    )
    fits, text = activations_fit(empty, torch.device("cpu"), tokens=14_240, images=16)
    assert not fits  # a CPU has no memory of its own to fill
    assert estimate_of(text) == pytest.approx(22.1 - 1.9 + 2.0, rel=0.1)


def estimate_of(text):
    return float(text.split("about ")[1].split(" GB")[0])


def test_a_trained_tower_and_a_second_head_are_in_the_estimate(model, monkeypatch):
    def estimate(trainable, further=0):
        freeze(model, trainable)
        return activations_fit(model, torch.device("cpu"), tokens=0, images=100_000, further=further)

    frozen = estimate_of(estimate(("language_model",))[1])
    per_image = PATCHES * 2 * (34 * 32 + 8 * 64)  # of two layers
    trained = estimate_of(estimate(("language_model", "vision_tower"))[1])
    assert trained == pytest.approx(frozen + 1.1 * 1e5 * per_image / 1e9, abs=0.1)
    assert estimate_of(estimate(("language_model",), further=10**9)[1]) == pytest.approx(frozen + 16, abs=0.1)
    tower = SimpleNamespace(model_type="dynamic")
    config = SimpleNamespace(get_text_config=model.config.get_text_config, vision_config=tower)
    monkeypatch.setattr(model, "config", config)
    assert estimate(("vision_tower",)) == (False, "what a trained dynamic keeps is not known")
