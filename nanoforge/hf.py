"""Hugging Face's side of a model: what makes each family itself, config.json and weights to and from ours,
reading a model directory, and causal language models outside the families (HFModel)."""
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from types import SimpleNamespace

import torch
import torch.nn as nn

from configurator import UserError
from data.offline import offline_without_network
from data.tokenizer import read_json
from nanoforge import kernels
from nanoforge.quantize import base_state
from nanoforge.rope import ROPE_TYPES, context_of, is_dynamic


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
    rope: dict = field(default_factory=dict)    # layer type -> its rope_parameters, as in config.json
    activation: str = 'silu'            # silu, gelu (exact), gelu_tanh
    gated: bool = True                  # act(gate(x)) * up(x), else act(up(x))
    qk_norm: bool = False               # RMS norm of each head of q and k
    post_norms: bool = False            # Gemma: norms after attention and MLP too
    tied: bool = True                   # head and embedding share one matrix
    sliding_window: int = 0             # keys that a 'sliding_attention' layer sees; 0 = all
    layer_types: list = field(default_factory=list)     # full_attention, sliding_attention; empty = full
    attn_scale: float = 0.0             # 0 = head_size ** -0.5
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    embed_scale: bool = False           # Gemma multiplies embeddings by sqrt(n_embd)
    extra: dict = field(default_factory=dict)   # other keys of a loaded config.json, kept for saving

    def __post_init__(self):
        if not self.head_size and self.n_embd % self.n_head:
            raise UserError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}')
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.position == 'rope' and self.head_size % 2:
            raise UserError(f'rotary positions need an even head size, not {self.head_size} (n_embd / '
                            'n_head)')
        # Llama's rule for a gated MLP: two thirds of 4 * n_embd, rounded up to a multiple of 32
        self.n_inner = self.n_inner or (-(-8 * self.n_embd // 96) * 32 if self.gated else 4 * self.n_embd)
        self.attn_scale = self.attn_scale or self.head_size ** -0.5
        usual = 'sliding_attention' if self.sliding_window else 'full_attention'
        self.layer_types = self.layer_types or [usual] * self.n_layer
        self.sliding_window = self.sliding_window if 'sliding_attention' in self.layer_types else 0
        self.rope = {kind: {'rope_type': 'default', 'rope_theta': 10000.0, **self.rope.get(kind, {})}
                     for kind in sorted(set(self.layer_types)) if self.position == 'rope'}

    def window(self, layer_type):
        """How many keys a layer of this type sees; 0: all."""
        return self.sliding_window if layer_type == 'sliding_attention' else 0


# What makes each family itself; sizes come from the flags or from the config.json that is loaded.
FAMILIES = {
    'gpt2': dict(norm='layernorm', norm_eps=1e-5, position='learned', activation='gelu_tanh', gated=False,
                 bias=True),
    'llama': dict(norm_eps=1e-5, tied=False),
    'mistral': dict(norm_eps=1e-5, tied=False),
    'qwen2': dict(qkv_bias=True),
    'qwen3': dict(qk_norm=True),
    'gemma2': dict(activation='gelu_tanh', post_norms=True, norm_offset=True, embed_scale=True,
                   attn_softcap=50.0, logit_softcap=30.0),
    'gemma3_text': dict(activation='gelu_tanh', post_norms=True, norm_offset=True, embed_scale=True,
                        qk_norm=True),
}

# ---- config.json -------------------------------------------------------------------------------------------

CLASSES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
           'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM', 'gemma2': 'Gemma2ForCausalLM',
           'gemma3_text': 'Gemma3ForCausalLM'}
# our field -> key of config.json, in GPT-2's words and in everyone else's
GPT2_KEYS = {'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer',
             'n_head': 'n_head', 'n_embd': 'n_embd', 'norm_eps': 'layer_norm_epsilon', 'n_inner': 'n_inner',
             'tied': 'tie_word_embeddings'}
LLAMA_KEYS = {'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings',
              'n_layer': 'num_hidden_layers',
              'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size',
              'n_inner': 'intermediate_size', 'head_size': 'head_dim', 'norm_eps': 'rms_norm_eps',
              'tied': 'tie_word_embeddings'}
WINDOW_KEYS = {'sliding_window': 'sliding_window'}
GEMMA_KEYS = {**WINDOW_KEYS, 'attn_softcap': 'attn_logit_softcapping',
              'logit_softcap': 'final_logit_softcapping'}
KEYS = {'gpt2': GPT2_KEYS, 'llama': LLAMA_KEYS,
        **{arch: LLAMA_KEYS | WINDOW_KEYS for arch in ('mistral', 'qwen2', 'qwen3')},
        **{arch: LLAMA_KEYS | GEMMA_KEYS for arch in ('gemma2', 'gemma3_text')}}
# What transformers takes where config.json says nothing (published files leave much out).
_QWEN = dict(hidden_act='silu', max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
_GEMMA = dict(hidden_activation='gelu_pytorch_tanh', num_attention_heads=8, num_key_value_heads=4,
              head_dim=256, sliding_window=4096, query_pre_attn_scalar=256, tie_word_embeddings=True)
UNSAID = {
    'gpt2': dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12,
                 layer_norm_epsilon=1e-5, activation_function='gelu_new', tie_word_embeddings=True),
    'llama': dict(hidden_act='silu', max_position_embeddings=2048),
    'mistral': dict(hidden_act='silu', num_key_value_heads=8, max_position_embeddings=131072,
                    sliding_window=4096),
    'qwen2': _QWEN, 'qwen3': dict(_QWEN, head_dim=128),
    'gemma2': dict(_GEMMA, vocab_size=256000, max_position_embeddings=8192, attn_logit_softcapping=50.0,
                   final_logit_softcapping=30.0),
    'gemma3_text': dict(_GEMMA, vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6,
                        rope_local_base_freq=1e4)}
ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh'}


OPTIONAL = ('n_inner',)             # GPT-2's: four times n_embd where it says nothing
# without these there is no model of that size; transformers would take its class's own
NEEDED = ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_inner')
KINDS = {field.name: (int, float) if field.type is float else field.type for field in fields(GPTConfig)}


def config_from_hf(hf):
    """A config.json as dict -> GPTConfig, or None for an architecture outside our families. UserError: a key
    that is missing or has a value of another kind."""
    if hf.get('model_type') == 'nanoforge':
        return GPTConfig(**hf['nanoforge'])
    if hf.get('model_type') == 'gemma3':            # the language model of a picture model
        tied = hf.get('tie_word_embeddings', True)
        hf = {'tie_word_embeddings': tied, **hf['text_config'], 'model_type': 'gemma3_text'}
    arch = hf.get('model_type')
    if arch not in FAMILIES:
        return None
    hf = {'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'hidden_activation': None, **UNSAID[arch], **hf}
    values = {**FAMILIES[arch], 'arch': arch}
    for ours, theirs in KEYS[arch].items():
        value = hf.get(theirs)
        if not value and ours in NEEDED and theirs not in OPTIONAL:
            raise UserError(f'config.json has no {theirs}: copy it again from the model\'s source')
        is_setting = isinstance(value, KINDS[ours]) and isinstance(value, bool) == (KINDS[ours] is bool)
        if value and (not is_setting or value < 0):
            raise UserError(f'config.json: {theirs} is {value!r}, which is no such size or setting: copy it '
                            'again from the model\'s source')
        values[ours] = value or 0
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
        contexts = [context_of(rope, values['block_size']) for rope in values['rope'].values()]
        values['block_size'] = max(contexts)
        if arch.startswith('gemma'):
            values['attn_scale'] = float(hf['query_pre_attn_scalar'] ** -0.5)       # complex: no float
        outside += [kind not in ('full_attention', 'sliding_attention') for kind in values['layer_types']]
        outside += [values['bias'] and not values['o_bias'], hf.get('partial_rotary_factor', 1.0) != 1.0]
        outside += [rope['rope_type'] not in ROPE_TYPES or rope.get('partial_rotary_factor', 1.0) != 1.0
                    for rope in values['rope'].values()]
    kept = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'initializer_range')
    if any(outside):
        return None
    return GPTConfig(**values, extra={key: hf[key] for key in kept if hf.get(key) is not None})


def _layer_types(hf, arch):
    n = hf['num_hidden_layers']
    qwen_is_full = arch.startswith('qwen') and not hf.get('use_sliding_window')
    if arch == 'llama' or not hf['sliding_window'] or qwen_is_full:
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
    """{rope_theta, rope_type, ...} of one layer type, from transformers 5's rope_parameters or the keys
    before it."""
    local = layer_type == 'sliding_attention' and hf['model_type'] == 'gemma3_text'
    rope = (hf.get('rope_scaling') if not local else None) or hf.get('rope_parameters') or {}
    rope = rope.get(layer_type, rope)
    theta = hf['rope_local_base_freq'] if local else hf.get('rope_theta', 10000.0)
    rope = {'rope_theta': theta, 'original_max_position_embeddings': hf['max_position_embeddings'],
            **{key: value for key, value in rope.items() if not isinstance(value, dict)}}
    rope['rope_type'] = rope.get('rope_type') or rope.pop('type', None) or 'default'
    needed, optional = ROPE_TYPES.get(rope['rope_type'], ((), ()))
    if is_dynamic(rope):            # here alone max_position_embeddings is the context before scaling
        rope['original_max_position_embeddings'] = hf['max_position_embeddings']
    elif hf.get('original_max_position_embeddings'):
        rope['original_max_position_embeddings'] = hf['original_max_position_embeddings']
    for key in needed:
        if type(rope.get(key)) not in (int, float) or rope[key] <= 0:
            raise UserError(f'config.json: {rope["rope_type"]} scaling of rotary positions needs a number '
                            f'above 0 as {key}, not {rope.get(key)!r}')
    known = ('rope_type', 'rope_theta', 'partial_rotary_factor', *needed, *optional)
    return {key: rope[key] for key in known if rope.get(key) is not None}


def config_to_hf(cfg, dtype='float32'):
    """GPTConfig -> the config.json that transformers opens.

    A combination that none of its classes computes (GPT-2 with a gated MLP, say) is called a nanoforge model
    there, so that nothing opens it wrongly; load_model does.
    """
    arch = cfg.arch
    hf = {'architectures': [CLASSES[arch]], 'model_type': arch, 'dtype': dtype, 'use_cache': True,
          # else the class's own would stand
          'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None,
          **{theirs: getattr(cfg, ours) or None for ours, theirs in KEYS[arch].items()},
          'tie_word_embeddings': cfg.tied}
    name = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.activation)
    name = 'gelu_new' if arch == 'gpt2' and name == 'gelu_pytorch_tanh' else name  # its own word for the same
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
            hf['sliding_window'] = cfg.sliding_window or cfg.block_size  # a number even where no layer slides
        full = cfg.rope.get('full_attention') or next(iter(cfg.rope.values()), {})
        if full and is_dynamic(full):
            hf['max_position_embeddings'] = full['original_max_position_embeddings']
        hf['rope_parameters'] = cfg.rope if arch == 'gemma3_text' else full
        hf['rope_theta'] = full.get('rope_theta')                   # where tools of the older generation look
        if full.get('rope_type', 'default') != 'default':
            hf['rope_scaling'] = full
        if arch == 'gemma3_text':
            hf['rope_local_base_freq'] = cfg.rope.get('sliding_attention', full).get('rope_theta')
    back = config_from_hf(hf)
    if back is None or replace(back, dropout=cfg.dropout, extra=cfg.extra) != cfg:
        return {'architectures': ['GPT'], 'model_type': 'nanoforge', 'dtype': dtype, 'nanoforge': asdict(cfg)}
    return {**hf, **cfg.extra}


