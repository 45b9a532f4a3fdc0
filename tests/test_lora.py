"""LoRA against PEFT on the transformers model, and against the definition W + scale * B A."""
import copy
import importlib
import json
import os

import pytest
import torch
import transformers

import peft
from configurator import UserError, parse
from conftest import losses_of
from nanoforge.lora import add_lora, adapters_off, file_layout, load_adapter, merge_lora, save_adapter, set_adapter, unmerge_lora
from model import GPT, GPTConfig, config_from_hf, from_hf_weights, load_model, load_weights, save_model
from nanoforge.optim import AdamW
from nanoforge.hf import HFModel
from nanoforge.kernels import stacked_linear

SIZES = dict(vocab_size=61, bos_token_id=None, eos_token_id=None)
LLAMA = dict(SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
FAMILIES = {
    'llama': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    'qwen3': lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        **LLAMA, head_dim=16, tie_word_embeddings=True)),
    'gpt2': lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)),
}
GPT2 = dict(arch='gpt2', norm='layernorm', position='learned', qk_norm=False, bias=True, gated=False,
            activation='gelu_tanh')
IDX = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(1))


def hf_model(family, seed=0):
    torch.manual_seed(seed)
    theirs = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in theirs.parameters():       # biases and norms begin as constants, which would hide mistakes
            p.add_(torch.randn_like(p) * 0.05)
    return theirs


def ours_from(theirs):
    cfg = config_from_hf(json.loads(theirs.config.to_json_string(use_diff=False)))
    model = GPT(cfg)
    load_weights(model, from_hf_weights(cfg, {k: v.clone() for k, v in theirs.state_dict().items()
                                              if not (cfg.tied and k == 'lm_head.weight')}), 'test')
    return model.eval()


def randomize(model, seed=2):
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if 'lora_A' in name or 'lora_B' in name or p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    usual = dict(arch='qwen3', vocab_size=61, block_size=64, n_layer=2, n_head=4, n_embd=32, n_inner=48, qk_norm=True)
    cfg = GPTConfig(**{**usual, **changes})
    return GPT(cfg).init_weights(0.1)


@pytest.mark.parametrize('family, settings', [
    ('llama', dict(target_modules=['q_proj', 'v_proj'])),
    ('llama', dict(target_modules='all-linear', use_rslora=True)),
    ('llama', dict(target_modules=['q_proj', 'k_proj', 'down_proj'], rank_pattern={'q_proj': 2},
                   alpha_pattern={'q_proj': 3})),
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


@pytest.mark.parametrize('family', ['qwen3', 'gpt2'])
@pytest.mark.parametrize('form', [dict(use_rslora=True), dict(use_dora=True), dict(use_rslora=True, use_dora=True)],
                         ids=lambda form: '+'.join(form))
def test_rslora_and_dora_train_as_in_peft(family, form, tmp_path):
    """Logits, every gradient, two SGD steps, and what is then saved opens in PEFT."""
    theirs = hf_model(family)
    base = copy.deepcopy(theirs)
    targets = ['c_attn', 'c_fc'] if family == 'gpt2' else ['q_proj', 'k_proj', 'down_proj']
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **form))
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / 'theirs')
    ours = load_adapter(ours_from(base), str(tmp_path / 'theirs'), trainable=True)
    scale = ours.layers[0].self_attn.q_proj.adapter.scale
    assert scale == (6 / 2 if 'use_rslora' in form else 6 / 4)
    for _ in range(2):
        logp = wrapped(IDX[:, :-1]).logits.log_softmax(-1).gather(2, IDX[:, 1:, None])
        torch.testing.assert_close(ours(IDX[:, :-1], IDX[:, 1:]), logp[..., 0], atol=1e-5, rtol=0)
        wrapped.zero_grad()
        ours.zero_grad()
        (-logp.mean()).backward()
        (-ours(IDX[:, :-1], IDX[:, 1:]).mean()).backward()
        expected = {name.replace('.default', '').replace('.weight', ''): p for name, p in wrapped.named_parameters()
                    if p.requires_grad}
        layout = {key.replace('.weight', ''): parts for key, parts in file_layout(ours, 'default').items()}
        assert expected.keys() == layout.keys() and any('magnitude' in key for key in layout) == ('use_dora' in form)
        for key, parts in layout.items():
            whole = parts if '.lora_A' not in key else parts[:1]
            gradient = torch.cat([part.grad for part in whole])
            assert gradient.abs().max() > 1e-5
            torch.testing.assert_close(gradient, expected[key].grad, atol=1e-6, rtol=1e-4)
        with torch.no_grad():
            for p in [*expected.values(), *(p for p in ours.parameters() if p.requires_grad)]:
                p -= 0.5 * p.grad
    save_adapter(ours, str(tmp_path / 'ours'), 'some/base')
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / 'ours')).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDX).logits, ours(IDX), atol=1e-5, rtol=0)
        torch.testing.assert_close(again(IDX).logits, wrapped(IDX).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_fresh_adapter_of_ours_opens_in_peft(family, tmp_path):
    theirs = hf_model(family)
    model = add_lora(ours_from(theirs), r=3, alpha=5, dropout=0.0)
    wrapped = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(r=3))
    default = sorted({name.split('.')[-1] for name, m in wrapped.named_modules() if hasattr(m, 'lora_A')})
    randomize(model)
    save_adapter(model, str(tmp_path))
    assert json.loads((tmp_path / 'adapter_config.json').read_text())['target_modules'] == default
    again = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDX), again(IDX).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize('changes', [{}, dict(n_kv_head=2), GPT2])
