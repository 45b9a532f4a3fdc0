"""Every family against transformers: random models saved there and opened here, and the other way round."""
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import roundtrip
from configurator import UserError
from conftest import ROOT
from data.chat import prompt_ids, render
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, load_model, save_model
from nanoforge import kernels
from nanoforge.decode import make_decoder
from nanoforge.hf import FAMILIES as FIELDS
from nanoforge.hf import UNSAID, HFModel, from_hf_weights, why_not_provided
from nanoforge.lora import add_lora, find_targets, stacked_weights
from nanoforge.optim import make_optimizer
from sample import generate, logp_gap

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
SMALL = dict(vocab_size=99, block_size=64, n_layer=2, n_head=2, n_embd=16)        # one of our own
GPT2 = dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64)
LLAMA3_ROPE = {'rope_type': 'llama3', 'rope_theta': 10000.0, 'factor': 8.0, 'low_freq_factor': 1.0,
               'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 1e4, 'original_max_position_embeddings': 16}
LONGROPE = {'rope_type': 'longrope', 'factor': 4.0, 'rope_theta': 1e4, 'original_max_position_embeddings': 16,
            'short_factor': [1.0] * 4, 'long_factor': [2.0] * 4}
# pad tokens get no gradient there
GEMMA = dict(SIZES, sliding_window=7, query_pre_attn_scalar=24, pad_token_id=None)
FAMILIES = {
    'gpt2': ('GPT2', GPT2),
    'gpt2_untied': ('GPT2', dict(GPT2, tie_word_embeddings=False, n_inner=40, activation_function='gelu')),
    'llama2': ('Llama', dict(SIZES, num_key_value_heads=4)),
    'llama3': ('Llama', dict(SIZES, rope_parameters=LLAMA3_ROPE)),
    'llama_linear': ('Llama', dict(SIZES, rope_parameters={'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 500.0})),
    'llama_yarn': ('Llama', dict(SIZES, rope_parameters=dict(YARN, beta_fast=8, beta_slow=0.5, truncate=False))),
    'qwen3_yarn': ('Qwen3', dict(SIZES, num_key_value_heads=4, head_dim=16, rope_parameters=YARN)),
    'llama_biases': ('Llama', dict(SIZES, attention_bias=True, mlp_bias=True)),
    'llama_attention_bias': ('Llama', dict(SIZES, attention_bias=True)),
    'smollm': ('Llama', dict(SIZES, tie_word_embeddings=True, num_key_value_heads=1)),
    'mistral': ('Mistral', dict(SIZES, sliding_window=7)),
    'mistral_whole': ('Mistral', dict(SIZES, sliding_window=None, head_dim=16)),
    'qwen2': ('Qwen2', SIZES),
    'qwen2.5': ('Qwen2', dict(SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=2,
                              tie_word_embeddings=True)),
    'qwen3': ('Qwen3', dict(SIZES, tie_word_embeddings=True, head_dim=16)),
    'qwen3_bias': ('Qwen3', dict(SIZES, num_key_value_heads=4, attention_bias=True)),
    'gemma2': ('Gemma2', GEMMA),
    'gemma3': ('Gemma3Text', dict(GEMMA, sliding_window_pattern=2)),
    'gemma3_scaled': ('Gemma3Text', dict(GEMMA, num_key_value_heads=4, final_logit_softcapping=5.0, rope_parameters={
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}})),
}


def theirs_of(family, **changes):
    """A random model of transformers with nothing at its neutral value:
    biases and norms moved away from 0 and 1."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f'{name}Config')(**{**settings, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """family -> (transformers' model, ours, its directory), made once."""
    made = {}

    def pair(family):
        if family not in made:
            theirs, directory = theirs_of(family), str(tmp_path_factory.mktemp(family))
            theirs.save_pretrained(directory)
            made[family] = theirs, load_model(directory)[0], directory
        return made[family]
    return pair


def tokens(*shape, seed=1):
    return torch.randint(0, 99, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_logits_and_padding(pairs, family):
    theirs, ours, _ = pairs(family)
    idx = tokens(3, 40)
    expected = theirs(idx).logits                                   # 40 tokens: well beyond every window
    close(ours(idx), expected)
    short = ours(torch.cat([idx[:1, :9], torch.zeros(1, 20, dtype=torch.long)], 1))[:, :9]
    close(short, expected[:1, :9])                                  # what stands to the right changes nothing
    targets = idx.roll(-1, 1).masked_fill(torch.rand(3, 40) < 0.3, -1)
    logp = expected.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None]).squeeze(2) * (targets >= 0)
    close(ours(idx, targets), logp)
    close(ours.token_stats(ours.hidden(idx), targets)['logp'], logp)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_packed_documents_do_not_see_one_another(pairs, family):
    theirs, ours, _ = pairs(family)
    idx = tokens(2, 40)
    ends = [[0, 5, 26, 40], [0, 40]]
    positions = torch.stack([torch.cat([torch.arange(b - a) for a, b in zip(row, row[1:])]) for row in ends])
    logits = ours(idx, positions=positions)
    for row, edges in enumerate(ends):
        for a, b in zip(edges, edges[1:]):
            close(logits[row:row + 1, a:b], theirs(idx[row:row + 1, a:b]).logits)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_incremental_decoding(pairs, family):
    """Two rows of different length: prompts at once (the shorter padded), then token by token,
    beyond every window and the first size of the cache."""
    theirs, ours, _ = pairs(family)
    idx, lengths = tokens(2, 40), torch.tensor([11, 6])
    expected = theirs(idx).logits
    decoder = make_decoder(ours, [idx[row, :n].tolist() for row, n in enumerate(lengths)], 1, 29)
    rows = torch.arange(2)
    close(decoder.start(), expected[rows, lengths - 1])
    for step in range(29):
        close(decoder.step(idx[rows, lengths + step]), expected[rows, lengths + step])


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_saved_here_opened_there(pairs, family, tmp_path):
    theirs, ours, _ = pairs(family)
    save_model(ours, None, str(tmp_path))
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation='eager')
    assert type(back) is type(theirs)
    assert not any(info.values()), info
    idx = tokens(2, 40)
    close(back(idx).logits, theirs(idx).logits)
    again = load_model(str(tmp_path))[0]
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_sampler_computes_the_same_model(pairs, family):
    """generate() has a decoding step of its own: it draws greedily what transformers would, at the same
    log-probability."""
    theirs, ours, _ = pairs(family)
    idx, new = tokens(1, 9), 12
    drawn = generate(ours, [idx[0].tolist(), idx[0, :5].tolist()], new, temperature=0)
    for row, prompt in enumerate((idx, idx[:, :5])):
        whole = torch.cat([prompt, drawn.tokens[row:row + 1]], 1)
        logp = theirs(whole).logits[0, -new - 1:-1].log_softmax(-1)
        close(logp.gather(1, drawn.tokens[row][:, None]).squeeze(1), logp.max(-1).values)
        close(drawn.logp[row], logp.max(-1).values)


@torch.no_grad()
@pytest.mark.parametrize('short', [256, 0])
@pytest.mark.parametrize('family', FAMILIES)
def test_continuations_share_a_prompt(pairs, family, short, monkeypatch):
    """A row of 2 documents: 10 tokens with three continuations, of which the first goes on in the document
    itself, and a plain one. Each sees what it would see alone, in documents taken for short or for long; the
    mask of a GPU says the same."""
    monkeypatch.setattr(kernels, 'SHORT_DOCUMENT', short)
    theirs, ours, _ = pairs(family)
    idx = tokens(1, 40)
    positions = torch.cat([torch.arange(15), torch.arange(10, 17), torch.arange(10, 19), torch.arange(9)])[None]
    got = ours(idx, positions=positions)
    for shared, start, end in ((0, 0, 15), (10, 15, 22), (10, 22, 31)):
        alone = torch.cat([idx[:, :shared], idx[:, start:end]], 1)
        close(got[:, start:end], theirs(alone).logits[:, shared:])
    close(got[:, 31:], theirs(idx[:, 31:]).logits)
    monkeypatch.setattr(kernels, 'SHORT_DOCUMENT', 0)
    q, k, v = torch.randn(3, 1, 2, 40, 8, generator=torch.Generator().manual_seed(4))
    for window, softcap in itertools.product((0, 4, 12), (0.0, 5.0)):
        kind = 'sliding_attention' if window else 'full_attention'
        cfg = replace(ours.config, sliding_window=window, layer_types=[kind], attn_softcap=softcap, attn_scale=1.0)
        context = kernels.AttentionContext(cfg, {}, idx, positions)
        mask = kernels.packed_mask(positions, window)[:, None]
        close(context.attention(q, k, v, kind), kernels.attention(q, k, v, mask, 1.0, softcap))


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients(pairs, family):
    """Of log-probabilities under weights of any sign: a plain block,
    and a packed row that attends by documents."""
    theirs, ours, _ = pairs(family)
    idx = tokens(1, 30)
    weights = torch.randn(1, 30, generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    for edges, where in (([0, 30], None), ([0, 12, 30], positions)):
        log_p = torch.cat([theirs(idx[:, a:b]).logits.log_softmax(-1) for a, b in zip(edges, edges[1:])], 1)
        expected = (log_p.gather(2, idx[..., None]).squeeze(2) * weights).sum()
        named = dict(theirs.named_parameters())
        expected = from_hf_weights(ours.config, dict(zip(named, torch.autograd.grad(expected, list(named.values())))))
        named = dict(ours.named_parameters())
        got = dict(zip(named, torch.autograd.grad((ours(idx, idx, where) * weights).sum(), list(named.values()))))
        assert expected.keys() == got.keys()
        for name, grad in got.items():
            atol = 1e-5 * max(1, expected[name].abs().max().item())
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize('family', FAMILIES)
def test_states_at_some_places(pairs, family, monkeypatch):
    """Those of the whole rows, though the last layer skips the others; one place twice;
    values and gradients."""
    ours, idx, places = pairs(family)[1], tokens(2, 20), torch.tensor([[3, 3, 39], [0, 21, 7]])
    weights = torch.randn(2, 3, ours.config.n_embd, generator=torch.Generator().manual_seed(3))
    named = dict(ours.named_parameters())
    for positions in (None, torch.cat([torch.arange(12), torch.arange(8)]).repeat(2, 1)):
        want = ours.hidden(idx, positions).flatten(0, 1)[places]
        for checkpointing in (False, True):
            monkeypatch.setattr(ours, 'gradient_checkpointing', checkpointing)
            monkeypatch.setattr(ours, 'training', checkpointing)
            got = ours.hidden(idx, positions, logit_positions=places)
            close(got, want)
            grads = [torch.autograd.grad((states * weights).sum(), list(named.values()), retain_graph=True, allow_unused=True,
                                         materialize_grads=True) for states in (got, want)]
            for name, a, b in zip(named, *grads):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()), msg=name)


def test_packed_rows_in_bf16_are_rounded_up(pairs, monkeypatch):
    """What is appended changes nothing, and nothing of it comes back."""
    ours, idx = pairs('qwen3')[1], tokens(1, 41)
    positions, shapes = torch.cat([torch.arange(15), torch.arange(10, 17), torch.arange(19)])[None], []
    hook = ours.layers[0].register_forward_pre_hook(lambda layer, inputs: shapes.append(inputs[0].size(1)))
    with torch.no_grad():
        plain = ours.hidden(idx, positions)
        ours.set_matmul('bf16')
        got, some = ours.hidden(idx, positions), ours.hidden(idx, positions, logit_positions=torch.tensor([40, 2]))
    hook.remove()
    ours.set_matmul('float32')
    assert shapes == [41, 64, 64] and got.shape == plain.shape
    close(some, got[0, [40, 2]], 0.05)
    assert 0 < (got - plain).norm() < 0.05 * plain.norm()


# ---- files -------------------------------------------------------------------------------------------------

def edit_config(directory, **changes):
    """Sets keys of a config.json; None removes one."""
    path = os.path.join(directory, 'config.json')
    with open(path) as f:
        config = {**json.load(f), **changes}
    with open(path, 'w') as f:
        json.dump({key: value for key, value in config.items() if value is not None}, f)


def edit_weights(directory, change):
    path = os.path.join(directory, 'model.safetensors')
    save_file(change(load_file(path)), path, metadata={'format': 'pt'})


OLD = {'llama3': dict(rope_theta=10000.0, rope_scaling=LLAMA3_ROPE),
       'llama_linear': dict(rope_theta=500.0, rope_scaling={'type': 'linear', 'factor': 4.0}),
       'mistral': dict(rope_theta=10000.0, head_dim=None),
       'qwen2': dict(rope_theta=10000.0, use_sliding_window=None, sliding_window=7),
       'qwen2.5': dict(layer_types=None, max_window_layers=2, sliding_window=7, use_sliding_window=True),
       'gemma2': dict(rope_theta=10000.0, layer_types=None),
       'gemma3': dict(rope_theta=1e6, rope_local_base_freq=1e4, layer_types=None, sliding_window_pattern=2),
       'gemma3_scaled': dict(rope_theta=1e6, rope_local_base_freq=1e4,
                             rope_scaling={'rope_type': 'linear', 'factor': 8.0})}


@torch.no_grad()
@pytest.mark.parametrize('family', OLD)
def test_config_of_the_older_generation(pairs, family, tmp_path):
    theirs, ours, directory = pairs(family)
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, rope_parameters=None, **OLD[family])
    old = load_model(str(tmp_path))[0]
    close(old(tokens(2, 40)), theirs(tokens(2, 40)).logits)
    assert {kind: rope for kind, rope in old.config.rope.items()} == ours.config.rope