# ---- names of weights --------------------------------------------------------------------------------------

# our name -> GPT-2's; '^T' marks matrices that GPT-2 stores transposed (its Conv1D)
GPT2_NAMES = {
    'embed_tokens': 'wte', 'embed_positions': 'wpe', 'norm': 'ln_f', 'input_layernorm': 'ln_1',
    'post_attention_layernorm': 'ln_2', 'self_attn.c_attn': 'attn.c_attn^T',
    'self_attn.o_proj': 'attn.c_proj^T', 'mlp.up_proj': 'mlp.c_fc^T', 'mlp.down_proj': 'mlp.c_proj^T'}


def hf_layout(model, kind):
    """{name in a model of `kind` (its model_type): (our tensors that make it up, stacked; whether it is then
    transposed)}."""
    cfg, state = model.config, model.state_dict()
    if cfg.tied:
        state.pop('lm_head.weight')
    if kind == 'gpt2':
        return dict(_to_gpt2(cfg, state))
    layout = {}
    for name, tensor in state.items():
        has_prefix = kind != 'nanoforge' and not name.startswith('lm_head')
        layout['model.' + name if has_prefix else name] = [tensor], False
    return layout


def _to_gpt2(cfg, state):
    state = {name: [tensor] for name, tensor in state.items()}
    for i in range(cfg.n_layer):
        for part in ('weight', 'bias') if cfg.bias else ('weight',):
            state[f'layers.{i}.self_attn.c_attn.{part}'] = sum(
                [state.pop(f'layers.{i}.self_attn.{name}_proj.{part}') for name in 'qkv'], [])
    for name, tensors in state.items():
        if name.startswith('lm_head'):
            yield name, (tensors, False)
            continue
        layer, module, part = re.match(r'(?:layers\.(\d+)\.)?(.+)\.(weight|bias)$', name).groups()
        theirs, _, transposed = GPT2_NAMES[module].partition('^')
        theirs = f'transformer.h.{layer}.{theirs}' if layer else f'transformer.{theirs}'
        yield f'{theirs}.{part}', (tensors, bool(transposed) and part == 'weight')
        if not cfg.bias and not module.startswith('embed'):             # GPT-2 has all biases
            size = sum(map(len, tensors))
            yield f'{theirs}.bias', ([torch.zeros(size, dtype=tensors[0].dtype)], False)


