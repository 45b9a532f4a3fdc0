"""What makes each family itself: GPT's configuration, and Hugging Face's config.json and weights to and from it."""
import re
from dataclasses import asdict, dataclass, field, replace

import torch

from configurator import UserError


@dataclass
class GPTConfig:
    arch: str = 'qwen3'                 # family: gpt2, llama, mistral, qwen2, qwen3, gemma2, gemma3_text
    vocab_size: int = 50304
    block_size: int = 1024              # longest context
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0                  # key/value heads; 0 = n_head
    n_embd: int = 768
    head_size: int = 0                  # 0 = n_embd / n_head
    n_inner: int = 0                    # width of the MLP; 0 = the family's usual
    dropout: float = 0.0
    bias: bool = False                  # biases in linear layers (and layer norms)
    qkv_bias: bool = False              # biases of q, k, v alone (Qwen2)
    o_bias: bool = False                # and of attention's output
    norm: str = 'rmsnorm'               # rmsnorm, layernorm
    norm_eps: float = 1e-6
    norm_offset: bool = False           # Gemma stores each gain less one
    position: str = 'rope'              # rope, learned
    rope: dict = field(default_factory=dict)   # layer type -> its rope_parameters, as in Hugging Face's config.json
    activation: str = 'silu'            # silu, gelu (exact), gelu_tanh
    gated: bool = True                  # act(gate(x)) * up(x), else act(up(x))
    qk_norm: bool = False               # RMS norm of each head of q and k
    post_norms: bool = False            # Gemma: norms after attention and MLP too
    tied: bool = True                   # head and embedding share one matrix
    sliding_window: int = 0             # keys that a 'sliding_attention' layer sees; 0 = all
    layer_types: list = field(default_factory=list)     # per layer: full_attention or sliding_attention; empty = full
    attn_scale: float = 0.0             # 0 = head_size ** -0.5
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    embed_scale: bool = False           # Gemma multiplies embeddings by sqrt(n_embd)
    extra: dict = field(default_factory=dict)   # other keys of a loaded config.json, kept for saving (token ids, ...)

    def __post_init__(self):
        if not self.head_size and self.n_embd % self.n_head:
            raise UserError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}')
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.position == 'rope' and self.head_size % 2:
            raise UserError(f'rotary positions need an even head size, not {self.head_size} (n_embd / n_head)')
        # Llama's rule for a gated MLP: two thirds of 4 * n_embd, rounded up to a multiple of 32
        self.n_inner = self.n_inner or (-(-8 * self.n_embd // 96) * 32 if self.gated else 4 * self.n_embd)
        self.attn_scale = self.attn_scale or self.head_size ** -0.5
        usual = 'sliding_attention' if self.sliding_window else 'full_attention'
        self.layer_types = self.layer_types or [usual] * self.n_layer
        self.sliding_window = self.sliding_window if 'sliding_attention' in self.layer_types else 0
        self.rope = {kind: {'rope_type': 'default', 'rope_theta': 10000.0, **self.rope.get(kind, {})}
                     for kind in sorted(set(self.layer_types)) if self.position == 'rope'}


# What makes each family itself; sizes come from the flags or from the config.json that is loaded.
FAMILIES = {
    'gpt2': dict(norm='layernorm', norm_eps=1e-5, position='learned', activation='gelu_tanh', gated=False, bias=True),
    'llama': dict(norm_eps=1e-5, tied=False),
    'mistral': dict(norm_eps=1e-5, tied=False),
    'qwen2': dict(qkv_bias=True),
    'qwen3': dict(qk_norm=True),
    'gemma2': dict(activation='gelu_tanh', post_norms=True, norm_offset=True, embed_scale=True, attn_softcap=50.0,
                   logit_softcap=30.0),
    'gemma3_text': dict(activation='gelu_tanh', post_norms=True, norm_offset=True, embed_scale=True, qk_norm=True),
}

# ---- config.json -----------------------------------------------------------------------------------------------------

CLASSES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
           'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM', 'gemma2': 'Gemma2ForCausalLM',
           'gemma3_text': 'Gemma3ForCausalLM'}
# our field -> key of config.json, in GPT-2's words and in everyone else's
GPT2_KEYS = {'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer', 'n_head': 'n_head',
             'n_embd': 'n_embd', 'norm_eps': 'layer_norm_epsilon', 'n_inner': 'n_inner', 'tied': 'tie_word_embeddings'}
LLAMA_KEYS = {'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
              'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size',
              'n_inner': 'intermediate_size', 'head_size': 'head_dim', 'norm_eps': 'rms_norm_eps',
              'tied': 'tie_word_embeddings'}
WINDOW_KEYS = {'sliding_window': 'sliding_window'}
GEMMA_KEYS = {**WINDOW_KEYS, 'attn_softcap': 'attn_logit_softcapping', 'logit_softcap': 'final_logit_softcapping'}
KEYS = {'gpt2': GPT2_KEYS, 'llama': LLAMA_KEYS,
        **{arch: LLAMA_KEYS | WINDOW_KEYS for arch in ('mistral', 'qwen2', 'qwen3')},
        **{arch: LLAMA_KEYS | GEMMA_KEYS for arch in ('gemma2', 'gemma3_text')}}
# kind of rotary scaling -> the settings that it needs
ROPE_TYPES = {'default': (), 'linear': ('factor',),
              'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')}