@pytest.mark.parametrize('dora', [False, True])
def test_forward_merge_and_unmerge_are_the_definition(changes, dora):
    model = tiny(**changes).double().eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    base = model(IDX)
    add_lora(model, r=4, alpha=8, target_modules='all-linear', dora=dora).double()
    # magnitudes are float32
    torch.testing.assert_close(model(IDX), base, atol=1e-6 if dora else 1e-12, rtol=0)
    randomize(model)
    adapted = model(IDX).detach()
    assert (adapted - base).abs().max() > 1e-2
    layer = model.layers[1].mlp.up_proj
    A, B = layer.lora['default'].lora_A, layer.lora['default'].lora_B
    dense = layer.weight + 8 / 4 * B @ A
    if dora:
        dense = dense / dense.norm(dim=1, keepdim=True) * layer.lora['default'].magnitude[:, None]
    torch.testing.assert_close(layer.weight_matrix(), dense, atol=1e-12, rtol=0)
    merge_lora(model)
    assert not any('lora' in name for name in model.state_dict())
    torch.testing.assert_close(model(IDX), adapted, atol=1e-9, rtol=0)
    torch.testing.assert_close(model.layers[1].mlp.up_proj.weight, dense, atol=1e-12, rtol=0)
    unmerge_lora(model)
    assert torch.equal(model(IDX), adapted)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items() if name in before)


def test_merged_float32_logits_within_a_millionth():
    model = add_lora(tiny().eval(), r=4, alpha=8, target_modules='all-linear')
    randomize(model)
    with torch.no_grad():
        adapted = model(IDX)
        assert (merge_lora(model)(IDX) - adapted).abs().max() <= 1e-6 * adapted.abs().max()
        assert torch.equal(unmerge_lora(model)(IDX), adapted)


@pytest.mark.parametrize('targets', [['q_proj'], ['q_proj', 'v_proj'], 'all-linear'])
@pytest.mark.parametrize('bf16', [False, True])
def test_stacked_projections_equal_single_ones_with_their_gradients(targets, bf16):
    model = add_lora(tiny(), r=4, alpha=8, target_modules=targets)
    randomize(model)
    model.set_matmul('bf16' if bf16 else 'float32')
    attention, x = model.layers[0].self_attn, torch.randn(2, 5, 32)
    outputs = []
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    for form in (lambda x: stacked_linear(x, layers), lambda x: torch.cat([layer(x) for layer in layers], -1)):
        model.zero_grad()
        x_ = x.clone().requires_grad_()
        y = form(x_)
        y.float().square().sum().backward()
        outputs.append([y, x_.grad] + [p.grad for p in attention.parameters() if p.grad is not None])
    assert outputs[0][0].dtype == (torch.bfloat16 if bf16 else torch.float32) and len(outputs[0]) >= 4
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=0.25 if bf16 else 1e-5, rtol=0.02 if bf16 else 1e-5)


