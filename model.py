"""GPT and its families: one class that runs the weights of GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 2/3 and SmolLM.

    model(idx)                        logits (B, T, V)
    model(idx, targets)               log-probability of each target, float32 (B, T); 0 where the target is -1
    model.hidden(idx, positions)      (B, T, C) after the last norm: what a critic or reward head stands on
    model.token_stats(hidden, targets, temperature)     logp, entropy, mean_logp, correct; (B, T, V) is never held

The modules carry Llama's names (layers.0.self_attn.q_proj, ...), so the weights of most families load unmapped; GPT-2's are
renamed on the way (see GPT2_NAMES). Cross-entropy, SFT, DPO and every RL loss are weightings of model(idx, targets) and live in
their scripts: this file knows no method.
"""
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from configurator import UserError
from data.tokenizer import TOKENIZER_FILES, load_tokenizer, read_json
from lora import (add_lora, adapters_off, dense_weight, load_adapter, merge_lora, read_adapter_config, save_adapter,
                  set_adapter, stacked_linear, unmerge_lora)
from quantized import base_state, check_trainable, quantize

SHORT_BLOCK = 192           # up to here batched products beat blockwise attention on a CPU (bench/attention.py)
DIRECT_LOGITS = 2 ** 24     # up to so many logits the whole (N, V) at once is faster than chunks
CHUNK_LOGITS = 2 ** 24      # logits in one chunk beyond that


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
    rope: dict = field(default_factory=dict)   # layer type -> Hugging Face's rope parameters (rope_theta, rope_type, factor, ...)
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
        self.layer_types = self.layer_types or ['sliding_attention' if self.sliding_window else 'full_attention'] * self.n_layer
        self.rope = {kind: {'rope_type': 'default', 'rope_theta': 10000.0, **self.rope.get(kind, {})}
                     for kind in sorted(set(self.layer_types)) if self.position == 'rope'}


# What makes each family itself; sizes come from the flags or from the config.json that is loaded.
FAMILIES = {
    'gpt2': dict(norm='layernorm', norm_eps=1e-5, position='learned', activation='gelu_tanh', gated=False, bias=True),
    'llama': dict(norm_eps=1e-5, tied=False),
    'mistral': dict(norm_eps=1e-5, tied=False),
    'qwen2': dict(qkv_bias=True),
    'qwen3': dict(qk_norm=True),
    'gemma2': dict(activation='gelu_tanh', post_norms=True, norm_offset=True, embed_scale=True, attn_softcap=50.0, logit_softcap=30.0),
    'gemma3_text': dict(activation='gelu_tanh', post_norms=True, norm_offset=True, embed_scale=True, qk_norm=True),
}


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

    def forward(self, x, plan, cache=None):
        cfg, (B, T, _) = self.cfg, x.size()
        H, G, D = cfg.n_head, cfg.n_kv_head, cfg.head_size
        cos, sin = plan.angles[self.layer_type] if plan.angles else (None, None)        # (B or 1, 1, T, D/2)
        qkv = self.qkv(x)
        if plan.short and cache is None and (not self.window or T <= self.window):
            q_weight, k_weight = (self.q_norm.gain, self.k_norm.gain) if cfg.qk_norm else (None, None)
            y = kernels.ShortAttention.apply(qkv, H, cfg.attn_scale, q_weight, k_weight, cfg.norm_eps,
                                             None if cos is None else cos[0, 0], None if sin is None else sin[0, 0])
            return self.o_proj(y)
        q, k, v = qkv.split([H * D, G * D, G * D], -1)
        q, k, v = (h.view(B, T, -1, D).transpose(1, 2) for h in (q, k, v))              # (B, heads, T, D)
        if x.device.type == 'cpu':
            q, k, v = q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)   # attention stays float32: CPU kernels are no faster in bf16
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None:
            q, k = kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.update(k, v, plan.positions)                                   # (B, G, S, D)
        y = plan.attend(q, k, v, self.window, cfg.attn_scale, cfg.attn_softcap)         # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * D))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.n_embd, cfg.n_inner, bias=cfg.bias) if cfg.gated else None
        self.up_proj = Linear(cfg.n_embd, cfg.n_inner, bias=cfg.bias)
        self.down_proj = Linear(cfg.n_inner, cfg.n_embd, bias=cfg.bias)
        self.act = {'silu': F.silu, 'gelu': F.gelu, 'gelu_tanh': lambda x: F.gelu(x, approximate='tanh')}[cfg.activation]

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
        if cfg.post_norms:      # Gemma names the norm before the MLP pre_feedforward_layernorm; the other one follows attention
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(cfg, cfg.n_embd), Norm(cfg, cfg.n_embd)
        self.post_norms, self.dropout = cfg.post_norms, cfg.dropout

    def forward(self, x, plan, cache=None):
        drop = lambda h: F.dropout(h, self.dropout, self.training) if self.dropout else h
        y = self.self_attn(self.input_layernorm(x), plan, cache)
        x = x + drop(self.post_attention_layernorm(y.to(x.dtype)) if self.post_norms else y)
        if self.post_norms:
            return x + drop(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)).to(x.dtype)))
        return x + drop(self.mlp(self.post_attention_layernorm(x)))