def from_hf_weights(cfg, weights):
    """{Hugging Face name: tensor} -> {our name: tensor}, the inverse of hf_layout. An unknown name stays
    as it is; so does the head of a tied model that differs from its embedding, which transformers unties."""
    state = {}
    for name, tensor in weights.items():
        name = re.sub(r'^(language_model\.)?((model|transformer)\.)?(language_model\.)?', '', name)
        # what old files carry besides
        if name.endswith(('rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias')):
            continue
        if cfg.arch == 'gpt2':
            state.update(_from_gpt2(name, tensor))
        else:
            state[name] = tensor
    if cfg.tied and 'lm_head.weight' in state:
        head = state.pop('lm_head.weight')
        embedding = state.setdefault('embed_tokens.weight', head)
        if not embedding.equal(head.to(embedding.dtype)):
            state['lm_head.weight'] = head
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


# ---- reading a model directory -----------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read_safetensors(directory):
    """{name: tensor} of a single or sharded model, mapped from disk; the pages are private: what is written
    to one never reaches the file."""
    from safetensors import SafetensorError, safe_open
    index = os.path.join(directory, 'model.safetensors.index.json')
    files = ['model.safetensors']
    if os.path.exists(index) and not os.path.exists(os.path.join(directory, files[0])):
        files = sorted(set(read_json(index).get('weight_map', {}).values()))
        if not files:
            raise UserError(f'{index} names no file of weights; copy or download it again')
    weights = {}
    for file in files:
        path = os.path.join(directory, file)
        if not os.path.exists(path) and len(files) > 1:
            raise UserError(f'{directory}: no {file} (a shard named in model.safetensors.index.json)')
        if not os.path.exists(path):
            raise UserError(f'{directory}: no {file}; weights are read from safetensors only: convert older '
                            'ones with transformers\' save_pretrained')
        try:
            with safe_open(path, framework='pt') as f:
                weights.update({name: f.get_tensor(name) for name in f.keys()})
        except SafetensorError as e:
            raise UserError(f'{path} is not a whole safetensors file ({e}); copy or download it '
                            'again') from None
    return weights


