"""How generate() gets the next token's logits: with a KV cache for our GPT, by plain recomputation for models
without one.

    decoder = make_decoder(model, prompts, num_samples, max_new_tokens)
    logits = decoder.start()        # (R, V) after the prompts, R = prompts * num_samples
    logits = decoder.step(token)    # (n, V): token (n,) was drawn for the first n rows

decoder.state lists tensors with R rows. To take a row out of the batch, copy the last row of each over it and
go on with one row less. Everything here computes what model.hidden and model.logits do, up to rounding:
logp_gap in sample.py measures it.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanoforge import rope
from nanoforge.kernels import Linear, autocast_dtype, concat, dithered
from nanoforge.tensors import cut_by_input, is_sharded, part, part_of_bias

# parameters up to which stacked copies of the weights are made: beyond, memory counts more
FUSE_LIMIT = {'cpu': 2 ** 28, 'cuda': 2 ** 30}
PACK_ROWS = 16              # rows from which a CPU multiplies faster by weights in oneDNN's layout
GROW = {'cpu': 16, 'cuda': 256}     # slots that the cache grows by at least; else by an eighth of what it has


class Samples(NamedTuple):
    """N prompts times num_samples rows, prompt by prompt; L is the longest length. On the model's device."""
    tokens: torch.Tensor        # (R, L) int64, 0 beyond a row's length
    lengths: torch.Tensor       # (R,) int64, the stop token included
    logp: torch.Tensor          # (R, L) float32, 0 beyond a row's length
    stopped: torch.Tensor       # (R,) bool: the last token is a stop token; False where the row was cut off


def make_decoder(model, prompts, num_samples, max_new_tokens):
    """prompts: lists of ids; a model of transformers, which has no layers of ours, is run again for every
    token."""
    cls = NoCacheDecoder
    if hasattr(model, 'layers'):
        layers = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
        is_plain = all(isinstance(layer, Linear) and not is_sharded(layer.weight) for layer in layers)
        cls = GraphDecoder if model.device.type == 'cuda' and is_plain else CachedDecoder
    return cls(model, prompts, num_samples, max_new_tokens)


