"""The operations of model.py, each in the form that its device runs fastest.

On a GPU they are torch's own. On a CPU torch's attention has a slow backward and none for packed rows, its
RMS norm is composed of a dozen passes, and the logits of a large vocabulary do not fit. The forms here
compute the same, in float32 unless bf16 is asked for; tests/test_kernels.py holds each and its derivatives
against the plain formula.
"""
import functools
import inspect
import warnings
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nanoforge import rope

from nanoforge.tensors import part, part_of_bias

SHORT_BLOCK = 192       # up to here batched products beat blockwise attention on a CPU (bench/attention.py)
SHORT_DOCUMENT = 256    # and in packed rows, for a prompt with one continuation
BUCKET = 16             # segments whose lengths differ by less than this are computed side by side,
SCORES = 2 ** 18        # up to so many scores at a time, which stay in cache
ALIGN = 64              # rows of bf16 products are padded to a multiple: oneDNN compiles a kernel a size


def on_cpu(x):
    """Whether x takes the forms made for a CPU; torch.compile makes its own of the plain ones."""
    return x.device.type == 'cpu' and not torch.compiler.is_compiling()


def autocast_dtype(device):
    """Autocast's dtype on a GPU, None where it is off and on a CPU."""
    if device.type != 'cpu' and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)


@functools.cache
def triton_kernels():
    from nanoforge import triton_kernels
    return triton_kernels


@functools.cache
def has_triton(device):
    """Whether the kernels of triton_kernels.py run here: it needs a card that Triton knows and a C compiler.
    Else torch's own operations do the same in more passes, and a line says so."""
    if device.type != 'cuda':
        return False
    try:
        z, targets = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device)
        triton_kernels().row_stats(z, targets, 1.0, 0.0, False)
        torch.cuda.synchronize(device)
    except Exception as error:          # of Triton, of its C compiler, of the card: each has its own classes
        warnings.warn(f'the head takes longer than it could, as Triton does not compile here: '
                      f'{type(error).__name__}: {str(error).partition(chr(10))[0]}')
        return False
    return True


# ---- linear layers -----------------------------------------------------------------------------------------

def linear(x, weights, biases=(), bf16=False):
    """x (..., K) times the stacked `weights`, each (N_i, K) -> (..., sum of N_i).

    bf16: both factors are rounded to bfloat16, the weights dithered (below), and multiplied with float32
    sums; the result stays bfloat16, gradients reach the float32 weights as float32.
    """
    if bf16 and x.is_cuda:
        return LinearOnGPU.apply(x, len(weights), *weights, *biases)
    if bf16:
        x, weights, biases = x.bfloat16(), list(map(dithered, weights)), list(map(dithered, biases))
    return F.linear(x, concat(weights), concat(biases))


class LinearOnGPU(torch.autograd.Function):
    """`linear` in bfloat16 as one node, which starts fewer kernels, and gives the weights gradients that were
    not rounded to bfloat16."""

    @staticmethod
    def forward(ctx, x, count, *parameters):
        weights, biases = parameters[:count], parameters[count:]
        ctx.dtype, x = x.dtype, x.bfloat16()
        ctx.save_for_backward(x, *weights)      # not the copies, which a sharded weight has for a moment only
        return F.linear(x, concat(list(map(in_bf16, weights))), concat(list(map(in_bf16, biases))))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        rows, dx, dparameters = [len(weight) for weight in weights], None, []
        if ctx.needs_input_grad[0]:
            dx = (grad @ concat(list(map(in_bf16, weights)))).to(ctx.dtype)
        grad = grad.reshape(-1, grad.size(-1))
        needs = ctx.needs_input_grad[2:]
        if any(needs[:len(rows)]):
            dparameters += product(grad.t(), x.reshape(-1, x.size(-1))).split(rows)
        else:
            dparameters += [None] * len(rows)
        if any(needs[len(rows):]):
            dparameters += grad.sum(0, dtype=torch.float32).split(rows)
        else:
            dparameters += [None] * (len(needs) - len(rows))
        return dx, None, *dparameters


def concat(tensors, dim=0):
    """One tensor, without a copy if there is but one; None of none."""
    if len(tensors) > 1:
        return torch.cat(tensors, dim)
    return tensors[0] if tensors else None


class Linear(nn.Linear):
    """nn.Linear whose products run in bfloat16 where `bf16` is set (see GPT.set_matmul).

    A layer with an adapter (lora.py) is a subclass of it.
    """
    bf16 = False

    def forward(self, x):
        return Linear.stacked(x, [self])

    def weight_matrix(self):
        """The matrix (out, in) that the layer multiplies by."""
        return self.weight

    @staticmethod
    def stacked(x, layers):
        """Several of these as one product, their outputs side by side."""
        biases = [part_of_bias(layer.bias) for layer in layers if layer.bias is not None]
        return linear(x, [part(layer.weight) for layer in layers], biases, layers[0].bf16)


def stacked_linear(x, layers):
    """x (..., K) through layers that read the same input -> their outputs side by side (..., sum of N_i).

    One product on a CPU, if all are of class Linear; the subclass that carries adapters has a form of its
    own. On a GPU one where the weights are in bfloat16: the copies of a layer are laid together in no time.
    """
    special = [layer for layer in layers if type(layer) is not Linear]
    stacks = layers[0].bf16 and not special if x.is_cuda else x.device.type == 'cpu'
    if not stacks or not all(isinstance(layer, Linear) for layer in layers):
        return torch.cat([layer(x) for layer in layers], -1)
    return (special or layers)[0].stacked(x, layers)


def layer_input(x, layer):
    """x as the layer, and others beside it, multiply it: rounded once for all of them."""
    return x.bfloat16() if x.is_cuda and getattr(layer, 'bf16', False) else x


def weight_matrix(layer):
    """The matrix (out, in) of any linear layer, one of transformers' included."""
    return layer.weight_matrix() if hasattr(layer, 'weight_matrix') else layer.weight


# ---- weights in bfloat16 -----------------------------------------------------------------------------------
#
# A pretrained model's weights lie on bfloat16's grid, and an update is far smaller than a step of that grid:
# rounded to nearest, products would see nothing of it for dozens of optimizer steps. Here a weight is rounded
# up or down by a threshold of its own, as a picture is dithered: of many weights that moved by a tenth of a
# step one in ten is a step further, and a sum over them is on average that of the float32 weights. A weight
# on the grid stays as it is. The thresholds are fixed, so what is computed depends on the weights alone:
# training, sampling, evaluation and a resumed run read the same numbers, on any rank. On a GPU, too, where
# autocast would round to nearest.

PERIOD = 1048583        # a prime: no two rows of a matrix share their thresholds
DITHER_CHUNK = 2 ** 18  # weights that are rounded at a time, which stay in cache


