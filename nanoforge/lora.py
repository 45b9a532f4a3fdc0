"""LoRA by hand (Hu et al. 2021), in PEFT's file format; over 4- and 8-bit layers (quantize.py) it is QLoRA.

A layer with adapters is the same object with the same `.weight`, its class swapped for one whose forward adds
scale * dropout(x) A^T B^T: base checkpoints load unmapped. Modules are called what they are in the
transformers model, as PEFT does (GPT-2's c_attn is our q_proj, k_proj and v_proj: one lora_A, slices of
lora_B), and an adapter is described by the keys of PEFT's adapter_config.json, so that files go both ways.
"""
import contextlib
import functools
import json
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from data.tokenizer import read_json
from nanoforge.hf import GPT2_NAMES
from nanoforge.kernels import Linear, dithered, keep_copies
from nanoforge.quantize import head_of, is_linear, is_quantized
from nanoforge.tensors import assign, cut_by_input, is_sharded, local, part, save_tensors

DEFAULTS = {'r': 8, 'lora_alpha': 8, 'lora_dropout': 0.0, 'bias': 'none', 'use_rslora': False,
            'use_dora': False, 'rank_pattern': {}, 'alpha_pattern': {}, 'base_model_name_or_path': None}
# what PEFT can put into an adapter and these layers cannot hold: refused rather than dropped
REFUSED = ('modules_to_save', 'lora_bias', 'layer_replication', 'trainable_token_indices',
           'target_parameters', 'alora_invocation_tokens', 'use_bdlora', 'use_qalora', 'arrow_config',
           'kasa_config', 'monteclora_config')
# Mamba's kernels take the matrices of these layers, past any adapter; PEFT refuses them, too
READ_AS_MATRICES = r'\b(mixer|mamba)\.(out_proj|dt_proj)$'
ONLY_PEFT = ', which only PEFT runs; merge it there (merge_and_unload), save and load the result'
# ways to begin an adapter that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take a part of
# it away, which PEFT computes anew whenever it loads one
INITIALISATIONS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica')


class Adapter(nn.Module):
    """An adapter of one layer: lora_A (r, in), lora_B (out, r); with DoRA the magnitude (out,) of the
    weight's rows."""

    def __init__(self, A, B, magnitude, scale, dropout):
        super().__init__()
        self.lora_A, self.lora_B, self.magnitude = A, B, magnitude
        self.scale, self.dropout = scale, dropout


class LoRALinear(nn.Linear):
    """Mixed into the class of a linear layer: its output plus that of the active adapter.

    lora: ModuleDict of Adapter by name; active: the name in use, None for none.
    """

    @property
    def adapter(self):
        """The Adapter in use, or None."""
        return self.lora[self.active] if self.active in self.lora else None

    def forward(self, x):
        flat = x.flatten(0, -2)                                             # (N, in)
        in_bf16 = getattr(self, 'bf16', False) and x.device.type == 'cpu'
        if in_bf16:
            flat = flat.bfloat16()
        if has_magnitude(self):
            merged = self.weight_matrix()
            y = F.linear(flat, dithered(merged) if in_bf16 else merged.to(flat.dtype))
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        else:
            y = add_adapters(super().forward(flat), flat, [self])
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def stacked(x, layers):
        if any(has_magnitude(layer) for layer in layers):
            return torch.cat([layer(x) for layer in layers], -1)
        flat = x.flatten(0, -2)                                             # (N, in)
        if layers[0].bf16:
            flat = flat.bfloat16()
        return add_adapters(Linear.stacked(flat, layers), flat, layers).view(*x.shape[:-1], -1)

    def base_weight(self):
        """The matrix (out, in) without adapters; dequantised, if the layer is quantised."""
        base = super()
        return base.weight_matrix() if hasattr(base, 'weight_matrix') else self.weight

    def weight_matrix(self):
        """The matrix (out, in) with the active adapter added, differentiably."""
        weight, adapter = self.base_weight(), self.adapter
        if adapter is None:
            return weight
        A, B = adapter.lora_A, adapter.lora_B
        merged = torch.addmm(weight.to(A.dtype), B, A, alpha=adapter.scale)
        # DoRA (Liu et al. 2024, eq. 5); no gradient through the norm, section 4.3
        if adapter.magnitude is not None:
            merged = merged * (adapter.magnitude / torch.linalg.norm(merged, dim=1).detach()).unsqueeze(1)
        return merged.to(weight.dtype)