@pytest.mark.parametrize('arch', UNSAID)
def test_what_config_json_leaves_unsaid(arch):
    """Our defaults for missing keys are transformers'."""
    config = type(transformers.AutoConfig.for_model(arch))()
    for key, value in UNSAID[arch].items():
        if key == 'rope_local_base_freq' or key == 'rope_theta':
            kind = 'full_attention' if key == 'rope_theta' else 'sliding_attention'
            assert config.rope_parameters[kind] == {'rope_type': 'default', 'rope_theta': value}
        elif key != 'sliding_window' or not arch.startswith('qwen'):
            # these hide it while use_sliding_window is off
            assert getattr(config, key) == value, key
    assert config.rms_norm_eps == 1e-6 if arch != 'gpt2' else config.layer_norm_epsilon == 1e-5
    assert config.tie_word_embeddings == UNSAID[arch].get('tie_word_embeddings', False)
    assert getattr(config, 'hidden_act', UNSAID[arch].get('hidden_act')) == UNSAID[arch].get('hidden_act')


@torch.no_grad()
@pytest.mark.parametrize('family', ['gpt2', 'llama2', 'gemma3'])
def test_sharded_weights(pairs, family, tmp_path):
    theirs, ours, _ = pairs(family)
    theirs.save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    close(load_model(str(tmp_path))[0](tokens(2, 9)), ours(tokens(2, 9)), 0)


