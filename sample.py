"""Talk to a model: the one sampler of the project, and the command around it.

    python sample.py out --prompt='Once upon a time' --num_samples=3
    python sample.py gpt2 --prompt=FILE:story.txt --top_p=0.9
    python sample.py tiny --chat

DIR_OR_NAME is any model directory (what the training scripts wrote, a checkpoint in it such as out/best, anything in Hugging
Face's format), a name on the hub, or `tiny`. In Python: generate(model, prompts, max_new_tokens, ...).
"""
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

from configurator import UserError, parse, run, setting


@dataclass
class Config:
    model: str = setting('tiny', positional=True)   # directory, hub name, or `tiny` (the embedded model)
    prompt: str = ''                # text, FILE:path, or - for standard input; empty: the token that begins a text
    num_samples: int = 1            # continuations of the prompt (nanoGPT draws 10; one that streams is what most look at)
    max_new_tokens: int = 500       # of each sample; where the model's context is full, its last half is carried on
    temperature: float = 0.8        # 0: always the likeliest token
    top_k: int = 200                # only the k likeliest tokens; 0 = all
    top_p: float = 1.0              # only the likeliest tokens that together have this probability; 1 = all
    repetition_penalty: float = 1.0     # above 1: tokens that were there already become less likely; 1 = off
    seed: int = 1337                # the same seed draws the same samples
    device: str = setting('auto', choices=('auto', 'cpu', 'cuda', 'mps'))  # auto: cuda, else mps, else cpu
    dtype: str = setting('auto', choices=('auto', 'float32', 'bfloat16', 'float16'))    # auto: bfloat16 on cuda, else float32
    stream: bool = True             # print tokens as they are drawn
    chat: bool = False              # a conversation, for models with a chat template

    def check(self):
        check_settings(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.num_samples)
        if self.chat and (self.prompt or self.num_samples != 1):
            raise UserError('--chat asks for its prompts itself and draws one answer: leave out --prompt and --num_samples')


def check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_samples):
    """UserError where a setting of generate has no meaning."""
    for name, value, fits, meant in (
            ('max_new_tokens', max_new_tokens, max_new_tokens >= 1, 'at least 1'),
            ('temperature', temperature, temperature >= 0, '0 (greedy) or above'),
            ('top_k', top_k, not top_k or top_k >= 1, 'at least 1, or 0 for all tokens'),
            ('top_p', top_p, top_p is None or 0 < top_p <= 1, 'above 0 and at most 1'),
            ('repetition_penalty', repetition_penalty, repetition_penalty > 0, 'above 0 (1 = off)'),
            ('num_samples', num_samples, num_samples >= 1, 'at least 1')):
        if not fits:
            raise UserError(f'{name}={value}: must be {meant}')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported

import numpy as np
import torch
import torch.nn.functional as F

from model import Linear, load_model

FUSE_LIMIT = 2 ** 28        # parameters up to which stacked copies of the weights are made: beyond, memory counts more


class Samples(NamedTuple):
    """N prompts times num_samples rows, prompt by prompt; L is the longest length. On the model's device.

    tokens (R, L) int64, 0 beyond a row's length;  lengths (R,) int64, the stop token included;  logp (R, L) float32, 0 beyond;
    stopped (R,) bool: True where the last token is a stop token, False where the row was cut off.
    """
    tokens: torch.Tensor
    lengths: torch.Tensor
    logp: torch.Tensor
    stopped: torch.Tensor