@functools.cache
def lora_class(cls):
    return type('LoRA' + cls.__name__, (LoRALinear, cls), {})


def plain_class(layer):
    """The class that a LoRALinear had before."""
    return type(layer).__mro__[2]       # LoRA<name>, LoRALinear, <name>


def active_adapter(layer):
    return layer.adapter if isinstance(layer, LoRALinear) else None


def has_magnitude(layer):
    """Whether DoRA is active: it scales the rows of the whole matrix, which must be made."""
    adapter = active_adapter(layer)
    return adapter is not None and adapter.magnitude is not None


def add_adapters(y, x, layers):
    """To y (N, sum of out), the outputs of `layers` side by side for x (N, in), each one's adapter is added,
    in place.

    Two thin products whatever the number of layers: the A stacked, the scaled B on a block diagonal.
    """
    adapters = [active_adapter(layer) for layer in layers]
    present = [adapter for adapter in adapters if adapter is not None]
    if not present:
        return y
    first = present[0]
    if all(adapter is not None and adapter.lora_A is first.lora_A for adapter in adapters):   # GPT-2's c_attn
        A = part(first.lora_A)
        B = torch.cat([part(adapter.lora_B) for adapter in adapters]) * first.scale
    else:
        A = torch.cat([part(adapter.lora_A) for adapter in present])
        blocks = []
        for layer, adapter in zip(layers, adapters):
            nothing = A.new_zeros(layer.out_features, 0)
            blocks.append(nothing if adapter is None else part(adapter.lora_B) * adapter.scale)
        B = torch.block_diag(*blocks)
    x = dropout(x.to(y.dtype), first.dropout, layers[0])
    return y.addmm_(F.linear(x, A.to(y.dtype)), B.t().to(y.dtype))


def dropout(x, p, layer):
    """Of a layer's input x (N, in). Where tensor parallelism cuts that, each rank draws for all of it, so
    that their random numbers stay the same, and takes its part."""
    if not cut_by_input(layer) or not layer.training:
        return F.dropout(x, p, layer.training)
    mesh = layer.weight.device_mesh
    kept = F.dropout(x.new_ones(len(x), mesh.size() * x.size(1)), p)
    return x * kept.chunk(mesh.size(), 1)[mesh.get_local_rank()]


# ---- which layers there are, under transformers' names -----------------------------------------------------

def hf_name(model, path):
    """Our module's path -> its path in the transformers model, which a wrapper holds as its one submodule."""
    if not hasattr(model, 'embed_tokens'):
        return path.partition('.')[2]
    if path == 'lm_head':
        return path
    if model.config.arch != 'gpt2':
        return 'model.' + path
    layer, name = re.match(r'(layers\.\d+\.)?(.+)', path).groups('')
    name = re.sub(r'self_attn\.[qkv]_proj', 'self_attn.c_attn', name)
    return 'transformer.' + layer.replace('layers', 'h') + GPT2_NAMES[name].split('^')[0]


def linear_groups(model):
    """{transformers' path: [our layers that make it up]} of every linear layer."""
    groups = {}
    for path, layer in model.named_modules():
        if is_linear(layer):
            groups.setdefault(hf_name(model, path), []).append(layer)
    return groups


def stacked_weights(model):
    """{end of a parameter's name: (matrices, numbers)} of matrices that lie stacked in one tensor, as experts
    of a mixture do: neither LoRA nor 4- and 8-bit weights reach them."""
    sizes = {}
    for name, p in model.named_parameters():
        if p.dim() == 3 and min(p.shape) > 1:               # (1: a convolution along the tokens)
            end = '.'.join(name.split('.')[-3:])
            matrices, numbers = sizes.get(end, (0, 0))
            sizes[end] = matrices + len(p), numbers + p.numel()
    return sizes