@torch.no_grad()
def test_gemma3_with_pictures_gives_its_language_model(pairs, tmp_path):
    _, ours, directory = pairs('gemma3')
    with open(os.path.join(directory, 'config.json')) as f:
        text = json.load(f)
    weights = {name.replace('model.', 'model.language_model.', 1): w
               for name, w in load_file(os.path.join(directory, 'model.safetensors')).items()}
    save_file({**weights, 'model.vision_tower.embeddings.weight': torch.ones(3)}, tmp_path / 'model.safetensors')
    config = {'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    close(load_model(str(tmp_path))[0](tokens(1, 20)), ours(tokens(1, 20)), 0)


@torch.no_grad()
def test_gpt2_without_biases(tmp_path):
    """transformers' GPT-2 has biases: it opens ours with zeros;
    here they are gone again, unless they were trained."""
    model = GPT(GPTConfig(**{**FIELDS['gpt2'], 'bias': False}, arch='gpt2', **SMALL))
    model.init_weights(0.3).eval()
    save_model(model, None, str(tmp_path))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == 'GPT2LMHeadModel' and not any(info.values())
    idx = tokens(2, 40)
    close(theirs(idx).logits, model(idx))
    back = load_model(str(tmp_path))[0]
    assert back.config == replace(model.config, extra=back.config.extra)
    assert not any('bias' in name for name in back.state_dict())
    close(back(idx), model(idx), 0)
    theirs.transformer.h[1].mlp.c_fc.bias += 0.5
    theirs.save_pretrained(tmp_path)
    trained = load_model(str(tmp_path))[0]
    assert trained.config.bias
    close(trained(idx), theirs(idx).logits)


@torch.no_grad()
def test_a_mixture_that_no_class_computes_is_not_called_by_a_wrong_name(tmp_path):
    model = GPT(GPTConfig(**{**FIELDS['qwen3'], 'bias': True, 'activation': 'gelu'}, **SMALL))
    model.init_weights().eval()
    save_model(model, None, str(tmp_path))
    with pytest.raises(ValueError, match='nanoforge'):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    back = load_model(str(tmp_path))[0]
    assert back.config == model.config
    close(back(tokens(2, 9)), model(tokens(2, 9)), 0)


@torch.no_grad()
@pytest.mark.parametrize('arch', FIELDS)
def test_every_family_made_here_is_one_there(arch, tmp_path):
    """Models from scratch, as train_gpt.py makes them, have a class in transformers,
    and no stop tokens of that class."""
    model = GPT(GPTConfig(**FIELDS[arch], arch=arch, **SMALL)).init_weights(0.3).eval()
    save_model(model, None, str(tmp_path))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and theirs.config.model_type == arch and theirs.config.eos_token_id is None
    close(theirs(tokens(2, 40)).logits, model(tokens(2, 40)))


@torch.no_grad()
def test_small_differences_of_old_files(pairs, tmp_path):
    """GPT-2 without the 'transformer.' prefix and with its mask; a tied head that is stored anyway."""
    _, ours, directory = pairs('gpt2')
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    edit_weights(tmp_path, lambda weights: {
        **{name.removeprefix('transformer.'): w for name, w in weights.items()},
        'h.0.attn.bias': torch.ones(1, 1, 64, 64), 'h.1.attn.masked_bias': torch.tensor(-1e4),
        'lm_head.weight': weights['transformer.wte.weight'].clone()})
    close(load_model(str(tmp_path))[0](tokens(2, 9)), ours(tokens(2, 9)), 0)


@torch.no_grad()
@pytest.mark.parametrize('family', ['gpt2', 'smollm', 'gemma3'])
def test_a_tied_model_whose_file_has_another_head(pairs, family, tmp_path):
    """It is untied, as transformers does; and where the head alone is there, the embedding is that."""
    _, ours, directory = pairs(family)
    embedding = 'transformer.wte.weight' if family == 'gpt2' else 'model.embed_tokens.weight'
    shutil.copytree(directory, tmp_path / 'own')
    edit_weights(tmp_path / 'own', lambda weights: {**weights, 'lm_head.weight': weights[embedding] + 0.1})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'own', attn_implementation='eager')
    idx = tokens(2, 20)
    own = load_model(str(tmp_path / 'own'))[0]
    close(own(idx), theirs(idx).logits)
    assert not own.config.tied and (own(idx) - ours(idx)).abs().max() > 0.1
    save_model(own, None, str(tmp_path / 'saved'))
    close(load_model(str(tmp_path / 'saved'))[0](idx), own(idx), 0)
    close(AutoModelForCausalLM.from_pretrained(tmp_path / 'saved', attn_implementation='eager')(idx).logits, own(idx))

    shutil.copytree(directory, tmp_path / 'head')
    edit_weights(tmp_path / 'head', lambda weights: {
        'lm_head.weight' if name == embedding else name: w for name, w in weights.items()})
    close(load_model(str(tmp_path / 'head'))[0](idx), ours(idx), 0)


