"""GPT and its families: one class that runs the weights of GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 2/3 and SmolLM.

    model(idx)                        logits (B, T, V)
    model(idx, targets)               log-probability of each target, float32 (B, T); 0 where the target is -1
    model.hidden(idx, positions)      (B, T, C) after the last norm: what a critic or reward head stands on; of some `logit_positions` alone
    model.token_stats(hidden, targets, temperature)     logp, entropy, mean_logp, correct; (B, T, V) is never held

The modules carry Llama's names (layers.0.self_attn.q_proj, ...), so the weights of most families load unmapped; GPT-2's
are renamed on the way (see GPT2_NAMES). Cross-entropy, SFT, DPO and every RL loss are weightings of model(idx, targets)
and live in their scripts: this file knows no method.
"""
import json
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanoforge import kernels
from configurator import UserError
from data.tokenizer import TOKENIZER_FILES, load_tokenizer, read_json
from nanoforge.hf import FAMILIES, GPT2_NAMES, GPTConfig, config_from_hf, config_to_hf, from_hf_weights, to_hf_weights
from nanoforge.lora import (add_lora, adapters_off, dense_weight, load_adapter, merge_lora, read_adapter_config, save_adapter,
                  set_adapter, stacked_linear, unmerge_lora)
from nanoforge.quantize import base_state, check_trainable, quantize

SHORT_BLOCK = 192           # up to here batched products beat blockwise attention on a CPU (bench/attention.py)
SHORT_DOCUMENT = 256        # and in packed rows, for a prompt with one continuation
ALIGN = 64                  # bf16 products take packed rows of a multiple of this: oneDNN compiles a kernel for each new size


class Linear(nn.Linear):
    """nn.Linear whose products run in bfloat16 on a CPU when the model says so (see kernels.linear)."""
    bf16 = False

    def forward(self, x):
        return kernels.linear(x, [self.weight], [] if self.bias is None else [self.bias], self.bf16)


class Norm(nn.Module):
    def __init__(self, cfg, size):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 0.0 if cfg.norm_offset else 1.0))
        self.bias = nn.Parameter(torch.zeros(size)) if cfg.norm == 'layernorm' and cfg.bias else None
        self.layer_norm, self.offset, self.eps = cfg.norm == 'layernorm', cfg.norm_offset, cfg.norm_eps

    @property
    def gain(self):
        return self.weight.float() + 1 if self.offset else self.weight

    def forward(self, x):
        if self.layer_norm:
            return F.layer_norm(x, x.shape[-1:], self.gain, self.bias, self.eps)
        return kernels.rms_norm(x, self.gain, self.eps)