# What transformers takes where config.json says nothing (published files leave much out).
_QWEN = dict(hidden_act='silu', max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
_GEMMA = dict(hidden_activation='gelu_pytorch_tanh', num_attention_heads=8, num_key_value_heads=4, head_dim=256,
              sliding_window=4096, query_pre_attn_scalar=256, tie_word_embeddings=True)
UNSAID = {
    'gpt2': dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, layer_norm_epsilon=1e-5,
                 activation_function='gelu_new', tie_word_embeddings=True),
    'llama': dict(hidden_act='silu', max_position_embeddings=2048),
    'mistral': dict(hidden_act='silu', num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
    'qwen2': _QWEN, 'qwen3': dict(_QWEN, head_dim=128),
    'gemma2': dict(_GEMMA, vocab_size=256000, max_position_embeddings=8192, attn_logit_softcapping=50.0,
                   final_logit_softcapping=30.0),
    'gemma3_text': dict(_GEMMA, vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6,
                        rope_local_base_freq=1e4)}
ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh'}


def config_from_hf(hf):
    """A config.json as dict -> GPTConfig, or None for an architecture outside our families."""
    if hf.get('model_type') == 'nanoforge':
        return GPTConfig(**hf['nanoforge'])
    if hf.get('model_type') == 'gemma3':            # the language model of a picture model
        tied = hf.get('tie_word_embeddings', True)
        hf = {'tie_word_embeddings': tied, **hf['text_config'], 'model_type': 'gemma3_text'}
    arch = hf.get('model_type')
    if arch not in FAMILIES:
        return None
    hf = {'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'hidden_activation': None, **UNSAID[arch], **hf}
    values = dict(FAMILIES[arch], arch=arch, **{ours: hf.get(theirs) or 0 for ours, theirs in KEYS[arch].items()})
    values['tied'] = bool(values['tied'])
    name = hf['activation_function'] if arch == 'gpt2' else hf['hidden_activation'] or hf['hidden_act']
    values['activation'] = ACTIVATIONS.get(name)
    strangers = ('add_cross_attention', 'scale_attn_by_inverse_layer_idx', 'use_bidirectional_attention',
                 'quantization_config')
    outside = [values['activation'] is None, hf.get('scale_attn_weights') is False, *map(hf.get, strangers)]
    if arch == 'gpt2':
        values['bias'] = hf.get('nanoforge', {}).get('bias', True)
    else:
        values['bias'] = bool(hf.get('mlp_bias'))
        values['o_bias'] = bool(hf.get('attention_bias'))
        values['qkv_bias'] = values['o_bias'] or arch == 'qwen2'
        values['layer_types'] = _layer_types(hf, arch)
        values['rope'] = {kind: _rope(hf, kind) for kind in set(values['layer_types'])}
        if arch.startswith('gemma'):
            values['attn_scale'] = hf['query_pre_attn_scalar'] ** -0.5
        outside += [values['bias'] and not values['o_bias'], hf.get('partial_rotary_factor', 1.0) != 1.0]
        outside += [rope['rope_type'] not in ROPE_TYPES or rope.get('partial_rotary_factor', 1.0) != 1.0
                    for rope in values['rope'].values()]
    kept = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'initializer_range')
    return None if any(outside) else GPTConfig(**values, extra={k: hf[k] for k in kept if hf.get(k) is not None})


def _layer_types(hf, arch):
    n = hf['num_hidden_layers']
    if arch == 'llama' or not hf['sliding_window'] or arch.startswith('qwen') and not hf.get('use_sliding_window'):
        return ['full_attention'] * n
    if arch == 'mistral':
        return ['sliding_attention'] * n
    if hf.get('layer_types'):
        return list(hf['layer_types'])
    if arch.startswith('qwen'):
        return ['full_attention' if i < hf['max_window_layers'] else 'sliding_attention' for i in range(n)]
    pattern = hf.get('sliding_window_pattern', 6) if arch == 'gemma3_text' else 2
    return ['sliding_attention' if (i + 1) % pattern else 'full_attention' for i in range(n)]


def _rope(hf, layer_type):
    """{rope_theta, rope_type, ...} of one layer type, from transformers 5's rope_parameters or the keys before it."""
    local = layer_type == 'sliding_attention' and hf['model_type'] == 'gemma3_text'
    rope = (hf.get('rope_scaling') if not local else None) or hf.get('rope_parameters') or {}
    rope = rope.get(layer_type, rope)
    theta = hf['rope_local_base_freq'] if local else hf.get('rope_theta', 10000.0)
    rope = {'rope_theta': theta, 'original_max_position_embeddings': hf['max_position_embeddings'],
            **{key: value for key, value in rope.items() if not isinstance(value, dict)}}
    rope['rope_type'] = rope.get('rope_type') or rope.pop('type', None) or 'default'
    known = ('rope_type', 'rope_theta', 'partial_rotary_factor', *ROPE_TYPES.get(rope['rope_type'], ()))
    return {key: rope[key] for key in known if key in rope}


def config_to_hf(cfg, dtype='float32'):
    """GPTConfig -> the config.json that transformers opens.

    A combination that none of its classes computes (GPT-2 with a gated MLP, say) is called a nanoforge model there, so
    that nothing opens it wrongly; load_model does.
    """
    arch = cfg.arch
    hf = {'architectures': [CLASSES[arch]], 'model_type': arch, 'dtype': dtype, 'use_cache': True,
          'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None,         # else the class's own would stand
          **{theirs: getattr(cfg, ours) or None for ours, theirs in KEYS[arch].items()},
          'tie_word_embeddings': cfg.tied}
    name = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.activation)
    name = 'gelu_new' if arch == 'gpt2' and name == 'gelu_pytorch_tanh' else name       # its own word for the same
    if arch == 'gpt2':
        hf.update(activation_function=name, nanoforge={'bias': cfg.bias}, resid_pdrop=cfg.dropout,
                  embd_pdrop=cfg.dropout, attn_pdrop=0.0)
    else:
        hf['hidden_activation' if arch.startswith('gemma') else 'hidden_act'] = name
        if arch in ('llama', 'qwen3', 'gemma2', 'gemma3_text'):
            hf['attention_bias'] = cfg.bias or cfg.o_bias
        if arch == 'llama':
            hf['mlp_bias'] = cfg.bias
        if arch.startswith(('qwen', 'gemma')):
            hf['layer_types'] = cfg.layer_types
        if arch.startswith('qwen'):
            hf['use_sliding_window'] = 'sliding_attention' in cfg.layer_types
        if arch.startswith('gemma'):
            hf['query_pre_attn_scalar'] = round(cfg.attn_scale ** -2)
            hf['sliding_window'] = cfg.sliding_window or cfg.block_size     # a number even where no layer slides
        full = cfg.rope.get('full_attention') or next(iter(cfg.rope.values()), {})
        hf['rope_parameters'] = cfg.rope if arch == 'gemma3_text' else full
        hf['rope_theta'] = full.get('rope_theta')                       # where tools of the older generation look
        if full.get('rope_type', 'default') != 'default':
            hf['rope_scaling'] = full
        if arch == 'gemma3_text':
            hf['rope_local_base_freq'] = cfg.rope.get('sliding_attention', full).get('rope_theta')
    back = config_from_hf(hf)
    if back is None or replace(back, dropout=cfg.dropout, extra=cfg.extra) != cfg:
        return {'architectures': ['GPT'], 'model_type': 'nanoforge', 'dtype': dtype, 'nanoforge': asdict(cfg)}
    return {**hf, **cfg.extra}


