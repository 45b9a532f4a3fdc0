"""How generate() gets the next token's logits: a static KV cache for our GPT, plain recomputation for models without one.

    decoder = Decoder(model, prompts, num_samples, room)    # or Recomputer, the same calls
    logits = decoder.start()                                # (R, V) after the prompts, R = prompts * num_samples
    logits = decoder.step(token)                            # (n, V): token (n,) was drawn for the first n rows

decoder.state lists tensors with R rows. To take a row out of the batch, copy the last row of each over it and go on with one row
less. Everything here computes what model.hidden and model.logits do, up to rounding: logp_gap in sample.py measures it.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanoforge import kernels
from nanoforge.lora import dense_weight
from model import Linear

FUSE_LIMIT = 2 ** 28        # parameters up to which stacked copies of the weights are made: beyond, memory counts more
PACK_ROWS = 16              # rows from which a CPU multiplies faster by weights in oneDNN's layout
GROW = 16                   # slots that the cache grows by at least; by an eighth of what it has where that is more


class Decoder:
    """The forward pass of our GPT for one new token a row, from weights fetched and stacked once.

    At small sizes a step is bound by the number of calls, so that what can be done once is not done per step or per layer.
    Prompts are shifted right in the cache so that all end at the same slot: every row writes slot `self.slot` and attends to the
    slots up to it, and one mask hides what lies before a shorter prompt, and the slots that are empty yet. Keys and values lie in
    one piece, which grows when it is full, and all of it is read: on a CPU that is twice as fast as the filled part of a larger
    piece. Channels j and j + D/2 of a head of q and k, which rotary positions turn together, are stored side by side: the
    rotation is then one complex product.
    """

    def __init__(self, model, prompts, num_samples, room):
        cfg, device = model.config, model.device
        self.model, self.prompts, self.num_samples = model, prompts, num_samples
        self.rows = 0                                                   # the first rows of the state that `views` are of
        self.slot, self.wide = max(map(len, prompts)), torch.promote_types(model.embed_tokens.weight.dtype, torch.float32)
        self.end = self.slot + room                                     # one behind the last slot there can be
        self.slots = min(self.end, self.slot + GROW)                    # how many there are
        self.amp = torch.get_autocast_dtype(device.type) if device.type != 'cpu' and torch.is_autocast_enabled(device.type) else None
        self.pairs = torch.arange(cfg.head_size, device=device)
        self.turns = {}
        if cfg.position == 'rope':
            self.pairs = self.pairs.view(2, -1).t().flatten()                                   # 0, D/2, 1, D/2 + 1, ...
            for name in set(cfg.layer_types):
                angle = torch.arange(self.end, device=device)[:, None].float() * model.inv_freq(name).to(device)
                self.turns[name] = torch.polar(torch.ones_like(angle), angle)                   # (end, D/2) complex
        self.layers = [self.prepare(layer) for layer in model.layers]
        self.windows, self.norm = {layer.window for layer in self.layers}, norm_of(model.norm)
        head, rows = dense_weight(model.lm_head), len(prompts) * num_samples
        plain = self.amp is None and head.dtype == self.wide and not cfg.logit_softcap      # model.logits without its conversions
        self.logits = product(head, None, head.dtype, rows if model.num_params() <= FUSE_LIMIT else 0) if plain else model.logits

    def prepare(self, layer):
        """One layer as functions."""
        cfg, attention, mlp = self.model.config, layer.self_attn, layer.mlp
        fuse = self.model.num_params() <= FUSE_LIMIT
        H, G, D = cfg.n_head, cfg.n_kv_head, cfg.head_size
        heads = torch.arange((H + 2 * G) * D, device=self.pairs.device).view(-1, D)
        heads[:H + G] = heads[:H + G, self.pairs]
        qk_norm = None
        if cfg.qk_norm:
            weight = torch.cat((attention.q_norm.gain.expand(H, D), attention.k_norm.gain.expand(G, D)))[:, self.pairs]
            qk_norm = lambda x: F.rms_norm(x, (D,), None, cfg.norm_eps).mul_(weight)
        fused = lambda modules, order=None: product_of(modules, fuse, self.amp, len(self.prompts) * self.num_samples, order)
        return SimpleNamespace(
            kind=attention.layer_type, window=attention.window, qk_norm=qk_norm,
            qkv=fused([attention.q_proj, attention.k_proj, attention.v_proj], heads.flatten()), out=fused([attention.o_proj]),
            up=fused([mlp.gate_proj, mlp.up_proj] if cfg.gated else [mlp.up_proj]), act=mlp.act, down=fused([mlp.down_proj]),
            norms=[norm_of(module) for name, module in layer.named_children() if name.endswith('layernorm')])

    def start(self):
        """Runs each prompt once, copies its keys and values to its samples -> logits (R, V) after the prompts."""
        model, cfg, device, W = self.model, self.model.config, self.model.device, self.slot
        rows = torch.arange(len(self.prompts), device=device)
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        idx = torch.tensor([prompt + [0] * (W - len(prompt)) for prompt in self.prompts], device=device)
        # with bf16 products the cache is float32, too: so log-probabilities are those of the training forward
        caches = model.new_caches(len(rows), W, self.amp)
        hidden = model.hidden(idx, None, caches)[rows, lengths - 1]     # causal: the padding on the right changes nothing
        empty = W - lengths                                             # slots before each prompt
        source = (torch.arange(W, device=device) - empty[:, None]).clamp_(min=0)                # (N, W)
        repeat = lambda x: x.repeat_interleave(self.num_samples, 0)
        self.caches = []                                                # a layer's keys and values (2, R, G, slots, D)
        for cache in caches:
            self.caches.append(cache.k.new_zeros(2, len(rows) * self.num_samples, cfg.n_kv_head, self.slots, cfg.head_size))
            for part, stored in zip((cache.k[..., self.pairs], cache.v), self.caches[-1]):
                stored[:, :, :W] = repeat(part.gather(2, source[:, None, :, None].expand_as(part)))
        self.position = repeat(lengths)                                                         # (R,), of the next token
        place = torch.arange(self.slots, device=device)
        hidden_slots = (place >= W)[None, None, None]                                           # empty yet
        if empty.any():
            hidden_slots = (hidden_slots | (place < repeat(empty)[:, None, None, None])).expand(-1, cfg.n_kv_head, -1, -1)
        self.mask = torch.zeros(hidden_slots.shape, dtype=caches[0].k.dtype, device=device).masked_fill(hidden_slots, float('-inf'))
        return repeat(model.logits(hidden))

    @property
    def state(self):
        own = [self.position] + [part for cache in self.caches for part in cache]
        return own if len(self.mask) == 1 else own + [self.mask]

    def grow(self, n):
        """More slots for the first n rows, which are all that are left."""
        more = min(max(GROW, self.slots // 8), self.end - self.slots)
        self.views = None                                               # no layer's old cache outlives its new one
        for i, cache in enumerate(self.caches):
            self.caches[i] = F.pad(cache[:, :n], (0, 0, 0, more))
        self.mask = F.pad(self.mask[:n], (0, more), value=float('-inf'))
        self.slots, self.rows = self.slots + more, 0

    def step(self, token):
        """token (n,): the last one of the first n rows -> logits (n, V) of the next."""
        model, cfg, n = self.model, self.model.config, len(token)
        if self.slot == self.slots:
            self.grow(n)
        if n != self.rows:
            views = lambda part: part[:n].view(-1, *part.shape[2:])                             # (n * G, ...)
            self.rows, self.row_mask = n, views(self.mask)
            self.views = [(cache[:, :n], views(cache[0]).transpose(1, 2), views(cache[1])) for cache in self.caches]
        position = self.position[:n]
        x = F.embedding(token, model.embed_tokens.weight)                                       # (n, C)
        if cfg.embed_scale:
            x = x * torch.tensor(cfg.n_embd ** 0.5, dtype=x.dtype)
        if cfg.position == 'learned':
            x = x + F.embedding(position, model.embed_positions.weight)
        turns = {name: turn.index_select(0, position).unsqueeze(1) for name, turn in self.turns.items()}    # (n, 1, D/2)
        self.mask[..., self.slot] = 0
        seen = {}                                                       # window -> first slot, number of slots, their mask
        for window in self.windows:
            begin = max(0, self.slot + 1 - window) if window else 0
            end = self.slot + 1 if begin else self.slots
            seen[window] = begin, end - begin, self.row_mask[..., begin:end]
        for layer, views in zip(self.layers, self.views):
            if cfg.post_norms:
                before, after, before_mlp, after_mlp = layer.norms
                x = x + after(layer.out(self.attend(layer, before(x), views, turns.get(layer.kind), *seen[layer.window])).to(x.dtype))
                x = x + after_mlp(layer.down(self.inner(layer, before_mlp(x))).to(x.dtype))
            else:
                before, before_mlp = layer.norms
                x = layer.out(self.attend(layer, before(x), views, turns.get(layer.kind), *seen[layer.window]), x)
                x = layer.down(self.inner(layer, before_mlp(x)), x)
        position += 1
        self.slot += 1
        return self.logits(self.norm(x))

    def attend(self, layer, x, views, turn, begin, count, mask):
        """x (n, C) -> (n, H * D), before o_proj: attention of a new position to the cached ones.

        views: the cache (2, n, G, slots, D) to write to, its keys (n * G, D, slots) and values (n * G, slots, D) to read."""
        cfg, n, (cache, keys, values) = self.model.config, len(x), views
        H, G, D = cfg.n_head, cfg.n_kv_head, cfg.head_size
        qkv = layer.qkv(x).to(self.wide).view(n, H + 2 * G, D)
        if cfg.qk_norm:
            qkv[:, :H + G] = layer.qk_norm(qkv[:, :H + G])
        if turn is not None:
            torch.view_as_complex(qkv.view(n, H + 2 * G, D // 2, 2))[:, :H + G].mul_(turn)
        q, kv = qkv.split((H, 2 * G), 1)
        cache.select(3, self.slot).copy_(kv.unflatten(1, (2, G)).transpose(0, 1))
        q = q.to(values.dtype).reshape(n * G, H // G, D)                # the heads that share keys are the rows of one product
        keys, values = keys.narrow(2, begin, count), values.narrow(1, begin, count)
        if cfg.attn_softcap:
            scores = cfg.attn_softcap * torch.tanh(torch.bmm(q, keys) * (cfg.attn_scale / cfg.attn_softcap)) + mask
        else:
            scores = torch.baddbmm(mask, q, keys, alpha=cfg.attn_scale)                         # (n * G, H / G, count)
        return torch.bmm(scores.softmax(-1, dtype=self.wide).to(values.dtype), values).view(n, H * D)

    def inner(self, layer, x):
        """x (n, C) -> (n, n_inner), before down_proj."""
        if not self.model.config.gated:
            return layer.act(layer.up(x))
        gate, up = layer.up(x).chunk(2, -1)
        return layer.act(gate) * up


def norm_of(module):
    """A Norm as a function without autograd's bookkeeping."""
    weight, bias, eps, size = module.gain, module.bias, module.eps, module.gain.numel()
    if module.layer_norm:
        return lambda x: F.layer_norm(x, (size,), weight, bias, eps)
    if weight.device.type != 'cpu' or weight.dtype in (torch.bfloat16, torch.float16):
        return lambda x: F.rms_norm(x, (size,), weight, eps)
    eps = torch.tensor(eps, dtype=weight.dtype)

    def rms_norm(x):        # fewer passes than F.rms_norm's on a CPU
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(eps, length, length, value=1 / size).rsqrt_()).mul_(weight)
    return rms_norm