@functools.cache
def thresholds(device):
    """(PERIOD + DITHER_CHUNK,) int32 in 0 ... 65535: random bits, which begin again after PERIOD."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(2 ** 16, (PERIOD,), generator=generator, dtype=torch.int32)
    return torch.cat((bits, bits[:DITHER_CHUNK])).to(device)


def dither(weight, out=None):
    """`weight` float32, contiguous, of any shape -> `out` bfloat16: each value rounded up or down, so that
    the mean over many is kept. The threshold of a value depends on its place in the weight alone."""
    out = torch.empty_like(weight, dtype=torch.bfloat16) if out is None else out
    if has_triton(weight.device):
        return triton_kernels().dither(weight, out, thresholds(weight.device), PERIOD)
    bits, high = weight.view(torch.int32).flatten(), out.view(torch.int16).flatten()
    for begin in range(0, len(bits), DITHER_CHUNK):
        part, place = bits[begin:begin + DITHER_CHUNK], begin % PERIOD
        # bfloat16 is the upper half of a float32: what is added to the lower half may carry into it
        part = part + thresholds(weight.device)[place:place + len(part)]
        high[begin:begin + DITHER_CHUNK] = part.bitwise_right_shift_(16)
    return out


class Dithered(torch.autograd.Function):
    """A weight in bfloat16, whose gradient goes to the float32 weight."""

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def in_bf16(weight):
    """A weight or bias in bfloat16: as it is, its copy where it has one, else made now."""
    if weight.dtype == torch.bfloat16:
        return weight.detach()
    copy = getattr(weight, 'bf16_copy', None)
    return dither(weight.detach().float().contiguous()) if copy is None else copy


def dithered(weight):
    """in_bf16, differentiably."""
    return Dithered.apply(weight, in_bf16(weight))


def keep_copies(weights):
    """Gives these parameters, if they are float32, copies in bfloat16, so that no product has to make one.
    Whoever changes a weight from then on calls update_copies, as an optimizer's step does."""
    for weight in weights:
        if weight.dtype == torch.float32:
            weight.bf16_copy = dither(weight.detach())


def drop_copies(weights):
    for weight in weights:
        if hasattr(weight, 'bf16_copy'):
            del weight.bf16_copy


def update_copies(weights):
    """Brings up to date the copies of those parameters that have one."""
    for weight in weights:
        if hasattr(weight, 'bf16_copy'):
            dither(weight.detach(), weight.bf16_copy)


# ---- the gate of an MLP ------------------------------------------------------------------------------------

LARGE_GATE = 2 ** 20    # from here on memory counts more than the moment that a small product loses
GATE_CHUNK = 2 ** 17    # values that are computed again at a time, which stay in cache


def gated(act, gate, up):
    """act(gate) * up (Shazeer 2020, eq. 5 and 6); act: elementwise."""
    large = on_cpu(gate) and gate.numel() >= LARGE_GATE and torch.is_grad_enabled()
    return Gated.apply(act, gate, up) if large else act(gate) * up


class Gated(torch.autograd.Function):
    """`gated`, whose act(gate) is not kept but computed again in the backward pass."""

    @staticmethod
    def forward(ctx, act, gate, up):
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = [x.contiguous() for x in (*ctx.saved_tensors, grad)]
        dgate, dup = (torch.empty_like(x) for x in tensors[:2])
        for g, u, dy, dg, du in zip(*(x.flatten().split(GATE_CHUNK) for x in (*tensors, dgate, dup))):
            with torch.enable_grad():
                g = g.detach().requires_grad_()
                activated = ctx.act(g)
            torch.mul(dy, activated.detach(), out=du)
            dg.copy_(*torch.autograd.grad(activated, g, dy * u))
        return None, dgate, dup


# ---- RMS norm, rotary positions ----------------------------------------------------------------------------

def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4)."""
    half_on_cpu = x.device.type == 'cpu' and x.dtype.itemsize == 2
    if half_on_cpu or x.dtype != weight.dtype:          # rounded once, at the end
        y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
        return y.to(x.dtype)
    if on_cpu(x):
        return RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _rms_forward(x, weight, eps):
    mean_square = torch.linalg.vecdot(x, x).div_(x.size(-1))
    scale = mean_square.add_(eps).rsqrt_().unsqueeze(-1)                # (..., 1)
    return (x * scale).mul_(weight), scale


def _rms_backward(grad, x, scale, weight):
    # Layer norm's fused backward with mean 0 differs from RMS norm's only by the term that it subtracts for
    # the mean.
    zero = torch.zeros_like(scale)
    dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, [x.size(-1)], zero, scale, weight, None, [True, True, False])
    missing = (grad @ weight).div_(x.size(-1)).unsqueeze(-1).mul_(scale)
    return dx.add_(missing), dweight


class RMSNorm(torch.autograd.Function):
    """rms_norm with one fused backward."""

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
    """Rotary positions (Su et al. 2021, eq. 34) on halves, as Llama has them: x (..., T, D), cos, sin (...,
    T, D/2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if not torch.compiler.is_compiling():
        return Rotate.apply(x, cos, sin)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _rotate(x, cos, sin, out):
    a, b = x.chunk(2, -1)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out


class Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the angles is kept; written where it
    belongs, without a concatenation."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, torch.empty_like(grad)), None, None


# ---- packed rows -------------------------------------------------------------------------------------------

def gather_rows(x, indices):
    """x (..., C), indices (M,) into the rows laid end to end -> (M, C)."""
    return F.embedding(indices, x.flatten(0, -2))       # whose backward is quicker than indexing's


def document_lengths(positions):
    """positions (B, T), where each 0 begins a packed document, as a row does -> lengths of all documents, row
    after row."""
    begins = positions == 0
    begins[:, 0] = True
    begins = begins.flatten().nonzero().squeeze(1)
    return begins.diff(append=begins.new_tensor([positions.numel()]))


def continuations(positions):
    """positions (B, T) of packed rows -> segments [(begin, shared, start, end)], counted over the rows laid
    end to end.

    The tokens start..end follow the first `shared` ones of the document that begins at `begin`; shared is 0
    for the document itself, which comes first.
    """
    begins = [0, *document_lengths(positions).cumsum(0).tolist()]
    position = positions.flatten().tolist()
    segments = []
    for begin, stop in zip(begins, begins[1:]):
        jumps = [i for i in range(begin + 1, stop) if position[i] != position[i - 1] + 1]
        starts = [begin, *jumps]
        for start, end in zip(starts, [*jumps, stop]):
            shared = 0 if start == begin else position[start]
            segments.append((begin, shared, start, end))
    return segments


def packed_mask(positions, window=0):
    """positions (..., T) of packed rows -> (..., T, T) bool, True where a query (row) sees a key (column).

    Each 0 begins a document. A jump back to p > 0 begins another branch of it, which sees the first p
    positions of the document and itself, not the branches beside it: one prompt with several completions, its
    keys computed once. window: only keys fewer than so many positions back; 0 = all.
    """
    tokens = packed_tokens(positions)
    query = PackedTokens(*(x[..., :, None] for x in tokens))
    key = PackedTokens(*(x[..., None, :] for x in tokens))
    return query_sees_key(query, key, window)


class PackedTokens(NamedTuple):
    """What decides which token of packed rows sees which, (..., T) each."""
    index: torch.Tensor         # in its row
    position: torch.Tensor
    document: torch.Tensor      # numbers of its document and of its branch, counted along the row
    branch: torch.Tensor
    start: torch.Tensor         # the position at which its branch begins: 0 in a trunk


def packed_tokens(positions):
    """positions (..., T) of packed rows -> PackedTokens."""
    index = torch.arange(positions.size(-1), device=positions.device).expand_as(positions)
    jump = F.pad(positions[..., 1:] != positions[..., :-1] + 1, (1, 0), value=True)
    start = positions.gather(-1, torch.where(jump, index, 0).cummax(-1).values)
    return PackedTokens(index, positions, (positions == 0).cumsum(-1), jump.cumsum(-1), start)


def query_sees_key(query, key, window):
    """PackedTokens of shapes that broadcast -> bool; see packed_mask."""
    trunk = (key.start == 0) & (key.position < query.start)
    mask = (query.branch == key.branch) | (query.document == key.document) & trunk
    mask = mask & (query.index >= key.index)
    return mask & (query.position - key.position < window) if window else mask


@functools.lru_cache(maxsize=16)
def causal_mask(T, dtype):
    """(T, T) to add to scores: -inf where the key comes after the query."""
    return torch.full((T, T), float('-inf'), dtype=dtype).triu_(1)


# ---- attention ---------------------------------------------------------------------------------------------

def attention(q, k, v, mask, scale, softcap=0.0):
    """q (B, H, T, D), k and v (B, G, S, D), G dividing H -> softmax(scale q k^T) v (B, H, T, D).

    mask: bool, True where a query sees a key; None: causal. softcap: Gemma 2 caps the scores with tanh first.
    """
    grouped = q.size(1) != k.size(1)
    causal = mask is None
    if q.size(2) == 1:      # a branch: torch.compile would make a symbol of `and`, which sdpa does not take
        causal = False
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    if grouped:
        sharing = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1)
    scores = (q @ k.transpose(2, 3)).float()
    scores = softcap * torch.tanh(scores * (scale / softcap))
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril_()
    if mask is not None:
        scores = scores.masked_fill(~mask, float('-inf'))
    return scores.softmax(-1).to(v.dtype) @ v