def test_bf16_products_stay_near_float32():
    model = add_lora(tiny().eval(), r=4, alpha=8, target_modules='all-linear')
    randomize(model)
    with torch.no_grad():
        exact = model(IDX)
        rounded = model.set_matmul('bf16')(IDX)
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_only_what_should_train_trains_and_the_loss_falls():
    model = add_lora(tiny(), r=4, alpha=8, dropout=0.1, target_modules=None)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all('q_proj.lora.' in name or 'v_proj.lora.' in name for name in trained)
    torch.manual_seed(0)
    losses = losses_of(model, IDX, 30)
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_dropout_is_on_the_adapters_input_in_training_alone():
    model = add_lora(tiny(), r=32, alpha=32, dropout=0.5, target_modules=['up_proj'])
    layer, x = model.layers[0].mlp.up_proj, torch.randn(4000, 32)
    with torch.no_grad():
        layer.lora['default'].lora_A.copy_(torch.eye(32))
        layer.lora['default'].lora_B.copy_(torch.eye(48, 32))
        layer.eval()
        assert torch.allclose(layer(x), x @ layer.weight.t() + torch.nn.functional.pad(x, (0, 16)), atol=1e-5)
        layer.train()
        seen = (layer(x) - x @ layer.weight.t())[:, :32] / x
    assert torch.minimum(seen.abs(), (seen - 2).abs()).max() < 0.05 and abs(seen.mean() - 1) < 0.02


@pytest.mark.parametrize('bias, expected', [('none', 0), ('lora_only', 2), ('all', 2 * 8 + 1)])
def test_bias_trains_as_told_and_adapters_off_is_the_untouched_base(bias, expected):
    model = tiny(**GPT2).eval()
    base = model(IDX)
    add_lora(model, r=2, alpha=2, target_modules=['c_fc'], bias=bias)
    assert sum(p.requires_grad for name, p in model.named_parameters() if name.endswith('bias')) == expected
    randomize(model)
    adapted = model(IDX)
    with pytest.raises(ZeroDivisionError):
        with adapters_off(model):
            assert torch.equal(model(IDX), base)
            1 / 0
    assert torch.equal(model(IDX), adapted) and not torch.equal(adapted, base)


def test_named_adapters_do_not_leak_into_one_another():
    model = tiny()
    add_lora(model, r=2, alpha=2, target_modules=['q_proj'], name='planner')
    add_lora(model, r=4, alpha=2, target_modules=['up_proj', 'v_proj'], name='coder')
    randomize(model)
    alone = add_lora(tiny(), r=2, alpha=2, target_modules=['q_proj'], name='planner')
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if 'coder' not in k})
    set_adapter(model, 'planner')
    assert torch.allclose(model(IDX), alone(IDX), atol=1e-6)
    for model.gradient_checkpointing in (False, True):
        for name in ('planner', 'coder'):
            model.zero_grad()
            set_adapter(model, name)
            model(IDX).square().sum().backward()
            assert {n.split('.')[-2] for n, p in model.named_parameters() if p.grad is not None} == {name}
    with pytest.raises(UserError, match='planner, coder'):
        set_adapter(model, 'judge')