def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, stop_ids=(),
             num_samples=1, seed=0, on_token=None):
    """Draws `num_samples` continuations of each prompt (a list of id lists of any lengths) -> Samples.

    Token t of sample s of prompt i is the inverse CDF at a uniform number that depends on (seed, i, s, t) alone, so a sample does
    not depend on its neighbours in the batch beyond rounding. temperature 0 takes the likeliest token.

    logp is that of the distribution the token was drawn from: logits with the repetition penalty, divided by the temperature,
    and, where top_k or top_p is on, of the tokens these leave, renormalised. With both off it is the full softmax's, as
    model.token_stats(..., temperature) gives in training. At temperature 0 it is the softmax's at temperature 1.

    repetition_penalty (Keskar et al. 2019, section 4.1) counts the prompt's tokens too. A row ends with a token of stop_ids, after
    max_new_tokens, or where the model's context is full. on_token(row, token) is called for every token as it is drawn.
    UserError: an empty prompt, one that fills the context, ids outside the vocabulary, a setting without meaning.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_samples)
    prompts = [list(prompt) for prompt in prompts]
    context, vocabulary = model.config.block_size, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f'prompt {i} is empty: a model needs at least one token to go on from')
        if len(prompt) >= context:
            raise UserError(f'prompt {i} has {len(prompt)} tokens and leaves no room in the model\'s context of {context}')
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UserError(f'prompt {i} has the id {max(prompt)}, but the model\'s vocabulary has {vocabulary}: another tokenizer?')
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts for _ in range(num_samples)]
    R, T, device, stop_ids = len(limits), max(limits, default=0), model.device, frozenset(stop_ids)
    tokens = torch.zeros(R, T, dtype=torch.long, device=device)
    logp = torch.zeros(R, T, device=device)
    lengths, stopped = [0] * R, [False] * R
    uniforms = uniform_numbers(seed, len(prompts), num_samples, T).to(device)                   # (T, R)
    seen = None
    if repetition_penalty != 1.0:
        seen = torch.zeros(R, vocabulary, dtype=torch.bool, device=device)
        for row in range(R):
            seen[row, prompts[row // num_samples]] = True

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            decoder = (Decoder if hasattr(model, 'new_caches') else Recomputer)(model, prompts, num_samples, T)
            logits = decoder.start() if R else None                                             # (R, V)
            rows = list(range(R))                       # rows[b]: the row of Samples that row b of the batch draws
            where = torch.arange(R, device=device)      # the same
            for t in range(T):
                n = len(rows)
                token, token_logp = draw(logits, uniforms[t, :n], temperature, top_k, top_p, repetition_penalty,
                                         None if seen is None else seen[:n])
                tokens[where[:n], t], logp[where[:n], t] = token, token_logp
                if seen is not None:
                    seen[:n].scatter_(1, token[:, None], True)
                drawn = token.tolist()
                if on_token:
                    for row, b in sorted(zip(rows, range(n))):
                        on_token(row, drawn[b])
                for b in reversed(range(n)):            # a row that is done leaves; the last of the batch takes its place
                    row = rows[b]
                    stopped[row] = drawn[b] in stop_ids
                    if stopped[row] or t + 1 == limits[row]:
                        lengths[row], last = t + 1, len(rows) - 1
                        if b != last:
                            rows[b] = rows[last]
                            for state in (token, where, uniforms.t(), seen, *decoder.state):
                                if state is not None:
                                    state[b] = state[last]
                        rows.pop()
                if not rows:
                    break
                logits = decoder.step(token[:len(rows)])
    finally:
        model.train(training)
    L = max(lengths, default=0)
    if not torch.isfinite(logp).all():
        raise UserError('the model\'s logits are not finite: its weights hold NaN or infinity, or its dtype overflows')
    return Samples(tokens[:, :L], torch.tensor(lengths, device=device), logp[:, :L], torch.tensor(stopped, device=device))


def uniform_numbers(seed, prompts, num_samples, length):
    """(length, prompts * num_samples) float32 in [0, 1): Philox (Salmon et al. 2011) keyed by the seed, its counter beginning at
    (prompt, sample), so that every number depends on seed, prompt, sample and position alone."""
    u = np.empty((length, prompts * num_samples), dtype=np.float32)
    for row in range(prompts * num_samples):
        counter = [0, 0, row % num_samples, row // num_samples]
        u[:, row] = np.random.Generator(np.random.Philox(key=seed % 2 ** 64, counter=counter)).random(length, dtype=np.float32)
    return torch.from_numpy(u)


def draw(logits, uniform, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, seen=None):
    """logits (R, V) float32, uniform (R,), seen (R, V) bool -> token (R,), its log-probability (R,) as described in generate."""
    if repetition_penalty != 1.0:
        penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        return token[:, 0], (logits.gather(1, token) - logits.logsumexp(-1, keepdim=True))[:, 0]
    if temperature != 1.0:
        logits = logits / temperature
    p = truncate(logits, top_k, top_p).softmax(-1)
    cdf = p.cumsum(-1)
    # the first token whose cdf is above u * total: never one of probability 0
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp_(max=logits.size(1) - 1)
    return token[:, 0], p.gather(1, token).log()[:, 0]


def truncate(logits, top_k=None, top_p=None):
    """logits (R, V) with -inf for all but the top_k largest, and of these for all but the fewest that hold at least top_p of the
    probability (Holtzman et al. 2020, section 3.1). Ties at the edge stay."""
    V = logits.size(1)
    top_k = min(top_k or V, V)
    nucleus = top_p is not None and top_p < 1
    if top_k == V and not nucleus:
        return logits
    largest = logits.topk(top_k).values                                                         # (R, k), descending
    edge = largest[:, -1:]
    if nucleus:
        before = largest.softmax(-1).cumsum(-1)
        edge = largest.gather(1, (before < top_p).sum(-1, keepdim=True).clamp_(max=top_k - 1))
    return logits.masked_fill(logits < edge, float('-inf'))


class Decoder:
    """The forward pass of our GPT one token at a time, over a static KV cache.

    A row's prompt ends at the same slot in every row (it is shifted right in the cache), so all rows write the slot `self.slot`,
    attend to the slots up to it, and one mask made at the start hides what lies before a shorter prompt. Weights that read the
    same input are stacked once; adapters and quantised layers are called as they are.
    """

    def __init__(self, model, prompts, num_samples, room):
        cfg = self.cfg = model.config
        self.model, self.prompts, self.num_samples = model, prompts, num_samples
        kind, device = model.device.type, model.device
        self.amp = torch.get_autocast_dtype(kind) if kind != 'cpu' and torch.is_autocast_enabled(kind) else None
        self.layers = [self.prepare(layer) for layer in model.layers]
        self.norm = norm_of(model.norm)
        self.width = max(len(prompt) for prompt in prompts)
        self.slots = self.width + room
        positions = torch.arange(self.slots, device=device)
        self.angles = {}
        if cfg.position == 'rope':
            for name in set(cfg.layer_types):
                inv_freq, factor = model.inv_freq(name), 1.0
                angle = positions[:, None].float() * inv_freq.to(device)                        # (slots, D/2)
                cos, sin = angle.cos() * factor, angle.sin() * factor
                self.angles[name] = torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)         # (slots, D)

    def prepare(self, layer):
        """What one layer does, as functions over weights that were fetched and stacked once."""
        attention, mlp, amp = layer.self_attn, layer.mlp, self.amp
        fuse = self.model.num_params() <= FUSE_LIMIT
        gates = [mlp.gate_proj] if self.cfg.gated else []
        return dict(
            norms=[norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)] + (
                [norm_of(layer.pre_feedforward_layernorm), norm_of(layer.post_feedforward_layernorm)] if layer.post_norms else []),
            qkv=product_of([attention.q_proj, attention.k_proj, attention.v_proj], fuse, amp),
            out=product_of([attention.o_proj], fuse, amp), up=product_of([*gates, mlp.up_proj], fuse, amp),
            down=product_of([mlp.down_proj], fuse, amp), act=mlp.act,
            qk_norm=[norm_of(attention.q_norm), norm_of(attention.k_norm)] if self.cfg.qk_norm else None,
            window=attention.window, kind=attention.layer_type)

    def start(self):
        """Computes each prompt once, copies its keys and values to its samples -> logits (R, V) after the prompts."""
        model, cfg, device = self.model, self.cfg, self.model.device
        N, W = len(self.prompts), self.width
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        idx = torch.zeros(N, W, dtype=torch.long)
        for i, prompt in enumerate(self.prompts):
            idx[i, :len(prompt)] = torch.tensor(prompt)
        caches = model.new_caches(N, W, self.amp)
        hidden = model.hidden(idx.to(device), None, caches)                                     # right-padded, causal
        hidden = hidden[torch.arange(N, device=device), lengths - 1]                            # (N, C)
        shift = W - lengths                                                                     # empty slots before each prompt
        source = (torch.arange(W, device=device) - shift[:, None]).clamp_(min=0)[:, None, :, None]      # (N, 1, W, 1)
        self.keys, self.values = [], []
        for cache in caches:
            for part, store in ((cache.k, self.keys), (cache.v, self.values)):
                shifted = part.gather(2, source.expand_as(part))
                whole = part.new_empty(N * self.num_samples, cfg.n_kv_head, self.slots, cfg.head_size)
                whole[:, :, :W] = shifted.repeat_interleave(self.num_samples, 0)
                store.append(whole)
        shift = shift.repeat_interleave(self.num_samples)
        self.position = W - shift                                                               # (R,) of the next token
        self.hidden = None
        if shift.any():     # (R, 1, 1, slots), added to scores
            self.hidden = torch.zeros(len(shift), 1, 1, self.slots, device=device)
            self.hidden.masked_fill_(torch.arange(self.slots, device=device) < shift[:, None, None, None], float('-inf'))
        self.slot = W
        self.state = [self.position, *self.keys, *self.values] + ([] if self.hidden is None else [self.hidden])
        return model.logits(hidden).repeat_interleave(self.num_samples, 0)

    def step(self, token):
        """token (n,), the last drawn of the first n rows of the state -> logits (n, V) of the next."""
        cfg, model, n = self.cfg, self.model, len(token)
        position = self.position[:n]
        x = F.embedding(token, model.embed_tokens.weight)                                       # (n, C)
        if cfg.embed_scale != 1.0:
            x = x * torch.tensor(cfg.embed_scale, dtype=x.dtype)
        if cfg.position == 'learned':
            x = x + F.embedding(position, model.embed_positions.weight)
        angles = {name: (cos[position][:, None], sin[position][:, None]) for name, (cos, sin) in self.angles.items()}
        for i, layer in enumerate(self.layers):
            norms = layer['norms']
            y = layer['out'](self.attend(i, layer, norms[0](x), angles.get(layer['kind'])))
            if cfg.post_norms:
                x = x + norms[1](y.to(x.dtype))
                x = x + norms[3](self.mlp(layer, norms[2](x)).to(x.dtype))
            else:
                x = x + y
                x = x + self.mlp(layer, norms[1](x))
        self.position[:n] += 1
        self.slot += 1
        return model.logits(self.norm(x))

    def attend(self, i, layer, x, angles):
        """x (n, C) -> (n, H * D): attention of one new position to the cached ones."""
        cfg, n, slot = self.cfg, len(x), self.slot
        H, G, D = cfg.n_head, cfg.n_kv_head, cfg.head_size
        qkv = layer['qkv'](x).view(n, H + 2 * G, D)
        if x.device.type == 'cpu':
            qkv = qkv.to(x.dtype)
        qk, v = qkv[:, :H + G], qkv[:, H + G:]
        if layer['qk_norm']:
            q_norm, k_norm = layer['qk_norm']
            qk = torch.cat((q_norm(qk[:, :H]), k_norm(qk[:, H:])), 1)
        if angles:
            cos, sin = (a.to(qk.dtype) for a in angles)
            qk = qk * cos + qk.roll(D // 2, -1) * sin       # (a, b) -> (a cos - b sin, b cos + a sin)
        keys, values = self.keys[i][:n], self.values[i][:n]                                     # (n, G, slots, D)
        keys[:, :, slot], values[:, :, slot] = qk[:, H:], v
        seen = slice(max(0, slot + 1 - layer['window']) if layer['window'] else 0, slot + 1)
        q = (qk[:, :H].to(keys.dtype) * cfg.attn_scale).view(n * G, H // G, D)
        scores = q @ keys.view(n * G, self.slots, D)[:, seen].transpose(1, 2)                   # (n * G, H / G, seen)
        if cfg.attn_softcap:
            scores = cfg.attn_softcap * torch.tanh(scores / cfg.attn_softcap)
        if self.hidden is not None:
            scores = (scores.view(n, G, H // G, -1) + self.hidden[:n, ..., seen]).view(scores.shape)
        p = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return (p @ values.view(n * G, self.slots, D)[:, seen]).view(n, H * D)

    def mlp(self, layer, x):
        up = layer['up'](x)
        if self.cfg.gated:
            gate, up = up.chunk(2, -1)
            return layer['down'](layer['act'](gate) * up)
        return layer['down'](layer['act'](up))


def norm_of(module):
    """A Norm as a function without autograd's bookkeeping."""
    weight, bias, eps = module.weight, module.bias, module.eps
    if module.layer_norm:
        return lambda x: F.layer_norm(x, weight.shape, weight, bias, eps)
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def product_of(modules, fuse, amp):
    """Linear layers that read the same input, as one function x -> their outputs side by side."""
    if not all(type(module) is Linear for module in modules) or not fuse:
        return modules[0] if len(modules) == 1 else lambda x: torch.cat([module(x) for module in modules], -1)
    dtype = torch.bfloat16 if modules[0].bf16 else amp or modules[0].weight.dtype
    weight = torch.cat([module.weight for module in modules]).to(dtype) if len(modules) > 1 else modules[0].weight.to(dtype)
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules]).to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


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