FLEX_FROM = 2 ** 22     # packed rows of at least so many scores: below, compiling takes longer than it saves
FLEX_BLOCK = 128        # queries and keys of a block, of which a mask says whether any see each other


def flex_mask(positions, window=0):
    """packed_mask of positions (B, T), T a multiple of FLEX_BLOCK, as flex attention's BlockMask.

    Nothing of size (T, T) is made: which blocks are computed at all, and which without a mask, follows from
    the first and last token of each. The numbers of documents and branches rise along a row.
    """
    tokens = packed_tokens(positions)
    begin, end = ([x[..., at::FLEX_BLOCK] for x in tokens] for at in (0, FLEX_BLOCK - 1))
    begin, end = PackedTokens(*begin), PackedTokens(*end)                           # (B, blocks) each
    query_begin, query_end = (PackedTokens(*(x[..., :, None] for x in block)) for block in (begin, end))
    key_begin, key_end = (PackedTokens(*(x[..., None, :] for x in block)) for block in (begin, end))
    needed = (key_begin.index <= query_begin.index) & (key_end.document >= query_begin.document)
    whole = (key_begin.index < query_begin.index) & (key_begin.branch == query_end.branch)
    if window:                  # where no query is in a later branch, positions are as far apart as tokens
        only_trunks = tokens.start.unflatten(-1, (-1, FLEX_BLOCK)).amax(-1)[..., :, None] == 0
        needed = needed & ~(only_trunks & (query_begin.index - key_end.index >= window))
        whole = whole & (query_end.index - key_begin.index < window)

    def mask_mod(b, h, q, k):
        query, key = (PackedTokens(*(x[b, at] for x in tokens)) for at in (q, k))
        return query_sees_key(query, key, window)

    def listed(blocks):         # how many, and which: (B, 1, blocks), (B, 1, blocks, blocks)
        order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    T = positions.size(-1)
    return BlockMask.from_kv_blocks(*listed(needed & ~whole), *listed(needed & whole), FLEX_BLOCK, mask_mod,
                                    seq_lengths=(T, T))


def flex(q, k, v, mask, scale, softcap=0.0):
    """attention() with a flex_mask of as many tokens, padded to a multiple of FLEX_BLOCK: where a row ends
    within a block, the backward pass had NaN (pytorch issue 153799)."""
    def capped(score, b, h, query, key):
        return softcap * torch.tanh(score / softcap)

    T = q.size(2)
    q, k, v = (F.pad(x, (0, 0, 0, -T % FLEX_BLOCK)) for x in (q, k, v))
    compute = compiled_flex() if q.is_cuda else flex_attention
    y = compute(q, k, v, capped if softcap else None, mask, scale, enable_gqa=q.size(1) != k.size(1))
    return y[:, :, :T]


@functools.cache
def compiled_flex():        # torch.compile imports its compiler: not where nothing is compiled
    # a kernel for each of float32 and bfloat16, windows, soft caps, training and evaluation; past the limit
    # torch compiles no more of them
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention)


@functools.cache
def flex_works(device, dtype, n_head, n_kv_head, head_size, softcap):
    """Whether flex attention compiles for such heads here, forward and backward: it needs Triton, a C
    compiler, and a card that holds its blocks. Else packed rows take a (T, T) mask, and a line says so."""
    T = 2 * FLEX_BLOCK
    q, k, v = (torch.zeros(2, heads, T, head_size, device=device, dtype=dtype, requires_grad=True)
               for heads in (n_head, n_kv_head, n_kv_head))
    try:
        with torch.enable_grad():
            mask = flex_mask(torch.arange(T, device=device).expand(2, -1))
            flex(q, k, v, mask, 1.0, softcap).sum().backward()
    except Exception as error:          # of Triton, of its C compiler, of the card: each has its own classes
        warnings.warn(f'packed rows take a mask of all pairs, as flex attention does not compile here: '
                      f'{type(error).__name__}: {str(error).partition(chr(10))[0]}')
        return False
    return True


def takes_flex(cfg, idx, dtype):
    """Whether packed rows idx (B, T) take flex attention, computed in this dtype."""
    B, T = idx.shape
    if not idx.is_cuda or B * T * T < FLEX_FROM:
        return False
    return flex_works(idx.device, dtype, cfg.n_head, cfg.n_kv_head, cfg.head_size, cfg.attn_softcap)


class FlashSegments(NamedTuple):
    """Packed rows laid end to end as flash attention of a GPU takes them: S stretches of queries, each of a
    document or of a branch, and the keys that each may see."""
    query_begins: torch.Tensor      # (S + 1,) int32, as are the next
    key_begins: torch.Tensor
    longest_query: int
    longest_key: int
    keys: torch.Tensor | None       # the token of each key; None: every token once, in order


def flash_segments(positions):
    """positions (B, T) of packed rows (see packed_mask) -> FlashSegments. A branch's keys are those of its
    prompt, once more, and its own; aligned at their ends, so that a causal mask is right."""
    (_, T), flat, device = positions.shape, positions.flatten(), positions.device
    jump = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
    start = jump.flatten().nonzero().squeeze(1)                                                     # (S,)
    length = start.diff(append=start.new_tensor([len(flat)]))
    shared = flat[start].masked_fill(start % T == 0, 0)             # so many keys of the prompt
    begin = torch.where(shared == 0, start, 0).cummax(0).values     # of the prompt
    query_begins, key_begins = (F.pad(x.cumsum(0), (1, 0)) for x in (length, length + shared))
    counts = torch.stack((length.max(), (length + shared).max(), key_begins[-1]))
    longest_query, longest_key, count = counts.tolist()
    keys = None
    if count > len(flat):
        segment = torch.arange(len(start), device=device)
        segment = segment.repeat_interleave(length + shared, output_size=count)
        place = torch.arange(count, device=device) - key_begins[segment]
        in_branch = place - shared[segment]
        keys = torch.where(in_branch < 0, begin[segment] + place, start[segment] + in_branch)
    return FlashSegments(query_begins.int(), key_begins.int(), longest_query, longest_key, keys)


def flash(q, k, v, attend, segments, window, scale):
    """attention() of packed rows in half precision; attend: flash_attention(), segments: their
    FlashSegments."""
    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B * T, -1, D) for x in (q, k, v))
    if segments.keys is not None:
        k, v = (gather_rows(x.flatten(1), segments.keys).view(-1, *x.shape[1:]) for x in (k, v))
    y = attend(q, k, v, *segments[:4], scale=scale, window_size=(window - 1 if window else -1, 0))
    return y.view(B, T, H, D).transpose(1, 2)


@functools.cache
def flash_attention():
    """torch's, of segments of any length: imported where it is needed, as it brings the compiler with it."""
    from torch.nn.attention.varlen import varlen_attn
    # torch 2.11 takes heads that share keys as they are; later it wants to be told
    grouped = {'enable_gqa': True} if 'enable_gqa' in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, **grouped)