def test_half_precision(pairs):
    _, ours, directory = pairs('gemma3')
    model = load_model(directory, dtype=torch.bfloat16)[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    idx = tokens(2, 40)
    logits = model(idx)
    assert logits.dtype == torch.float32 and (logits - ours(idx)).abs().max() < 0.05 * ours(idx).abs().max()
    decoder = make_decoder(model, idx[:, :30].tolist(), 1, 10)
    with torch.no_grad():
        steps = [decoder.start(), *(decoder.step(idx[:, t]) for t in range(30, 40))]
    assert decoder.caches[0].dtype == torch.bfloat16
    close(torch.stack(steps, 1), logits[:, 29:], 0.1)
    assert model(idx, idx).dtype == torch.float32


def test_gradient_checkpointing_and_dropout_change_no_gradient(pairs):
    _, _, directory = pairs('qwen3')
    grads = []
    for every in (0, 1, 2):
        model = load_model(directory)[0].train()
        model.gradient_checkpointing = every
        for module in model.modules():
            module.dropout = 0.3
        torch.manual_seed(0)
        model(tokens(2, 20), tokens(2, 20)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(*grads))


PEAK = """
import sys
sys.path.insert(0, 'bench')
import torch, model
from shared import peak
before = peak()
gpt = model.load_model(sys.argv[1])[0]
print(peak() - before, gpt.num_params() * 4)
total = sum(p.sum() for p in gpt.parameters())          # every page is read
print(peak() - before)
"""


def test_weights_are_mapped_not_copied(tmp_path):
    model = GPT(GPTConfig(vocab_size=20000, n_embd=512, n_layer=8, n_head=8)).init_weights()
    save_model(model, None, str(tmp_path))
    command = [sys.executable, '-c', PEAK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, size, read = map(int, done.stdout.split())
    assert size > 120e6 and loaded < 0.25 * size and read < 1.25 * size


def test_a_model_is_loaded_without_torchs_compiler():
    """Which takes 1.8 s to import: at every start."""
    command = "import sys, model; model.load_model('tiny'); sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, '-c', command], cwd=ROOT, check=True)


@torch.no_grad()
def test_mapped_weights_are_private(pairs, tmp_path):
    """Training changes the memory, not the file;
    and the file can be written anew from the model mapped from it."""
    directory = str(tmp_path / 'model')
    shutil.copytree(pairs('qwen3')[2], directory)
    model = load_model(directory)[0]
    before = {name: w.clone() for name, w in model.state_dict().items()}
    for p in model.parameters():
        p.add_(1.0)
    assert all(torch.equal(w, before[name]) for name, w in load_model(directory)[0].state_dict().items())
    save_model(model, None, directory)
    again, changed = load_model(directory)[0].state_dict(), model.state_dict()
    for name, w in before.items():
        assert torch.equal(again[name], w + 1.0) and torch.equal(again[name], changed[name])


# ---- mistakes ----------------------------------------------------------------------------------------------

def broken(pairs, tmp_path, family='llama2'):
    shutil.copytree(pairs(family)[2], tmp_path, dirs_exist_ok=True)
    return str(tmp_path)


def refused(directory, *words):
    with pytest.raises(UserError) as error:
        load_model(str(directory))
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_missing_and_corrupt_files(pairs, tmp_path):
    pairs('llama2')[0].save_pretrained(tmp_path / 'sharded', max_shard_size='20KB')
    shard = sorted((tmp_path / 'sharded').glob('*.safetensors'))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(tmp_path / 'sharded', shard.name, 'not a whole safetensors file')
    shard.write_bytes(b'\xff' * 50)
    refused(tmp_path / 'sharded', shard.name, 'not a whole safetensors file')
    shard.unlink()
    refused(tmp_path / 'sharded', shard.name, 'index')
    (tmp_path / 'sharded' / 'model.safetensors.index.json').write_text('{')
    refused(tmp_path / 'sharded', 'index.json', 'JSON')
    (tmp_path / 'sharded' / 'model.safetensors.index.json').write_text('{}')
    refused(tmp_path / 'sharded', 'index.json', 'names no file')
    directory = broken(pairs, tmp_path / 'old')
    os.rename(os.path.join(directory, 'model.safetensors'), os.path.join(directory, 'pytorch_model.bin'))
    refused(directory, 'safetensors only', 'save_pretrained')
    edit_config(directory, model_type='no_such_model')
    refused(directory, 'no_such_model')
    (tmp_path / 'old' / 'config.json').write_text('not JSON')
    refused(directory, 'config.json', 'JSON')
    (tmp_path / 'empty').mkdir()
    refused(tmp_path / 'empty', 'no config.json')
    refused(tmp_path / 'nowhere', 'no model directory')


def test_keys_that_do_not_fit(pairs, tmp_path):
    directory = broken(pairs, tmp_path)
    edit_weights(directory, lambda weights: {**weights, 'model.layers.0.extra.weight': torch.ones(2)})
    refused(directory, 'layers.0.extra.weight has no home')
    edit_weights(directory, lambda weights: {name: w for name, w in weights.items() if 'extra' not in name})
    edit_weights(directory, lambda weights: {**weights, 'model.norm.weight': torch.ones(3)})
    refused(directory, 'norm.weight is (3,), not (32,)')
    edit_weights(directory, lambda weights: {name: w for name, w in weights.items() if name != 'lm_head.weight'})
    refused(directory, 'lm_head.weight is missing')


@pytest.mark.parametrize('family, changes, words', [
    ('qwen2', dict(num_hidden_layers=None), 'no num_hidden_layers'),
    ('qwen2', dict(hidden_size='32'), "hidden_size is '32'"),
    ('llama2', dict(num_attention_heads=-4), 'num_attention_heads is -4'),
    ('gpt2', dict(n_embd=None, n_head=0), 'no n_head'),
    ('gemma3', dict(rope_parameters=3), 'config.json'),
    ('llama2', dict(hidden_act=['silu']), 'config.json'),
    ('llama2', dict(model_type={}), 'config.json'),
])
def test_a_config_that_lacks_a_key_or_has_another_kind_of_value(pairs, family, changes, words, tmp_path):
    directory = broken(pairs, tmp_path, family)
    edit_config(directory, **changes)
    refused(directory, directory, words)


def test_what_the_hub_does_not_give():
    """The client's own errors, made without a network."""
    from huggingface_hub import errors
    refusal = SimpleNamespace(status_code=403, headers={}, request=None)
    gated = why_not_provided('org/name', errors.GatedRepoError('no', response=refusal))
    assert all(word in gated for word in ('org/name', 'gated', 'licence', 'log in', 'HF_TOKEN')) and 'network' not in gated
    private = why_not_provided('org/name', errors.RepositoryNotFoundError('no', response=refusal))
    assert all(word in private for word in ('spelling', 'log in', 'HF_TOKEN'))
    assert 'HF_TOKEN' in why_not_provided('org/name', errors.HfHubHTTPError('no', response=refusal))
    offline = why_not_provided('org/name', errors.LocalEntryNotFoundError('no'))
    assert 'network' in offline and 'HF_TOKEN' not in offline


def tokenizer_of(size):
    vocabulary = {'<unk>': 0, **{f't{i}': i for i in range(1, size)}}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, '<unk>')).to_str())