def load_weights(model, state, where, dtype=None, device=None):
    """Makes a state of ours the model's parameters; a UserError names a key without a home, a missing one, a
    wrong shape.

    Where dtype and device fit, the tensors themselves become the parameters: mapped from disk, nothing is
    copied.
    """
    expected = base_state(model)
    if model.config.tied:
        expected.pop('lm_head.weight')
    problems = [f'{name} is missing' for name in expected if name not in state]
    problems += [f'{name} has no home' for name in state if name not in expected]
    problems += [f'{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}'
                 for name, tensor in expected.items() if name in state and state[name].shape != tensor.shape]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise UserError(f'{where} does not fit its config.json: ' + '; '.join(problems[:3]) + more)
    for name, old in expected.items():
        parent, _, leaf = name.rpartition('.')
        tensor = state.pop(name).to(device or old.device, dtype or old.dtype).contiguous()
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
    if model.config.tied:
        model.lm_head.weight = model.embed_tokens.weight


def find_model(name_or_path, weights=True):
    """A local directory, the embedded model `tiny`, or a hub name -> a directory with config.json; of the hub
    without the `weights`, if so asked."""
    if name_or_path == 'tiny':
        return os.path.join(ROOT, 'data', 'tiny')
    if os.path.isdir(name_or_path):
        configs = [os.path.join(name_or_path, file) for file in ('config.json', 'adapter_config.json')]
        if not any(map(os.path.exists, configs)):
            raise UserError(f'{name_or_path} has no config.json: not a model directory')
        return name_or_path
    is_hub_name = re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', name_or_path)
    if not is_hub_name or os.path.isdir(os.path.dirname(name_or_path)):
        raise UserError(f'no model directory {name_or_path}')
    from huggingface_hub import snapshot_download
    wanted = ['*.json', '*.jinja', 'tokenizer.model', '*.txt']
    if weights:
        wanted += ['model*.safetensors', 'adapter*.safetensors']
    offline_without_network()
    try:
        return snapshot_download(name_or_path, allow_patterns=wanted)
    except Exception as e:      # the hub's client raises a dozen kinds: not found, gated, offline, time-out
        raise UserError(why_not_provided(name_or_path, e)) from None