def takes_flash(cfg, device, dtype):
    """Whether packed rows take flash attention: on a GPU from Ampere on, in half precision, without soft
    caps."""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return dtype.itemsize == 2 and not cfg.attn_softcap and cfg.head_size <= 256


class AttentionContext:
    """What the layers of one forward pass share: positions, rotary angles, and the form in which attention is
    computed.

    A GPU takes torch's scaled_dot_product_attention, and for packed rows flash attention of their documents;
    in float32 and with soft caps flex attention, or where they are short a mask. A CPU has four forms
    besides:

        short           an unpacked block of up to SHORT_BLOCK tokens: ShortAttention
        varlen          packed rows of short documents: VarlenAttention
        shared_prefix   packed rows where continuations of long prompts are worth it: SharedPrefixAttention
        documents       other packed rows: torch's attention, one document after the other

    The first two begin before QK norm and rotary positions (see `fused`), the others take q, k and v.
    """

    def __init__(self, cfg, inv_freq, idx, positions, keep_kv=None, dtype=torch.float32, compiled=False):
        """cfg: GPTConfig; inv_freq: {layer type: rotary frequencies (D/2,)}; idx (B, T); positions (B, T) of
        packed rows (see packed_mask) or None; keep_kv: a list to which each layer adds its (keys, values),
        (B, G, T, D) each; dtype: of the weights; compiled: the layers are, which take the plain forms."""
        (B, T), device = idx.shape, idx.device
        packed = positions is not None
        self.cfg, self.keep_kv = cfg, keep_kv
        self.positions = positions if packed else torch.arange(T, device=device)[None]           # (1 or B, T)
        self.short, self.varlen, self.shared_prefix, self.documents = False, None, None, None
        dtype = autocast_dtype(device) or dtype
        self.flash = None
        if packed and takes_flash(cfg, device, dtype):
            self.flash = flash_attention(), flash_segments(positions.expand(B, T))
        self.flex = packed and not self.flash and takes_flex(cfg, idx, dtype)
        takes_cpu_form = on_cpu(idx) and not compiled
        if packed and takes_cpu_form:
            self.choose_packed_form(positions.expand(B, T))
        elif takes_cpu_form and T <= SHORT_BLOCK and keep_kv is None:
            self.short = not cfg.attn_softcap and cfg.n_kv_head == cfg.n_head

        self.windows, self.rope, self.masks = {}, {}, {}                # each by layer type
        for layer_type in set(cfg.layer_types):
            window = cfg.window(layer_type)
            self.windows[layer_type] = window if T > window else 0      # 0: all of the row is seen
            if layer_type in inv_freq:
                settings = cfg.rope[layer_type]
                lengths = self.context_lengths(packed) if rope.is_dynamic(settings) else None
                angle = rope.angles(settings, inv_freq[layer_type], self.positions, lengths)[:, None]
                factor = rope.attention_factor(settings)
                cos, sin = angle.cos() * factor, angle.sin() * factor           # (1 or B, 1, T, D/2) each
                self.rope[layer_type] = cos.to(dtype), sin.to(dtype)
            self.masks[layer_type] = self.make_mask(self.windows[layer_type], packed, B)

    def context_lengths(self, packed):
        """(1 or B, T): the number of positions of each token's document, all of its branches counted; of an
        unpacked row its own, padding included."""
        if not packed:
            return torch.full_like(self.positions, self.positions.size(1))
        counts = document_lengths(self.positions)
        lengths = [int(document.max()) + 1 for document in self.positions.flatten().split(counts.tolist())]
        return counts.new_tensor(lengths).repeat_interleave(counts).view_as(self.positions)

    def choose_packed_form(self, positions):
        """For packed rows (B, T) on a CPU."""
        cfg, segments = self.cfg, continuations(positions)
        self.documents = positions.flatten().split(document_lengths(positions).tolist())
        if cfg.attn_softcap:
            return
        if max(shared + end - start for _, shared, start, end in segments) <= SHORT_DOCUMENT:
            self.varlen = VarlenBatches(positions, segments, cfg.n_head, cfg.n_kv_head)
        elif any(shared for _, shared, _, _ in segments):
            shared_prefix = SharedPrefixAttention(positions, segments)
            if shared_prefix.cost < sum(len(document) ** 2 for document in self.documents):
                self.shared_prefix = shared_prefix

    def make_mask(self, window, packed, B):
        """(1 or B, 1, T, T) bool; a list of (n, n), one for each document; a BlockMask; None where no mask is
        needed: a causal block."""
        if self.flash:
            return None
        if self.flex:
            T = self.positions.size(1)
            padding = torch.arange(-T % FLEX_BLOCK, device=self.positions.device)   # a document of its own
            positions = torch.cat((self.positions.expand(B, T), padding.expand(B, -1)), 1)
            return flex_mask(positions, window)
        if self.varlen or self.shared_prefix and not window:
            return None
        if not self.documents:
            return packed_mask(self.positions, window)[:, None] if packed or window else None
        masks = []
        for document in self.documents:
            n = len(document)
            one_branch = n == document[-1] - document[0] + 1
            masks.append(None if one_branch and n <= (window or n) else packed_mask(document, window))
        return masks

    def fused(self, layer_type):
        """Whether fused_attention computes this type of layer."""
        if self.short:
            return not self.windows[layer_type] and not torch.compiler.is_compiling()
        return self.varlen is not None

    def fused_attention(self, qkv, layer_type, q_norm, k_norm):
        """qkv (B, T, (H + 2 G) * D), heads of q, of k, of v -> (B, T, H * D): QK norm, if its weights (D,)
        are given, rotary positions and attention as one node of the graph."""
        cfg = self.cfg
        weights = [norm and norm.effective_weight for norm in (q_norm, k_norm)]
        for_qk = *weights, cfg.norm_eps, *self.rope.get(layer_type, (None, None))
        if self.varlen:
            return VarlenAttention.apply(qkv, self.varlen, self.windows[layer_type], cfg.attn_scale, *for_qk)
        mask = causal_mask(qkv.size(1), qkv.dtype)
        return ShortAttention.apply(qkv, cfg.n_head, cfg.attn_scale, *for_qk, mask)

    def attention(self, q, k, v, layer_type):
        """q (B, H, T, D), k and v (B, G, T, D), G dividing H -> (B, H, T, D)."""
        cfg, (B, H, T, D) = self.cfg, q.shape
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.keep_kv is not None:
            self.keep_kv.append((k, v))
        if self.shared_prefix and not self.windows[layer_type]:
            return self.shared_prefix.attend(q, k, v, cfg.attn_scale)
        if self.flash:
            return flash(q, k, v, *self.flash, self.windows[layer_type], cfg.attn_scale)
        if self.flex:
            return flex(q, k, v, self.masks[layer_type], cfg.attn_scale, cfg.attn_softcap)
        if not self.documents:
            return attention(q, k, v, self.masks[layer_type], cfg.attn_scale, cfg.attn_softcap)
        lengths = list(map(len, self.documents))
        by_document = [h.transpose(1, 2).flatten(0, 1).split(lengths) for h in (q, k, v)]
        outputs = []
        for *qkv, mask in zip(*by_document, self.masks[layer_type]):            # (n, heads, D) each
            qkv = [h.transpose(0, 1)[None] for h in qkv]                        # (1, heads, n, D)
            outputs.append(attention(*qkv, mask, cfg.attn_scale, cfg.attn_softcap))
        y = torch.cat(outputs, 2)                                               # (1, H, B * T, D)
        return y.view(H, B, T, D).transpose(0, 1)


