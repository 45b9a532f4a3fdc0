"""The few operations for which torch's own form is slow or large, each beside its plain meaning.

Everything here computes what its docstring says, in float32 unless `bf16` is asked for, and is checked against the
plain formula in tests/test_ops.py. On a GPU torch's own kernels are used (model.py chooses).
"""
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def linear(x, weights, biases=(), bf16=False):
    """x (..., K) times the stacked `weights`, each (N_i, K) -> (..., sum of N_i).

    bf16: both factors are rounded to bfloat16 and multiplied with float32 sums (twice the speed where the processor has
    it); the result stays bfloat16, gradients reach the float32 weights as float32.
    """
    weight = torch.cat([w.bfloat16() if bf16 else w for w in weights]) if len(weights) > 1 else weights[0]
    bias = torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None
    if not bf16:
        return F.linear(x, weight, bias)
    return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4)."""
    if x.dtype != weight.dtype or x.dtype.itemsize == 2 and x.device.type == 'cpu':         # rounded once, at the end
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
    return RMSNorm.apply(x, weight, eps) if x.device.type == 'cpu' else F.rms_norm(x, x.shape[-1:], weight, eps)


def _rms_forward(x, weight, eps):
    scale = torch.linalg.vecdot(x, x).div_(x.size(-1)).add_(eps).rsqrt_().unsqueeze(-1)     # (..., 1)
    return (x * scale).mul_(weight), scale


def _rms_backward(grad, x, scale, weight):
    # Layer norm's fused backward with mean 0 differs from RMS norm's only by the term that it subtracts for the mean.
    zero = torch.zeros_like(scale)
    dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, [x.size(-1)], zero, scale, weight, None, [True, True, False])
    return dx.add_((grad @ weight).div_(x.size(-1)).unsqueeze(-1).mul_(scale)), dweight


class RMSNorm(torch.autograd.Function):
    """rms_norm with one fused backward (torch composes it of a dozen passes on a CPU)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()          # the fused backward reads x and scale as rows
        out, scale = _rms_forward(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, weight = ctx.saved_tensors
        return *_rms_backward(grad.contiguous(), x, scale, weight), None


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, eq. 34) on halves, as Llama has them: x (..., T, D), cos and sin (..., T,
    D/2)."""
    return Rotate.apply(x, cos, sin)


def _rotate(x, cos, sin, out):
    a, b = x.chunk(2, -1)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out


class Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos.to(x.dtype), sin.to(x.dtype), torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos.to(grad.dtype), -sin.to(grad.dtype), torch.empty_like(grad)), None, None


@functools.lru_cache(maxsize=16)
def future(T, dtype):
    """(T, T), -inf where the key comes after the query: what is added to scores."""
    return torch.full((T, T), float('-inf'), dtype=dtype).triu_(1)


class ShortAttention(torch.autograd.Function):
    """QK norm, rotary positions and causal attention of a short block on a CPU, as one node of batched products.

    qkv (B, T, 3 * H * D), heads of q, then of k, then of v -> (B, T, H * D). Below about two hundred positions the
    batched products beat torch's blockwise attention, whose backward is slow on a CPU, and one node saves a dozen
    copies a layer. q_weight, k_weight (D,) or None: RMS norm of each head; cos, sin (T, D/2) or (B, 1, T, D/2) or None:
    rotary positions; mask (T, T) or (B * H, T, T): what is added to scores, as `future`.
    Products run in the dtype of qkv; norm, rotation and softmax in float32.
    """

    @staticmethod
    def forward(ctx, qkv, n_head, scale, q_weight, k_weight, eps, cos, sin, mask):
        B, T, C = qkv.shape
        H, D = n_head, C // n_head // 3
        split = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)              # (3, B, H, T, D)
        norms, x = None, split
        if q_weight is not None or cos is not None:                         # at least float32 for norm and rotation
            qk = raw = split[:2].to(torch.promote_types(qkv.dtype, torch.float32), memory_format=torch.contiguous_format)
            if q_weight is not None:
                qk, rms = _rms_forward(raw, torch.stack((q_weight, k_weight)).view(2, 1, 1, 1, D), eps)
                norms = raw, rms
            if cos is not None:
                qk = _rotate(qk, cos, sin, torch.empty_like(qk))
            x = torch.empty(3, B, H, T, D, dtype=qkv.dtype)
            x[:2].copy_(qk)
            x[2].copy_(split[2])
        x = x.reshape(3, B * H, T, D)
        q, k, v = x.unbind(0)                                               # (B * H, T, D) each
        p = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)        # (B * H, T, T)
        ctx.save_for_backward(x, p, q_weight, k_weight, cos, sin, *(norms or ()))
        ctx.sizes, ctx.scale = (B, T, H, D), scale
        return torch.bmm(p, v).view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, p, q_weight, k_weight, cos, sin, *norms = ctx.saved_tensors
        (B, T, H, D), (q, k, v) = ctx.sizes, x.unbind(0)
        grad = grad.view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        dx = torch.empty_like(x)
        torch.bmm(p.transpose(1, 2), grad, out=dx[2])
        dscores = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
        torch.baddbmm(dx[0], dscores, k, beta=0, alpha=ctx.scale, out=dx[0])
        torch.baddbmm(dx[1], dscores.transpose(1, 2), q, beta=0, alpha=ctx.scale, out=dx[1])
        out = torch.empty(B, T, 3, H, D, dtype=grad.dtype)
        split, dx = out.permute(2, 0, 3, 1, 4), dx.view(3, B, H, T, D)
        dq_weight = dk_weight = None
        if q_weight is None and cos is None:
            split.copy_(dx)
        else:
            dqk = dx[:2].to(torch.promote_types(dx.dtype, torch.float32))
            if cos is not None:
                dqk = _rotate(dqk, cos, -sin, torch.empty_like(dqk))
            if norms:
                raw, rms = norms
                dq, dq_weight = _rms_backward(dqk[0], raw[0], rms[0], q_weight)
                dk, dk_weight = _rms_backward(dqk[1], raw[1], rms[1], k_weight)
                dqk = (dq, dk)
            split[0].copy_(dqk[0])
            split[1].copy_(dqk[1])
            split[2].copy_(dx[2])
        return out.view(B, T, 3 * H * D), None, None, dq_weight, dk_weight, None, None, None, None


def pick(x, places):
    """x (..., C), places (M,) in the rows laid end to end -> (M, C)."""
    return F.embedding(places, x.flatten(0, -2))        # whose backward is quicker than indexing's


def document_lengths(positions):
    """positions (B, T), where each 0 begins a packed document, as a row does -> lengths of all documents, row after
    row."""
    begins = positions == 0
    begins[:, 0] = True
    begins = begins.flatten().nonzero().squeeze(1)
    return begins.diff(append=begins.new_tensor([positions.numel()]))


def visible(positions, window=0):
    """positions (..., T) of packed rows -> (..., T, T) bool, True where a query (row) sees a key (column).

    Each 0 begins a document. A jump back to p > 0 begins another branch of it, which sees the first p positions of the
    document and itself, not the branches beside it: one prompt with several completions, its keys computed once.
    window: only keys fewer than so many positions back; 0 = all.
    """
    place = torch.arange(positions.size(-1), device=positions.device)
    jump = F.pad(positions[..., 1:] != positions[..., :-1] + 1, (1, 0), value=True)
    branch, document = jump.cumsum(-1), (positions == 0).cumsum(-1)                                     # (..., T)
    start = positions.gather(-1, torch.where(jump, place, 0).cummax(-1).values)     # where the branch of each begins
    trunk = (start[..., None, :] == 0) & (positions[..., None, :] < start[..., :, None])
    seen = (branch[..., :, None] == branch[..., None, :]) | (document[..., :, None] == document[..., None, :]) & trunk
    seen &= place[:, None] >= place
    if window:
        seen &= positions[..., :, None] - positions[..., None, :] < window
    return seen


def continuations(positions):
    """positions (B, T) of packed rows -> [(begin, shared, at, end)], places in the rows laid end to end: the tokens
    at..end follow the first `shared` of the document that begins at `begin`; shared is 0 for the document itself."""
    begins = [0, *(document_lengths(positions).cumsum(0).tolist())]
    places = positions.flatten().tolist()
    spans = []
    for begin, stop in zip(begins, begins[1:]):
        cuts = [begin, *(i for i in range(begin + 1, stop) if places[i] != places[i - 1] + 1), stop]
        spans += [(begin, places[at] if at > begin else 0, at, end) for at, end in zip(cuts, cuts[1:])]
    return spans


SPAN = 16           # spans whose lengths differ by less are computed side by side,
SCORES = 2 ** 18    # up to so many scores at a time, which stay in cache


class Spans:
    """Packed rows (see `visible`) for SpanAttention: each prompt, continuation and plain document is a span, which attends to the tokens
    that it continues and to itself; spans of about the same lengths are a batch, padded to the longest of them.

    The heads of queries, keys and values are rows of a table, head after head, N tokens each; behind them a row of zeros, for padding.
    """

    def __init__(self, positions, spans, heads, groups):
        """positions (B, T), spans: their `continuations`; `heads` of queries, `groups` of keys and of values."""
        self.sizes = N, H, G = positions.numel(), heads, groups
        none, flat = (H + 2 * G) * N, torch.cat((positions.flatten(), positions.new_tensor([2 ** 30])))
        of_heads = lambda first, count, place: torch.where(place < N, torch.arange(first, first + count).view(-1, 1, 1) * N + place, none)
        self.batches, self.masks = [], {}
        for part in self.alike(spans, SCORES // H):
            begin, shared, at, end = torch.tensor(part).t()[:, :, None]                             # (n, 1) each
            run = lambda start, count: torch.where((step := torch.arange(int(count.max()))) < count, start + step, N)     # (n, longest)
            query = run(at, end - at)                                                               # (n, Q); N where padded
            key = torch.cat((run(begin, shared), query), 1)                                         # (n, K)
            q = of_heads(0, H, query).view(G, H // G, *query.shape).transpose(1, 2).flatten()       # heads that share keys: one product
            rows = torch.cat((q, of_heads(H, G, key).flatten(), of_heads(H + G, G, key).flatten()))
            grads = torch.where(q < none, q % N * H + q // N, H * N)                                # the same rows of (N, H)
            self.batches.append((query.size(1), key.size(1), rows, grads, flat[query][:, :, None], flat[key][:, None]))
        rows, outputs = (torch.cat(parts) for parts in zip(*((rows, rows[:len(grads)]) for _, _, rows, grads, _, _ in self.batches)))
        place = torch.empty(none + 1, dtype=torch.long)
        place[outputs] = torch.arange(len(outputs))
        self.outputs = place[:H * N].view(H, N).t().flatten()                                       # of (N, H), in the batches' outputs
        counts = torch.bincount(rows, minlength=none + 1)[:none]
        self.sources = rows.argsort(stable=True)[:int(counts.sum())]        # of each row of the table: its copies in the batches,
        self.begins = counts.cumsum(0) - counts                             # from here on

    @staticmethod
    def alike(spans, limit):
        """[(begin, shared, at, end)] of `continuations` -> batches of them, each of at most `limit` scores if it can; a prompt
        becomes a span of its own."""
        prompts, kinds = {}, {}
        for begin, shared, _, _ in spans:
            prompts[begin] = max(prompts.get(begin, 0), shared)
        for begin, shared, at, end in spans:
            middle = begin + prompts[begin] if at == begin and prompts[begin] < end - at else at
            for span in ((begin, 0, at, middle), (begin, shared or middle - at, middle, end)):
                if span[2] < span[3]:
                    kinds.setdefault((-(-span[1] // SPAN), -(-(span[3] - span[2]) // SPAN)), []).append(span)
        for (few, many), members in kinds.items():
            size = max(1, limit // (many * (few + many) * SPAN ** 2))
            yield from (members[i:i + size] for i in range(0, len(members), size))

    def added(self, window, dtype):
        """For each batch (n, 1, Q, K): what is added to its scores; a padded query sees padding alone."""
        if (window, dtype) not in self.masks:
            seen = lambda query, key: (key <= query) & (query - key < window) if window else key <= query
            self.masks[window, dtype] = [torch.zeros((), dtype=dtype).masked_fill(~seen(query, key), float('-inf')).unsqueeze(1)
                                         for *_, query, key in self.batches]
        return self.masks[window, dtype]


class SpanAttention(torch.autograd.Function):
    """QK norm, rotary positions and attention of packed rows of short documents on a CPU, as one node of batched products.

    qkv (B, T, (H + 2 G) * D), heads of q, then of k, then of v -> (B, T, H * D); the rest as in ShortAttention, with cos, sin
    (1 or B, 1, T, D/2) and the Spans of the rows. At least float32 throughout: products this small are no faster in bf16.
    """

    @staticmethod
    def forward(ctx, qkv, spans, window, scale, q_weight, k_weight, eps, cos, sin):
        (B, T, C), (N, H, G) = qkv.shape, spans.sizes
        D, wide = C // (H + 2 * G), torch.promote_types(qkv.dtype, torch.float32)
        raw = qkv.view(N, H + 2 * G, D).to(wide).transpose(0, 1)                                    # (H + 2 G, N, D)
        x, norms, qk = raw.new_empty((H + 2 * G) * N + 1, D), (), raw[:H + G]
        x[-1] = 0
        heads = x[:-1].view(H + 2 * G, N, D)
        if q_weight is not None:
            raw = qk.contiguous()
            qk, rms = _rms_forward(raw, torch.cat((q_weight.expand(H, 1, D), k_weight.expand(G, 1, D))), eps)
            norms = raw, rms
        if cos is not None:
            cos, sin = (angle.expand(B, 1, T, D // 2).reshape(N, D // 2) for angle in (cos, sin))
            _rotate(qk, cos, sin, heads[:H + G])
        else:
            heads[:H + G].copy_(qk)
        heads[H + G:].copy_(qkv.view(N, H + 2 * G, D).transpose(0, 1)[H + G:])
        saved, outputs = [], []
        for (Q, K, rows, grads, *_), mask in zip(spans.batches, spans.added(window, wide)):
            q, k, v = x.index_select(0, rows).split([len(grads), *[(len(rows) - len(grads)) // 2] * 2])
            k, v = k.view(-1, K, D), v.view(-1, K, D)                                               # (G * n, K, D)
            q = q.view(len(k), -1, D)                                                               # (G * n, H/G * Q, D)
            scores = torch.bmm(q, k.transpose(1, 2)).view(G, -1, H // G, Q, K)
            p = torch.add(mask, scores, alpha=scale).softmax(-1).view(len(k), -1, K)
            outputs.append(torch.bmm(p, v).view(-1, D))
            saved += (q, k, v, p)
        ctx.save_for_backward(q_weight, k_weight, cos, sin, *norms, *saved)
        ctx.spans, ctx.scale, ctx.shape = spans, scale, qkv.shape
        return torch.cat(outputs).index_select(0, spans.outputs).view(B, T, H * D).to(qkv.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q_weight, k_weight, cos, sin, *saved = ctx.saved_tensors
        norms, saved = (saved[:2], saved[2:]) if q_weight is not None else ((), saved)
        spans, ((N, H, G), (B, T, C)) = ctx.spans, (ctx.spans.sizes, ctx.shape)
        D = C // (H + 2 * G)
        g = saved[0].new_empty(N * H + 1, D)
        g[:-1], g[-1] = grad.view(N * H, D), 0
        parts = g.new_empty(sum(len(rows) for _, _, rows, *_ in spans.batches), D)
        begin = 0
        for (_, _, rows, grads, *_), q, k, v, p in zip(spans.batches, saved[::4], saved[1::4], saved[2::4], saved[3::4]):
            own = g.index_select(0, grads).view(q.shape)
            dq, dk, dv = (part.view(x.shape) for part, x in
                          zip(parts[begin:begin + len(rows)].split([len(grads), *[(len(rows) - len(grads)) // 2] * 2]), (q, k, v)))
            begin += len(rows)
            dscores = torch.ops.aten._softmax_backward_data(torch.bmm(own, v.transpose(1, 2)), p, -1, p.dtype).mul_(ctx.scale)
            torch.bmm(p.transpose(1, 2), own, out=dv)
            torch.bmm(dscores, k, out=dq)
            torch.bmm(dscores.transpose(1, 2), q, out=dk)
        dx = F.embedding_bag(spans.sources, parts, spans.begins, mode='sum').view(H + 2 * G, N, D)      # sums the copies' gradients
        out = grad.new_empty(N, H + 2 * G, D)
        split, dqk = out.transpose(0, 1), dx[:H + G]
        dq_weight = dk_weight = None
        if cos is not None:
            dqk = _rotate(dqk, cos, -sin, torch.empty_like(dqk))
        if norms:
            dq, dq_weight = _rms_backward(dqk[:H].contiguous(), norms[0][:H], norms[1][:H], q_weight)
            dk, dk_weight = _rms_backward(dqk[H:].contiguous(), norms[0][H:], norms[1][H:], k_weight)
            dqk = torch.cat((dq, dk))
        split[:H + G].copy_(dqk)
        split[H + G:].copy_(dx[H + G:])
        return out.view(B, T, C), None, None, None, dq_weight, dk_weight, None, None, None


class Branches:
    """Attention over packed rows in which prompts have several continuations (see `visible`), without the (T, T) scores of a document:
    documents with their first continuation are one batch of causal rows, the other continuations another, each behind a copy of the
    prompt's keys."""

    def __init__(self, positions):
        """positions (B, T)."""
        device, spans = positions.device, continuations(positions)
        trunks, others = [span for span in spans if not span[1]], [span for span in spans if span[1]]
        column = lambda values: torch.tensor(values, device=device)[:, None]
        begin, _, _, end = map(column, zip(*trunks))
        width = int((end - begin).max())
        self.trunk = torch.minimum(begin + torch.arange(width, device=device), end - 1)             # (D, width), the end repeated
        begin, shared, at, stop = map(column, zip(*others))
        prompt, length = int(shared.max()), int((stop - at).max())
        own = at + torch.arange(length, device=device)
        self.query = torch.minimum(own, stop - 1)                                                   # (N, length)
        places = torch.arange(prompt, device=device)
        self.key = torch.cat((begin + torch.minimum(places, shared - 1), self.query), 1)            # (N, prompt + length)
        steps = torch.arange(length, device=device)
        self.mask = torch.cat(((places < shared)[:, None].expand(-1, length, -1), (steps <= steps[:, None]).expand(len(others), -1, -1)), 2)[:, None]
        whole = torch.arange(width, device=device) < column([end - begin for begin, _, _, end in trunks])
        inside = torch.cat((whole.flatten(), (own < stop).flatten()))
        self.order = torch.empty(positions.numel(), dtype=torch.long, device=device)                # place of each token in both outputs
        self.order[torch.cat((self.trunk.flatten(), self.query.flatten()))[inside]] = inside.nonzero().squeeze(1)
        self.cost = self.trunk.numel() * width + self.query.numel() * self.key.size(1)              # scores, padding included

    def attend(self, q, k, v, scale):
        """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D)."""
        B, H, T, D = q.shape
        rows = lambda x, index: F.embedding(index, x).unflatten(-1, (-1, D)).transpose(1, 2)        # (n, heads, length, D)
        flat = [x.transpose(1, 2).reshape(B * T, -1) for x in (q, k, v)]
        grouped = H != k.size(1)
        trunk = F.scaled_dot_product_attention(*(rows(x, self.trunk) for x in flat), is_causal=True, scale=scale, enable_gqa=grouped)
        other = F.scaled_dot_product_attention(rows(flat[0], self.query), rows(flat[1], self.key), rows(flat[2], self.key), self.mask,
                                               scale=scale, enable_gqa=grouped)
        both = torch.cat([y.transpose(1, 2).reshape(-1, H * D) for y in (trunk, other)])
        return F.embedding(self.order, both).view(B, T, H, D).transpose(1, 2)