class Attention(nn.Module):
    def __init__(self, cfg, layer_type):
        super().__init__()
        self.cfg, self.layer_type = cfg, layer_type
        self.window = cfg.sliding_window if layer_type == 'sliding_attention' else 0
        C, q_size, kv_size = cfg.n_embd, cfg.n_head * cfg.head_size, cfg.n_kv_head * cfg.head_size
        qkv_bias = cfg.bias or cfg.qkv_bias
        self.q_proj, self.k_proj = Linear(C, q_size, bias=qkv_bias), Linear(C, kv_size, bias=qkv_bias)
        self.v_proj, self.o_proj = Linear(C, kv_size, bias=qkv_bias), Linear(q_size, C, bias=cfg.bias or cfg.o_bias)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = Norm(cfg, cfg.head_size), Norm(cfg, cfg.head_size)

    def qkv(self, x):
        """(B, T, C) -> (B, T, (n_head + 2 n_kv_head) * head_size); one product on a CPU."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if x.device.type == 'cpu' and all(isinstance(layer, Linear) for layer in layers):
            return stacked_linear(x, layers)
        return torch.cat([layer(x) for layer in layers], -1)

    def forward(self, x, plan, cache=None, logit_positions=None):
        cfg, (B, T, _) = self.cfg, x.size()
        out = self.o_proj if logit_positions is None else lambda y: self.o_proj(kernels.pick(y, logit_positions))
        H, G, D = cfg.n_head, cfg.n_kv_head, cfg.head_size
        cos, sin = plan.angles[self.layer_type] if plan.angles else (None, None)        # (B or 1, 1, T, D/2)
        qkv = self.qkv(x)
        if plan.spans:
            q_weight, k_weight = (self.q_norm.gain, self.k_norm.gain) if cfg.qk_norm else (None, None)
            return out(kernels.SpanAttention.apply(qkv, plan.spans, self.window, cfg.attn_scale, q_weight, k_weight, cfg.norm_eps, cos, sin))
        if plan.short and cache is None and (not self.window or T <= self.window):
            q_weight, k_weight = (self.q_norm.gain, self.k_norm.gain) if cfg.qk_norm else (None, None)
            y = kernels.ShortAttention.apply(qkv, H, cfg.attn_scale, q_weight, k_weight, cfg.norm_eps, None if cos is None else cos[0, 0],
                                         None if sin is None else sin[0, 0], kernels.future(T, qkv.dtype))
            return out(y)
        q, k, v = qkv.split([H * D, G * D, G * D], -1)
        q, k, v = (h.view(B, T, -1, D).transpose(1, 2) for h in (q, k, v))              # (B, heads, T, D)
        if x.device.type == 'cpu':
            q, k, v = (h.to(x.dtype) for h in (q, k, v))    # attention stays float32: no slower on a CPU than bf16
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None:
            q, k = kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.update(k, v, plan.positions)                                   # (B, G, S, D)
        y = plan.attend(q.to(k.dtype), k, v, self.window, cfg.attn_scale, cfg.attn_softcap)     # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, H * D)
        return out(y if cache is None else y.to(qkv.dtype))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.n_embd, cfg.n_inner, bias=cfg.bias) if cfg.gated else None
        self.up_proj = Linear(cfg.n_embd, cfg.n_inner, bias=cfg.bias)
        self.down_proj = Linear(cfg.n_inner, cfg.n_embd, bias=cfg.bias)
        self.act = {'silu': F.silu, 'gelu': F.gelu,
                    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh')}[cfg.activation]

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg, layer_type):
        super().__init__()
        self.input_layernorm = Norm(cfg, cfg.n_embd)
        self.self_attn = Attention(cfg, layer_type)
        self.post_attention_layernorm = Norm(cfg, cfg.n_embd)
        self.mlp = MLP(cfg)
        if cfg.post_norms:      # in Gemma, post_attention_layernorm really follows attention, and these are the MLP's
            self.pre_feedforward_layernorm = Norm(cfg, cfg.n_embd)
            self.post_feedforward_layernorm = Norm(cfg, cfg.n_embd)
        self.post_norms, self.dropout = cfg.post_norms, cfg.dropout

    def forward(self, x, plan, cache=None, logit_positions=None):
        """x (B, T, C) -> the same; of the given logit_positions alone, (len(logit_positions), C)."""
        drop = lambda h: F.dropout(h, self.dropout, self.training) if self.dropout else h
        y = self.self_attn(self.input_layernorm(x), plan, cache, logit_positions)
        x = x if logit_positions is None else kernels.pick(x, logit_positions)
        x = x + drop(self.post_attention_layernorm(y.to(x.dtype)) if self.post_norms else y)
        if self.post_norms:
            return x + drop(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)).to(x.dtype)))
        return x + drop(self.mlp(self.post_attention_layernorm(x)))


class Plan:
    """What one forward pass shares over its layers: positions, rotary angles, and who may look at whom.

    Three cases: a plain causal block; packed rows, whose positions restart at 0 with each document and jump back to
    p > 0 with each further continuation of its first p tokens (see kernels.visible); and a KV cache, where a query at
    position p sees the keys of its row at positions 0..p. No (T, T) mask is made for the first, nor for packed rows on
    a CPU, which attend document by document.
    """

    def __init__(self, model, idx, positions, cache):
        cfg, (B, T), device = model.config, idx.shape[:2], idx.device
        self.positions = torch.arange(T, device=device)[None] if positions is None else positions     # (1 or B, T)
        self.packed, self.slots, self.masks = positions is not None and cache is None, cache and cache.length, {}
        self.short = (device.type == 'cpu' and T <= SHORT_BLOCK and not self.packed and not cfg.attn_softcap
                      and cfg.n_kv_head == cfg.n_head)
        self.documents = self.branches = self.spans = None
        if self.packed and device.type == 'cpu':            # positions of each document, row after row
            rows = positions.expand(B, T)
            self.documents, spans = rows.flatten().split(kernels.document_lengths(rows).tolist()), kernels.continuations(rows)
            short = max(shared + end - at for _, shared, at, end in spans) <= SHORT_DOCUMENT
            if short and not cfg.attn_softcap:
                self.spans = kernels.Spans(rows, spans, cfg.n_head, cfg.n_kv_head)
            elif any(shared for _, shared, _, _ in spans) and not cfg.attn_softcap:
                branches = kernels.Branches(rows)
                self.branches = branches if branches.cost < sum(len(d) ** 2 for d in self.documents) else None
        self.angles = {}
        for kind in set(cfg.layer_types) if cfg.position == 'rope' else ():
            angle = self.positions[:, None, :, None].float() * model.inv_freq(kind).to(device)           # (1 or B, 1, T, D/2)
            self.angles[kind] = angle.cos(), angle.sin()

    def mask(self, window):
        """(B or 1, 1, T, keys) bool, True where a query sees a key; made once for all layers of one window."""
        if window not in self.masks:
            if self.slots:                                                              # slot = position
                query, slot = self.positions[:, None, :, None], torch.arange(self.slots, device=self.positions.device)
                self.masks[window] = (slot <= query) & (query - slot < (window or self.slots))
            else:
                self.masks[window] = kernels.visible(self.positions, window)[:, None]
        return self.masks[window]

    def document_masks(self, window):
        """For each document of packed rows on a CPU (T, T) bool, or None where it is a plain causal block."""
        if window not in self.masks:
            plain = [len(d) == d[-1] - d[0] + 1 <= (window or len(d)) for d in self.documents]
            self.masks[window] = [None if is_plain else kernels.visible(d, window)
                                  for d, is_plain in zip(self.documents, plain)]
        return self.masks[window]

    def attend(self, q, k, v, window, scale, softcap):
        """q (B, H, T, D), k and v (B, G, S, D), G dividing H -> (B, H, T, D)."""
        (B, H, T, D), S = q.shape, k.size(2)
        window = window if window and S > window else 0
        if self.branches and not window:
            return self.branches.attend(q, k, v, scale)
        if not self.documents:
            causal = not (self.packed or self.slots or window)
            return attention(q, k, v, None if causal else self.mask(window), scale, softcap)
        lengths = [len(document) for document in self.documents]
        rows = zip(*(h.transpose(1, 2).flatten(0, 1).split(lengths) for h in (q, k, v)))        # each (n, heads, D)
        parts = [attention(*(h.transpose(0, 1)[None] for h in row), mask, scale, softcap)
                 for row, mask in zip(rows, self.document_masks(window))]
        return torch.cat(parts, 2).view(H, B, T, D).transpose(0, 1)


def attention(q, k, v, mask, scale, softcap):
    """softmax(q k^T scale) v where the mask is True, causal where it is None; Gemma 2 caps the scores with tanh
    first."""
    grouped, causal = q.size(1) != k.size(1), mask is None and q.size(2) > 1
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    if grouped:
        k, v = (h.repeat_interleave(q.size(1) // h.size(1), 1) for h in (k, v))
    scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * (scale / softcap))
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril_()
    return (scores if mask is None else scores.masked_fill(~mask, float('-inf'))).softmax(-1).to(v.dtype) @ v


class KVCache:
    """Keys and values of one layer per slot = position: k, v (B, n_kv_head, S, D), allocated once."""

    def __init__(self, B, heads, S, D, dtype, device):
        self.k = torch.zeros(B, heads, S, D, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = S

    def update(self, k, v, positions):
        """Writes k, v (B, G, T, D) at `positions` (1 or B, T) and returns all slots."""
        if positions.size(0) == 1:
            self.k.index_copy_(2, positions[0], k.to(self.k.dtype))
            self.v.index_copy_(2, positions[0], v.to(self.v.dtype))
        else:
            rows = torch.arange(k.size(0), device=k.device)[:, None]                    # (B, 1)
            self.k[rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)
            self.v[rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k, self.v


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == 'learned':
            self.embed_positions = nn.Embedding(config.block_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_types)
        self.norm = Norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)     # float32: see token_stats
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.gradient_checkpointing, self.matmul = False, 'float32'
        self._inv_freq = {}

    def init_weights(self, std=0.02):
        """GPT-2's scheme (Radford et al. 2019, section 2.3): N(0, std), residual projections over sqrt(2 n_layer)."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.data.fill_(0.0 if name.endswith('bias') or self.config.norm_offset else 1.0)
            else:
                residual = name.endswith(('o_proj.weight', 'down_proj.weight'))
                p.data.normal_(0.0, std / math.sqrt(2 * self.config.n_layer) if residual else std)
        return self

    def set_matmul(self, mode):
        """'bf16' or 'float32': how the linear layers multiply on a CPU. On a GPU autocast decides."""
        self.matmul = mode
        for module in self.modules():
            if hasattr(module, 'bf16'):
                module.bf16 = mode == 'bf16'
        return self

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def inv_freq(self, layer_type):
        """Rotary inverse frequencies (D/2,) of a layer type."""
        if layer_type not in self._inv_freq:
            self._inv_freq[layer_type] = rope_frequencies(self.config, layer_type)
        return self._inv_freq[layer_type]

    def hidden(self, idx, positions=None, caches=None, embeddings=None, logit_positions=None):
        """idx (B, T) -> (B, T, C), after the last norm.

        positions (B, T): absolute ones with `caches` (one KVCache a layer); without, each 0 begins a packed document and
        a jump back to p > 0 another continuation of its first p tokens; then a row may be longer than the context.
        embeddings (B, T, C) stand in for those of idx (several streams summed, noise added). logit_positions: an integer tensor of
        any shape, counting the rows laid end to end: only these are wanted, (*logit_positions.shape, C), and the last layer is not
        computed for others.
        """
        cfg, (B, T) = self.config, idx.size()
        if T > cfg.block_size and (positions is None or caches or positions.max() >= cfg.block_size):
            raise UserError(f'a row of {T} tokens does not fit the model\'s context of {cfg.block_size}: shorten it')
        if self.matmul == 'bf16' and B == 1 and positions is not None and not caches and embeddings is None:
            rest = torch.arange(-T % ALIGN, device=idx.device)[None]            # a document of its own
            idx, positions = F.pad(idx, (0, rest.size(1))), torch.cat((positions, rest), 1)
        kept, back = (None, None) if logit_positions is None else logit_positions.unique(return_inverse=True)
        plan = Plan(self, idx, positions, caches[0] if caches else None)
        x = self.embed_tokens(idx) if embeddings is None else embeddings                    # (B, T, C)
        if cfg.embed_scale:
            x = x * torch.tensor(cfg.n_embd ** 0.5, dtype=x.dtype)
        if cfg.position == 'learned':
            x = x + self.embed_positions(plan.positions)
        if cfg.dropout:
            x = F.dropout(x, cfg.dropout, self.training)
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, plan, None, kept if layer is self.layers[-1] else None, use_reentrant=False)
            else:
                x = layer(x, plan, caches[i] if caches else None, kept if layer is self.layers[-1] else None)
        return self.norm(x)[:, :T] if logit_positions is None else F.embedding(back, self.norm(x))

    def logits(self, hidden):
        """(..., C) -> (..., V) in float32 whatever the autocast: a rounded head biases every probability."""
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels.head(hidden, dense_weight(self.lm_head), self.config.logit_softcap)

    def token_stats(self, hidden, targets, temperature=1.0, extras=True):
        """hidden (B, T, C), targets (B, T), -1 where unsupervised -> dict of (B, T): logp, entropy, mean_logp, correct.

        logp, entropy and mean_logp (the mean log-probability over the vocabulary, for label smoothing) are float32, 0
        where unsupervised, and differentiable with any incoming gradient per token; correct is bool. Logits are divided
        by the temperature. Only supervised rows reach the head. extras=False: logp alone, which is quicker.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels.token_stats(hidden, dense_weight(self.lm_head), targets, temperature,
                                       self.config.logit_softcap, extras)

    def forward(self, idx, targets=None, positions=None):
        hidden = self.hidden(idx, positions)
        return self.logits(hidden) if targets is None else self.token_stats(hidden, targets, extras=False)['logp']

    def new_caches(self, B, length, dtype=None):
        """One empty KVCache a layer, for B rows of at most `length` positions; in autocast's dtype where that is on."""
        cfg, kind = self.config, self.device.type
        if length > cfg.block_size:
            raise UserError(f'{length} tokens (prompt and continuation) do not fit the context of {cfg.block_size}: '
                            'shorten the prompt or ask for fewer new tokens')
        if dtype is None:
            autocast = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else self.embed_tokens.weight.dtype
        return [KVCache(B, cfg.n_kv_head, length, cfg.head_size, dtype, self.device) for _ in self.layers]