def test_a_tokenizer_of_another_model(pairs, tmp_path):
    directory = broken(pairs, tmp_path)
    tokenizer_of(99).save(directory)
    assert load_model(directory)[1].vocab_size == 99
    tokenizer_of(100).save(directory)
    refused(directory, '100', '99', 'another model')


def test_a_token_that_was_added_without_an_embedding(pairs, tmp_path):
    """The model loads; only a text that has the token is refused, and a chat that would end with it."""
    directory = broken(pairs, tmp_path)
    backend = tokenizer_of(99).backend
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(['<tool>', '<end>'])
    config = {'eos_token': '<end>'}
    Tokenizer(backend.to_str(), config, chat_template='{% for m in messages %}{{ m.content }} {% endfor %}').save(directory)
    _, tokenizer = load_model(directory)
    assert tokenizer.encode('t1 t2') == [1, 2] and tokenizer.stop_ids == {2}
    with pytest.raises(UserError, match="'<tool>'.*resize_token_embeddings"):
        tokenizer.encode('t1 <tool>')
    with pytest.raises(UserError, match='<end>'):
        render(tokenizer, [{'role': role, 'content': 't1'} for role in ('user', 'assistant')])


def test_rows_longer_than_the_context(pairs):
    for family in ('gpt2', 'llama2'):
        ours = pairs(family)[1]
        for call in (lambda: ours(tokens(1, 65)), lambda: generate(ours, tokens(1, 65).tolist(), 1)):
            with pytest.raises(UserError, match='context of 64'):
                call()