# ---- names of weights ------------------------------------------------------------------------------------------------

# our name -> GPT-2's; '^T' marks matrices that GPT-2 stores transposed (its Conv1D)
GPT2_NAMES = {
    'embed_tokens': 'wte', 'embed_positions': 'wpe', 'norm': 'ln_f', 'input_layernorm': 'ln_1',
    'post_attention_layernorm': 'ln_2', 'self_attn.c_attn': 'attn.c_attn^T', 'self_attn.o_proj': 'attn.c_proj^T',
    'mlp.up_proj': 'mlp.c_fc^T', 'mlp.down_proj': 'mlp.c_proj^T'}


def to_hf_weights(model, kind):
    """Our state as {name in a model of `kind` (its model_type): tensor}, without copies where the layout is the
    same."""
    cfg, state = model.config, model.state_dict()
    if cfg.tied:
        state.pop('lm_head.weight')
    if kind == 'gpt2':
        return {name: tensor.contiguous() for name, tensor in _to_gpt2(cfg, state)}
    prefix = '' if kind == 'nanoforge' else 'model.'
    return {('' if name.startswith('lm_head') else prefix) + name: w.contiguous() for name, w in state.items()}


def _to_gpt2(cfg, state):
    for i in range(cfg.n_layer):
        for part in ('weight', 'bias') if cfg.bias else ('weight',):
            state[f'layers.{i}.self_attn.c_attn.{part}'] = torch.cat(
                [state.pop(f'layers.{i}.self_attn.{name}_proj.{part}') for name in 'qkv'])
    for name, tensor in state.items():
        if name.startswith('lm_head'):
            yield name, tensor
            continue
        layer, module, part = re.match(r'(?:layers\.(\d+)\.)?(.+)\.(weight|bias)$', name).groups()
        theirs, _, transposed = GPT2_NAMES[module].partition('^')
        theirs = f'transformer.h.{layer}.{theirs}' if layer else f'transformer.{theirs}'
        yield f'{theirs}.{part}', tensor.t() if transposed and part == 'weight' else tensor
        if not cfg.bias and not module.startswith('embed'):             # GPT-2 has all biases
            yield f'{theirs}.bias', tensor.new_zeros(tensor.size(0))