def rope_frequencies(cfg, layer_type):
    """Inverse frequencies (D/2,) float32 of a layer type's rotary positions, with the linear and Llama 3's scaling."""
    rope = cfg.rope[layer_type]
    inv = 1.0 / rope['rope_theta'] ** (torch.arange(0, cfg.head_size, 2).float() / cfg.head_size)
    if rope['rope_type'] == 'linear':
        inv = inv / rope['factor']
    elif rope['rope_type'] == 'llama3':     # long waves are stretched by `factor`, short ones kept, others blended
        old, low, high = (rope[k] for k in ('original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor'))
        turns = old * inv / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        inv = inv * blend + inv / rope['factor'] * (1 - blend)
    return inv


# ---- Hugging Face's files --------------------------------------------------------------------------------------------

def read_safetensors(directory):
    """{name: tensor} of a single or sharded model, mapped from disk; the pages are private: what is written to one
    never reaches the file."""
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
        if not os.path.exists(path):
            raise UserError(f'{directory}: no {file}' + (
                ' (a shard named in model.safetensors.index.json)' if len(files) > 1 else '; weights are read from '
                'safetensors only: convert older ones with transformers\' save_pretrained'))
        try:
            with safe_open(path, framework='pt') as f:
                weights.update({name: f.get_tensor(name) for name in f.keys()})
        except SafetensorError as e:
            raise UserError(f'{path} is not a whole safetensors file ({e}); copy or download it again') from None
    return weights


