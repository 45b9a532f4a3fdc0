"""LoRA against PEFT on the transformers model, and against the definition W + scale * B A."""
import copy
import json
import os

import pytest
import torch
import transformers

import peft
from configurator import UserError
from lora import add_lora, adapters_off, dense_weight, load_adapter, merge_lora, save_adapter, set_adapter, unmerge_lora
from model import GPT, GPTConfig, config_from_hf, from_hf_weights, load_model, load_weights, save_model

SIZES = dict(vocab_size=61, bos_token_id=None, eos_token_id=None)
LLAMA = dict(SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64)
FAMILIES = {
    'llama': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    'qwen3': lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=True)),
    'gpt2': lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                                                         attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)),
}
IDX = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(1))


def hf_model(family, seed=0):
    torch.manual_seed(seed)
    theirs = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():       # biases and norms begin as constants, which would hide mistakes
            p.add_(torch.randn_like(p) * 0.05)
    return theirs


def ours_from(theirs):
    cfg = config_from_hf(json.loads(theirs.config.to_json_string(use_diff=False)))
    model = GPT(cfg)
    load_weights(model, from_hf_weights(cfg, {k: v for k, v in theirs.state_dict().items()
                                              if not (cfg.tied and k == 'lm_head.weight')}), 'test')
    return model.eval()


def randomize(model, seed=2):
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if 'lora_A' in name or 'lora_B' in name or p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    cfg = GPTConfig(**dict(dict(arch='qwen3', vocab_size=61, block_size=64, n_layer=2, n_head=4, n_embd=32, n_inner=48, qk_norm=True),
                           **changes))
    return GPT(cfg).init_weights(0.1)


@pytest.mark.parametrize('family, settings', [
    ('llama', dict(target_modules=['q_proj', 'v_proj'])),
    ('llama', dict(target_modules='all-linear', use_rslora=True)),
    ('llama', dict(target_modules=['q_proj', 'k_proj', 'down_proj'], rank_pattern={'q_proj': 2}, alpha_pattern={'q_proj': 3})),
    ('llama', dict(target_modules=['v_proj', 'o_proj'], use_dora=True)),
    ('qwen3', dict(target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'])),
    ('qwen3', dict(target_modules=['q_proj', 'lm_head'])),
    ('gpt2', dict(target_modules=['c_attn'])),
    ('gpt2', dict(target_modules='all-linear', bias='all')),
    ('gpt2', dict(target_modules=['c_proj', 'c_fc'], bias='lora_only')),
    ('gpt2', dict(target_modules=['c_attn', 'mlp.c_proj'], use_dora=True)),
])
def test_peft_format_both_ways(family, settings, tmp_path):
    theirs = hf_model(family)
    base = copy.deepcopy(theirs)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, task_type='CAUSAL_LM', **settings)).eval()
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / 'theirs')
    model = load_adapter(ours_from(base), str(tmp_path / 'theirs'))
    with torch.no_grad():
        expected = wrapped(IDX).logits
        assert (expected - base(IDX).logits).abs().max() > 1e-2
        torch.testing.assert_close(model(IDX), expected, atol=1e-5, rtol=0)
        with adapters_off(model):
            torch.testing.assert_close(model(IDX), base(IDX).logits, atol=1e-5, rtol=0)

        save_adapter(model, str(tmp_path / 'ours'), 'some/base')
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / 'ours')).eval()
        torch.testing.assert_close(again(IDX).logits, expected, atol=1e-5, rtol=0)
        config = json.loads((tmp_path / 'ours' / 'adapter_config.json').read_text())
        assert config['base_model_name_or_path'] == 'some/base'


@pytest.mark.parametrize('family', FAMILIES)
def test_a_fresh_adapter_of_ours_opens_in_peft(family, tmp_path):
    theirs = hf_model(family)
    model = add_lora(ours_from(theirs), r=3, alpha=5, dropout=0.0)
    default = sorted({name.split('.')[-1] for name, m in peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(r=3)).named_modules()
                      if hasattr(m, 'lora_A')})
    randomize(model)
    save_adapter(model, str(tmp_path))
    assert json.loads((tmp_path / 'adapter_config.json').read_text())['target_modules'] == default
    again = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDX), again(IDX).logits, atol=1e-5, rtol=0)