def product_of(modules, fuse, amp, rows, order=None):
    """Linear layers that read the same input, as one function: x (n, K) -> their outputs side by side, in the given order of
    channels, added to `onto` where it is given. Adapters and quantised layers are called as they are."""
    if not fuse or not all(type(module) is Linear for module in modules):
        outputs = lambda x: torch.cat([module(x) for module in modules], -1) if len(modules) > 1 else modules[0](x)
        return lambda x, onto=None: (outputs(x) if order is None else outputs(x)[:, order]) + (0 if onto is None else onto)
    dtype = torch.bfloat16 if modules[0].bf16 else amp or modules[0].weight.dtype
    weight, bias = (None if parts[0] is None else (torch.cat(parts) if len(parts) > 1 else parts[0])
                    for parts in ([module.weight for module in modules], [module.bias for module in modules]))
    return product(weight if order is None else weight[order], bias if order is None or bias is None else bias[order], dtype, rows)


def product(weight, bias, dtype, rows):
    """x (n, K) -> x times weight (N, K) transposed, plus bias, added to `onto` where it is given; n is `rows` at first."""
    own, weight, bias = weight.dtype, weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.device.type == 'cpu' and rows >= PACK_ROWS and own == torch.float32 and hasattr(torch.ops.mkldnn, '_linear_pointwise'):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)      # oneDNN's own layout: made once, not at every product
        linear = lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, 'none', [], '')
    elif bias is None and dtype == own:
        transposed = weight.t()
        return lambda x, onto=None: x @ transposed if onto is None else torch.addmm(onto, x, transposed)
    else:
        linear = lambda x: F.linear(x.to(dtype), weight, bias)
    return lambda x, onto=None: linear(x) if onto is None else onto + linear(x)


class Recomputer:
    """The same three calls for a model without caches: every step runs the whole sequences again."""

    def __init__(self, model, prompts, num_samples, room):
        self.model = model
        lengths = [len(prompt) for prompt in prompts for _ in range(num_samples)]
        self.length = torch.tensor(lengths, device=model.device)
        self.idx = torch.zeros(len(lengths), max(lengths) + room, dtype=torch.long, device=model.device)
        for row, length in enumerate(lengths):
            self.idx[row, :length] = torch.tensor(prompts[row // num_samples])
        self.state = [self.idx, self.length]

    def start(self):
        return self.last_logits(len(self.idx))

    def step(self, token):
        n = len(token)
        self.idx[torch.arange(n, device=token.device), self.length[:n]] = token
        self.length[:n] += 1
        return self.last_logits(n)

    def last_logits(self, n):
        """Right-padded rows under a causal mask: what lies behind a row's end changes nothing before it."""
        length = self.length[:n]
        hidden = self.model.hidden(self.idx[:n, :int(length.max())])
        return self.model.logits(hidden[torch.arange(n, device=length.device), length - 1])