def _norm_and_rotate(qk, n_head, q_weight, k_weight, eps, cos, sin, out):
    """QK norm (where there are weights) and rotary positions (where there are angles) of qk (heads, ..., D),
    the first n_head of them queries, written to `out` -> what the backward of the norm needs."""
    saved = ()
    if q_weight is not None:
        raw = qk.contiguous()
        weight = torch.stack([q_weight] * n_head + [k_weight] * (len(qk) - n_head))
        qk, scale = _rms_forward(raw, weight.view(len(qk), *[1] * (qk.dim() - 2), -1), eps)
        saved = raw, scale
    if cos is not None:
        qk = _rotate(qk, cos, sin, out if out.dtype == qk.dtype else torch.empty_like(qk))
    if qk is not out:
        out.copy_(qk)
    return saved


def _norm_and_rotate_backward(grad, n_head, saved, q_weight, k_weight, cos, sin, out):
    """grad (heads, ..., D), the first n_head of them queries; writes the gradient of qk to `out` -> those of
    the weights."""
    if cos is not None:
        grad = _rotate(grad, cos, -sin, torch.empty_like(grad))
    if not saved:
        out.copy_(grad)
        return None, None
    dweights, (raw, scale) = [], saved
    for heads, weight in ((slice(n_head), q_weight), (slice(n_head, None), k_weight)):
        dqk, dweight = _rms_backward(grad[heads].contiguous(), raw[heads], scale[heads], weight)
        out[heads].copy_(dqk)
        dweights.append(dweight)
    return dweights


def _softmax_backward(grad, p):
    return torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype)


