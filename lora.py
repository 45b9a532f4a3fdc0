"""LoRA by hand (Hu et al. 2021), in PEFT's file format; over 4- and 8-bit layers (quantized.py) it is QLoRA.

A layer with adapters is the same object with the same `.weight`, its class swapped for one whose forward adds
scale * dropout(x) A^T B^T; base checkpoints load unmapped, and the optimizer sees only what trains. Modules are named as PEFT
names them on the transformers model (GPT-2's c_attn is our q_proj, k_proj and v_proj: one lora_A, slices of lora_B), and an
adapter is described by PEFT's adapter_config, so that files go both ways.
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

import kernels
from configurator import UserError
from quantized import dequantize, is_quantized

# what PEFT can put into an adapter and these layers cannot: refused rather than dropped
REFUSED = ('modules_to_save', 'lora_bias', 'layer_replication', 'trainable_token_indices', 'target_parameters',
           'alora_invocation_tokens', 'use_bdlora', 'use_qalora', 'megatron_config')


class Adapter(nn.Module):
    """One adapter of one layer: lora_A (r, in), lora_B (out, r), with DoRA the magnitude (out,) of each row of the weight."""

    def __init__(self, A, B, scale, dropout, magnitude):
        super().__init__()
        self.lora_A, self.lora_B, self.magnitude = A, B, magnitude
        self.scale, self.dropout = scale, dropout


class LoRALinear(nn.Linear):
    """Mixed into the class of a linear layer by add_lora and load_adapter: base output plus that of the active adapter."""

    def forward(self, x):
        flat = x.flatten(0, -2)                                             # (N, in): addmm_ in place wants matrices
        if getattr(self, 'bf16', False) and x.device.type == 'cpu':
            flat = flat.bfloat16()
        adapter = active(self)
        if adapter is not None and adapter.magnitude is not None:
            y = F.linear(flat, dense_weight(self).to(flat.dtype), None if self.bias is None else self.bias.to(flat.dtype))
        else:
            y = add_adapters(super().forward(flat), flat, [self])
        return y.view(*x.shape[:-1], -1)


def active(layer):
    """The adapter that `layer` uses now, or None."""
    return layer.lora[layer.active] if isinstance(layer, LoRALinear) and layer.active in layer.lora else None


def add_adapters(y, x, layers):
    """y (N, sum of out), the outputs of `layers` side by side for x (N, in), gains each one's adapter in place: two thin products."""
    adapters = [active(layer) for layer in layers]
    found = [a for a in adapters if a is not None]
    if not found:
        return y
    x = F.dropout(x.to(y.dtype), found[0].dropout, layers[0].training)
    if len(found) == len(layers) and all(a.lora_A is found[0].lora_A for a in found):
        A, B = found[0].lora_A, torch.cat([a.lora_B for a in found]) * found[0].scale
    else:
        A = torch.cat([a.lora_A for a in found])
        B = torch.block_diag(*(x.new_zeros(layer.out_features, 0, dtype=A.dtype) if a is None else a.lora_B * a.scale
                               for layer, a in zip(layers, adapters)))
    return y.addmm_(F.linear(x, A.to(y.dtype)), B.t().to(y.dtype))


def stacked_linear(x, layers):
    """x (..., in) through several of model.Linear's layers -> (..., sum of out), the base weights as one product."""
    if any(a is not None and a.magnitude is not None for a in map(active, layers)):
        return torch.cat([layer(x) for layer in layers], -1)
    flat = x.flatten(0, -2)
    flat = flat.bfloat16() if layers[0].bf16 else flat
    y = kernels.linear(flat, [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None],
                       layers[0].bf16)
    return add_adapters(y, flat, layers).view(*x.shape[:-1], -1)


def dense_weight(layer):
    """The matrix (out, in) that `layer` stands for: dequantised, and with its active adapter added; DoRA (Liu et al. 2024, eq. 5-6)."""
    weight, adapter = dequantize(layer) if is_quantized(layer) else layer.weight, active(layer)
    if adapter is None:
        return weight
    dense = torch.addmm(weight.to(adapter.lora_A.dtype), adapter.lora_B, adapter.lora_A, alpha=adapter.scale)
    if adapter.magnitude is not None:       # the norm is a constant for the gradient, as section 4.3 of the paper has it
        dense = dense * (adapter.magnitude / torch.linalg.norm(dense, dim=1).detach()).unsqueeze(1)
    return dense.to(weight.dtype)