def load_weights(model, state, where, dtype=None, device=None):
    """Makes a state of ours the model's parameters; a UserError names a key without a home, a missing one, a wrong
    shape.

    Where dtype and device fit, the tensors themselves become the parameters: mapped from disk, nothing is copied.
    """
    own = base_state(model)
    if model.config.tied:
        own.pop('lm_head.weight')
    problems = [f'{name} is missing' for name in own if name not in state]
    problems += [f'{name} has no home' for name in state if name not in own]
    problems += [f'{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}' for name in own
                 if name in state and state[name].shape != own[name].shape]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise UserError(f'{where} does not fit its config.json: ' + '; '.join(problems[:3]) + more)
    for name in own:
        parent, _, leaf = name.rpartition('.')
        tensor = state.pop(name).to(device or own[name].device, dtype or own[name].dtype).contiguous()
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
    if model.config.tied:
        model.lm_head.weight = model.embed_tokens.weight


def find_model(name_or_path):
    """A local directory, the embedded model `tiny`, or a hub name -> a directory with config.json."""
    if name_or_path == 'tiny':
        return os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'tiny')
    if os.path.isdir(name_or_path):
        if not any(os.path.exists(os.path.join(name_or_path, file)) for file in ('config.json', 'adapter_config.json')):
            raise UserError(f'{name_or_path} has no config.json: not a model directory')
        return name_or_path
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', name_or_path) or os.path.isdir(os.path.dirname(name_or_path)):
        raise UserError(f'no model directory {name_or_path}')
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name_or_path, allow_patterns=['*.json', 'model*.safetensors', 'adapter*.safetensors',
                                                               '*.jinja', 'tokenizer.model', '*.txt'])
    except Exception as e:      # the hub's client raises a dozen kinds: not found, gated, offline, time-out
        raise UserError(f'no model {name_or_path!r}: not a local directory, and hub and local cache do not provide it '
                        f'({type(e).__name__}); download it where there is a network, give its directory') from None