class Plan:
    """What one forward pass shares over its layers: positions, rotary angles, and who may look at whom.

    Three cases: a plain causal block; packed rows, whose positions restart at 0 with each document; and a KV cache, where a
    query at position p sees the keys of its row at positions 0..p. No (T, T) mask is made for the first, nor for packed rows on
    a CPU, which attend document by document.
    """

    def __init__(self, model, idx, positions, cache):
        cfg, (B, T), device = model.config, idx.shape[:2], idx.device
        self.packed = positions is not None and cache is None
        self.positions = torch.arange(T, device=device)[None] if positions is None else positions     # (1 or B, T)
        self.cached, self.masks = cache is not None, {}
        self.keys = cache.length if self.cached else T
        self.angles = {}
        if cfg.position == 'rope':
            for name in set(cfg.layer_types):
                angle = self.positions[:, None, :, None].float() * model.inv_freq(name).to(device)  # (1 or B, 1, T, D/2)
                self.angles[name] = angle.cos(), angle.sin()
        self.short = (device.type == 'cpu' and T <= SHORT_BLOCK and not self.packed and not cfg.attn_softcap
                      and cfg.n_kv_head == cfg.n_head)
        if self.packed and device.type == 'cpu':
            edges = (positions == 0).nonzero().tolist()         # where documents begin, row by row
            rows = [[t for b, t in edges if b == row] for row in range(B)]
            self.documents = [(row, t, end) for row, begins in enumerate(rows)
                              for t, end in zip(begins, begins[1:] + [T])]

    def mask(self, window):
        """(B or 1, 1, T, keys) bool, True where a query sees a key; made once for all layers of one window."""
        if window not in self.masks:
            query = self.positions[:, None, :, None]                                    # (B, 1, T, 1)
            if self.cached:
                key = torch.arange(self.keys, device=query.device)[None, None, None]    # slot = position
                seen = key <= query
            else:
                T = self.positions.size(1)
                seen = torch.ones(T, T, dtype=torch.bool, device=query.device).tril_()[None, None]
                key = self.positions[:, None, None, :]
                if self.packed:
                    document = (self.positions == 0).cumsum(1)                          # (B, T)
                    seen = seen & (document[:, None, :, None] == document[:, None, None, :])
            self.masks[window] = seen & (query - key < window) if window else seen
        return self.masks[window]

    def attend(self, q, k, v, window, scale, softcap):
        """q (B, H, T, D), k and v (B, G, S, D), G dividing H -> (B, H, T, D)."""
        T, S = q.size(2), k.size(2)
        windowed = window if window and S > window else 0
        if self.packed and q.device.type == 'cpu' and not softcap:
            y = torch.empty_like(q)
            for row, begin, end in self.documents:
                part = [h[row:row + 1, :, begin:end] for h in (q, k, v)]
                mask = None
                if windowed and end - begin > windowed:
                    ones = torch.ones(end - begin, end - begin, dtype=torch.bool)
                    mask = ones.tril().triu_(1 - windowed)
                y[row:row + 1, :, begin:end] = F.scaled_dot_product_attention(
                    *part, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1))
            return y
        plain = not self.packed and not self.cached and not windowed
        if not softcap:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=None if plain else self.mask(windowed), is_causal=plain and T > 1, scale=scale,
                enable_gqa=q.size(1) != k.size(1))
        if q.size(1) != k.size(1):
            k, v = (h.repeat_interleave(q.size(1) // h.size(1), 1) for h in (k, v))
        scores = (softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))).float()
        return scores.masked_fill(~self.mask(windowed), float('-inf')).softmax(-1).to(v.dtype) @ v