# ---- the head and what is read off it --------------------------------------------------------------------------------

TILE = 2 ** 21      # logits of one tile of TokenStats: 8 MB of float32 stay in cache
DIRECT = 2 ** 23    # up to so many logits all of them at once are quicker, if logp alone is asked for
KEEP = 2 ** 28      # logits whose exponentials are kept for backward: at most 1 GB


def head(hidden, weight, softcap=0.0):
    """Logits (..., V): hidden (..., C) times weight (V, C), transposed, soft-capped (Gemma 2) where a cap is given;
    float32 from any precision, float64 from float64."""
    if weight.is_cuda and weight.dtype.itemsize == 2 and not torch.is_grad_enabled():   # no float32 copy of the weight
        rows = hidden.reshape(-1, hidden.size(-1)).to(weight.dtype)
        z = torch.mm(rows, weight.t(), out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
    else:
        kind = torch.promote_types(weight.dtype, torch.float32)
        z = F.linear(hidden.to(kind), weight.to(kind))
    return softcap * torch.tanh(z / softcap) if softcap else z


class TargetLogp(torch.autograd.Function):
    """Log-probability of each target where all logits fit: logits (N, V), targets (N,) -> (N,), 0 where the target is -1.
    F.cross_entropy takes three more passes."""

    @staticmethod
    def forward(ctx, logits, targets):
        logp, mask = logits.log_softmax(-1), targets < 0
        index = targets.clamp(min=0).unsqueeze(1)
        ctx.save_for_backward(logp, index, mask)
        return logp.gather(1, index).squeeze(1).masked_fill_(mask, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logp, index, mask = ctx.saved_tensors
        grad = grad.masked_fill(mask, 0.0).unsqueeze(1)
        return logp.exp().mul_(-grad).scatter_add_(1, index, grad), None


def token_stats(hidden, weight, targets, temperature=1.0, softcap=0.0, extras=True):
    """hidden (..., C), weight (V, C), targets (...), -1 where unsupervised -> dict of (...): logp, entropy, mean_logp,
    correct (see TokenStats), 0 where unsupervised; logp alone without `extras`."""
    if not extras and targets.numel() * len(weight) <= DIRECT:
        z = head(hidden, weight, softcap) if temperature == 1.0 else head(hidden, weight, softcap) / temperature
        return {'logp': TargetLogp.apply(z.view(-1, len(weight)), targets.flatten()).view(targets.shape)}
    mask = targets >= 0
    keep = KEEP if torch.is_grad_enabled() and not softcap else 0
    parts = TokenStats.apply(hidden[mask], weight, targets[mask], temperature, softcap, extras, keep)
    return {name: torch.zeros(targets.shape, dtype=part.dtype, device=part.device).masked_scatter(mask, part)
            for name, part in zip(('logp', 'entropy', 'mean_logp', 'correct'), parts) if part is not None}


class TokenStats(torch.autograd.Function):
    """Log-probabilities and their kin from hidden states; (N, V) is never held.

    hidden (N, C), weight (V, C), targets (N,) -> logp, entropy, mean_logp (N,) float32 (float64 from float64) and
    correct (N,) bool; the last three only with `extras`. With z the logits over temperature (soft-capped first) and p =
    softmax(z): logp = z_y - lse, entropy = lse - sum p z, mean_logp = mean z - lse; each takes its own incoming
    gradient per row.

    The vocabulary is walked in tiles that fit the cache, with a running maximum (Milakov & Gimelshein 2018, algorithm
    3). Backward makes the logits again, but for the first `keep` of them, whose exponentials are kept: all of a small
    vocabulary.
    """

    @staticmethod
    def logits(ctx, x, weight, buffer):
        """(N, n) for n rows of the head, in `buffer`; x is hidden times the scale that comes before the soft cap."""
        z = torch.mm(x, weight.to(x.dtype).t(), out=buffer[:len(x) * len(weight)].view(len(x), len(weight)))
        return z.tanh_().mul_(ctx.cap) if ctx.softcap else z

    @staticmethod
    def find(targets, tile):
        """(N,) whether the target stands in the tile, and (N, 1) in which of its columns (any, where it does not)."""
        column = (targets - tile.start).clamp_(0, tile.stop - tile.start - 1)
        return (targets >= tile.start) & (targets < tile.stop), column[:, None]

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, extras, keep):
        ctx.set_materialize_grads(False)
        N, V = len(hidden), len(weight)
        ctx.softcap, ctx.cap, ctx.scale = softcap, softcap / temperature, 1 / (softcap or temperature)
        width = min(max(TILE // max(N, 1), 256), V)
        ctx.tiles = [slice(i, min(i + width, V)) for i in range(0, V, width)]
        ctx.keep = sum(tile.stop * N <= keep for tile in ctx.tiles)                     # so many tiles are kept
        x = hidden.to(torch.promote_types(weight.dtype, torch.float32)) * ctx.scale
        top, (total, weighted, mean) = x.new_full((N,), float('-inf')), x.new_zeros(3, N)
        best, chosen, kept, buffer = torch.zeros_like(targets), torch.zeros_like(top), [], x.new_empty(N * width)
        for i, tile in enumerate(ctx.tiles):
            z = TokenStats.logits(ctx, x, weight[tile], x.new_empty(N * width) if i < ctx.keep else buffer)
            here, column = TokenStats.find(targets, tile)
            chosen = torch.where(here, z.gather(1, column).squeeze(1), chosen)
            peak, place = z.max(-1) if extras else (z.amax(-1), None)
            last, top = top, torch.maximum(top, peak)
            shrink = (last - top).exp_()
            if extras:
                best = torch.where(peak > last, place + tile.start, best)
                mean += z.sum(-1).div_(V)
                e = (z - top[:, None]).exp_()
                weighted = weighted * shrink + torch.linalg.vecdot(e, z)
            else:
                e = z.sub_(top[:, None]).exp_()
            total = total * shrink + e.sum(-1)
            kept += [e, top] if i < ctx.keep else []
        lse = top + total.log()
        logp = chosen - lse
        entropy = lse - weighted / total if extras else None
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, *kept)
        if not extras:
            return logp, None, None, None
        correct = best == targets
        ctx.mark_non_differentiable(correct)
        return logp, entropy, mean - lse, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy, dmean, _):
        hidden, weight, targets, lse, entropy, *kept = ctx.saved_tensors
        x = hidden.to(lse.dtype) * ctx.scale
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp
        pull = -dlogp if dmean is None else -(dlogp + dmean)                     # each p's share: -sum of the gradients
        dx, dweight = torch.zeros_like(x), torch.empty_like(weight, dtype=x.dtype) if ctx.needs_input_grad[1] else None
        buffer = x.new_empty(len(x) * ctx.tiles[0].stop)
        for i, tile in enumerate(ctx.tiles):
            if i < ctx.keep and dentropy is None:
                e, top = kept[2 * i:2 * i + 2]
                dz = torch.mul(e, (pull * (top - lse).exp_())[:, None], out=buffer[:e.numel()].view(e.shape))
            else:
                z = TokenStats.logits(ctx, x, weight[tile], buffer)
                slope = 1 - (z / ctx.cap).square_() if ctx.softcap else None        # of the soft cap, less its factor
                log_p = z.sub_(lse[:, None])
                if dentropy is not None:
                    p = log_p.exp()
                    dz = log_p.add_(entropy[:, None]).mul_(-dentropy[:, None]).add_(pull[:, None]).mul_(p)
                else:
                    dz = log_p.exp_().mul_(pull[:, None])
            if dmean is not None:
                dz += dmean[:, None] / len(weight)
            here, column = TokenStats.find(targets, tile)
            dz.scatter_add_(1, column, torch.where(here, dlogp, 0)[:, None])
            if ctx.softcap:
                dz.mul_(slope).mul_(ctx.cap)
            dx.addmm_(dz, weight[tile].to(dz.dtype))
            if dweight is not None:
                torch.mm(dz.t(), x, out=dweight[tile])
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dx.mul_(ctx.scale).to(hidden.dtype), dweight, None, None, None, None, None
