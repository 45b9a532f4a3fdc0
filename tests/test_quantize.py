"""4- and 8-bit layers against their definition, and QLoRA trained on the CPU."""
import copy
import json
import os

import pytest
import torch

from nanoforge import quantize as quantize_module
from configurator import UserError
from conftest import losses_of
from nanoforge.lora import add_lora, adapters_off, merge_lora, unmerge_lora
from model import GPT, GPTConfig, load_model, save_model
from nanoforge.quantize import check_trainable, dequantize, is_quantized, quantize

IDX = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))
KINDS = [dict(bits=4), dict(bits=4, quant_type='fp4', double_quant=False), dict(bits=8)]


def tiny(**changes):
    torch.manual_seed(0)
    usual = dict(arch='qwen3', vocab_size=61, block_size=64, n_layer=2, n_head=4, n_embd=64, n_inner=96, qk_norm=True)
    return GPT(GPTConfig(**{**usual, **changes})).init_weights(0.1)


def nf4_levels():
    """The 16 levels of NF4: quantiles of N(0, 1), 8 above and 7 below zero
    (Dettmers et al. 2023, section 3)."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    quantile = lambda p: torch.special.ndtri(torch.tensor(p, dtype=torch.float64))
    above = quantile(torch.linspace(1 - offset, 0.5, 9)[:-1].tolist())
    below = -quantile(torch.linspace(1 - offset, 0.5, 8)[:-1].tolist())
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    return levels / levels.max()


def test_nf4_is_the_nearest_level_times_the_blocks_largest_magnitude():
    model = tiny()
    plain = copy.deepcopy(model)
    quantize(model, 4, double_quant=False)
    for i in range(2):
        weight, layer = plain.layers[i].mlp.up_proj.weight.double(), model.layers[i].mlp.up_proj
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        levels = nf4_levels()
        nearest = levels[(blocks / absmax)[..., None].sub(levels).abs().argmin(-1)] * absmax
        torch.testing.assert_close(dequantize(layer).double(), nearest.view_as(weight), atol=2e-6, rtol=1e-4)
        assert layer.weight.numel() * layer.weight.element_size() == weight.numel() / 2


def test_int8_is_rounding_to_127ths_of_each_rows_largest_magnitude():
    model = tiny()
    weight = model.layers[0].self_attn.o_proj.weight.detach().clone()
    layer = quantize(model, 8).layers[0].self_attn.o_proj
    step = weight.abs().amax(1, keepdim=True) / 127
    assert layer.weight.dtype == torch.int8
    # it rounds from float16
    assert ((dequantize(layer) - weight).abs() <= 0.505 * step + 1e-3 * weight.abs()).all()


@pytest.mark.parametrize('kind', KINDS)
def test_only_block_layers_and_the_same_function_in_training_and_evaluation(kind):
    model = tiny(bias=True)
    plain = copy.deepcopy(model)
    quantize(model, **kind)
    names = {name for name, layer in model.named_modules() if is_quantized(layer)}
    assert names == {f'layers.{i}.{m}' for i in range(2) for m in
                     [f'self_attn.{p}_proj' for p in 'qkvo'] + [f'mlp.{p}_proj' for p in ('gate', 'up', 'down')]}
    with torch.no_grad():
        for name in names:                                      # the plain model with the rounded weights
            plain.get_submodule(name).weight.copy_(dequantize(model.get_submodule(name)))
        expected = plain(IDX)
        # twice: bitsandbytes' own layers repack in eval mode
        for mode in (model.train, model.eval, model.train):
            mode()
            torch.testing.assert_close(model(IDX), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(IDX), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_those_of_the_rounded_weights_with_and_without_checkpointing(kind):
    model = tiny()
    plain = copy.deepcopy(model)
    quantize(model, **kind)
    for name, layer in model.named_modules():
        if is_quantized(layer):
            plain.get_submodule(name).weight.data.copy_(dequantize(layer))
    grads = []
    for m, checkpointing in ((plain, False), (model, False), (model, True)):
        m.gradient_checkpointing = checkpointing
        torch.manual_seed(4)
        if not hasattr(m, 'adapters'):
            add_lora(m, r=4, alpha=8, target_modules='all-linear')
            for name, p in sorted((n, p) for n, p in m.named_parameters() if p.requires_grad):
                p.data.normal_(0, 0.1)
        m.zero_grad()
        m(IDX).square().sum().backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name in other:
            torch.testing.assert_close(other[name], grads[0][name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bf16', [False, True])
def test_qlora_trains_merges_dequantised_and_unmerges(kind, bf16):
    model = quantize(tiny(), **kind).set_matmul('bf16' if bf16 else 'float32')
    base = model.eval()(IDX)
    add_lora(model.train(), r=4, alpha=8, dropout=0.1, target_modules='all-linear')
    check_trainable(model)
    held = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = losses_of(model, IDX, 15)
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p, held[n]) for n, p in model.named_parameters() if n in held)
    model.set_matmul('float32').eval()
    with torch.no_grad():
        adapted = model(IDX)
        with adapters_off(model):
            torch.testing.assert_close(model(IDX), base, atol=0.2 if bf16 else 1e-5, rtol=0)
        merge_lora(model)
        assert not any(is_quantized(m) for m in model.modules()) and set(model.state_dict()) == set(tiny().state_dict())
        torch.testing.assert_close(model(IDX), adapted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(unmerge_lora(model)(IDX), adapted, atol=0, rtol=0)


@pytest.mark.parametrize('flags', [
    dict(load_in_4bit=True), dict(load_in_8bit=True),
    dict(load_in_4bit=True, bnb_4bit_quant_type='fp4', bnb_4bit_use_double_quant=False,
         bnb_4bit_compute_dtype='bfloat16')])
def test_load_model_quantises_as_it_reads_and_a_qlora_run_round_trips(flags, tmp_path):
    base, out, merged = (str(tmp_path / name) for name in ('base', 'out', 'merged'))
    save_model(tiny(tied=False), None, base)
    model, tokenizer = load_model(base, **flags)
    bits, kind = (8 if 'load_in_8bit' in flags else 4), flags.get('bnb_4bit_quant_type', 'nf4')
    direct = quantize(tiny(tied=False), bits, kind, flags.get('bnb_4bit_use_double_quant', True),
                      flags.get('bnb_4bit_compute_dtype'))
    assert torch.equal(model(IDX), direct.eval()(IDX)) and sum(is_quantized(m) for m in model.modules()) == 14
    with pytest.raises(UserError, match='add LoRA'):
        check_trainable(model)
    with pytest.raises(UserError, match='merge_lora'):
        save_model(model, tokenizer, out)
    add_lora(model, r=4, alpha=8, target_modules='all-linear')
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    save_model(model, tokenizer, out)
    assert sorted(os.listdir(out)) == ['adapter_config.json', 'adapter_model.safetensors']
    with torch.no_grad():
        adapted = model(IDX)
        assert torch.equal(load_model(out, **flags)[0](IDX), adapted)
        save_model(merge_lora(model, keep=False), tokenizer, merged)
        assert all(p.requires_grad for p in model.parameters())
        torch.testing.assert_close(load_model(merged)[0](IDX), model(IDX), atol=1e-6, rtol=0)
        torch.testing.assert_close(model(IDX), adapted, rtol=0, atol=0.2 if 'bnb_4bit_compute_dtype' in flags else 1e-4)


def test_a_key_that_is_missing_or_misshapen_is_named(tmp_path):
    save_model(tiny(), None, str(tmp_path))
    config = json.loads((tmp_path / 'config.json').read_text())
    deeper = dict(num_hidden_layers=3, layer_types=['full_attention'] * 3)
    for change, name in ((dict(intermediate_size=128), r'mlp.gate_proj.weight is \(96, 64\), not \(128, 64\)'),
                         (deeper, 'layers.2.self_attn.q_proj.weight is missing')):
        (tmp_path / 'config.json').write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=name):
            load_model(str(tmp_path), load_in_4bit=True)


def test_mistakes_are_one_line(monkeypatch):
    for wrong in (dict(bits=3), dict(quant_type='nf3'), dict(compute_dtype='float31')):
        with pytest.raises(UserError):
            quantize(tiny(), **wrong)
    with pytest.raises(UserError, match='before add_lora'):
        quantize(quantize(tiny()))
    with pytest.raises(UserError, match='before add_lora'):
        quantize(add_lora(tiny(), r=2, alpha=2))
    with monkeypatch.context() as patch:
        patch.setattr('bitsandbytes.functional.quantize_4bit', lambda *args, **kwargs: torch.ops.no.such_kernel())
        with pytest.raises(UserError, match='cannot hold 4-bit weights on cpu here.*leave out'):
            quantize(tiny())
    monkeypatch.setitem(__import__('sys').modules, 'bitsandbytes', None)
    quantize_module.bitsandbytes.cache_clear()
    with pytest.raises(UserError, match='pip install bitsandbytes'):
        quantize(tiny())
    quantize_module.bitsandbytes.cache_clear()
    check_trainable(tiny())
    with pytest.raises(UserError, match='frozen'):
        check_trainable(tiny().requires_grad_(False))