def logp_gap(model, prompts, samples, temperature=1.0):
    """(max, mean) of |log-probability as sampled - that of the training forward| over all tokens that generate(model, prompts, ...)
    drew at this temperature without top_k, top_p and penalty: rounding, if sampler and training compute the same model."""
    num_samples = len(samples.tokens) // len(prompts)
    lengths = samples.lengths.tolist()
    rows = [list(prompts[r // num_samples]) + samples.tokens[r, :n].tolist() for r, n in enumerate(lengths)]
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    targets = torch.full_like(idx, -1)
    for r, (row, n) in enumerate(zip(rows, lengths)):
        idx[r, :len(row)] = torch.tensor(row)
        targets[r, len(row) - n - 1:len(row) - 1] = idx[r, len(row) - n:len(row)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            idx, targets = idx[:, :-1].to(model.device), targets[:, :-1].to(model.device)
            trained = model.token_stats(model.hidden(idx), targets, temperature)['logp']
    finally:
        model.train(training)
    drawn = torch.arange(samples.logp.size(1), device=model.device) < samples.lengths[:, None]
    gap = (trained[targets >= 0] - samples.logp[drawn]).abs()
    return gap.max().item(), gap.mean().item()


# ---- the command ------------------------------------------------------------------------------------------------------------

def generate_long(model, prompt, max_new_tokens, num_samples=1, seed=0, on_token=None, **settings):
    """generate() for one prompt, past the end of the context: rows that it cuts off go on from the last half of their context.
    Returns a list of id lists; of a prompt longer than the context only the end is seen."""
    context, rows, alive = model.config.block_size, [[] for _ in range(num_samples)], list(range(num_samples))
    prompt = prompt if len(prompt) < context else prompt[-max(1, context // 2):]
    samples = generate(model, [prompt], max_new_tokens, num_samples=num_samples, seed=seed, on_token=on_token, **settings)
    while True:
        for b, row in enumerate(alive):
            rows[row] += samples.tokens[b, :samples.lengths[b]].tolist()
        alive = [row for b, row in enumerate(alive) if not samples.stopped[b] and len(rows[row]) < max_new_tokens]
        if not alive:
            return rows
        done, seed = len(rows[alive[0]]), seed + 2 ** 32
        samples = generate(model, [(prompt + rows[row])[-max(1, context // 2):] for row in alive], max_new_tokens - done, seed=seed,
                           on_token=on_token and (lambda b, token: on_token(alive[b], token)), **settings)


class Printer:
    """Prints rows of tokens one after the other while they are drawn together: those of later rows wait for their turn, and so
    do bytes that are not yet a whole character."""

    def __init__(self, tokenizer, prompt, num_samples=1):
        self.tokenizer, self.current = tokenizer, 0
        self.ids = [list(prompt) for _ in range(num_samples)]
        self.from_, self.until = 0, len(prompt)     # of the current row: decoding begins here; printed up to there

    def add(self, row, token):
        self.ids[row].append(token)
        if row == self.current:
            self.show()

    def show(self, end=False):
        # Decoded together with what was printed last, as some tokenizers treat the first word of a text differently.
        ids = self.ids[self.current]
        decode = lambda part: self.tokenizer.decode(part, skip_special_tokens=True)
        before, text = decode(ids[self.from_:self.until]), decode(ids[self.from_:])
        if end or not text.endswith('\ufffd'):
            print(text[len(before):], end='', flush=True)
            self.from_, self.until = self.until, len(ids)