# ---- contexts longer than what a model was trained on ------------------------------------------------------

DYNAMIC = {'rope_type': 'dynamic', 'factor': 4.0, 'rope_theta': 1e4}
SCALED = {
    'yarn': ('Llama', YARN, 16), 'yarn_factor': ('Qwen3', dict(YARN, attention_factor=1.5), 16),
    'yarn_deepseek': ('Mistral', dict(YARN, mscale=0.7, mscale_all_dim=0.4, beta_fast=4), 16),
    'dynamic': ('Llama', DYNAMIC, 16), 'dynamic_qwen3': ('Qwen3', DYNAMIC, 16)}


@torch.no_grad()
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 2e-7)], ids=['float32', 'float64'])
@pytest.mark.parametrize('name', SCALED)
def test_beyond_the_original_context(name, dtype, tolerance, tmp_path):
    """Lengths below and beyond it: whole rows, packed rows, decoding with a cache, and a directory that keeps it.
    transformers' dynamic frequencies remember a longer text, so each length has a fresh model; its norms, which
    are float32 in a float64 model, too, are those of torch."""
    arch, rope, original = SCALED[name]
    torch.manual_seed(0)
    config = getattr(transformers, f'{arch}Config')(**{
        **SIZES, 'rope_parameters': rope, 'max_position_embeddings': original, 'eos_token_id': None, 'pad_token_id': None})
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    for p in theirs.parameters():
        p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(tmp_path / 'there')

    def fresh():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / 'there', dtype=dtype)
        for module in model.modules():
            if 'RMSNorm' in type(module).__name__:
                module.forward = partial(F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight,
                                         eps=module.variance_epsilon)
        return model.eval()

    ours = load_model(str(tmp_path / 'there'), dtype=dtype)[0]
    assert type(ours) is GPT and ours.config.block_size == 64
    save_model(ours, None, str(tmp_path / 'here'))
    again = load_model(str(tmp_path / 'here'))[0]
    assert again.config == ours.config and json.loads((tmp_path / 'here' / 'config.json').read_text())['model_type'] != 'nanoforge'
    idx = tokens(2, 64)
    for T in (10, 16, 17, 31, 64):
        close(ours(idx[:, :T]), fresh()(idx[:, :T]).logits, tolerance)
    plain = load_model(str(tmp_path / 'there'), dtype=dtype)[0]
    for of_type in plain.config.rope.values():
        of_type['rope_type'] = 'default'
    assert (plain(idx) - ours(idx)).abs().max() > 1e-3                  # the scaling is seen

    ends = [0, 10, 27, 64]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(ends, ends[1:])])[None]
    packed = ours(idx[:1], positions=positions)
    for a, b in zip(ends, ends[1:]):
        close(packed[:, a:b], fresh()(idx[:1, a:b]).logits, tolerance)
    branches = torch.cat([torch.arange(20), torch.arange(12, 30), torch.arange(12, 38)])[None]      # two continue 0..12
    packed = ours(idx[:1], positions=branches)
    if 'yarn' in name:
        close(packed[:, 20:38], fresh()(torch.cat([idx[:1, :12], idx[:1, 20:38]], 1)).logits[:, 12:], tolerance)
    close(packed[:, 38:], fresh()(torch.cat([idx[:1, :12], idx[:1, 38:]], 1)).logits[:, 12:], tolerance)

    prompts = [idx[0, :12].tolist(), idx[1, :24].tolist()]              # of one batch, each as if it were alone
    samples = generate(ours, prompts, 20, temperature=0)
    for prompt, row in zip(prompts, samples.tokens.tolist()):
        made = fresh().generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, use_cache=True,
                                output_logits=True, return_dict_in_generate=True)
        assert row[-20:] == made.sequences[0, len(prompt):].tolist()
    decoder = make_decoder(ours, prompts, 1, 20)
    logits = [decoder.start()] + [decoder.step(samples.tokens[:, i].clone()) for i in range(19)]
    close(torch.stack(logits, 1)[1].float(), torch.cat(made.logits), max(tolerance, 1e-6))      # float32 from generate