class CachedDecoder:
    """The forward pass of our GPT for one new token a row, from weights fetched and stacked once.

    At small sizes a step is bound by the number of calls, so what can be done once is not done per step or
    per layer. Prompts are shifted right in the cache so that all end at the same slot: every row writes slot
    `cache_pos` and attends to the slots up to it; one mask hides what lies before a shorter prompt, and the
    slots that are still empty. Keys and values lie in one piece, which grows when it is full, and all of it
    is read: on a CPU that is twice as fast as the filled part of a larger piece. Channels j and j + D/2 of a
    head of q and k, which rotary positions rotate together, are stored side by side: the rotation is then one
    complex product.
    """

    def __init__(self, model, prompts, num_samples, max_new_tokens):
        cfg, device = model.local_config, model.device
        self.cfg, self.model, self.prompts, self.num_samples = cfg, model, prompts, num_samples
        self.acc_dtype = torch.promote_types(model.embed_tokens.weight.dtype, torch.float32)
        self.cache_pos = max(map(len, prompts))
        self.max_slots = self.cache_pos + max_new_tokens
        self.grow_by = GROW.get(device.type, GROW['cpu'])
        self.slots = min(self.max_slots, self.cache_pos + self.grow_by)         # how many there are
        self.view_rows = 0                                         # `views` are of so many rows of the caches
        self.rope_order, self.rope = torch.arange(cfg.head_size, device=device), {}
        if cfg.position == 'rope':
            self.rope_order = self.rope_order.view(2, -1).t().flatten()              # 0, D/2, 1, D/2 + 1, ...
            position = torch.arange(self.max_slots, device=device)
            for layer_type, inv_freq in model.inv_freq.items():
                settings = cfg.rope[layer_type]
                angle = rope.angles(settings, inv_freq, position, position + 1)
                factor = torch.full_like(angle, rope.attention_factor(settings))
                self.rope[layer_type] = torch.polar(factor, angle)                  # (max_slots, D/2) complex

        rows = len(prompts) * num_samples
        small = model.num_params() <= FUSE_LIMIT.get(device.type, FUSE_LIMIT['cpu'])
        self.layers = [DecoderLayer(model, layer, self.rope_order, rows, small) for layer in model.layers]
        self.windows = {layer.window for layer in self.layers}
        self.norm, self.logits = fuse_norm(model.norm), model.logits
        head = model.lm_head.weight_matrix()
        if head.dtype == self.acc_dtype and not cfg.logit_softcap and autocast_dtype(device) is None:
            self.logits = linear_function(head, None, head.dtype, rows if small else 0)  # without conversions

    def start(self):
        """Runs each prompt once, copies its keys and values to its samples -> logits (R, V) after the
        prompts."""
        cfg, device, longest = self.cfg, self.model.device, self.cache_pos
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in self.prompts]
        idx = torch.tensor(padded, device=device)                       # (prompts, longest)
        hidden, keys_values = self.run_prompts(idx, lengths)

        empty = longest - lengths                                       # slots before each prompt
        source = torch.arange(longest, device=device) - empty[:, None]  # (prompts, longest): shifted right
        source = source.clamp_(min=0)[:, None, :, None].expand(-1, cfg.n_kv_head, -1, cfg.head_size)
        R = len(idx) * self.num_samples
        self.caches = []                          # of each layer: keys and values (2, R, n_kv_head, slots, D)
        for k, v in keys_values:
            cache = k.new_zeros(2, R, cfg.n_kv_head, self.slots, cfg.head_size)
            k = k[..., self.rope_order]
            cache[0, :, :, :longest] = self.for_samples(k.gather(2, source))
            cache[1, :, :, :longest] = self.for_samples(v.gather(2, source))
            self.caches.append(cache)
        self.position = self.for_samples(lengths)                                    # (R,), of the next token
        slot = torch.arange(self.slots, device=device)
        hide = (slot >= longest)[None, None, None]                                          # (1, 1, 1, slots)
        if empty.any():
            before = slot < self.for_samples(empty)[:, None, None, None]
            hide = (hide | before).expand(-1, cfg.n_kv_head, -1, -1)                # (R, n_kv_head, 1, slots)
        self.mask = torch.zeros(hide.shape, dtype=keys_values[0][0].dtype, device=device)
        self.mask.masked_fill_(hide, float('-inf'))
        return self.for_samples(self.model.logits(hidden))

    def run_prompts(self, idx, lengths):
        """idx (prompts, longest), their lengths (prompts,) -> hidden states (prompts, C) of the last tokens,
        [(keys, values)] of the layers, (prompts, n_kv_head, longest, D) each."""
        if len(idx) > 1 and any(map(rope.is_dynamic, self.model.config.rope.values())):
            # rotated by the row's length, so that no prompt may be padded
            runs = [self.run_prompts(row[None, :n], n[None]) for row, n in zip(idx, lengths)]
            hidden, caches = zip(*runs)
            longest, keys_values = idx.size(1), []
            for layer in zip(*caches):
                rows = [[F.pad(x, (0, 0, 0, longest - x.size(2))) for x in row] for row in layer]
                keys_values.append([torch.cat(parts) for parts in zip(*rows)])
            return torch.cat(hidden), keys_values
        keys_values = []
        hidden = self.model.hidden(idx, keep_kv=keys_values)    # causal: padding on the right changes nothing
        return hidden[torch.arange(len(idx), device=idx.device), lengths - 1], keys_values

    def for_samples(self, x):
        """x (prompts, ...) -> (R, ...)."""
        return x.repeat_interleave(self.num_samples, 0)

    @property
    def state(self):
        tensors = [self.position]
        for cache in self.caches:
            tensors += [cache[0], cache[1]]
        return tensors if len(self.mask) == 1 else [*tensors, self.mask]

    def grow(self, n):
        """More slots for the first n rows, which are all that are left."""
        more = min(max(self.grow_by, self.slots // 8), self.max_slots - self.slots)
        self.views = None                                          # no layer's old cache outlives its new one
        for i, cache in enumerate(self.caches):
            self.caches[i] = F.pad(cache[:, :n], (0, 0, 0, more))
        self.mask = F.pad(self.mask[:n], (0, more), value=float('-inf'))
        self.slots, self.view_rows = self.slots + more, 0

    def make_views(self, n):
        """What the layers write to and read from while n rows are left."""
        self.view_rows = n
        self.row_mask = self.mask[:n].flatten(0, 1)             # (n * n_kv_head, 1, slots), or 1 for all rows
        self.views = []
        for cache in self.caches:
            keys, values = cache[:, :n].flatten(1, 2)                   # (n * n_kv_head, slots, D) each
            self.views.append((cache[:, :n], keys.transpose(1, 2), values))

    def step(self, token):
        """token (n,): the last one of the first n rows -> logits (n, V) of the next."""
        n = len(token)
        if self.cache_pos == self.slots:
            self.grow(n)
        if n != self.view_rows:
            self.make_views(n)
        logits = self.next_logits(token)
        self.position[:n] += 1
        self.cache_pos += 1
        return logits

    def next_logits(self, token):
        """step() without its bookkeeping."""
        cfg, position = self.cfg, self.position[:len(token)]
        x = self.model.embed(token, position)                                                   # (n, C)
        angles_of = {name: table.index_select(0, position).unsqueeze(1) for name, table in self.rope.items()}
        self.open_slot()
        visible = {window: self.visible_slots(window) for window in self.windows}
        for layer, views in zip(self.layers, self.views):
            angles = angles_of.get(layer.layer_type)
            attended = self.attend(layer, layer.norms[0](x), views, angles, *visible[layer.window])
            if cfg.post_norms:
                _, after_attention, before_mlp, after_mlp = layer.norms
                x = x + after_attention(layer.o_proj(attended).to(x.dtype))
                y = layer.down_proj(layer.inner(before_mlp(x)))
                x = x + after_mlp(y.to(x.dtype))
            else:
                x = layer.o_proj(attended, x)
                x = layer.down_proj(layer.inner(layer.norms[1](x)), x)
        return self.logits(self.norm(x))

    def open_slot(self):
        """From now on the slot of the new tokens is seen."""
        self.mask[..., self.cache_pos] = 0

    def write_slot(self, cache, kv):
        """Puts keys and values (2, n, G, D) of the new tokens into their slot."""
        cache.select(3, self.cache_pos).copy_(kv)

    def visible_slots(self, window):
        """(first slot, number of slots, their mask) that a layer of this window reads."""
        begin = max(0, self.cache_pos + 1 - window) if window else 0
        end = self.cache_pos + 1 if begin else self.slots
        return begin, end - begin, self.row_mask[..., begin:end]

    def attend(self, layer, x, views, rope, begin, count, mask):
        """x (n, C) -> (n, H * D), before o_proj: attention of a new position to the cached ones.

        views: the cache (2, n, G, slots, D) to write to, its keys (n * G, D, slots), its values (n * G,
        slots, D).
        """
        cfg, n, (cache, keys, values) = self.cfg, len(x), views
        H, G, D = cfg.n_head, cfg.n_kv_head, cfg.head_size
        qkv = layer.qkv_proj(x).to(self.acc_dtype).view(n, H + 2 * G, D)
        if cfg.qk_norm:
            normed = F.rms_norm(qkv[:, :H + G], (D,), None, cfg.norm_eps)
            qkv[:, :H + G] = normed.mul_(layer.qk_weight)
        if rope is not None:
            pairs = torch.view_as_complex(qkv.view(n, H + 2 * G, D // 2, 2))
            pairs[:, :H + G].mul_(rope)
        q, kv = qkv.split((H, 2 * G), 1)
        kv = kv.unflatten(1, (2, G)).transpose(0, 1)                    # (2, n, G, D)
        self.write_slot(cache, kv)
        q = q.to(values.dtype).reshape(n * G, H // G, D)   # the heads that share keys are rows of one product
        keys, values = keys.narrow(2, begin, count), values.narrow(1, begin, count)
        if cfg.attn_softcap:
            scores = torch.tanh(torch.bmm(q, keys) * (cfg.attn_scale / cfg.attn_softcap))
            scores = cfg.attn_softcap * scores + mask
        else:
            scores = torch.baddbmm(mask, q, keys, alpha=cfg.attn_scale)                # (n * G, H / G, count)
        p = scores.softmax(-1, dtype=self.acc_dtype).to(values.dtype)
        return torch.bmm(p, values).view(n, H * D)


class GraphDecoder(CachedDecoder):
    """The same on a GPU, where to start kernels one by one takes longer than they run: those of a step are
    recorded once, as a CUDA graph, and started together.

    A graph knows no numbers but those in tensors that stay where they are, so that the slot is one; and it is
    for as many rows and slots as there were. Rows that have ended are computed on until half of them have.
    """

    def __init__(self, model, prompts, num_samples, max_new_tokens):
        super().__init__(model, prompts, num_samples, max_new_tokens)
        device = model.device
        self.slot = torch.tensor([self.cache_pos], device=device)
        self.token = torch.zeros(len(prompts) * num_samples, dtype=torch.long, device=device)
        self.rows, self.graph, self.graph_of = len(self.token), None, None
        self.autocast = autocast_dtype(device)

    def step(self, token):
        n = len(token)
        if self.cache_pos == self.slots:
            self.grow(self.rows)
        if n <= self.rows // 2:
            self.rows = n
        self.token[:n] = token
        if self.graph_of != (self.rows, self.slots):        # which loads what its kernels need, too
            self.make_views(self.rows)
            self.graph, self.graph_of = None, (self.rows, self.slots)
            self.output = self.next_logits(self.token[:self.rows])
        else:
            if self.graph is None:
                self.record()
            self.graph.replay()
        # rows that have ended go past the context's end
        self.position[:self.rows].add_(1).clamp_(max=self.cfg.block_size - 1)
        self.slot += 1
        self.cache_pos += 1
        return self.output[:n]

    def record(self):
        """Records a step of `rows` rows, which leaves its logits in `output`."""
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # what autocast keeps would be the graph's, and gone with it
        uncached = torch.autocast('cuda', self.autocast, self.autocast is not None, cache_enabled=False)
        with torch.cuda.stream(stream), uncached:
            self.graph.capture_begin(capture_error_mode='thread_local')
            self.output = self.next_logits(self.token[:self.rows])
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def open_slot(self):
        self.mask.index_fill_(-1, self.slot, 0)

    def write_slot(self, cache, kv):
        cache.index_copy_(3, self.slot, kv.unsqueeze(3).to(cache.dtype))

    def visible_slots(self, window):
        mask = self.row_mask
        if window:
            place = torch.arange(self.slots, device=mask.device)
            mask = mask.masked_fill(place <= self.slot - window, float('-inf'))
        return 0, self.slots, mask


class DecoderLayer:
    """One Block as functions of the rows of a step, its projections stacked where that makes it faster."""

    def __init__(self, model, layer, rope_order, rows, small):
        cfg, attention, mlp = model.local_config, layer.self_attn, layer.mlp
        self.cfg, self.layer_type, self.act = cfg, attention.layer_type, mlp.act
        self.window = cfg.window(self.layer_type)
        norms = [module for name, module in layer.named_children() if name.endswith('layernorm')]
        self.norms = list(map(fuse_norm, norms))                    # in the order in which they are used
        H, G, D = cfg.n_head, cfg.n_kv_head, cfg.head_size
        if cfg.qk_norm:
            q_weight = attention.q_norm.effective_weight.expand(H, D)
            k_weight = attention.k_norm.effective_weight.expand(G, D)
            self.qk_weight = torch.cat((q_weight, k_weight))[:, rope_order]                     # (H + G, D)
        channels = torch.arange((H + 2 * G) * D, device=model.device).view(-1, D)
        channels[:H + G] = channels[:H + G, rope_order]

        amp = autocast_dtype(model.device)
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        up = (mlp.gate_proj, mlp.up_proj) if cfg.gated else (mlp.up_proj,)
        self.qkv_proj = fuse_linears(qkv, small, amp, rows, channels.flatten())
        self.o_proj = fuse_linears((attention.o_proj,), small, amp, rows)
        self.up_proj = fuse_linears(up, small, amp, rows)
        self.down_proj = fuse_linears((mlp.down_proj,), small, amp, rows)

    def inner(self, x):
        """x (n, C) -> (n, n_inner), before down_proj."""
        if not self.cfg.gated:
            return self.act(self.up_proj(x))
        gate, up = self.up_proj(x).chunk(2, -1)
        return self.act(gate) * up


def fuse_norm(module):
    """A Norm as a function without autograd's bookkeeping."""
    weight, bias, eps, size = module.effective_weight, module.bias, module.eps, module.weight.numel()
    if module.layer_norm:
        def norm(x):
            return F.layer_norm(x, (size,), weight, bias, eps)
    elif weight.device.type != 'cpu' or weight.dtype.itemsize == 2:
        def norm(x):
            return F.rms_norm(x, (size,), weight, eps)
    else:
        eps = torch.tensor(eps, dtype=weight.dtype)

        def norm(x):        # fewer passes than F.rms_norm's on a CPU
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            scale = torch.addcmul(eps, length, length, value=1 / size).rsqrt_()
            return (x * scale).mul_(weight)
    return norm


def fuse_linears(modules, fuse, amp, rows, order=None):
    """Linear layers that read the same input, as one function of x (n, K): their outputs side by side, in the
    given order of channels, added to `residual` where it is given. Adapters and quantised layers are called
    as they are."""
    if fuse and all(type(module) is Linear for module in modules):
        in_bf16 = modules[0].bf16
        rounded = dithered if in_bf16 else torch.Tensor.detach
        weight = concat([rounded(part(module.weight)) for module in modules])
        biases = [rounded(part_of_bias(module.bias)) for module in modules if module.bias is not None]
        bias = concat(biases)
        if order is not None:
            weight, bias = weight[order], None if bias is None else bias[order]
        dtype = torch.bfloat16 if in_bf16 else amp or weight.dtype
        multiply = linear_function(weight, bias, dtype, rows)
        return summed(multiply, modules[0].weight) if cut_by_input(modules[0]) else multiply

    def call(x, residual=None):
        y = concat([module(x) for module in modules], -1)
        y = y if order is None else y[:, order]
        return y if residual is None else residual + y
    return call


def summed(multiply, weight):
    """A product whose outputs are summed over the ranks of tensor parallelism, which hold parts of the
    inputs."""
    group = weight.device_mesh.get_group()

    def multiply_and_sum(x, residual=None):
        y = multiply(x)
        torch.distributed.all_reduce(y, group=group)
        return y if residual is None else residual + y
    return multiply_and_sum


def linear_function(weight, bias, dtype, rows):
    """x (n, K) -> x times weight (N, K) transposed, plus bias, in `dtype`, added to `residual` where it is
    given; n is `rows` at first."""
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    can_pack = dtype in (torch.float32, torch.bfloat16) and weight.device.type == 'cpu'
    can_pack = can_pack and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    if dtype == torch.bfloat16:         # an older processor has no such layout for it
        can_pack = can_pack and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if rows >= PACK_ROWS and can_pack:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)      # oneDNN's own layout: made once

        def multiply(x, residual=None):
            y = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, 'none', [], '')
            return y if residual is None else residual + y
    elif bias is None and dtype.itemsize > 2:       # then x is in this dtype already
        transposed = weight.t()

        def multiply(x, residual=None):
            return x @ transposed if residual is None else torch.addmm(residual, x, transposed)
    else:
        def multiply(x, residual=None):
            y = F.linear(x.to(dtype), weight, bias)
            return y if residual is None else residual + y
    return multiply


class NoCacheDecoder:
    """The same calls for a model without caches: every step runs the whole sequences again."""

    def __init__(self, model, prompts, num_samples, max_new_tokens):
        self.model = model
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        self.length = torch.tensor([len(row) for row in rows], device=model.device)
        width = max(map(len, rows)) + max_new_tokens
        self.idx = torch.zeros(len(rows), width, dtype=torch.long, device=model.device)
        for row, prompt in enumerate(rows):
            self.idx[row, :len(prompt)] = torch.tensor(prompt)
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