class ShortAttention(torch.autograd.Function):
    """QK norm, rotary positions and causal attention of a short block on a CPU, as one node of batched
    products.

    qkv (B, T, 3 * H * D), heads of q, then of k, then of v -> (B, T, H * D). Below about two hundred
    positions the batched products beat torch's blockwise attention, whose backward is slow on a CPU, and one
    node saves a dozen copies a layer. q_weight, k_weight (D,) or None: RMS norm of each head; cos, sin (T,
    D/2) or (1 or B, 1, T, D/2) or None: rotary positions; mask (T, T) or (B * H, T, T): added to scores, as
    causal_mask. Products run in the dtype of qkv; norm, rotation and softmax in float32.
    """

    @staticmethod
    def forward(ctx, qkv, n_head, scale, q_weight, k_weight, eps, cos, sin, mask):
        B, T, C = qkv.shape
        H, D = n_head, C // n_head // 3
        acc_dtype = torch.promote_types(qkv.dtype, torch.float32)
        heads = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)              # (3, B, H, T, D)
        x = torch.empty(3, B, H, T, D, dtype=qkv.dtype)
        saved = _norm_and_rotate(heads[:2].to(acc_dtype), 1, q_weight, k_weight, eps, cos, sin, x[:2])
        x[2].copy_(heads[2])
        x = x.view(3, B * H, T, D)
        q, k, v = x.unbind(0)                                               # (B * H, T, D) each
        p = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)          # (B * H, T, T)
        p = p.softmax(-1)
        ctx.save_for_backward(x, p, q_weight, k_weight, cos, sin, *saved)
        ctx.sizes, ctx.scale = (B, T, H, D), scale
        y = torch.bmm(p, v).view(B, H, T, D)
        return y.transpose(1, 2).reshape(B, T, H * D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, p, q_weight, k_weight, cos, sin, *saved = ctx.saved_tensors
        B, T, H, D = ctx.sizes
        q, k, v = x.unbind(0)
        grad = grad.view(B, T, H, D).transpose(1, 2)
        grad = grad.reshape(B * H, T, D)
        dx = torch.empty_like(x)
        dq, dk, dv = dx.unbind(0)
        torch.bmm(p.transpose(1, 2), grad, out=dv)
        dscores = _softmax_backward(torch.bmm(grad, v.transpose(1, 2)), p)
        torch.baddbmm(dq, dscores, k, beta=0, alpha=ctx.scale, out=dq)
        torch.baddbmm(dk, dscores.transpose(1, 2), q, beta=0, alpha=ctx.scale, out=dk)

        dx = dx.view(3, B, H, T, D)
        dqkv = torch.empty(B, T, 3, H, D, dtype=grad.dtype)
        dheads = dqkv.permute(2, 0, 3, 1, 4)
        dqk = dx[:2].to(torch.promote_types(dx.dtype, torch.float32))
        dweights = _norm_and_rotate_backward(dqk, 1, saved, q_weight, k_weight, cos, sin, dheads[:2])
        dheads[2].copy_(dx[2])
        return dqkv.view(B, T, 3 * H * D), None, None, *dweights, None, None, None, None


class VarlenBatch(NamedTuple):
    """n segments of about the same lengths, padded to Q queries and K keys; see VarlenBatches."""
    Q: int
    K: int
    rows: torch.Tensor          # of the table: (H * n * Q + 2 * G * n * K,), for queries, keys and values
    grad_rows: torch.Tensor     # the queries' rows in a table of outputs (N, H)
    query_positions: torch.Tensor       # (n, Q, 1)
    key_positions: torch.Tensor         # (n, 1, K)


class VarlenBatches:
    """Packed rows of N tokens (see packed_mask) for VarlenAttention, as batches of segments: prompts,
    continuations, plain documents.

    A segment attends to the tokens that it continues and to itself. The heads of queries, keys and values are
    rows of a table, head after head, N tokens each; behind them a row of zeros, for padding.
    """

    def __init__(self, positions, segments, n_head, n_kv_head):
        """positions (B, T), segments: their `continuations`; H = n_head, G = n_kv_head."""
        N = positions.numel()
        self.sizes = N, n_head, n_kv_head
        self.masks = {}
        self.batches = [self.batch(positions, part) for part in bucket(segments, SCORES // n_head)]

        # Where each output (N, H) lies in the outputs of all batches, laid end to end.
        outputs = torch.cat([batch.rows[:len(batch.grad_rows)] for batch in self.batches])
        table_size = (n_head + 2 * n_kv_head) * N
        place = torch.empty(table_size + 1, dtype=torch.long)
        place[outputs] = torch.arange(len(outputs))
        self.outputs = place[:n_head * N].view(n_head, N).t().flatten()

        # A row of the table may have copies in several batches (a prompt's keys); its gradient is the sum of
        # theirs: copies[copy_begins[i]:copy_begins[i + 1]] are those of row i.
        rows = torch.cat([batch.rows for batch in self.batches])
        counts = torch.bincount(rows, minlength=table_size + 1)[:table_size]
        self.copies = rows.argsort(stable=True)[:int(counts.sum())]
        self.copy_begins = counts.cumsum(0) - counts

    def batch(self, positions, segments):
        """segments [(begin, shared, start, end)] -> VarlenBatch."""
        N, H, G = self.sizes
        begin, shared, start, end = torch.tensor(segments).t()[:, :, None]      # (n, 1) each
        query = self.ranges(start, end - start)                                # (n, Q) tokens; N where padded
        key = torch.cat((self.ranges(begin, shared), query), 1)                 # (n, K)
        q_rows = self.table_rows(query, 0, H)                                   # (H, n, Q)
        # the heads that share keys lie side by side: their queries are one product
        q_rows = q_rows.view(G, H // G, *query.shape).transpose(1, 2).flatten()
        k_rows = self.table_rows(key, H, G).flatten()
        v_rows = self.table_rows(key, H + G, G).flatten()
        token, head = q_rows % N, q_rows // N
        grad_rows = torch.where(q_rows < (H + 2 * G) * N, token * H + head, H * N)
        # padding lies behind everything, so no query sees it but padding
        position = torch.cat((positions.flatten(), positions.new_tensor([2 ** 30])))
        rows = torch.cat((q_rows, k_rows, v_rows))
        return VarlenBatch(query.size(1), key.size(1), rows, grad_rows,
                           position[query][:, :, None], position[key][:, None])

    def ranges(self, start, count):
        """start, count (n, 1) -> (n, longest): start, start + 1, ... and N behind each end."""
        step = torch.arange(int(count.max()))
        return torch.where(step < count, start + step, self.sizes[0])

    def table_rows(self, tokens, first, count):
        """tokens (n, L) -> (count, n, L): their rows of the heads first, first + 1, ..."""
        N, H, G = self.sizes
        head = torch.arange(first, first + count).view(-1, 1, 1)
        return torch.where(tokens < N, head * N + tokens, (H + 2 * G) * N)

    def additive_masks(self, window, dtype):
        """For each batch (n, 1, Q, K): what is added to its scores."""
        if (window, dtype) not in self.masks:
            masks = []
            for batch in self.batches:
                query, key = batch.query_positions, batch.key_positions
                seen = key <= query
                if window:
                    seen = seen & (query - key < window)
                mask = torch.zeros((), dtype=dtype).masked_fill(~seen, float('-inf'))
                masks.append(mask.unsqueeze(1))
            self.masks[window, dtype] = masks
        return self.masks[window, dtype]

    def split(self, x, batch):
        """x (rows of a batch, D) -> q (G * n, H/G * Q, D), k and v (G * n, K, D)."""
        n_query = len(batch.grad_rows)
        n_key = (len(batch.rows) - n_query) // 2
        q, k, v = x.split([n_query, n_key, n_key])
        D = x.size(1)
        k, v = k.view(-1, batch.K, D), v.view(-1, batch.K, D)
        return q.view(len(k), -1, D), k, v


def bucket(segments, limit):
    """[(begin, shared, start, end)] -> lists of them of about the same lengths, each of at most `limit`
    scores if it can; the prompt of continuations becomes a segment of its own, which the first of them
    continues."""
    prompts, buckets = {}, {}
    for begin, shared, _, _ in segments:
        prompts[begin] = max(prompts.get(begin, 0), shared)
    for begin, shared, start, end in segments:
        middle = start
        if start == begin and prompts[begin] < end - start:
            middle = begin + prompts[begin]
        first, rest = (begin, 0, start, middle), (begin, shared or middle - start, middle, end)
        for part in (first, rest):
            length = part[3] - part[2]
            if length:
                key = -(-part[1] // BUCKET), -(-length // BUCKET)
                buckets.setdefault(key, []).append(part)
    for (shared, length), members in buckets.items():
        size = max(1, limit // (length * (shared + length) * BUCKET ** 2))
        for i in range(0, len(members), size):
            yield members[i:i + size]


class VarlenAttention(torch.autograd.Function):
    """QK norm, rotary positions and attention of packed rows of short documents on a CPU, as one node.

    qkv (B, T, (H + 2 G) * D), heads of q, then of k, then of v -> (B, T, H * D); the rest as in
    ShortAttention, with the VarlenBatches of the rows. At least float32 throughout: products this small are
    no faster in bf16.
    """

    @staticmethod
    def forward(ctx, qkv, varlen, window, scale, q_weight, k_weight, eps, cos, sin):
        (B, T, C), (N, H, G) = qkv.shape, varlen.sizes
        D, acc_dtype = C // (H + 2 * G), torch.promote_types(qkv.dtype, torch.float32)
        heads = qkv.view(N, H + 2 * G, D).to(acc_dtype).transpose(0, 1)                 # (H + 2 G, N, D)
        if cos is not None:
            cos, sin = (angle.expand(B, 1, T, D // 2).reshape(N, D // 2) for angle in (cos, sin))
        table = heads.new_empty((H + 2 * G) * N + 1, D)
        table[-1] = 0
        x = table[:-1].view(H + 2 * G, N, D)
        saved = _norm_and_rotate(heads[:H + G], H, q_weight, k_weight, eps, cos, sin, x[:H + G])
        x[H + G:].copy_(heads[H + G:])

        by_batch, outputs = [], []
        for batch, mask in zip(varlen.batches, varlen.additive_masks(window, acc_dtype)):
            q, k, v = varlen.split(table.index_select(0, batch.rows), batch)
            scores = torch.bmm(q, k.transpose(1, 2))
            scores = scores.view(G, -1, H // G, batch.Q, batch.K)
            p = torch.add(mask, scores, alpha=scale).softmax(-1)
            p = p.view(len(k), -1, batch.K)
            outputs.append(torch.bmm(p, v).view(-1, D))
            by_batch += (q, k, v, p)
        ctx.save_for_backward(q_weight, k_weight, cos, sin, *saved, *by_batch)
        ctx.varlen, ctx.scale = varlen, scale
        ctx.shape, ctx.n_saved = qkv.shape, len(saved)
        y = torch.cat(outputs).index_select(0, varlen.outputs)
        return y.view(B, T, H * D).to(qkv.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q_weight, k_weight, cos, sin, *rest = ctx.saved_tensors
        saved, by_batch = rest[:ctx.n_saved], rest[ctx.n_saved:]
        varlen, (B, T, C) = ctx.varlen, ctx.shape
        N, H, G = varlen.sizes
        D = C // (H + 2 * G)
        table = by_batch[0].new_empty(N * H + 1, D)                                  # of gradients of outputs
        table[:-1] = grad.view(N * H, D)
        table[-1] = 0
        dparts = table.new_empty(sum(len(batch.rows) for batch in varlen.batches), D)
        begin = 0
        for i, batch in enumerate(varlen.batches):
            q, k, v, p = by_batch[4 * i:4 * i + 4]
            doutput = table.index_select(0, batch.grad_rows).view(q.shape)
            dq, dk, dv = varlen.split(dparts[begin:begin + len(batch.rows)], batch)
            begin += len(batch.rows)
            dscores = _softmax_backward(torch.bmm(doutput, v.transpose(1, 2)), p).mul_(ctx.scale)
            torch.bmm(p.transpose(1, 2), doutput, out=dv)
            torch.bmm(dscores, k, out=dq)
            torch.bmm(dscores.transpose(1, 2), q, out=dk)

        dx = F.embedding_bag(varlen.copies, dparts, varlen.copy_begins, mode='sum')
        dx = dx.view(H + 2 * G, N, D)
        dqkv = grad.new_empty(N, H + 2 * G, D)
        dheads = dqkv.transpose(0, 1)
        dqk, out = dx[:H + G], dheads[:H + G]
        dweights = _norm_and_rotate_backward(dqk, H, saved, q_weight, k_weight, cos, sin, out)
        dheads[H + G:].copy_(dx[H + G:])
        return dqkv.view(B, T, C), None, None, None, *dweights, None, None, None


class SharedPrefixAttention:
    """Attention over packed rows in which prompts have several continuations (see packed_mask), without the
    (T, T) scores of a document.

    Documents with their first continuation (trunks) are one batch of causal rows; the other continuations
    (branches) are another, each behind a copy of the prompt's keys.
    """

    def __init__(self, positions, segments):
        """positions (B, T), segments: their `continuations`."""
        device = positions.device
        trunks = torch.tensor([segment for segment in segments if not segment[1]], device=device)
        branches = torch.tensor([segment for segment in segments if segment[1]], device=device)
        begin, _, _, end = trunks.t()[:, :, None]                                               # (D, 1) each
        step = torch.arange(int((end - begin).max()), device=device)
        self.trunk = torch.minimum(begin + step, end - 1)         # (D, longest) tokens, the last one repeated
        in_trunk = step < end - begin

        begin, shared, start, end = branches.t()[:, :, None]                                    # (N, 1) each
        step = torch.arange(int((end - start).max()), device=device)
        prefix = torch.arange(int(shared.max()), device=device)
        self.query = torch.minimum(start + step, end - 1)                                       # (N, longest)
        shared_keys = begin + torch.minimum(prefix, shared - 1)
        self.key = torch.cat((shared_keys, self.query), 1)
        sees_prefix = (prefix < shared)[:, None].expand(-1, len(step), -1)
        sees_itself = (step <= step[:, None]).expand(len(branches), -1, -1)
        self.mask = torch.cat((sees_prefix, sees_itself), 2)[:, None]
        in_branch = start + step < end

        # the row of each token in the outputs of trunks and branches, laid end to end
        real = torch.cat((in_trunk.flatten(), in_branch.flatten()))
        tokens = torch.cat((self.trunk.flatten(), self.query.flatten()))
        self.order = torch.empty(positions.numel(), dtype=torch.long, device=device)
        self.order[tokens[real]] = real.nonzero().squeeze(1)
        # scores that are computed, padding included
        self.cost = self.trunk.numel() * self.trunk.size(1)
        self.cost += self.query.numel() * self.key.size(1)

    def attend(self, q, k, v, scale):
        """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D)."""
        B, H, T, D = q.shape
        grouped = H != k.size(1)
        flat_q, flat_k, flat_v = (x.transpose(1, 2).reshape(B * T, -1) for x in (q, k, v))

        def rows(flat, tokens):         # -> (n, heads, length, D)
            return F.embedding(tokens, flat).unflatten(-1, (-1, D)).transpose(1, 2)

        trunk = F.scaled_dot_product_attention(
            rows(flat_q, self.trunk), rows(flat_k, self.trunk), rows(flat_v, self.trunk),
            is_causal=True, scale=scale, enable_gqa=grouped)
        branch = F.scaled_dot_product_attention(
            rows(flat_q, self.query), rows(flat_k, self.key), rows(flat_v, self.key), self.mask,
            scale=scale, enable_gqa=grouped)
        trunk = trunk.transpose(1, 2).reshape(-1, H * D)
        branch = branch.transpose(1, 2).reshape(-1, H * D)
        y = F.embedding(self.order, torch.cat((trunk, branch)))
        return y.view(B, T, H, D).transpose(1, 2)


# ---- the head and what is read off it ----------------------------------------------------------------------

TILE = 2 ** 21      # logits of one tile of TokenStats: 8 MB of float32 stay in cache
DIRECT = 2 ** 23    # up to so many logits all of them at once are quicker, if logp alone is asked for
KEEP = 2 ** 28      # logits that are kept for backward at least: 1 GB


def kept_logits(device, memory=0):
    """So many logits are kept for the backward pass, which makes the others again: of a GPU those in a
    sixteenth of its `memory` in bytes (0: that of `device`)."""
    if device.type == 'cuda' and not memory:
        memory = torch.cuda.get_device_properties(device).total_memory
    return max(KEEP, int(memory) // 64)


def head(hidden, weight, softcap=0.0, dtype=None):
    """Logits (..., V): hidden (..., C) times weight (V, C), transposed, soft-capped (Gemma 2) where a cap is
    given; float32 from any precision, float64 from float64.

    dtype: bfloat16 where a GPU rounds both factors to it, the weight dithered. The logits are float32 there,
    too: rounded ones would bias every probability. A CPU has no such product and takes float32 factors.
    """
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        dtype = weight.dtype            # no float32 copy of the weight
    if dtype == torch.bfloat16 and weight.is_cuda:
        rows = hidden.reshape(-1, hidden.size(-1))
        z = Product.apply(rows, weight).view(*hidden.shape[:-1], -1)
    else:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        z = F.linear(hidden.to(dtype), weight.to(dtype))
    return softcap * torch.tanh(z / softcap) if softcap else z


def product(x, y):
    """x (N, C) times y (C, M), both of one dtype -> (N, M), float32 from bfloat16."""
    return torch.mm(x, y, out_dtype=torch.float32) if x.dtype == torch.bfloat16 else torch.mm(x, y)


class Product(torch.autograd.Function):
    """x (N, C) times weight (V, C), transposed, on a GPU, both rounded to bfloat16 -> (N, V) float32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.dtypes = x.dtype, weight.dtype
        x, weight = x.bfloat16(), in_bf16(weight)
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight), grad = ctx.saved_tensors, grad.bfloat16()
        dweight = product(grad.t(), x).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return product(grad, weight).to(ctx.dtypes[0]), dweight


class TargetLogp(torch.autograd.Function):
    """Log-probability of each target where all logits fit: logits (N, V), targets (N,) -> (N,), 0 where the
    target is -1. F.cross_entropy takes three more passes."""

    @staticmethod
    def forward(ctx, logits, targets):
        # Nothing that is returned or saved is changed in place: torch.compile on a GPU lost the gradient over
        # it.
        logp, unsupervised = logits.log_softmax(-1), targets < 0
        index = targets.clamp(min=0).unsqueeze(1)
        ctx.save_for_backward(logp, index, unsupervised)
        return logp.gather(1, index).squeeze(1).masked_fill(unsupervised, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logp, index, unsupervised = ctx.saved_tensors
        grad = grad.masked_fill(unsupervised, 0.0).unsqueeze(1)
        return logp.exp().mul_(-grad).scatter_add_(1, index, grad), None


def token_stats(hidden, weight, targets, temperature=1.0, softcap=0.0, extras=True, dtype=None):
    """hidden (..., C), weight (V, C), targets (...), -1 where unsupervised -> dict of (...): logp, entropy,
    mean_logp, correct (see TokenStats), 0 where unsupervised; logp alone without `extras`. dtype: see head;
    a CPU takes bfloat16 for the products of the backward pass alone."""
    if not extras and targets.numel() * len(weight) <= DIRECT:
        logits = head(hidden, weight, softcap, dtype)
        if temperature != 1.0:
            logits = logits / temperature
        logp = TargetLogp.apply(logits.view(-1, len(weight)), targets.flatten())
        return {'logp': logp.view(targets.shape)}
    mask = targets >= 0
    keep = kept_logits(hidden.device) if torch.is_grad_enabled() and not softcap else 0
    function = RowStats if has_triton(hidden.device) and hidden.dtype.itemsize < 8 else TokenStats
    bf16 = dtype == torch.bfloat16
    parts = function.apply(hidden[mask], weight, targets[mask], temperature, softcap, extras, keep, bf16)
    stats = {}
    for name, part in zip(('logp', 'entropy', 'mean_logp', 'correct'), parts):
        if part is not None:
            zeros = torch.zeros(targets.shape, dtype=part.dtype, device=part.device)
            stats[name] = zeros.masked_scatter(mask, part)
    return stats


class TokenStats(torch.autograd.Function):
    """Log-probabilities and their kin from hidden states; (N, V) is never held.

    hidden (N, C), weight (V, C), targets (N,) -> logp, entropy, mean_logp (N,) float32 (float64 from float64)
    and correct (N,) bool; the last three only with `extras`. With z the logits over temperature (soft-capped
    first) and p = softmax(z): logp = z_y - lse, entropy = lse - sum p z, mean_logp = mean z - lse; each takes
    its own incoming gradient per row.

    The vocabulary is walked in tiles that fit the cache, with a running maximum (Milakov & Gimelshein 2018,
    algorithm 3). Backward makes the logits again, but for the first `keep` of them, whose exponentials are
    kept: all of a small vocabulary. bf16: the gradients' products round their factors to bfloat16, as those
    of every other layer do; the logits stay as they are.
    """

    @staticmethod
    def logits(ctx, x, weight, buffer):
        """(N, n) for n rows of the head, in `buffer`; x is hidden times the scale that comes before the soft
        cap."""
        out = buffer[:len(x) * len(weight)].view(len(x), len(weight))
        z = torch.mm(x, weight.to(x.dtype).t(), out=out)
        return z.tanh_().mul_(ctx.cap) if ctx.softcap else z

    @staticmethod
    def locate(targets, tile):
        """(N,) whether the target stands in the tile, and (N, 1) in which of its columns (any, where it does
        not)."""
        column = (targets - tile.start).clamp_(0, tile.stop - tile.start - 1)
        return (targets >= tile.start) & (targets < tile.stop), column[:, None]

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, extras, keep, bf16=False):
        ctx.set_materialize_grads(False)
        N, V = len(hidden), len(weight)
        ctx.softcap, ctx.cap, ctx.scale = softcap, softcap / temperature, 1 / (softcap or temperature)
        ctx.bf16 = bf16
        width = min(max(TILE // max(N, 1) // ALIGN * ALIGN, 256), V)        # products like round sizes
        ctx.tiles = [slice(i, min(i + width, V)) for i in range(0, V, width)]
        ctx.keep = sum(tile.stop * N <= keep for tile in ctx.tiles)                   # so many tiles are kept
        x = hidden.to(torch.promote_types(weight.dtype, torch.float32)) * ctx.scale
        buffer = x.new_empty(N * width)
        kept = []
        # running values (N,) over the tiles: the largest logit and its column, the target's logit, sums of
        # exp(z - top), exp(z - top) z and z / V
        top, best = x.new_full((N,), float('-inf')), torch.zeros_like(targets)
        chosen, total, weighted, mean = x.new_zeros(4, N)
        for i, tile in enumerate(ctx.tiles):
            keep_tile = i < ctx.keep
            own_buffer = x.new_empty(N * width) if keep_tile else buffer
            z = TokenStats.logits(ctx, x, weight[tile], own_buffer)
            here, column = TokenStats.locate(targets, tile)
            chosen = torch.where(here, z.gather(1, column).squeeze(1), chosen)
            peak, argmax = z.max(-1) if extras else (z.amax(-1), None)
            previous, top = top, torch.maximum(top, peak)
            shrink = (previous - top).exp_()
            if extras:
                best = torch.where(peak > previous, argmax + tile.start, best)
                mean += z.sum(-1).div_(V)
                e = (z - top[:, None]).exp_()
                weighted = weighted * shrink + z.mul_(e).sum(-1)
            else:
                e = z.sub_(top[:, None]).exp_()
            total = total * shrink + e.sum(-1)
            if keep_tile:
                kept += [e, top]
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
        p_factor = -dlogp if dmean is None else -(dlogp + dmean)        # what each p is multiplied by
        dx, dweight = torch.zeros_like(x), None
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight, dtype=x.dtype)
        buffer = x.new_empty(len(x) * ctx.tiles[0].stop)
        if ctx.bf16:        # rows of zeros up to a multiple of ALIGN
            padded = -len(x) % ALIGN + len(x)
            rounded_dz = x.new_zeros(padded, ctx.tiles[0].stop, dtype=torch.bfloat16)
            rounded_x = F.pad(x, (0, 0, 0, padded - len(x))).bfloat16()
        for i, tile in enumerate(ctx.tiles):
            if i < ctx.keep and dentropy is None:
                e, top = kept[2 * i:2 * i + 2]
                out = buffer[:e.numel()].view(e.shape)
                factor = p_factor * (top - lse).exp_()
                dz = torch.mul(e, factor[:, None], out=out)
            else:
                z = TokenStats.logits(ctx, x, weight[tile], buffer)
                # of the soft cap, less its factor
                slope = 1 - (z / ctx.cap).square_() if ctx.softcap else None
                log_p = z.sub_(lse[:, None])
                if dentropy is None:
                    dz = log_p.exp_().mul_(p_factor[:, None])
                else:
                    p = log_p.exp()
                    dz = log_p.add_(entropy[:, None]).mul_(-dentropy[:, None])
                    dz = dz.add_(p_factor[:, None]).mul_(p)
            if dmean is not None:
                dz += dmean[:, None] / len(weight)
            here, column = TokenStats.locate(targets, tile)
            dz.scatter_add_(1, column, torch.where(here, dlogp, 0)[:, None])
            if ctx.softcap:
                dz.mul_(slope).mul_(ctx.cap)
            if ctx.bf16:
                dz_tile = rounded_dz[:, :dz.size(1)]
                dz_tile[:len(x)] = dz
                dx += torch.mm(dz_tile, weight[tile].bfloat16())[:len(x)]
                if dweight is not None:
                    dweight[tile] = torch.mm(dz_tile.t(), rounded_x)
            else:
                dx.addmm_(dz, weight[tile].to(dz.dtype))
                if dweight is not None:
                    torch.mm(dz.t(), x, out=dweight[tile])
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        return dx.mul_(ctx.scale).to(hidden.dtype), dweight, *[None] * 6


GPU_TILE = 2 ** 27      # logits of whole rows that a GPU holds at a time: 512 MB


class RowStats(torch.autograd.Function):
    """TokenStats on a GPU: tiles of whole rows, each read once by one kernel, and once more by the one that
    writes its gradient. bf16: the products round their factors to it; logits are float32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, extras, keep, bf16):
        ctx.set_materialize_grads(False)
        ctx.dtypes, V = (hidden.dtype, weight.dtype), len(weight)
        ctx.scale, ctx.cap = 1 / (softcap or temperature), softcap / temperature
        x = hidden.bfloat16() if bf16 else hidden.float()
        weight = in_bf16(weight) if bf16 else weight.float()
        rows = max(GPU_TILE // V, 1)
        ctx.tiles = [slice(i, min(i + rows, len(x))) for i in range(0, len(x), rows)] or [slice(0, 0)]
        stats, kept = [], []
        for tile in ctx.tiles:
            z = product(x[tile], weight.t())
            stats.append(triton_kernels().row_stats(z, targets[tile], ctx.scale, ctx.cap, extras))
            if tile.stop * V <= keep:
                kept.append(z)
        lse, logp, entropy, mean, best = (concat(part) if part[0] is not None else None
                                          for part in zip(*stats))
        ctx.save_for_backward(x, weight, targets, lse, entropy, *kept)
        if not extras:
            return logp, None, None, None
        correct = best == targets
        ctx.mark_non_differentiable(correct)
        return logp, entropy, mean, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy, dmean, _):
        x, weight, targets, lse, entropy, *kept = ctx.saved_tensors
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp.contiguous()
        if dentropy is not None or dmean is not None:
            dentropy, dmean = (torch.zeros_like(lse) if part is None else part.contiguous()
                               for part in (dentropy, dmean))
        dx, dweight = torch.empty_like(x, dtype=ctx.dtypes[0]), None
        for i, tile in enumerate(ctx.tiles):
            z = kept[i] if i < len(kept) else product(x[tile], weight.t())
            of_rows = [part if part is None else part[tile]
                       for part in (targets, lse, entropy, dlogp, dentropy, dmean)]
            dz = torch.empty_like(z, dtype=x.dtype)
            triton_kernels().row_grads(z, *of_rows, ctx.scale, ctx.cap, dz)
            dx[tile] = product(dz, weight)
            if ctx.needs_input_grad[1]:
                part = product(dz.t(), x[tile])
                dweight = part if dweight is None else dweight.add_(part)
        if dweight is not None:
            dweight = dweight.to(ctx.dtypes[1])
        return dx, dweight, *[None] * 6