class KVCache:
    """Keys and values of one layer per slot = position: k, v (B, n_kv_head, S, D), allocated once."""

    def __init__(self, B, heads, S, D, dtype, device):
        self.k = torch.zeros(B, heads, S, D, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = S

    def update(self, k, v, positions):
        """Writes k, v (B, G, T, D) at `positions` (1 or B, T) and returns all slots."""
        if positions.size(0) == 1:
            self.k.index_copy_(2, positions[0], k)
            self.v.index_copy_(2, positions[0], v)
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
        self.gradient_checkpointing = False
        self._inv_freq = {}

    def init_weights(self, std=0.02):
        """GPT-2's scheme: N(0, std), residual projections divided by sqrt(2 n_layer) (Radford et al. 2019, section 2.3)."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.data.fill_(0.0 if name.endswith('bias') or self.config.norm_offset else 1.0)
            else:
                residual = name.endswith(('o_proj.weight', 'down_proj.weight'))
                p.data.normal_(0.0, std / math.sqrt(2 * self.config.n_layer) if residual else std)
        return self

    def set_matmul(self, mode):
        """'bf16' or 'float32': how the linear layers multiply on a CPU. On a GPU autocast decides."""
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

    def hidden(self, idx, positions=None, caches=None, embeddings=None):
        """idx (B, T) -> (B, T, C), after the last norm.

        positions (B, T): absolute ones with `caches` (one KVCache a layer); without, each 0 begins a packed document.
        embeddings (B, T, C) stand in for those of idx (several streams summed, noise added).
        """
        cfg, (B, T) = self.config, idx.size()
        if T > cfg.block_size and caches is None and cfg.position == 'learned':
            raise UserError(f'a sequence of {T} tokens does not fit the model\'s context of {cfg.block_size}')
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
                x = checkpoint(layer, x, plan, use_reentrant=False)
            else:
                x = layer(x, plan, caches[i] if caches else None)
        return self.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., V) in float32 whatever the autocast: a rounded head biases every probability."""
        with torch.autocast(hidden.device.type, enabled=False):
            weight = dense_weight(self.lm_head)         # with its adapter, where the head has one
            z = F.linear(hidden.to(weight.dtype), weight).float() if weight.dtype != torch.float64 else F.linear(hidden, weight)
            cap = self.config.logit_softcap
            return cap * torch.tanh(z / cap) if cap else z

    def token_stats(self, hidden, targets, temperature=1.0):
        """hidden (B, T, C), targets (B, T), -1 where unsupervised -> dict of (B, T): logp, entropy, mean_logp, correct.

        logp, entropy and mean_logp (the mean log-probability over the vocabulary, for label smoothing) are float32, 0 where
        unsupervised, and differentiable with any incoming gradient per token; correct is bool. Logits are divided by the
        temperature. Only supervised rows reach the head.
        """
        mask = targets >= 0
        rows, flat = hidden[mask], targets[mask]                                            # (N, C), (N,)
        with torch.autocast(hidden.device.type, enabled=False):
            parts = kernels.TokenStats.apply(rows, dense_weight(self.lm_head), self.lm_head.bias, flat, temperature,
                                             self.config.logit_softcap, max(1, CHUNK_LOGITS // self.config.vocab_size))
        return {name: torch.zeros(targets.shape, dtype=part.dtype, device=part.device).masked_scatter(mask, part)
                for name, part in zip(('logp', 'entropy', 'mean_logp', 'correct'), parts)}

    def forward(self, idx, targets=None, positions=None):
        hidden = self.hidden(idx, positions)
        if targets is None:
            return self.logits(hidden)
        if targets.numel() * self.config.vocab_size > DIRECT_LOGITS:
            return self.token_stats(hidden, targets)['logp']
        logits = self.logits(hidden).flatten(0, 1)                                          # (B * T, V)
        return -F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction='none').view(targets.shape)

    def new_caches(self, B, length, dtype=None):
        """One empty KVCache a layer, for B rows of at most `length` positions."""
        cfg = self.config
        dtype = dtype or next(self.layers.parameters()).dtype
        return [KVCache(B, cfg.n_kv_head, length, cfg.head_size, dtype, self.device) for _ in self.layers]


# kind of rotary scaling -> the settings that it needs
ROPE_TYPES = {'default': (), 'linear': ('factor',),
              'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')}


def rope_frequencies(cfg, layer_type):
    """Inverse frequencies (D/2,) float32 of a layer type's rotary positions, with the linear and Llama 3's scaling."""
    rope = cfg.rope[layer_type]
    inv = 1.0 / rope['rope_theta'] ** (torch.arange(0, cfg.head_size, 2).float() / cfg.head_size)
    if rope['rope_type'] == 'linear':
        inv = inv / rope['factor']
    elif rope['rope_type'] == 'llama3':     # long waves are stretched by `factor`, short ones kept, those between blended
        old, low, high = (rope[k] for k in ('original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor'))
        turns = old * inv / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        inv = inv * blend + inv / rope['factor'] * (1 - blend)
    return inv


# ---- Hugging Face's files ---------------------------------------------------------------------------------------------------

CLASSES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
           'qwen3': 'Qwen3ForCausalLM', 'gemma2': 'Gemma2ForCausalLM', 'gemma3_text': 'Gemma3ForCausalLM'}
