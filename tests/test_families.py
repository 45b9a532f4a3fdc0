"""Every family against transformers: random models saved there and opened here, and the other way round."""
import json
import os
import re

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from configurator import UserError
from model import GPT, GPTConfig, load_model, save_model

transformers.logging.set_verbosity_error()
SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
GPT2 = dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64)
LLAMA3_ROPE = {'rope_type': 'llama3', 'rope_theta': 10000.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
               'original_max_position_embeddings': 16}
GEMMA = dict(SIZES, sliding_window=7, query_pre_attn_scalar=24)
FAMILIES = {
    'gpt2': ('GPT2', GPT2),
    'gpt2_untied': ('GPT2', dict(GPT2, tie_word_embeddings=False, n_inner=40, activation_function='gelu')),
    'llama2': ('Llama', dict(SIZES, num_key_value_heads=4)),
    'llama3': ('Llama', dict(SIZES, rope_parameters=LLAMA3_ROPE)),
    'llama_linear': ('Llama', dict(SIZES, rope_parameters={'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 500.0})),
    'llama_biases': ('Llama', dict(SIZES, attention_bias=True, mlp_bias=True)),
    'llama_attention_bias': ('Llama', dict(SIZES, attention_bias=True)),
    'smollm': ('Llama', dict(SIZES, tie_word_embeddings=True, num_key_value_heads=1)),
    'mistral': ('Mistral', dict(SIZES, sliding_window=7)),
    'mistral_whole': ('Mistral', dict(SIZES, sliding_window=None, head_dim=16)),
    'qwen2': ('Qwen2', SIZES),
    'qwen2.5': ('Qwen2', dict(SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=2, tie_word_embeddings=True)),
    'qwen3': ('Qwen3', dict(SIZES, tie_word_embeddings=True, head_dim=16)),
    'qwen3_bias': ('Qwen3', dict(SIZES, num_key_value_heads=4, attention_bias=True)),
    'gemma2': ('Gemma2', GEMMA),
    'gemma3': ('Gemma3Text', dict(GEMMA, sliding_window_pattern=2)),
    'gemma3_scaled': ('Gemma3Text', dict(GEMMA, num_key_value_heads=4, final_logit_softcapping=5.0, rope_parameters={
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}})),
}


def theirs_of(family, **changes):
    """A random model of transformers with nothing at its neutral value: biases and norms moved away from 0 and 1."""
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
    """Two rows of different length: prompts at once (the shorter padded), then a chunk, then token by token."""
    theirs, ours, _ = pairs(family)
    idx, lengths = tokens(2, 30), torch.tensor([11, 6])
    expected = theirs(idx).logits
    caches = ours.new_caches(2, 40)
    prompt = idx[:, :11].clone()
    prompt[1, 6:] = 7                                               # padding: overwritten before anything looks at it
    logits = ours.logits(ours.hidden(prompt, torch.arange(11)[None], caches))
    close(logits[0, :11], expected[0, :11])
    close(logits[1, :6], expected[1, :6])
    done = lengths.clone()
    for step in (5, 1, 1, 1):
        positions = done[:, None] + torch.arange(step)
        logits = ours.logits(ours.hidden(idx.gather(1, positions), positions, caches))
        close(logits, torch.stack([expected[row, p] for row, p in enumerate(positions)]))
        done += step


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