def find_targets(model, target_modules):
    """PEFT's target_modules -> paths: a list of names or ends of paths, a regular expression, or
    'all-linear'."""
    groups, named = linear_groups(model), target_modules
    if named is None:
        named = ['c_attn'] if any(path.endswith('.c_attn') for path in groups) else ['q_proj', 'v_proj']
    if named == 'all-linear' or list(named) == ['all-linear']:
        paths = [path for path, layers in groups.items()
                 if head_of(model) not in layers and not re.search(READ_AS_MATRICES, path)]
        if not paths:
            raise UserError(f'LoRA: {model.config.arch} has no linear layer that could take an adapter (its '
                            'matrices are in layers of another kind): train the whole model, without '
                            'use_lora')
        return paths
    is_pattern = isinstance(named, str)
    named = [named] if is_pattern else named

    def matches(path, name):
        return ('.' + path).endswith('.' + name) or is_pattern and re.fullmatch(name, path)

    unmatched = [name for name in named if not any(matches(path, name) for path in groups)]
    if unmatched or not named:
        ends = ', '.join(sorted({path.rpartition('.')[2] for path in groups}))
        raise UserError(f'target_modules: no linear layer is called {", ".join(unmatched) or "nothing"}; '
                        f'there are {ends} (or say all-linear: all but the head)')
    return [path for path in groups if any(matches(path, name) for name in named)]


# ---- adding, choosing, switching off -----------------------------------------------------------------------

def add_lora(model, r=8, alpha=16, dropout=0.0, target_modules=None, bias='none', rslora=False, dora=False,
             name='default'):
    """Gives `model` a fresh adapter, makes it the active one and freezes the base. Returns the model.

    W becomes W + alpha / r * B A (rslora: alpha / sqrt(r), Kalajdzievski 2023); A is random, B zero: no
    change yet. dropout: on the adapter's input (a head's adapter has none). target_modules: as in PEFT, see
    find_targets; None = PEFT's choice for the family. bias: which biases train: 'none', 'all', 'lora_only'
    (those of adapted layers). dora: Liu et al. 2024. name: to hold several, see set_adapter. UserError: a
    value out of range, no such target.
    """
    if r < 1 or alpha <= 0 or not 0 <= dropout < 1 or bias not in ('none', 'all', 'lora_only'):
        raise UserError('LoRA takes r >= 1, alpha > 0, 0 <= dropout < 1 and bias none, all or lora_only; '
                        f'not r={r}, alpha={alpha}, dropout={dropout}, bias={bias}')
    config = dict(DEFAULTS, r=r, lora_alpha=alpha, lora_dropout=dropout, bias=bias, use_rslora=rslora,
                  use_dora=dora)
    attach(model, name, config, find_targets(model, target_modules), trainable=True)
    return model


def attach(model, name, config, paths, trainable):
    """Puts adapter `name`, described by PEFT's `config`, on the layers at `paths` and makes it active."""
    adapters = getattr(model, 'adapters', {})       # name -> config, in the order in which they came
    if getattr(model, 'merged', None):
        raise UserError('an adapter is merged into the weights: unmerge_lora before adding another')
    if name in adapters:
        raise UserError(f'adapter name {name!r} is taken')
    if not re.fullmatch(r'\w+', name) or hasattr(nn.ModuleDict, name):
        raise UserError(f'adapter name {name!r} is not a plain word')
    if adapters and any(c['bias'] != 'none' for c in (config, *adapters.values())):
        raise UserError("several adapters would share the model's biases: use bias=none for each of them")
    if config['use_dora'] and config['lora_dropout'] and trainable:
        raise UserError('DoRA rescales the whole weight and is not built with dropout: set the LoRA dropout '
                        'to 0')
    if not adapters:
        model.requires_grad_(False)
    for path, layers in linear_groups(model).items():
        if path in paths:
            attach_group(layers, name, config, path, trainable)
    model.adapters, model.merged, model.base_biases = {**adapters, name: config}, None, {}
    if config['bias'] != 'none':
        for path, module in model.named_modules():
            bias = getattr(module, 'bias', None)
            if bias is not None and (config['bias'] == 'all' or isinstance(module, LoRALinear)):
                model.base_biases[path] = bias.detach().clone()
                bias.requires_grad_(trainable)
    set_adapter(model, name)