def why_not_provided(name, error):
    """One line for what the hub's client raised: what is wrong with model `name`, and what helps."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    login = 'log in (hf auth login) or set the environment variable HF_TOKEN to a token of an account'
    if isinstance(error, GatedRepoError):
        return (f'{name!r} is a gated model: accept its licence on its page of the Hugging Face hub, then '
                f'{login} that has accepted it')
    if isinstance(error, RepositoryNotFoundError):      # a private one looks like none
        return (f'no model {name!r}: not a local directory, and the hub has none of this name for you; check '
                f'the spelling, or, if it is private, {login} that may read it')
    if getattr(getattr(error, 'response', None), 'status_code', None) in (401, 403):
        return f'the hub refuses access to {name!r}: {login} that may read it'
    return (f'no model {name!r}: not a local directory, and hub and local cache do not provide it '
            f'({type(error).__name__}); download it where there is a network, give its directory')


# ---- other architectures -----------------------------------------------------------------------------------

# what transformers' configurations call the bound of the logits
SOFTCAP_KEYS = ('final_logit_softcapping', 'logits_soft_cap', 'output_logit_soft_cap')


def switch_dropout_off(config):
    """In a transformers configuration and those inside it; models read it there."""
    for key, value in vars(config).items():
        if hasattr(value, 'to_dict'):
            switch_dropout_off(value)
        elif isinstance(value, float) and 'drop' in key:
            setattr(config, key, 0.0)


class HFModel(nn.Module):
    """Any other causal language model of transformers, behind the calls of model.GPT (without its speed).

    model: a transformers model with a language modelling head; it stays as it is and saves itself.
    Right-padded rows, packed documents, token_stats and sampling work as in GPT; packed documents are run
    side by side, and sampling runs the whole sequence at every step, so that nothing is asked of an
    architecture but that it is causal.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings().weight
        softcaps = [getattr(config, key, None) for key in SOFTCAP_KEYS]
        self.config = SimpleNamespace(
            arch=config.model_type, vocab_size=len(embedding), n_embd=config.hidden_size, dropout=0.0,
            block_size=getattr(config, 'max_position_embeddings', None) or 2 ** 31,
            tied=self.lm_head.weight is embedding, logit_softcap=next(filter(None, softcaps), 0.0))
        self.scale = 1.0
        self.scale = self.logit_scale()

    @staticmethod
    def load(directory, device, dtype):
        """A Hugging Face directory -> HFModel, without dropout. Code that comes with a model is never run."""
        from transformers import AutoConfig, AutoModelForCausalLM
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            switch_dropout_off(config)
            model, info = AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True)
        except Exception as e:    # whatever its loading code raises, it is this directory that cannot be used
            reason = (str(e).strip() or type(e).__name__).partition('\n')[0]
            raise UserError(f'{directory}: outside our families, and transformers does not open it '
                            f'({reason})') from None
        problems = []
        for key, problem in (('missing_keys', 'is missing'), ('unexpected_keys', 'has no home'),
                             ('mismatched_keys', 'has another shape')):
            problems += [f'{name} {problem}' for name in sorted(info[key], key=str)]
        if problems:
            raise UserError(f'{directory} does not fit its config.json: ' + '; '.join(problems[:3]))
        try:
            return HFModel(model.to(device)).eval()
        except (AttributeError, TypeError, ValueError, LookupError, ImportError, NotImplementedError) as e:
            raise UserError(f'{directory}: {model.config.model_type} is not supported: it does not run as a '
                            f'language model with one head ({type(e).__name__}: {str(e)[:120]})') from None

    @property
    def lm_head(self):
        return self.model.get_output_embeddings()

    @property
    def backbone(self):
        """The model below the head; some call themselves their own base."""
        base = self.model.base_model
        return base if base is not self.model else self.model.model

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def gradient_checkpointing(self):
        return self.model.is_gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on):
        if on:
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def set_matmul(self, mode):
        """Its products stay in the precision of its weights (or of autocast)."""
        return self

    @torch.no_grad()
    def logit_scale(self):
        """The factor between head and logits (Granite and Cohere have one), found by comparing; UserError if
        it is not one."""
        idx = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        training = self.model.training
        theirs = self.model.eval()(idx, use_cache=False).logits.float()
        if self.config.logit_softcap:
            theirs = self.config.logit_softcap * torch.atanh(theirs / self.config.logit_softcap)
        ours = kernels.head(*self.head(self.hidden(idx)))
        self.model.train(training)
        scale = ((theirs * ours).sum() / ours.square().sum()).item()
        if not (theirs - scale * ours).abs().max() <= 0.02 * theirs.abs().max():
            raise UserError(f'{self.config.arch} is not supported: its logits are not last hidden state '
                            'times head')
        return 1.0 if abs(scale - 1) < 1e-3 else scale

    def hidden(self, idx, positions=None, embeddings=None, logit_positions=None):
        """idx (B, T) -> (B, T, C), after the last norm. positions (B, T), logit_positions: as for
        GPT.hidden, whose embeddings such a model does not take."""
        assert embeddings is None
        if logit_positions is not None:
            return self.hidden(idx, positions).flatten(0, 1)[logit_positions]
        B, T = idx.size()
        if T > self.config.block_size and (positions is None or positions.max() >= self.config.block_size):
            raise UserError(f'a row of {T} tokens does not fit the model\'s context of '
                            f'{self.config.block_size}: shorten it')
        if positions is None:
            return self.backbone(input_ids=idx, use_cache=False).last_hidden_state
        segments, tokens = kernels.continuations(positions.expand(B, T)), idx.flatten()
        rows = [torch.cat([tokens[begin:begin + shared], tokens[start:end]])
                for begin, shared, start, end in segments]
        hidden = self.hidden(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        parts = [row[shared:shared + end - start] for row, (_, shared, start, end) in zip(hidden, segments)]
        return torch.cat(parts).view(B, T, -1)

    def head(self, hidden):
        """(hidden, weight) whose product the logits are: a bias is one more column."""
        head, hidden = self.lm_head, hidden * self.scale
        weight = kernels.weight_matrix(head)                # with its adapter, where the head has one
        if getattr(head, 'bias', None) is None:
            return hidden, weight
        one = hidden.new_full((*hidden.shape[:-1], 1), self.scale)
        return torch.cat([hidden, one], -1), torch.cat([weight, head.bias[:, None]], 1)

    def logits(self, hidden):
        """(..., C) -> (..., V) in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels.head(*self.head(hidden), self.config.logit_softcap)

    def token_stats(self, hidden, targets, temperature=1.0, extras=True):
        """As GPT.token_stats."""
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels.token_stats(*self.head(hidden), targets, temperature, self.config.logit_softcap,
                                       extras)

    def forward(self, idx, targets=None, positions=None):
        """As GPT.forward."""
        hidden = self.hidden(idx, positions)
        if targets is None:
            return self.logits(hidden)
        return self.token_stats(hidden, targets, extras=False)['logp']