# our field -> key of config.json, in GPT-2's words and in everyone else's
GPT2_KEYS = {'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer', 'n_head': 'n_head', 'n_embd': 'n_embd',
             'norm_eps': 'layer_norm_epsilon', 'n_inner': 'n_inner', 'tied': 'tie_word_embeddings'}
LLAMA_KEYS = {'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
              'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size', 'n_inner': 'intermediate_size',
              'head_size': 'head_dim', 'norm_eps': 'rms_norm_eps', 'tied': 'tie_word_embeddings'}
WINDOW_KEYS = {'sliding_window': 'sliding_window'}
GEMMA_KEYS = {**WINDOW_KEYS, 'attn_softcap': 'attn_logit_softcapping', 'logit_softcap': 'final_logit_softcapping'}
KEYS = {'gpt2': GPT2_KEYS, 'llama': LLAMA_KEYS, **{arch: LLAMA_KEYS | WINDOW_KEYS for arch in ('mistral', 'qwen2', 'qwen3')},
        **{arch: LLAMA_KEYS | GEMMA_KEYS for arch in ('gemma2', 'gemma3_text')}}
# What transformers takes where config.json says nothing (published files leave much out).
_QWEN = dict(hidden_act='silu', max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
_GEMMA = dict(hidden_activation='gelu_pytorch_tanh', num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=4096,
              query_pre_attn_scalar=256, tie_word_embeddings=True)
UNSAID = {
    'gpt2': dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, layer_norm_epsilon=1e-5,
                 activation_function='gelu_new', tie_word_embeddings=True),
    'llama': dict(hidden_act='silu', max_position_embeddings=2048),
    'mistral': dict(hidden_act='silu', num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
    'qwen2': _QWEN, 'qwen3': dict(_QWEN, head_dim=128),
    'gemma2': dict(_GEMMA, vocab_size=256000, max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    'gemma3_text': dict(_GEMMA, vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6, rope_local_base_freq=1e4)}
ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh'}


def config_from_hf(hf):
    """A config.json as dict -> GPTConfig, or None for an architecture outside our families."""
    if hf.get('model_type') == 'nanoforge':
        return GPTConfig(**hf['nanoforge'])
    if hf.get('model_type') == 'gemma3':            # the language model of a picture model
        hf = {'tie_word_embeddings': hf.get('tie_word_embeddings', True), **hf['text_config'], 'model_type': 'gemma3_text'}
    arch = hf.get('model_type')
    if arch not in FAMILIES:
        return None
    hf = {'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'hidden_activation': None, **UNSAID[arch], **hf}
    values = dict(FAMILIES[arch], arch=arch, **{ours: hf.get(theirs) or 0 for ours, theirs in KEYS[arch].items()})
    values['tied'] = bool(values['tied'])
    values['activation'] = ACTIVATIONS.get(hf['activation_function'] if arch == 'gpt2' else hf['hidden_activation'] or hf['hidden_act'])
    outside = [values['activation'] is None, hf.get('add_cross_attention'), hf.get('scale_attn_by_inverse_layer_idx'),
               hf.get('scale_attn_weights') is False, hf.get('use_bidirectional_attention'), hf.get('quantization_config')]
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
    return {key: rope[key] for key in ('rope_type', 'rope_theta', 'partial_rotary_factor', *ROPE_TYPES.get(rope['rope_type'], ()))
            if key in rope}


def config_to_hf(cfg, dtype='float32'):
    """GPTConfig -> the config.json that transformers opens.

    A combination that none of its classes computes (GPT-2 with a gated MLP, say) is called a nanoforge model there, so that
    nothing opens it wrongly; load_model does.
    """
    arch = cfg.arch
    hf = {'architectures': [CLASSES[arch]], 'model_type': arch, 'dtype': dtype, 'use_cache': True,
          'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None,         # else the class's own would stand
          **{theirs: getattr(cfg, ours) or None for ours, theirs in KEYS[arch].items()}, 'tie_word_embeddings': cfg.tied}
    name = {ours: theirs for theirs, ours in ACTIVATIONS.items() if (theirs != 'gelu_new') or arch == 'gpt2'}[cfg.activation]
    if arch == 'gpt2':
        hf.update(activation_function=name, nanoforge={'bias': cfg.bias}, resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout,
                  attn_pdrop=0.0)
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


# our name -> GPT-2's; '^T' marks matrices that GPT-2 stores transposed (its Conv1D)
GPT2_NAMES = {
    'embed_tokens': 'wte', 'embed_positions': 'wpe', 'norm': 'ln_f', 'input_layernorm': 'ln_1', 'post_attention_layernorm': 'ln_2',
    'self_attn.c_attn': 'attn.c_attn^T', 'self_attn.o_proj': 'attn.c_proj^T', 'mlp.up_proj': 'mlp.c_fc^T',
    'mlp.down_proj': 'mlp.c_proj^T'}


def to_hf_weights(model, kind):
    """Our state as {name in a `kind` of model (config.json's model_type): tensor}, without copies where the layout is the same."""
    cfg, state = model.config, model.state_dict()
    if cfg.tied:
        state.pop('lm_head.weight')
    if kind == 'gpt2':
        return {name: tensor.contiguous() for name, tensor in _to_gpt2(cfg, state)}
    prefix = '' if kind == 'nanoforge' else 'model.'
    return {name if name.startswith('lm_head') else prefix + name: tensor.contiguous() for name, tensor in state.items()}


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
    """{Hugging Face name: tensor} -> {our name: tensor}; the inverse of to_hf_weights. A name that it cannot place stays."""
    state = {}
    for name, tensor in weights.items():
        name = re.sub(r'^(language_model\.)?((model|transformer)\.)?(language_model\.)?', '', name)
        if name.endswith(('rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias')):       # what old files carry besides
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


def read_safetensors(directory):
    """{name: tensor} of a single or sharded model, mapped from disk: private pages, so writing to one never reaches the file."""
    from safetensors import SafetensorError, safe_open
    index = os.path.join(directory, 'model.safetensors.index.json')
    files = ['model.safetensors']
    if os.path.exists(index) and not os.path.exists(os.path.join(directory, files[0])):
        files = sorted(set(read_json(index).get('weight_map', {}).values()))
    weights = {}
    for file in files:
        path = os.path.join(directory, file)
        if not os.path.exists(path):
            raise UserError(f'{directory}: no {file}' + (' (a shard named in model.safetensors.index.json)' if len(files) > 1 else
                            '; weights are read from safetensors only: convert older ones with transformers\' save_pretrained'))
        try:
            with safe_open(path, framework='pt') as f:
                weights.update({name: f.get_tensor(name) for name in f.keys()})
        except SafetensorError as e:
            raise UserError(f'{path} is not a whole safetensors file ({e}); copy or download it again') from None
    return weights


def load_weights(model, state, where, dtype=None, device=None):
    """Makes a state of ours the model's parameters; a key without a home, a missing one or a wrong shape is an error that names it.

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
        return snapshot_download(name_or_path, allow_patterns=['*.json', 'model*.safetensors', 'adapter*.safetensors', '*.jinja',
                                                               'tokenizer.model', '*.txt'])
    except Exception as e:      # the hub's client raises a dozen kinds: not found, gated, offline, time-out
        raise UserError(f'no model {name_or_path!r}: not a local directory, and the hub and its local cache do not provide it '
                        f'({type(e).__name__}); download it where there is a network and give its directory') from None


def load_model(name_or_path, device='cpu', dtype=torch.float32, load_in_4bit=False, load_in_8bit=False,
               bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=None, base=None,
               trainable_adapter=False):
    """A hub name, a directory or 'tiny' -> (model, tokenizer), weights in `dtype` on `device`, in eval mode.

    tokenizer is None where the directory has none. Dropout is off: set model.config.dropout's uses where training wants it.
    load_in_4bit, load_in_8bit: the linear layers of the blocks are quantised as they are read (see quantized.quantize). A PEFT
    adapter's directory loads `base`, or else the base that it names, and puts the adapter on it.
    """
    if load_in_4bit and load_in_8bit:
        raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')
    quantisation = (load_in_4bit, load_in_8bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant, bnb_4bit_compute_dtype)
    directory = find_model(name_or_path)
    if os.path.exists(os.path.join(directory, 'adapter_config.json')):
        return load_with_base(directory, base, trainable_adapter, device, dtype, *quantisation)
    hf = read_json(os.path.join(directory, 'config.json'))
    cfg = config_from_hf(hf)
    if cfg is None:
        raise UserError(f'{name_or_path}: model_type {hf.get("model_type")!r} is none of {", ".join(FAMILIES)}')
    weights = read_safetensors(directory)
    if hf['model_type'] == 'gemma3':
        weights = {name: w for name, w in weights.items() if not re.search('vision_tower|multi_modal_projector', name)}
    state = from_hf_weights(cfg, weights)
    if cfg.arch == 'gpt2' and not cfg.bias:             # saved by us without biases: still so, or trained on elsewhere?
        cfg.bias = any(w.any() for name, w in state.items() if name.endswith('.bias'))
        state = state if cfg.bias else {name: w for name, w in state.items() if not name.endswith('.bias')}
    with torch.device('meta'):
        model = GPT(cfg).to(dtype)
    if load_in_4bit or load_in_8bit:
        quantize(model, 4 if load_in_4bit else 8, *quantisation[2:], state, device)
    load_weights(model, state, directory, dtype, device)
    model.name_or_path = name_or_path
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    if tokenizer and max(tokenizer.backend.get_vocab(with_added_tokens=False).values()) >= cfg.vocab_size:
        raise UserError(f'{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model only {cfg.vocab_size} embeddings: '
                        'one of the two belongs to another model')
    return model.eval(), tokenizer


def has_tokenizer(directory):
    return any(os.path.exists(os.path.join(directory, name)) for name in TOKENIZER_FILES)


def load_with_base(directory, base, trainable, *settings):
    """A PEFT adapter's directory -> (its base model with the adapter on it, tokenizer: the adapter's own where it has one)."""
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
    dtype = dtype or model.embed_tokens.weight.dtype
    hf = config_to_hf(model.config, str(dtype).removeprefix('torch.'))
    weights = {name: tensor.to(dtype) for name, tensor in to_hf_weights(model, hf['model_type']).items()}
    path = os.path.join(directory, 'model.safetensors')     # replaced, not overwritten: a model mapped from there stays whole
    save_file(weights, path + '.new', metadata={'format': 'pt'})
    os.replace(path + '.new', path)
    if tokenizer is not None:
        tokenizer.save(directory)
        ends = sorted(tokenizer.stop_ids)
        hf.update({key: value for key, value in (('bos_token_id', tokenizer.bos_id), ('pad_token_id', tokenizer.pad_id), (
            'eos_token_id', ends[0] if len(ends) == 1 else ends)) if hf.get(key) is None and value not in (None, [])})
    with open(os.path.join(directory, 'config.json'), 'w') as f:
        json.dump(hf, f, indent=2)
