"""GPT and its families: one class that runs the weights of GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 2/3 and
SmolLM.

    model(idx)                      logits (B, T, V)
    model(idx, targets)             log-probability of each target, float32 (B, T); 0 where the target is -1
    model.hidden(idx, positions)    (B, T, C) after the last norm: what a value or reward head stands on
    model.token_stats(hidden, targets, temperature)
                                    logp, entropy, mean_logp, correct (B, T); (B, T, V) is never held

    python model.py --check NAME    is a model the same here and in transformers? (bench/roundtrip.py)

The modules carry Llama's names (layers.0.self_attn.q_proj, ...), so the weights of most families load
unmapped; GPT-2's are renamed on the way (nanoforge/hf.py). Cross-entropy, SFT, DPO and every RL loss are
weightings of model(idx, targets) and live in their scripts: this file knows no method. Operations that a CPU
needs in another form than torch's are in nanoforge/kernels.py.
"""
import functools
import json
import math
import os
import re
import runpy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from data.tokenizer import TOKENIZER_FILES, load_tokenizer, read_json
from nanoforge import kernels, rope
from nanoforge.hf import (
    FAMILIES, GPTConfig, HFModel, config_from_hf, config_to_hf, find_model, from_hf_weights, hf_layout,
    load_weights, read_safetensors)
from nanoforge.kernels import Linear
from nanoforge.lora import add_lora, load_adapter, merge_lora, read_adapter_config, save_adapter
from nanoforge.quantize import base_state, quantize
from nanoforge.tensors import part, save_tensors