def load_model(name_or_path, device='cpu', dtype=torch.float32, load_in_4bit=False, load_in_8bit=False,
               bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=None, base=None,
               trainable_adapter=False):
    """A hub name, a directory or 'tiny' -> (model, tokenizer), weights in `dtype` on `device`, in eval mode.

    tokenizer is None where the directory has none. Dropout is off: set model.config.dropout's uses where training wants
    it. load_in_4bit, load_in_8bit: the linear layers of the blocks are quantised as they are read (see
    quantize.quantize). A PEFT adapter's directory loads `base`, or else the base that it names, and puts the adapter
    on it.
    """
    if load_in_4bit and load_in_8bit:
        raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')
    quantisation = (load_in_4bit, load_in_8bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant, bnb_4bit_compute_dtype)
    directory = find_model(name_or_path)
    if os.path.exists(os.path.join(directory, 'adapter_config.json')):
        return load_with_base(directory, base, trainable_adapter, device, dtype, *quantisation)
    hf = read_json(os.path.join(directory, 'config.json'))
    if (hf.get('nanoforge') or {}).get('multicontext'):
        raise UserError(f'{name_or_path} is a multicontext model (several token streams at each position): it has no '
                        'single text to continue, and only train_gpt.py opens it')
    cfg, bits = config_from_hf(hf), 4 if load_in_4bit else 8 if load_in_8bit else None
    if cfg is None:
        from nanoforge.wrapped import load_wrapped
        model = load_wrapped(directory, device, dtype)
        if bits:
            quantize(model, bits, *quantisation[2:])
        cfg = model.config
    else:
        weights = read_safetensors(directory)
        if hf['model_type'] == 'gemma3':
            weights = {name: w for name, w in weights.items() if not re.search('vision_tower|multi_modal', name)}
        state = from_hf_weights(cfg, weights)
        if cfg.arch == 'gpt2' and not cfg.bias:     # saved by us without biases: still so, or trained on elsewhere?
            cfg.bias = any(w.any() for name, w in state.items() if name.endswith('.bias'))
            state = state if cfg.bias else {name: w for name, w in state.items() if not name.endswith('.bias')}
        with torch.device('meta'):
            model = GPT(cfg).to(dtype)
        if bits:
            quantize(model, bits, *quantisation[2:], state, device)
        load_weights(model, state, directory, dtype, device)
    model.name_or_path = name_or_path
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    if tokenizer and max(tokenizer.backend.get_vocab(with_added_tokens=False).values()) >= cfg.vocab_size:
        raise UserError(f'{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model only {cfg.vocab_size} '
                        'embeddings: one of the two belongs to another model')
    return model.eval(), tokenizer