def from_hf_weights(cfg, weights):
    """{Hugging Face name: tensor} -> {our name: tensor}, the inverse of to_hf_weights. An unknown name stays as it
    is."""
    state = {}
    for name, tensor in weights.items():
        name = re.sub(r'^(language_model\.)?((model|transformer)\.)?(language_model\.)?', '', name)
        if name.endswith(('rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias')):     # what old files carry besides
            continue
        if cfg.arch == 'gpt2':
            state.update(_from_gpt2(name, tensor))
        else:
            state[name] = tensor
    if cfg.tied:
        state.pop('lm_head.weight', None)
    return state


def _from_gpt2(name, tensor):
    match = re.match(r'(?:h\.(\d+)\.)?(.+)\.(weight|bias)$', name)
    for ours, theirs in GPT2_NAMES.items():
        theirs, _, transposed = theirs.partition('^')
        if match and match[2] == theirs:
            tensor = tensor.t() if transposed and match[3] == 'weight' else tensor
            ours = f'layers.{match[1]}.{ours}' if match[1] else ours
            if not ours.endswith('c_attn'):
                return {f'{ours}.{match[3]}': tensor}
            return {f'{ours[:-6]}{name}_proj.{match[3]}': part for name, part in zip('qkv', tensor.chunk(3))}
    return {name: tensor}