class Norm(nn.Module):
    """Layer norm or RMS norm over the last dimension."""

    def __init__(self, cfg, size):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 0.0 if cfg.norm_offset else 1.0))
        self.bias = nn.Parameter(torch.zeros(size)) if cfg.norm == 'layernorm' and cfg.bias else None
        self.layer_norm, self.offset, self.eps = cfg.norm == 'layernorm', cfg.norm_offset, cfg.norm_eps

    @property
    def effective_weight(self):
        weight = part(self.weight)
        return weight.float() + 1 if self.offset else weight

    def forward(self, x):
        if self.layer_norm:
            return F.layer_norm(x, x.shape[-1:], self.effective_weight, part(self.bias), self.eps)
        return kernels.rms_norm(x, self.effective_weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention; several heads of queries may share a head of keys and values (Ainslie et al.
    2023)."""

    def __init__(self, cfg, layer_type):
        super().__init__()
        self.cfg, self.layer_type = cfg, layer_type
        C, q_size, kv_size = cfg.n_embd, cfg.n_head * cfg.head_size, cfg.n_kv_head * cfg.head_size
        qkv_bias = cfg.bias or cfg.qkv_bias
        self.q_proj = Linear(C, q_size, bias=qkv_bias)
        self.k_proj = Linear(C, kv_size, bias=qkv_bias)
        self.v_proj = Linear(C, kv_size, bias=qkv_bias)
        self.o_proj = Linear(q_size, C, bias=cfg.bias or cfg.o_bias)
        self.q_norm = Norm(cfg, cfg.head_size) if cfg.qk_norm else None
        self.k_norm = Norm(cfg, cfg.head_size) if cfg.qk_norm else None

    def forward(self, x, context, logit_positions=None):
        """x (B, T, C) -> (B, T, C); with logit_positions (M,) of these alone, (M, C)."""
        cfg, (B, T, _) = self.cfg, x.shape
        qkv = kernels.stacked_linear(x, (self.q_proj, self.k_proj, self.v_proj))
        if context.fused(self.layer_type):              # what follows as one node, which is faster on a CPU
            y = context.fused_attention(qkv, self.layer_type, self.q_norm, self.k_norm)
        else:
            if x.device.type == 'cpu':
                qkv = qkv.to(x.dtype)                   # float32 attention is no slower on a CPU than bf16's
            qkv = qkv.view(B, T, -1, cfg.head_size).transpose(1, 2)  # (B, n_head + 2 n_kv_head, T, head_size)
            qk, v = qkv.split([cfg.n_head + cfg.n_kv_head, cfg.n_kv_head], 1)
            if context.rope and not cfg.qk_norm:
                qk = kernels.rotate(qk, *context.rope[self.layer_type])
            q, k = qk.split([cfg.n_head, cfg.n_kv_head], 1)
            if cfg.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
                if context.rope:
                    q, k = (kernels.rotate(x, *context.rope[self.layer_type]) for x in (q, k))
            y = context.attention(q, k, v, self.layer_type)             # (B, n_head, T, head_size)
            y = y.transpose(1, 2).reshape(B, T, -1)                     # (B, T, n_head * head_size)
        if logit_positions is not None:
            y = kernels.gather_rows(y, logit_positions)
        return self.o_proj(y)


def gelu_tanh(x):
    return F.gelu(x, approximate='tanh')


ACTIVATIONS = {'silu': F.silu, 'gelu': F.gelu, 'gelu_tanh': gelu_tanh}


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.n_embd, cfg.n_inner, bias=cfg.bias) if cfg.gated else None
        self.up_proj = Linear(cfg.n_embd, cfg.n_inner, bias=cfg.bias)
        self.down_proj = Linear(cfg.n_inner, cfg.n_embd, bias=cfg.bias)
        self.act = ACTIVATIONS[cfg.activation]

    def forward(self, x):
        x = kernels.layer_input(x, self.up_proj)
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(kernels.gated(self.act, self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, cfg, layer_type):
        super().__init__()
        self.input_layernorm = Norm(cfg, cfg.n_embd)
        self.self_attn = Attention(cfg, layer_type)
        self.post_attention_layernorm = Norm(cfg, cfg.n_embd)
        self.mlp = MLP(cfg)
        # in Gemma, post_attention_layernorm really follows attention, and these are the MLP's
        if cfg.post_norms:
            self.pre_feedforward_layernorm = Norm(cfg, cfg.n_embd)
            self.post_feedforward_layernorm = Norm(cfg, cfg.n_embd)
        self.post_norms, self.dropout = cfg.post_norms, cfg.dropout

    def forward(self, x, context, logit_positions=None):
        """x (B, T, C) -> (B, T, C); with logit_positions (M,) of these alone, (M, C)."""
        y = self.self_attn(self.input_layernorm(x), context, logit_positions)
        if logit_positions is not None:
            x = kernels.gather_rows(x, logit_positions)
        if self.post_norms:
            x = x + self.drop(self.post_attention_layernorm(y.to(x.dtype)))
            y = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.drop(self.post_feedforward_layernorm(y.to(x.dtype)))
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Embedding(nn.Embedding):
    def reset_parameters(self):
        # drawing on the meta device, which holds no numbers, would import torch's compiler: 1.8 s
        if not self.weight.is_meta:
            super().reset_parameters()


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.n_embd)
        if config.position == 'learned':
            self.embed_positions = Embedding(config.block_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer_type) for layer_type in config.layer_types)
        self.norm = Norm(config, config.n_embd)
        # its product is kernels.head, whose logits are float32
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.gradient_checkpointing, self.matmul, self.compiled = 0, 'float32', False

    def init_weights(self, std=0.02):
        """GPT-2's scheme (Radford et al. 2019, section 2.3): N(0, std), residual projections over sqrt(2
        n_layer)."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.data.fill_(0.0 if name.endswith('bias') or self.config.norm_offset else 1.0)
            else:
                residual = name.endswith(('o_proj.weight', 'down_proj.weight'))
                p.data.normal_(0.0, std / math.sqrt(2 * self.config.n_layer) if residual else std)
        return self

    def set_matmul(self, mode):
        """'bf16' or 'float32': how the linear layers multiply, and on a GPU the head; on a CPU the head's
        gradients alone, its logits being float32."""
        self.matmul = mode
        for module in self.modules():
            if hasattr(module, 'bf16'):
                module.bf16 = mode == 'bf16'
        layers = [module for module in self.layers.modules() if isinstance(module, Linear)]
        layers += [self.lm_head] if self.device.type == 'cuda' else []
        weights = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        if mode == 'bf16':
            kernels.keep_copies(weights)
        else:
            kernels.drop_copies(weights)
        return self

    def compile_layers(self, **settings):
        """torch.compile with these settings, a layer at a time: one graph serves them all.

        Compiled as a whole, the model had gradients of zero (CUDA, torch 2.11), and the head, which never
        holds all logits at once, is quicker as it is.
        """
        # a graph for each of training, evaluation and prompts; without and with dropout, adapters, a mask;
        # for all rows and, in the last layer, for some
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for layer in self.layers:
            layer.compile(**settings)
        self.compiled = True
        return self

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def local_config(self):
        """The configuration that the layers compute by: under tensor parallelism of this rank's heads."""
        return self.layers[0].self_attn.cfg

    @functools.cached_property
    def inv_freq(self):
        """{layer type: inverse frequencies of its rotary positions (D/2,)}; empty where positions are
        learned."""
        cfg = self.config
        return {kind: rope.frequencies(settings, cfg.head_size) for kind, settings in cfg.rope.items()}

    def embed(self, idx, positions, embeddings=None):
        """idx, positions (...) -> (..., C); embeddings() -> (..., C) stand in for those of idx."""
        cfg, x = self.config, self.embed_tokens(idx) if embeddings is None else embeddings()
        if cfg.embed_scale:
            x = x * torch.tensor(cfg.n_embd ** 0.5, dtype=x.dtype)
        return x + self.embed_positions(positions) if cfg.position == 'learned' else x

    def hidden(self, idx, positions=None, embeddings=None, logit_positions=None, keep_kv=None):
        """idx (B, T) -> (B, T, C), after the last norm.

        positions (B, T): rows are packed; each 0 begins a document, a jump back to p > 0 another continuation
        of its first p tokens; a row may then be longer than the context. embeddings() -> (B, T, C) stand in
        for those of idx (several streams summed, noise added): called in here, where a sharded table is
        whole. logit_positions: an integer tensor of any shape, counting the rows laid end to end: only these
        are wanted, (*logit_positions.shape, C), and the last layer is not computed for others. keep_kv: a
        list to which each layer adds its (keys, values), each (B, n_kv_head, T, head_size), for a sampler.
        """
        cfg, (B, T) = self.config, idx.size()
        if T > cfg.block_size and (positions is None or positions.max() >= cfg.block_size):
            raise UserError(f'a row of {T} tokens does not fit the model\'s context of {cfg.block_size}: '
                            'shorten it')
        on_cpu = idx.device.type == 'cpu'
        if on_cpu and self.matmul == 'bf16' and B == 1 and positions is not None and embeddings is None:
            padding = torch.arange(-T % kernels.ALIGN, device=idx.device)[None]        # a document of its own
            idx = F.pad(idx, (0, padding.size(1)))
            positions = torch.cat((positions, padding), 1)
        rows = inverse = None
        if logit_positions is not None:
            rows, inverse = logit_positions.unique(return_inverse=True)
        context = kernels.AttentionContext(self.local_config, self.inv_freq, idx, positions, keep_kv,
                                           self.embed_tokens.weight.dtype, self.compiled)

        x = self.embed(idx, context.positions, embeddings)                              # (B, T, C)
        if cfg.dropout:
            x = F.dropout(x, cfg.dropout, self.training)
        every = self.gradient_checkpointing if self.training and torch.is_grad_enabled() else 0
        for i, layer in enumerate(self.layers):
            wanted = rows if layer is self.layers[-1] else None
            if every and i % every == 0:
                x = checkpoint(layer, x, context, wanted, use_reentrant=False)
            else:
                x = layer(x, context, wanted)
        x = self.norm(x)
        return x[:, :T] if logit_positions is None else F.embedding(inverse, x)

    def logits(self, hidden):
        """(..., C) -> (..., V), float32."""
        dtype = kernels.autocast_dtype(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels.head(hidden, self.lm_head.weight_matrix(), self.config.logit_softcap, dtype)

    def token_stats(self, hidden, targets, temperature=1.0, extras=True):
        """hidden (B, T, C), targets (B, T), -1 where unsupervised -> dict of (B, T): logp, entropy,
        mean_logp, correct.

        logp, entropy and mean_logp (the mean log-probability over the vocabulary, for label smoothing) are
        float32, 0 where unsupervised, and differentiable with any incoming gradient per token; correct is
        bool. Logits are divided by the temperature. Only supervised rows reach the head. extras=False: logp
        alone, which is quicker.
        """
        dtype = kernels.autocast_dtype(hidden.device)
        if hidden.device.type == 'cpu' and self.matmul == 'bf16':
            dtype = torch.bfloat16
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels.token_stats(hidden, self.lm_head.weight_matrix(), targets, temperature,
                                       self.config.logit_softcap, extras, dtype)

    def forward(self, idx, targets=None, positions=None):
        hidden = self.hidden(idx, positions)
        if targets is None:
            return self.logits(hidden)
        return self.token_stats(hidden, targets, extras=False)['logp']


# ---- Hugging Face directories ------------------------------------------------------------------------------

def load_model(name_or_path, device='cpu', dtype=torch.float32, load_in_4bit=False, load_in_8bit=False,
               bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=None,
               base=None, trainable_adapter=False):
    """A hub name, a directory or 'tiny' -> (model, tokenizer), weights in `dtype` on `device`, in eval mode.

    tokenizer is None where the directory has none. Dropout is off: set model.config.dropout's uses where
    training wants it. load_in_4bit, load_in_8bit: the linear layers of the blocks are quantised as they are
    read (see quantize.quantize). A PEFT adapter's directory loads `base`, or else the base that it names, and
    puts the adapter on it.
    """
    if load_in_4bit and load_in_8bit:
        raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')
    is_plan = str(device) == 'meta'             # shapes alone: no weights are read, or fetched from the hub
    directory = find_model(name_or_path, weights=not is_plan)
    if os.path.exists(os.path.join(directory, 'adapter_config.json')):
        return load_with_base(directory, base, trainable_adapter, device, dtype, load_in_4bit, load_in_8bit,
                              bnb_4bit_quant_type, bnb_4bit_use_double_quant, bnb_4bit_compute_dtype)
    quantization = None
    if load_in_4bit or load_in_8bit:
        quantization = dict(bits=4 if load_in_4bit else 8, quant_type=bnb_4bit_quant_type,
                            double_quant=bnb_4bit_use_double_quant, compute_dtype=bnb_4bit_compute_dtype)
    hf = read_json(os.path.join(directory, 'config.json'))
    if (hf.get('nanoforge') or {}).get('multicontext'):
        raise UserError(f'{name_or_path} is a multicontext model (several token streams at each position): '
                        'it has no single text to continue, and only train_gpt.py opens it')
    try:
        cfg = config_from_hf(hf)
    except UserError as e:
        raise UserError(f'{directory}: {e}') from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(f'{directory}: its config.json describes no language model '
                        f'({type(e).__name__}: {e}); copy it again from the model\'s source') from None
    if is_plan:
        model = empty_model(cfg, hf)
    elif cfg is not None:
        model = load_gpt(cfg, hf, directory, device, dtype, quantization)
    else:
        model = HFModel.load(directory, device, dtype)
        if quantization:
            quantize(model, **quantization)
    model.name_or_path = name_or_path
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    vocab_size = model.config.vocab_size
    if tokenizer and max(tokenizer.backend.get_vocab(with_added_tokens=False).values()) >= vocab_size:
        raise UserError(f'{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model only '
                        f'{vocab_size} embeddings: one of the two belongs to another model')
    if tokenizer:
        tokenizer.restrict(vocab_size)
    return model.eval(), tokenizer


def empty_model(cfg, hf):
    """The GPT that cfg describes, on the meta device; hf: the config.json that cfg was made from."""
    if cfg is None:
        raise UserError(f'--plan knows the families that model.py runs, and {hf.get("model_type")} is none '
                        'of them: it runs as transformers has it, whose memory is not counted here')
    with torch.device('meta'):
        return GPT(cfg)


def load_gpt(cfg, hf, directory, device, dtype, quantization):
    """A model of our families; hf: the config.json that cfg was made from."""
    weights = read_safetensors(directory)
    if hf['model_type'] == 'gemma3':        # the text half of a model that sees pictures
        weights = {name: tensor for name, tensor in weights.items()
                   if not re.search('vision_tower|multi_modal', name)}
    state = from_hf_weights(cfg, weights)
    cfg.tied = cfg.tied and 'lm_head.weight' not in state
    if cfg.arch == 'gpt2' and not cfg.bias:   # saved by us without biases: still so, or trained on elsewhere?
        biases = [name for name in state if name.endswith('.bias')]
        cfg.bias = any(state[name].any() for name in biases)
        if not cfg.bias:
            state = {name: tensor for name, tensor in state.items() if name not in biases}
    with torch.device('meta'):
        model = GPT(cfg).to(dtype)
    if quantization:
        quantize(model, **quantization, state=state, device=device)
    load_weights(model, state, directory, dtype, device)
    return model


def has_tokenizer(directory):
    return any(os.path.exists(os.path.join(directory, name)) for name in TOKENIZER_FILES)


def load_with_base(directory, base, trainable, *settings):
    """A PEFT adapter's directory -> (its base model with the adapter on it, the adapter's tokenizer or else
    the base's)."""
    named = base or read_adapter_config(directory)['base_model_name_or_path']
    if not named:
        raise UserError(f'{directory}: its adapter_config.json names no base model; give base')
    try:
        model, tokenizer = load_model(named, *settings)
    except UserError as e:
        raise UserError(f'{directory} is an adapter, and its base does not load ({e}); give another '
                        'base') from None
    load_adapter(model, directory, trainable=trainable, any_base=base is not None)
    if has_tokenizer(directory):
        theirs = load_tokenizer(directory)
        if tokenizer:           # other tools leave generation_config.json with the base
            theirs.stop_ids |= {token for token in tokenizer.stop_ids
                                if theirs.backend.id_to_token(token) == tokenizer.backend.id_to_token(token)}
        theirs.restrict(model.config.vocab_size)
        tokenizer = theirs
    return model.eval(), tokenizer


def save_model(model, tokenizer, directory, dtype=None):
    """A Hugging Face directory: config.json, model.safetensors, and the tokenizer's files where there is a
    tokenizer.

    Of a model with adapters the active one is saved, in PEFT's format (merge_lora first to save the whole
    model).
    """
    os.makedirs(directory, exist_ok=True)
    if getattr(model, 'adapters', None) and not model.merged:  # attributes that add_lora and load_adapter set
        save_adapter(model, directory)
    elif len(base_state(model)) != len(model.state_dict()):
        raise UserError('4- and 8-bit weights are saved with their adapter, or whole after merge_lora')
    elif isinstance(model, GPT):
        save_gpt(model, tokenizer, directory, dtype or model.embed_tokens.weight.dtype)
    else:
        model.model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save(directory)


def save_gpt(model, tokenizer, directory, dtype):
    hf = config_to_hf(model.config, str(dtype).removeprefix('torch.'))
    # replaced: a model that is mapped from there stays whole
    path = os.path.join(directory, 'model.safetensors')
    save_tensors(path + '.new', hf_layout(model, hf['model_type']), dtype, metadata={'format': 'pt'})
    os.replace(path + '.new', path)
    if tokenizer is not None:
        for key, value in tokenizer.named_ids().items():
            if hf.get(key) is None:
                hf[key] = value
    with open(os.path.join(directory, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(hf, f, indent=2)


if __name__ == '__main__':
    root = os.path.dirname(os.path.abspath(__file__))
    runpy.run_path(os.path.join(root, 'bench', 'roundtrip.py'), run_name='__main__')