def has_tokenizer(directory):
    return any(os.path.exists(os.path.join(directory, name)) for name in TOKENIZER_FILES)


def load_with_base(directory, base, trainable, *settings):
    """A PEFT adapter's directory -> (its base model with the adapter on it, the adapter's tokenizer or else the
    base's)."""
    named = base or read_adapter_config(directory)['base_model_name_or_path']
    if not named:
        raise UserError(f'{directory}: its adapter_config.json names no base model; give base')
    try:
        model, tokenizer = load_model(named, *settings)
    except UserError as e:
        raise UserError(f'{directory} is an adapter, and its base does not load ({e}); give another base') from None
    load_adapter(model, directory, trainable=trainable, any_base=base is not None)
    return model.eval(), load_tokenizer(directory) if has_tokenizer(directory) else tokenizer


def save_model(model, tokenizer, directory, dtype=None):
    """A Hugging Face directory: config.json, model.safetensors, and the tokenizer's files where there is a tokenizer.

    Of a model with adapters the active one is saved, in PEFT's format (merge_lora first to save the whole model).
    """
    from safetensors.torch import save_file
    os.makedirs(directory, exist_ok=True)
    if getattr(model, 'adapters', None) and not model.merged:           # attributes that add_lora and load_adapter set
        save_adapter(model, directory)
        if tokenizer is not None:
            tokenizer.save(directory)
        return
    if len(base_state(model)) != len(model.state_dict()):
        raise UserError('4- and 8-bit weights are saved with their adapter, or whole after merge_lora')
    if not isinstance(model, GPT):
        model.model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save(directory)
        return
    dtype = dtype or model.embed_tokens.weight.dtype
    hf = config_to_hf(model.config, str(dtype).removeprefix('torch.'))
    weights = {name: tensor.to(dtype) for name, tensor in to_hf_weights(model, hf['model_type']).items()}
    path = os.path.join(directory, 'model.safetensors')     # replaced: a model that is mapped from there stays whole
    save_file(weights, path + '.new', metadata={'format': 'pt'})
    os.replace(path + '.new', path)
    if tokenizer is not None:
        tokenizer.save(directory)
        ends = sorted(tokenizer.stop_ids)
        ids = {'bos_token_id': tokenizer.bos_id, 'pad_token_id': tokenizer.pad_id,
               'eos_token_id': ends[0] if len(ends) == 1 else ends}
        hf.update({key: value for key, value in ids.items() if hf.get(key) is None and value not in (None, [])})
    with open(os.path.join(directory, 'config.json'), 'w') as f:
        json.dump(hf, f, indent=2)


if __name__ == '__main__':
    from bench.roundtrip import main        # which imports this file as `model`, as everything else does
    main()