@pytest.mark.parametrize('change, message', [
    (dict(factor='4'), "above 0 as factor, not '4'"), (dict(factor=None), 'above 0 as factor, not None'),
    (dict(rope_type='dynamic', factor=-1), 'dynamic scaling .* not -1'),
    (dict(original_max_position_embeddings='16'), "original_max_position_embeddings, not '16'")])
def test_bad_rope_scaling_is_one_line(pairs, change, message, tmp_path):
    ours = pairs('llama_yarn')[1]
    save_model(ours, None, str(tmp_path))
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['rope_scaling']
    config['rope_parameters'].update(change)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


# ---- architectures outside the families --------------------------------------------------------------------

OTHERS = {'GPTNeoX': {}, 'Phi': {}, 'Granite': dict(logits_scaling=8.0, embedding_multiplier=3.0)}
NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
EXPERTS = dict(SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
TRAINED = {
    'Llama': dict(SIZES, rope_parameters=LONGROPE), 'Olmo2': SIZES, 'Phi3': {**SIZES, **NO_TOKENS}, 'Cohere': SIZES,
    'SmolLM3': {**SIZES, **NO_TOKENS}, 'GPTNeoX': {**SIZES, 'num_key_value_heads': 4}, 'Qwen3Moe': EXPERTS,
    'Mixtral': dict(SIZES, num_local_experts=4), 'Phimoe': dict(SIZES, num_local_experts=4),
    'RecurrentGemma': dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                           num_attention_heads=4, lru_width=32, attention_window_size=16),
    'OPT': dict(vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=1, dropout=0.5)}


def other(name, directory):
    """Saves a random model of an architecture outside the families; returns transformers' model."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(getattr(transformers, f'{name}Config')(**TRAINED[name])).eval()
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize('name', TRAINED)
def test_other_architectures_train_and_come_back(name, tmp_path):
    """A step of every parameter, a step of adapters alone; what is saved opens here and there."""
    theirs, idx = other(name, tmp_path / 'there'), tokens(2, 12)
    for lora in (False, True):
        ours = load_model(str(tmp_path / 'there'))[0]
        with torch.no_grad():
            close(ours(idx), theirs(idx).logits)
            if name != 'Phimoe':                            # whose router draws lots in training
                close(ours.train()(idx), theirs(idx).logits)            # no dropout
        if lora:
            add_lora(ours, 4, 8, 0.0, 'all-linear')
        optimizer, losses = make_optimizer('muon', ours.train(), 1e-2), []
        for _ in range(2):
            loss = -ours(idx[:, :-1], idx[:, 1:]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] < losses[0]
        save_model(ours.eval(), None, str(tmp_path / f'lora_{lora}'))
        with torch.no_grad():
            close(load_model(str(tmp_path / f'lora_{lora}'))[0](idx), ours(idx))
            if not lora:
                close(AutoModelForCausalLM.from_pretrained(tmp_path / 'lora_False')(idx).logits, ours(idx))


def test_what_lora_leaves_out_is_known(tmp_path):
    """Stacked experts and matrices in other layers than linear ones."""
    other('Qwen3Moe', tmp_path / 'experts')
    experts = stacked_weights(load_model(str(tmp_path / 'experts'))[0])
    assert experts == {'mlp.experts.gate_up_proj': (16, 4 * 4 * 32 * 32), 'mlp.experts.down_proj': (16, 4 * 4 * 32 * 16)}
    mamba = HFModel(transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=8)))
    assert find_targets(mamba, 'all-linear') == [f'backbone.layers.0.mixer.{name}' for name in ('in_proj', 'x_proj')]
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True))
    theirs.save_pretrained(tmp_path / 'conv')
    with pytest.raises(UserError, match='gpt2 has no linear layer .* without use_lora'):
        add_lora(load_model(str(tmp_path / 'conv'))[0], target_modules='all-linear')


@pytest.mark.parametrize('name', OTHERS)
def test_other_architectures(name, tmp_path):
    config = getattr(transformers, f'{name}Config')(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, **OTHERS[name])
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(tmp_path / 'there')
    ours, tokenizer = load_model(str(tmp_path / 'there'))
    assert tokenizer is None and ours.config.block_size == 64 and ours.config.vocab_size == 99
    idx, targets = tokens(2, 20), tokens(2, 20, seed=5).masked_fill(tokens(2, 20) < 30, -1)
    close(ours(idx), theirs(idx).logits)
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, 20)
    close(ours(idx, positions=positions), torch.cat([theirs(idx[:, :8]).logits, theirs(idx[:, 8:]).logits], 1))
    # three continuations
    positions = torch.cat([torch.arange(8), torch.arange(5, 10), torch.arange(5, 12)])[None]
    got = ours(idx[:1], positions=positions)
    close(got[:, :8], theirs(idx[:1, :8]).logits)
    for start, end in ((8, 13), (13, 20)):
        close(got[:, start:end], theirs(torch.cat([idx[:1, :5], idx[:1, start:end]], 1)).logits[:, 5:])
    log_p = theirs(idx).logits.log_softmax(-1)
    logp = log_p.gather(2, targets.clamp(min=0)[..., None]).squeeze(2) * (targets >= 0)
    close(ours(idx, targets), logp)
    stats = ours.token_stats(ours.hidden(idx), targets)
    close(stats['entropy'], -(log_p.exp() * log_p).sum(-1) * (targets >= 0))
    expected = torch.autograd.grad(logp.sum(), list(theirs.parameters()))
    for a, b in zip(torch.autograd.grad(ours(idx, targets).sum(), list(ours.parameters())), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    prompts = [idx[0, :9].tolist(), idx[1, :5].tolist()]
    assert logp_gap(ours, prompts, generate(ours, prompts, 8))[0] < 1e-5
    save_model(ours, None, str(tmp_path / 'here'))
    with torch.no_grad():
        close(AutoModelForCausalLM.from_pretrained(tmp_path / 'here')(idx).logits, theirs(idx).logits, 0)
    with pytest.raises(UserError, match='context of 64'):
        ours(tokens(1, 65))


# ---- the proof ---------------------------------------------------------------------------------------------

def test_check_says_what_it_finds(pairs, monkeypatch, capsys):
    directory = pairs('qwen2.5')[2]
    assert roundtrip.check(directory)
    table = capsys.readouterr().out
    assert table.count('PASS') >= 8 and 'FAIL' not in table and 'qwen2' in table
    real = roundtrip.theirs_of

    def changed(directory):
        theirs, strange = real(directory)
        theirs.model.layers[3].self_attn.o_proj.weight.data[0, 0] += 0.01
        return theirs, strange
    monkeypatch.setattr(roundtrip, 'theirs_of', changed)
    assert not roundtrip.check(directory)
    assert capsys.readouterr().out.count('FAIL  ') == 2


# ---- torch.compile -----------------------------------------------------------------------------------------

def test_compiled_layers_have_the_same_gradients(recwarn):
    """Layer by layer, as train_gpt.py compiles them, in the plain forms that a GPU takes,
    without a graph break, and without a warning on the console."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**FIELDS['qwen3'], **{**SMALL, 'n_layer': 1})).init_weights(0.3)
    batches, parameters = [tokens(2, T) for T in (16, 24, 11)], list(model.parameters())        # of other lengths, too
    expected = [torch.autograd.grad(model(idx, idx).sum(), parameters) for idx in batches]
    for layer in model.layers:
        layer.compile(backend='aot_eager', fullgraph=True)
    for idx, of_batch in zip(batches, expected):
        for a, b in zip(torch.autograd.grad(model(idx, idx).sum(), parameters), of_batch):
            assert b.any()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not [w for w in recwarn if 'Dynamo' in str(w.message)]