# ---- which layers there are, under PEFT's names -----------------------------------------------------------------------------

def hf_name(model, path):
    """Our module's path -> its path in the transformers model. Of an architecture behind the wrapper the paths are transformers' own."""
    from model import GPT, GPT2_NAMES
    if not isinstance(model, GPT):
        return path.partition('.')[2]
    if path == 'lm_head' or model.config.arch != 'gpt2':
        return path if path == 'lm_head' else 'model.' + path
    layer, name = re.match(r'(layers\.\d+\.)?(.+)', path).groups('')
    name = re.sub(r'self_attn\.[qkv]_proj', 'self_attn.c_attn', name)
    return 'transformer.' + layer.replace('layers', 'h') + GPT2_NAMES[name].split('^')[0]


def linear_groups(model):
    """{transformers' path: [our layers that make it up]} of every linear layer, the head last."""
    head = model.lm_head if hasattr(model, 'lm_head') else next(m.get_output_embeddings() for m in model.children())
    groups, last = {}, {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            (last if layer is head else groups).setdefault(hf_name(model, path), []).append(layer)
    return {**groups, **last}, list(last)


def find_targets(model, target_modules):
    """PEFT's target_modules -> paths: names or ends of paths in a list, one regular expression over whole paths, or 'all-linear'."""
    groups, head = linear_groups(model)
    if target_modules is None:
        target_modules = ['c_attn'] if any(path.endswith('.c_attn') for path in groups) else ['q_proj', 'v_proj']
    if target_modules in ('all-linear', ['all-linear'], ('all-linear',)):
        return [path for path in groups if path not in head]
    if isinstance(target_modules, str):
        tests = {target_modules: lambda path: re.fullmatch(target_modules, path) or ('.' + path).endswith('.' + target_modules)}
    else:
        tests = {name: lambda path, name=name: ('.' + path).endswith('.' + name) for name in target_modules}
    unmatched = [name for name, test in tests.items() if not any(map(test, groups))]
    if unmatched or not tests:
        there = ', '.join(sorted({path.rpartition('.')[2] for path in groups}))
        raise UserError(f'target_modules: nothing is called {", ".join(unmatched) or "by an empty list"}; this model has {there} '
                        "(or 'all-linear': all but the head)")
    return [path for path in groups if any(test(path) for test in tests.values())]


# ---- adding, choosing, switching off ----------------------------------------------------------------------------------------

def add_lora(model, r=8, alpha=16, dropout=0.0, target_modules=None, bias='none', rslora=False, dora=False, name='default'):
    """Gives `model` a fresh adapter (A as torch's linear layers begin, B zero), makes it the active one, and freezes the base.

    r: rank; the update is alpha / r (rslora: alpha / sqrt(r), Kalajdzievski 2023) * B A; dropout: on the adapter's input, not on the
    head's. target_modules: as in PEFT, see find_targets; None = its default. bias: which biases train: 'none', 'all', 'lora_only'
    (those of adapted layers). Returns the model. UserError for a value out of range or targets that do not exist.
    """
    if r < 1 or alpha <= 0 or not 0 <= dropout < 1 or bias not in ('none', 'all', 'lora_only'):
        raise UserError(f'LoRA wants r >= 1, alpha > 0, 0 <= dropout < 1, bias none, all or lora_only; not r={r}, alpha={alpha}, '
                        f'dropout={dropout}, bias={bias}')
    if dora and dropout:
        raise UserError('DoRA scales the whole weight and has no dropout here: set the LoRA dropout to 0')
    config = {'r': r, 'lora_alpha': alpha, 'lora_dropout': dropout, 'bias': bias, 'use_rslora': rslora, 'use_dora': dora,
              'rank_pattern': {}, 'alpha_pattern': {}}
    attach(model, name, config, find_targets(model, target_modules), trainable=True)
    return model


def attach(model, name, config, paths, trainable):
    """Puts adapter `name`, described by PEFT's `config`, on the layers at `paths`; it becomes the active one."""
    if getattr(model, 'merged', None):
        raise UserError('the adapter is merged into the weights: unmerge_lora before adding another')
    adapters = model.__dict__.setdefault('adapters', {})
    if name in adapters or not re.fullmatch(r'\w+', name) or hasattr(nn.ModuleDict, name):
        raise UserError(f'adapter name {name!r} is ' + ('taken' if name in adapters else 'not a plain word'))
    if adapters and any(c['bias'] != 'none' for c in (config, *adapters.values())):
        raise UserError("several adapters share the model's biases: use bias=none for each of them")
    if not adapters:
        model.requires_grad_(False)
    groups, _ = linear_groups(model)
    for path in paths:
        r, alpha = rank_alpha(config, path)
        device = groups[path][0].weight.device
        A = nn.Parameter(torch.empty(r, groups[path][0].in_features, device=device), requires_grad=trainable)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        for layer in groups[path]:
            magnitude = None
            if config['use_dora']:
                magnitude = nn.Parameter(torch.linalg.norm(dense_weight(layer).detach().float(), dim=1), requires_grad=trainable)
            B = nn.Parameter(torch.zeros(layer.out_features, r, device=device), requires_grad=trainable)
            if not isinstance(layer, LoRALinear):
                layer.base_class = type(layer)
                layer.__class__ = lora_class(type(layer))
                layer.lora = nn.ModuleDict()
            scale = alpha / (math.sqrt(r) if config['use_rslora'] else r)
            layer.lora[name] = Adapter(A, B, scale, config['lora_dropout'], magnitude)
    adapters[name] = config
    model.base_biases = {}
    if config['bias'] != 'none':
        chosen = model.named_parameters() if config['bias'] == 'all' else (
            (f'{path}.bias', layer.bias) for path, layer in model.named_modules() if isinstance(layer, LoRALinear))
        model.base_biases = {path: p.detach().clone() for path, p in chosen if p is not None and path.endswith('bias')}
        for path in model.base_biases:
            model.get_parameter(path).requires_grad_(trainable)
    set_adapter(model, name)


def rank_alpha(config, path):
    """(r, alpha) at `path`; PEFT's patterns give single modules other values."""
    return tuple(next((v for k, v in config[f'{kind}_pattern'].items() if re.fullmatch(rf'(.*\.)?({k})', path)), config[default])
                 for kind, default in (('rank', 'r'), ('alpha', 'lora_alpha')))


@functools.cache
def lora_class(cls):
    return type('LoRA' + cls.__name__, (LoRALinear, cls), {})


def set_adapter(model, name):
    """Makes `name` the one adapter in use. The others stay out of the graph and so get no gradient. Not between a forward pass
    and its backward: gradient checkpointing would recompute with the wrong one."""
    if name not in getattr(model, 'adapters', {}):
        raise UserError(f'no adapter {name!r}; there are: {", ".join(getattr(model, "adapters", {})) or "none"}')
    model.active_adapter = name
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.active = name


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model is its base: no adapter, and the biases from before training. Parameters' identity and mode are untouched."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    if not layers:
        raise UserError('adapters_off: the model has no adapter to switch off' + (
            ' (it is merged: unmerge_lora first)' if getattr(model, 'merged', None) else ''))
    biases = {path: model.get_parameter(path).data for path in model.base_biases}
    try:
        for layer in layers:
            layer.active = None
        for path, value in model.base_biases.items():
            model.get_parameter(path).data = value.to(biases[path].device)
        yield model
    finally:
        for layer in layers:
            layer.active = model.active_adapter
        for path, value in biases.items():
            model.get_parameter(path).data = value


# ---- folding into the weights and back --------------------------------------------------------------------------------------

def merge_lora(model, keep=True):
    """Folds the active adapter into the weights: afterwards the model is plain, and quantised layers are dequantised. Returns it.

    keep: hold on to the layers as they were, so that unmerge_lora puts back the very same ones; False frees their memory and
    makes every parameter trainable again. A tied head with an adapter is untied, as the embedding must stay what it is.
    """
    before = []
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, LoRALinear) and not is_quantized(layer):
            continue
        weight = dense_weight(layer).detach()
        if layer is getattr(model, 'lm_head', None) and model.config.tied:
            model.config.tied = False
            before.append(('tied', None))
        elif any(p is layer.weight for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()):
            raise UserError(f'{path} is tied to the embedding: its adapter cannot be merged; load the model with its adapter instead')
        before.append((path, layer))
        cls = getattr(layer, 'plain_class', None) or layer.base_class
        plain = cls(layer.in_features, layer.out_features, bias=False, device='meta')
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        plain.bf16 = getattr(layer, 'bf16', False)
        model.set_submodule(path, plain.train(layer.training))
    if not before:
        raise UserError('merge_lora: the model has no adapter' + (': it is merged already' if getattr(model, 'merged', None) else ''))
    model.merged = before
    if not keep:
        model.merged, model.adapters, model.base_biases = None, {}, {}
        model.requires_grad_(True)
    return model