def test_gradient_checkpointing_gives_the_same_gradients():
    model = add_lora(tiny(), r=4, alpha=8, dropout=0.2, target_modules='all-linear')
    randomize(model)
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        model(IDX).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_an_adapter_on_a_tied_head_leaves_the_embedding():
    model = tiny().eval()
    embedding, base = model.embed_tokens.weight.detach().clone(), model(IDX)
    add_lora(model, r=4, alpha=8, target_modules=['lm_head'])
    randomize(model)
    with torch.no_grad():
        delta = 2 * model.lm_head.lora['default'].lora_B @ model.lm_head.lora['default'].lora_A
        torch.testing.assert_close(model(IDX), base + model.hidden(IDX) @ delta.t(), atol=1e-5, rtol=0)
    model(IDX, IDX).sum().backward()
    direct = model.lm_head.lora['default'].lora_B.grad.clone()
    model.zero_grad()
    model.token_stats(model.hidden(IDX), IDX)['logp'].sum().backward()
    torch.testing.assert_close(model.lm_head.lora['default'].lora_B.grad, direct, atol=1e-4, rtol=1e-4)
    assert model.embed_tokens.weight.grad is None
    adapted = model(IDX)
    merge_lora(model)
    assert torch.equal(model.embed_tokens.weight, embedding) and not model.config.tied
    torch.testing.assert_close(model(IDX), adapted, atol=1e-5, rtol=0)
    unmerge_lora(model)
    assert model.lm_head.weight is model.embed_tokens.weight and model.config.tied and torch.equal(model(IDX), adapted)


def test_a_saved_adapter_loads_with_its_base_and_a_merged_model_opens_in_transformers(tmp_path):
    base, out, merged = (str(tmp_path / name) for name in ('base', 'out', 'merged'))
    save_model(tiny(), None, base)
    model, tokenizer = load_model(base)
    add_lora(model, r=4, alpha=8, target_modules=['lm_head', 'q_proj'])
    randomize(model)
    save_model(model, tokenizer, out)
    assert sorted(os.listdir(out)) == ['adapter_config.json', 'adapter_model.safetensors']
    with torch.no_grad():
        again, _ = load_model(out)
        assert torch.equal(again(IDX), model(IDX)) and not any(p.requires_grad for p in again.parameters())
        trainable, _ = load_model(out, trainable_adapter=True)
        assert {n for n, p in trainable.named_parameters() if p.requires_grad} == \
            {n for n, p in model.named_parameters() if p.requires_grad}
        save_model(merge_lora(model), None, merged)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
        torch.testing.assert_close(theirs(IDX).logits, again(IDX), atol=1e-5, rtol=0)
    os.rename(base, base + '-moved')
    with pytest.raises(UserError, match='base'):
        load_model(out)
    assert torch.equal(load_model(out, base=base + '-moved')[0](IDX), again(IDX))


def test_mistakes_are_one_line(tmp_path):
    model = tiny()
    with pytest.raises(UserError, match='c_attn;.*down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_p'):
        add_lora(model, target_modules=['q_proj', 'c_attn'])
    for wrong in (dict(r=0), dict(alpha=0), dict(dropout=1.0), dict(bias='some'), dict(dora=True, dropout=0.1),
                  dict(name='a.b'), dict(name='keys'), dict(target_modules=[])):
        with pytest.raises(UserError):
            add_lora(model, **wrong)
    assert not any('lora' in name for name in model.state_dict()) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match='no adapter'):
        with adapters_off(model):
            pass
    with pytest.raises(UserError, match='no adapter'):
        merge_lora(model)
    add_lora(model, r=2, alpha=2)
    with pytest.raises(UserError, match='taken'):
        add_lora(model, r=2, alpha=2)
    with pytest.raises(UserError, match='bias'):
        add_lora(model, r=2, alpha=2, bias='all', name='other')
    save_adapter(model, str(tmp_path), 'org/small')
    wide = tiny(n_embd=64)
    with pytest.raises(UserError, match=r'base \(org/small\): .*layers.0.self_attn.q_proj.lora_A.* not \(2, 64'):
        load_adapter(wide, str(tmp_path))
    assert not any('lora' in name for name in wide.state_dict()) and wide(IDX).shape == (2, 13, 61)
    with pytest.raises(UserError, match='model has no model.layers.1'):
        load_adapter(tiny(n_layer=1), str(tmp_path))
    other = tiny()
    other.name_or_path = 'org/other'
    with pytest.raises(UserError, match='org/small.*org/other'):
        load_adapter(other, str(tmp_path))
    assert not getattr(other, 'adapters', None)
    other.name_or_path = 'models/small'
    load_adapter(other, str(tmp_path))
    merge_lora(other)
    with pytest.raises(UserError, match='unmerge'):
        with adapters_off(other):
            pass
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    for change in (dict(peft_type='LOHA'), dict(modules_to_save=['embed_tokens']), dict(init_lora_weights='pissa'),
                   dict(init_lora_weights='olora'), dict(init_lora_weights='loftq'), dict(lora_bias=True),
                   dict(target_parameters=['experts.down_proj'])):
        (tmp_path / 'adapter_config.json').write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match='merge_and_unload'):
            load_adapter(tiny(), str(tmp_path))


    (tmp_path / 'adapter_config.json').write_text(json.dumps({**config, 'r': '2'}))
    with pytest.raises(UserError, match="r is '2'"):
        load_adapter(tiny(), str(tmp_path))
    (tmp_path / 'adapter_config.json').write_text('{')
    with pytest.raises(UserError, match='JSON'):
        load_adapter(tiny(), str(tmp_path))