def attach_group(layers, name, config, path, trainable):
    """Adapter `name` for the layers that are one module of the transformers model, at `path`: one lora_A for
    all."""
    r = at_path(config['rank_pattern'], path, config['r'])
    alpha = at_path(config['alpha_pattern'], path, config['lora_alpha'])
    scale = alpha / (math.sqrt(r) if config['use_rslora'] else r)
    device = layers[0].weight.device
    A = nn.Parameter(torch.empty(r, layers[0].in_features, device=device), requires_grad=trainable)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))                             # as torch begins a linear layer
    for layer in layers:
        if not isinstance(layer, LoRALinear):
            layer.__class__, layer.lora, layer.active = lora_class(type(layer)), nn.ModuleDict(), None
        B = nn.Parameter(torch.zeros(layer.out_features, r, device=device), requires_grad=trainable)
        magnitude = None
        if config['use_dora']:
            norms = layer.base_weight().detach().float().norm(dim=1)
            magnitude = nn.Parameter(norms, requires_grad=trainable)
        layer.lora[name] = Adapter(A, B, magnitude, scale, config['lora_dropout'])


def at_path(patterns, path, default):
    """PEFT's rank_pattern and alpha_pattern, {regular expression: value}, give single modules other
    values."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf'(.*\.)?({pattern})', path):
            return value
    return default


def lora_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


def set_adapter(model, name):
    """Makes `name` the one adapter in use; the others are not in the graph and get no gradient.

    Never between a forward pass and its backward: gradient checkpointing would recompute with another
    adapter. And an optimizer that holds several adapters would let momentum and weight decay move the idle
    ones: one for each.
    """
    if name not in getattr(model, 'adapters', {}):
        raise UserError(f'no adapter {name!r}; there are: '
                        f'{", ".join(getattr(model, "adapters", {})) or "none"}')
    model.active_adapter = name
    for layer in lora_layers(model):
        layer.active = name


def remove_adapter(model, name):
    """Takes adapter `name` off. Without a last one the layers are plain again; the base stays frozen."""
    del model.adapters[name]
    for layer in lora_layers(model):
        if name in layer.lora:
            layer.lora.pop(name)
        if not layer.lora:
            layer.__class__ = plain_class(layer)
            del layer.lora, layer.active
    if model.adapters and model.active_adapter == name:
        set_adapter(model, next(reversed(model.adapters)))


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model is its base: no adapter, and the biases as they were before training.

    A reference model only if training began from the base: to train an adapter further, load it twice, one
    frozen.
    """
    if not lora_layers(model):
        merged = ' (it is merged: unmerge_lora first)' if getattr(model, 'merged', None) else ''
        raise UserError('adapters_off: the model has no adapter' + merged)
    biases = {path: model.get_submodule(path).bias for path in model.base_biases}
    trained = {path: local(bias).clone() if is_sharded(bias) else bias.data for path, bias in biases.items()}
    try:
        for layer in lora_layers(model):
            layer.active = None
        for path, bias in biases.items():
            if is_sharded(bias):        # gathered when its layer computes; each rank puts its rows into it
                assign(bias, model.base_biases[path])
            else:
                bias.data = model.base_biases[path].to(bias)
        yield model
    finally:
        set_adapter(model, model.active_adapter)
        for path, bias in biases.items():
            if is_sharded(bias):
                local(bias).copy_(trained[path])
            else:
                bias.data = trained[path]


# ---- folding into the weights and back ---------------------------------------------------------------------