def unmerge_lora(model):
    """Undoes merge_lora exactly: the layers from before the merge are back, adapters, quantised weights and all. Returns the model."""
    if not getattr(model, 'merged', None):
        raise UserError('unmerge_lora: the model is not merged (or merged with keep=False)')
    for path, layer in model.merged:
        if path == 'tied':
            model.config.tied = True
        else:
            model.set_submodule(path, layer.train(model.training))
    model.merged = None
    return model


# ---- PEFT's files -----------------------------------------------------------------------------------------------------------

def save_adapter(model, directory, base_model_name=None, name=None):
    """Writes adapter `name` (default: the active one) as PEFT does: adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file
    name = name or model.active_adapter
    config, weights, adapted = model.adapters[name], {}, []
    groups, _ = linear_groups(model)
    for path, layers in groups.items():
        parts = [layer.lora[name] for layer in layers if isinstance(layer, LoRALinear) and name in layer.lora]
        if parts:
            adapted.append(path)
            weights[f'{path}.lora_A.weight'] = parts[0].lora_A
            weights[f'{path}.lora_B.weight'] = torch.cat([part.lora_B for part in parts])
            if config['use_dora']:
                weights[f'{path}.lora_magnitude_vector'] = torch.cat([part.magnitude for part in parts])
    for path, modules in bias_groups(model).items():
        infix = '.base_layer' if path in adapted else ''
        weights[f'{path}{infix}.bias'] = torch.cat([module.bias for module in modules])
    ends = sorted({path.rpartition('.')[2] for path in adapted})
    if {path for path in groups if path.rpartition('.')[2] in ends} != set(adapted):
        ends = adapted
    os.makedirs(directory, exist_ok=True)
    save_file({'base_model.model.' + key: w.detach().contiguous().cpu() for key, w in weights.items()},
              os.path.join(directory, 'adapter_model.safetensors'), metadata={'format': 'pt'})
    described = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base_model_name or base_name(model),
                 'inference_mode': True, 'fan_in_fan_out': any(path.endswith('.c_attn') for path in groups), 'target_modules': ends}
    with open(os.path.join(directory, 'adapter_config.json'), 'w') as f:
        json.dump({**config, **described}, f, indent=2)


def bias_groups(model):
    """{transformers' path: [our modules]} of the biases that train with the adapter."""
    groups = {}
    for path in getattr(model, 'base_biases', {}):
        path = path.removesuffix('.bias')
        groups.setdefault(hf_name(model, path), []).append(model.get_submodule(path))
    return groups


def base_name(model):
    return getattr(model, 'name_or_path', None)


def load_adapter(model, directory, name='default', trainable=False, any_base=False):
    """Puts PEFT's adapter in `directory` on the model as its active one; load one twice for a policy and its frozen reference.

    UserError where it is for another base: a module, shape or base_model_name_or_path (by its last part, as models are moved;
    any_base=True waives this one) that does not fit, or holds what is not plain LoRA.
    """
    from safetensors.torch import load_file
    config = read_adapter_config(directory)
    theirs, ours = config.get('base_model_name_or_path'), base_name(model)
    last = lambda path: os.path.basename(os.path.normpath(path)).lower()
    if theirs and ours and last(theirs) != last(ours) and not any_base:
        raise UserError(f'{directory} is an adapter for {theirs}, and the model is {ours}; if they are the same, say any_base=True '
                        '(load_model: give base)')
    path = os.path.join(directory, 'adapter_model.safetensors')
    if not os.path.exists(path):
        raise UserError(f'{directory} has no adapter_model.safetensors; save the adapter with a current PEFT')
    weights = {key.removeprefix('base_model.model.').replace('.base_layer.', '.'): w for key, w in load_file(path).items()}
    groups, _ = linear_groups(model)
    shapes, where = {}, {}                                                  # what the file may hold; where its biases go
    for path, layers in groups.items():
        r, out = rank_alpha(config, path)[0], sum(layer.out_features for layer in layers)
        shapes.update({f'{path}.lora_A.weight': (r, layers[0].in_features), f'{path}.lora_B.weight': (out, r)})
        if config['use_dora']:
            shapes[f'{path}.lora_magnitude_vector'] = (out,)
    for path, module in model.named_modules():
        if config['bias'] != 'none' and getattr(module, 'bias', None) is not None:
            where.setdefault(hf_name(model, path) + '.bias', []).append(module.bias)
    shapes.update({key: (sum(b.numel() for b in biases),) for key, biases in where.items()})
    head = model.lm_head.weight if hasattr(model, 'lm_head') else None      # PEFT adds a copy of a head that is adapted
    for key in ('lm_head.weight', 'model.embed_tokens.weight', 'transformer.wte.weight'):
        if key in weights and head is not None and weights[key].shape == head.shape and weights[key].equal(head.cpu().to(weights[key].dtype)):
            del weights[key]
    for key, w in weights.items():
        if shapes.get(key) != tuple(w.shape):
            raise UserError(f'{directory} is an adapter for another base{f" ({theirs})" if theirs else ""}: its {key} is '
                            f'{tuple(w.shape)}, ' + (f'not {shapes[key]}' if key in shapes else 'which has no place in this model'))
    paths = [path for path in groups if f'{path}.lora_A.weight' in weights]
    missing = [key for key in shapes if key.partition('.lora_')[0] in paths and key not in weights and key not in where]
    if missing or not paths:
        raise UserError(f'{directory}: adapter_model.safetensors has no {missing[0] if missing else "lora_A"}')
    attach(model, name, config, paths, trainable)
    with torch.no_grad():
        for path in paths:
            parts = [layer.lora[name] for layer in groups[path]]
            parts[0].lora_A.copy_(weights[f'{path}.lora_A.weight'])
            sizes = [part.lora_B.size(0) for part in parts]
            for part, B in zip(parts, weights[f'{path}.lora_B.weight'].split(sizes)):
                part.lora_B.copy_(B)
            if config['use_dora']:
                for part, magnitude in zip(parts, weights[f'{path}.lora_magnitude_vector'].split(sizes)):
                    part.magnitude.copy_(magnitude)
        for key, biases in where.items():
            if key in weights:
                for bias, value in zip(biases, weights[key].split([b.numel() for b in biases])):
                    bias.copy_(value)
    return model


def read_adapter_config(directory):
    """PEFT's adapter_config.json, with the defaults of what older versions left out; UserError for what is not plain LoRA."""
    path = os.path.join(directory, 'adapter_config.json')
    if not os.path.exists(path):
        raise UserError(f'{directory} has no adapter_config.json: not an adapter')
    with open(path) as f:
        config = json.load(f)
    refused = [key for key in REFUSED if config.get(key) and config[key] != 'megatron.core']
    if config.get('peft_type') != 'LORA' or refused:
        raise UserError(f'{path}: ' + (f'{refused[0]} is set' if refused else f'peft_type is {config.get("peft_type")}') +
                        ', which only PEFT can run; merge it there (merge_and_unload) and load the result')
    kept = {'base_model_name_or_path': None, 'r': 8, 'lora_alpha': 8, 'lora_dropout': 0.0, 'bias': 'none', 'use_rslora': False,
            'use_dora': False, 'rank_pattern': {}, 'alpha_pattern': {}}
    return {key: config.get(key, default) for key, default in kept.items()}