@pytest.mark.parametrize('begin', ['gaussian', 'orthogonal', 'eva'])
def test_adapters_that_began_otherwise_but_leave_the_base(begin, tmp_path):
    base = hf_model('llama')
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, init_lora_weights=begin)).eval()
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(ours_from(base), str(tmp_path))(IDX), wrapped(IDX).logits,
                                   atol=1e-5, rtol=0)


@pytest.mark.parametrize('targets', ['all-linear', ['query_key_value', 'lm_head']])
def test_a_transformers_model_behind_the_wrapper(targets, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)).eval()
    model = HFModel(copy.deepcopy(theirs))
    with pytest.raises(UserError, match='dense, dense_4h_to_h, dense_h_to_4h'):
        add_lora(model)
    add_lora(model, r=4, alpha=8, target_modules=targets)
    randomize(model)
    save_adapter(model, str(tmp_path))
    with torch.no_grad():
        adapted = model(IDX)
        assert (adapted - theirs(IDX).logits).abs().max() > 1e-2
        again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), str(tmp_path)).eval()
        torch.testing.assert_close(again(IDX).logits, adapted, atol=1e-5, rtol=0)
        torch.testing.assert_close(load_adapter(HFModel(theirs), str(tmp_path))(IDX), adapted, atol=1e-5, rtol=0)
        torch.testing.assert_close(merge_lora(model)(IDX), adapted, atol=1e-5, rtol=0)


def test_the_projects_optimizer_trains_biases_that_adapters_off_swaps():
    model = tiny(**GPT2)
    base = model(IDX)
    add_lora(model, r=2, alpha=2, bias='all')
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (-model(IDX[:, :-1], IDX[:, 1:]).mean()).backward()
        optimizer.step()
        with torch.no_grad(), adapters_off(model):
            assert torch.equal(model(IDX), base)
    assert (model(IDX) - base).abs().max() > 0.1 and model.base_biases.keys() == {
        name.removesuffix('.bias') for name, _ in model.named_parameters() if name.endswith('bias')}


@pytest.mark.parametrize('script, flags', [
    ('train_sft', ['use_lora=true']), ('train_dpo', ['use_lora=true']), ('train_rl', ['use_lora=true']),
    ('train_agents', ['specialization=lora'])])
def test_rslora_and_dora_are_flags_of_every_script_with_lora(script, flags, capsys):
    Config = importlib.import_module(script).Config
    cfg = parse(Config, [*flags, '--use_dora', 'model.use_rslora=true'])
    assert cfg.use_dora and cfg.use_rslora and getattr(cfg, 'lora_dropout', 0) == 0
    is_team = script == 'train_agents'
    wrong = [(['GPU_num=2'], 'tensor_parallel=2'), (['specialization=prompt'], 'no adapters')]
    for more, message in wrong if is_team else [(['--lora_dropout=0.1'], 'lora_dropout=0.1')]:
        with pytest.raises(SystemExit):
            parse(Config, [*flags, '--use_dora', *more])
        assert message in capsys.readouterr().err.splitlines()[-1]