def merge_lora(model, keep=True):
    """Folds the active adapter into the weights and returns the model, now plain: quantised layers are
    dequantised.

    keep: hold on to the layers as they were, so that unmerge_lora puts back the very same ones; False frees
    them and makes every parameter trainable. A tied head with an adapter is untied, since the embedding must
    stay what it is.
    """
    layers = [(path, layer) for path, layer in model.named_modules()
              if isinstance(layer, LoRALinear) or is_quantized(layer)]
    if not layers:
        why = ': it is merged already' if getattr(model, 'merged', None) else ''
        raise UserError('merge_lora: the model has no adapter' + why)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tied = next((path for path, layer in layers if id(layer.weight) in embeddings), None)
    if tied not in (None, 'lm_head'):
        raise UserError(f'{tied} shares its matrix with the embedding, so its adapter cannot be merged')
    for path, layer in layers:
        cls = layer.plain_class if is_quantized(layer) else plain_class(layer)
        plain = cls(layer.in_features, layer.out_features, bias=False, device='meta').train(layer.training)
        plain.weight = nn.Parameter(layer.weight_matrix().detach(), requires_grad=False)
        plain.bias, plain.bf16 = layer.bias, getattr(layer, 'bf16', False)
        if not keep and layer.bias is not None:             # not memory that a sharded layer frees again
            plain.bias = nn.Parameter(layer.bias.detach().clone())
        if plain.bf16:
            keep_copies([plain.weight])
        model.set_submodule(path, plain)
    model.merged = layers
    if tied:
        model.config.tied = False
    if not keep:
        model.merged, model.adapters, model.base_biases = None, {}, {}
        model.requires_grad_(True)
    return model


def unmerge_lora(model):
    """Undoes merge_lora exactly: the very layers from before, adapters and all. Returns the model."""
    if not getattr(model, 'merged', None):
        raise UserError('unmerge_lora: the model is not merged, or was with keep=False')
    for path, layer in model.merged:
        model.set_submodule(path, layer.train(model.training))
        if path == 'lm_head' and layer.weight is model.embed_tokens.weight:
            model.config.tied = True
    model.merged = None
    return model


# ---- PEFT's files ------------------------------------------------------------------------------------------

def file_layout(model, name):
    """{key in adapter_model.safetensors: [our parameters that make it up, stacked]} of adapter `name`."""
    layout, biases = {}, {}
    for path, layers in linear_groups(model).items():
        parts = [layer.lora[name] for layer in layers if isinstance(layer, LoRALinear) and name in layer.lora]
        if parts:
            layout[f'{path}.lora_A.weight'] = [parts[0].lora_A]
            layout[f'{path}.lora_B.weight'] = [part.lora_B for part in parts]
            if parts[0].magnitude is not None:
                layout[f'{path}.lora_magnitude_vector'] = [part.magnitude for part in parts]
    for path in model.base_biases:
        module = model.get_submodule(path)
        inside = '.base_layer' if isinstance(module, LoRALinear) else ''
        biases.setdefault(f'{hf_name(model, path)}{inside}.bias', []).append(module.bias)
    return {'base_model.model.' + key: parts for key, parts in {**layout, **biases}.items()}


def adapted_paths(keys):
    end = '.lora_A.weight'
    return [key[len('base_model.model.'):-len(end)] for key in keys if key.endswith(end)]