def test_target_logp_compiles():
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.tensor([3, -1, 0, 6, 2])
    for form in (kernels.TargetLogp.apply, torch.compile(kernels.TargetLogp.apply, backend='aot_eager')):
        logp = form(logits, targets)
        grad, = torch.autograd.grad(logp.sum(), logits)
        plain = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
        close(logp, plain)
        close(grad, torch.autograd.grad(plain.sum(), logits)[0])


# ---- what other tools look for in a folder

# file: {key: which tools read it}; what they make of it is below
NEEDED = {
    'config.json': {
        'architectures': 'vLLM, llama.cpp, Ollama: the class', 'model_type': 'transformers, lm-eval', 'dtype': 'of the weights',
        'vocab_size': 'all', 'hidden_size': 'all', 'num_hidden_layers': 'all', 'num_attention_heads': 'all', 'num_key_value_heads': 'vLLM, llama.cpp',
        'max_position_embeddings': 'vLLM, llama.cpp: the context', 'rope_theta': 'Ollama, and tools older than rope_parameters', 'rope_parameters': 'newer ones',
        'eos_token_id': 'llama.cpp', 'tie_word_embeddings': 'all'},
    'generation_config.json': {'eos_token_id': 'vLLM, lm-eval: every token that ends a turn', 'pad_token_id': 'lm-eval, for a batch'},
    'tokenizer_config.json': {'tokenizer_class': 'AutoTokenizer', 'eos_token': 'llama.cpp, Ollama', 'pad_token': 'lm-eval'},
    'tokenizer.json': {'model': 'all', 'added_tokens': 'all', 'pre_tokenizer': 'llama.cpp knows it by what it does'},
}


def test_what_other_tools_need_is_in_a_saved_folder(tmp_path):
    """Template and stop tokens among it, also where the model that a run began with names neither."""
    model, tokenizer = load_model('tiny')
    bare = Tokenizer(tokenizer.text, {'eos_token': '<|endoftext|>', 'pad_token': '<|endoftext|>'})     # as of a base model
    chat = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Where does Kai live?'}]
    for name, theirs in (('chat', tokenizer), ('base', bare)):
        asked, folder = prompt_ids(theirs, chat), tmp_path / name
        save_model(model, theirs, str(folder))
        assert sorted(os.listdir(folder)) == sorted([*NEEDED, 'model.safetensors', 'chat_template.jinja'])
        for file, keys in NEEDED.items():
            content = json.loads((folder / file).read_text())
            assert not keys.keys() - content.keys(), (name, file, keys.keys() - content.keys())
        turn = theirs.id_of('<|im_end|>')
        stops = json.loads((folder / 'generation_config.json').read_text())['eos_token_id']
        assert turn in stops and sorted(stops) == sorted(theirs.stop_ids)
        with safe_open(folder / 'model.safetensors', 'pt') as weights:
            assert weights.metadata() == {'format': 'pt'}
        # and what transformers, which vLLM and lm-eval ask, makes of them
        opened, loaded = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        assert opened.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == asked
        assert sorted(loaded.generation_config.eos_token_id) == sorted(stops) and opened.pad_token_id == theirs.pad_id
        answer = loaded.generate(torch.tensor([asked]), max_new_tokens=30, do_sample=False)[0, len(asked):].tolist()
        assert answer[-1] == turn and turn not in answer[:-1]