def save_adapter(model, directory, base_model_name=None, name=None):
    """Writes adapter `name` (None: the active one) as PEFT does: adapter_config.json and
    adapter_model.safetensors.

    base_model_name: what load_model and PEFT are to load underneath; None = what the model was loaded from.
    """
    name = name or model.active_adapter
    config, layout = model.adapters[name], file_layout(model, name)
    paths = adapted_paths(layout)
    ends = sorted({path.rpartition('.')[2] for path in paths})
    config = {**config, 'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'inference_mode': True,
              'base_model_name_or_path': base_model_name or getattr(model, 'name_or_path', None),
              'fan_in_fan_out': any(path.endswith('.c_attn') for path in linear_groups(model)),
              'target_modules': ends if set(find_targets(model, ends)) == set(paths) else paths}
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, 'adapter_model.safetensors')
    save_tensors(path, {key: (parts, False) for key, parts in layout.items()}, metadata={'format': 'pt'})
    with open(os.path.join(directory, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f, indent=2)


def load_adapter(model, directory, name='default', trainable=False, any_base=False):
    """Puts the PEFT adapter in `directory` on the model as `name` and makes it active; returns the model.

    UserError where it is for another base: a module, a shape or base_model_name_or_path (its last part, as
    models are moved; any_base=True waives this one) does not fit; or where it is not plain LoRA.
    """
    from safetensors.torch import load_file
    config = read_adapter_config(directory)
    theirs, ours = config['base_model_name_or_path'], getattr(model, 'name_or_path', None)
    if theirs and ours and last_part(theirs) != last_part(ours) and not any_base:
        raise UserError(f'{directory} is an adapter for {theirs}, the model is {ours}; if they are the same, '
                        'say so with any_base=True (load_model: give base)')
    file = os.path.join(directory, 'adapter_model.safetensors')
    if not os.path.exists(file):
        raise UserError(f'{directory} has no adapter_model.safetensors: save the adapter with a current PEFT')
    weights = load_file(file)
    head = getattr(getattr(model, 'lm_head', None), 'weight', None)
    for key in list(weights):                                 # PEFT adds an unchanged copy of an adapted head
        if re.search(r'(lm_head(\.base_layer)?|embed_tokens)\.weight$', key) and head is not None:
            if weights[key].shape == head.shape and weights[key].to(head).equal(head):
                del weights[key]
    if any('.lora_embedding_' in key for key in weights):
        raise UserError(f'{directory} has an adapter on the embedding' + ONLY_PEFT)
    paths = adapted_paths(weights)
    if not paths:
        raise UserError(f'{file} holds no LoRA weights')
    for_base = f' ({theirs})' if theirs else ''
    mismatch = f'{directory} is an adapter for another base{for_base}: '
    groups = linear_groups(model)
    absent = [path for path in paths if path not in groups]
    if any('.experts.' in path for path in absent):
        raise UserError(f'{directory} has adapters on the experts of a mixture' + ONLY_PEFT)
    if absent:
        raise UserError(mismatch + f'the model has no {absent[0]}')
    before = getattr(model, 'active_adapter', None)
    attach(model, name, config, paths, trainable)
    layout = file_layout(model, name)
    shapes = {key: (sum(map(len, parts)), *parts[0].shape[1:]) for key, parts in layout.items()}
    wrong = [f'{key} is {tuple(w.shape)}, not {shapes.get(key, "in this model")}'
             for key, w in weights.items() if shapes.get(key) != tuple(w.shape)]
    wrong += [f'{key} is missing' for key in shapes if '.lora_' in key and key not in weights]
    if wrong:
        remove_adapter(model, name)
        if before in model.adapters:
            set_adapter(model, before)
        raise UserError(mismatch + wrong[0].removeprefix('base_model.model.'))
    with torch.no_grad():
        for key, w in weights.items():
            for part, piece in zip(layout[key], w.split(list(map(len, layout[key])))):
                part.copy_(piece)
    return model


def last_part(path):
    return os.path.basename(os.path.normpath(path)).lower()


def read_adapter_config(directory):
    """PEFT's adapter_config.json, with defaults where older ones lack keys; UserError for what is not plain
    LoRA."""
    path = os.path.join(directory, 'adapter_config.json')
    if not os.path.exists(path):
        raise UserError(f'{directory} has no adapter_config.json: not an adapter')
    config = read_json(path)
    refused = [f'{key} is set' for key in REFUSED if config.get(key)]
    if config.get('init_lora_weights') not in INITIALISATIONS:
        refused = [f'init_lora_weights is {config["init_lora_weights"]}']
    if config.get('peft_type') != 'LORA':
        refused = [f'peft_type is {config.get("peft_type")}']
    if refused:
        raise UserError(f'{path}: {refused[0]}' + ONLY_PEFT)
    settings = {key: default if config.get(key) is None else config[key] for key, default in DEFAULTS.items()}
    for key, default in DEFAULTS.items():
        kind = (int, float) if type(default) in (int, float) else type(default)
        if default is not None and not isinstance(settings[key], kind):
            raise UserError(f'{path}: {key} is {settings[key]!r}, of another type than PEFT writes; copy the '
                            'adapter again from its source')
    return settings
