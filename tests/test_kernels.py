"""Each operation of kernels.py against its plain formula:
values and gradients, float64, float32 and bfloat16."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model import gelu_tanh
from nanoforge import kernels

DTYPES = [torch.float64, torch.float32]


def leaf(*shape, dtype=torch.float64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, dtype=torch.float64, generator=g) * scale).to(dtype).requires_grad_()


def agree(ours, plain, inputs, tolerance):
    """Values and the gradients of all inputs under one random incoming gradient."""
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    push = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(plain.dtype)
    grads = (torch.autograd.grad(y, inputs, push, retain_graph=True) for y in (ours, plain))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tolerance(dtype):
    return 1e-5 if dtype == torch.float32 else 1e-12


# ---- linear ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('sizes', [(6,), (6, 2, 2)])
def test_linear_stacks_its_weights(sizes, biased):
    x, weights = leaf(2, 3, 5), [leaf(n, 5, seed=i) for i, n in enumerate(sizes)]
    biases = [leaf(n, seed=9 + i) for i, n in enumerate(sizes)] if biased else []
    plain = torch.cat([F.linear(x, w, biases[i] if biased else None) for i, w in enumerate(weights)], -1)
    agree(kernels.linear(x, weights, biases), plain, [x, *weights, *biases], 1e-12)


def test_linear_in_bf16_rounds_factors_and_result_only():
    x, w, b = leaf(4, 64, dtype=torch.float32), leaf(8, 64, dtype=torch.float32), leaf(8, dtype=torch.float32)
    y = kernels.linear(x, [w], [b], bf16=True)
    assert y.dtype == torch.bfloat16
    rounded = [kernels.dither(t.detach()).double() for t in (w, b)]
    exact = x.bfloat16().double() @ rounded[0].t() + rounded[1]
    assert ((y.double() - exact).abs() <= exact.abs() * 2 ** -8 + 1e-3).all()
    grads = torch.autograd.grad(y, [x, w, b], torch.ones_like(y))
    assert {g.dtype for g in grads} == {torch.float32}
    torch.testing.assert_close(grads[1], x.detach().sum(0).expand(8, -1), rtol=2 ** -7, atol=0.05)


@pytest.mark.parametrize('act', [F.silu, gelu_tanh])
@pytest.mark.parametrize('dtype', DTYPES)
def test_gate_of_an_mlp(act, dtype):
    """In chunks, the last of them short, of what need not be contiguous."""
    gate, up = leaf(2, 400, 700, dtype=dtype), leaf(2, 700, 400, dtype=dtype).mT
    assert gate.numel() % kernels.GATE_CHUNK and gate.numel() > kernels.GATE_CHUNK
    agree(kernels.Gated.apply(act, gate, up), act(gate) * up, [gate, up], tolerance(dtype))


def test_a_large_gate_keeps_two_tensors():
    """All that the backward pass needs beside the incoming gradient; a small one keeps three."""
    def kept(rows):
        gate, up, seen = leaf(rows, 1024, dtype=torch.float32), leaf(rows, 1024, dtype=torch.float32), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
            kernels.gated(F.silu, gate * 1, up * 1)
        return len({x.data_ptr() for x in seen if x.numel() > 1})
    assert kept(1024) == 2 and kept(8) == 3


# ---- weights in bfloat16 -----------------------------------------------------------------------------------

def on_the_grid(*shape):
    return leaf(*shape, dtype=torch.float32, scale=0.1).detach().bfloat16().float()


def test_a_weight_on_bfloat16s_grid_stays_as_it_is():
    w = torch.cat([on_the_grid(64, 33).flatten(), torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-38])])
    w[-1] = w[-1].bfloat16()
    assert kernels.dither(w).float().equal(w)


def test_a_dithered_weight_is_one_of_its_two_neighbours_and_right_on_average():
    w = leaf(2000, 700, dtype=torch.float32).detach()           # longer than the thresholds, of both signs
    below = (w.view(torch.int32) & -65536).view(torch.float32)          # towards 0
    above = ((w.view(torch.int32) & -65536) + 65536).view(torch.float32)
    got = kernels.dither(w).float()
    assert (got.eq(below) | got.eq(above)).all()
    share = ((w - below) / (above - below)).double()
    for part in ((share > 0.2) & (share < 0.3), (share > 0.9), (share < 0.1)):
        assert abs(got.eq(above)[part].double().mean() - share[part].mean()) < 0.005


@pytest.mark.parametrize('step', [0.02, 0.1, 0.4])      # as a share of the distance to the next on the grid
def test_a_product_follows_an_update_below_bfloat16s_grid(step):
    w, x = on_the_grid(128, 4096), leaf(4096, dtype=torch.float64).detach()
    gap = 2 ** (w.abs().log2().floor() - 7)
    moved = w + step * gap * x.sign().float()
    wanted = ((moved.double() - w.double()) @ x).sum()
    followed = ((kernels.dither(moved).double() - w.double()) @ x).sum()
    assert abs(followed / wanted - 1) < 0.05
    unseen = moved.bfloat16().float().eq(w).double().mean()     # by rounding to nearest
    assert unseen > 0.99


def test_a_copy_is_read_until_it_is_dropped():
    x, w = leaf(2, 8, dtype=torch.float32), torch.nn.Parameter(leaf(4, 8, dtype=torch.float32).detach())
    kernels.keep_copies([w])
    before = kernels.linear(x, [w], bf16=True)
    with torch.no_grad():
        w += 1
    assert kernels.linear(x, [w], bf16=True).equal(before)
    kernels.update_copies([w])
    after = kernels.linear(x, [w], bf16=True)
    assert not after.equal(before)
    kernels.drop_copies([w])
    assert kernels.linear(x, [w], bf16=True).equal(after)


# ---- RMS norm ----------------------------------------------------------------------------------------------

def plain_rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(3, 16), (2, 5, 16), (2, 3, 4, 8)])
def test_rms_norm(shape, dtype):
    x, w = leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype)
    agree(kernels.rms_norm(x, w, 1e-3), plain_rms(x, w, 1e-3), [x, w], tolerance(dtype))


def test_rms_norm_of_a_transposed_view():
    """As q and k come: (B, T, H, D) seen as (B, H, T, D), and a slice of a wider tensor."""
    base, w = leaf(2, 5, 3, 24), leaf(8)
    x = base[..., 8:16].transpose(1, 2)
    agree(kernels.rms_norm(x, w, 1e-6), plain_rms(x, w, 1e-6), [base, w], 1e-12)


def test_rms_norm_gradcheck():
    assert torch.autograd.gradcheck(lambda x, w: kernels.rms_norm(x, w, 1e-2), (leaf(2, 3, 6), leaf(6)))
    assert torch.autograd.gradcheck(lambda x, w: kernels.rms_norm(x.transpose(0, 1), w, 1e-2), (leaf(2, 3, 6), leaf(6)))


def test_rms_norm_in_bf16_is_rounded_once():
    x, w = leaf(7, 512, dtype=torch.bfloat16, scale=3), leaf(512, dtype=torch.bfloat16)
    y = kernels.rms_norm(x, w, 1e-6)
    assert y.dtype == torch.bfloat16
    exact = plain_rms(x.double(), w.double(), 1e-6)
    assert ((y.double() - exact).abs() <= exact.abs() * 2 ** -8 * 1.01).all()  # half a unit in the last place


# ---- rotary positions --------------------------------------------------------------------------------------

def angles(T, D, dtype=torch.float64):
    angle = torch.arange(T)[:, None] / 100 ** (torch.arange(D // 2) / (D // 2))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def plain_rotate(x, cos, sin):
    """As complex numbers: dimension i pairs with i + D/2."""
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize('dtype', DTYPES)
def test_rotate(dtype):
    x, (cos, sin) = leaf(2, 3, 7, 8, dtype=dtype), angles(7, 8, dtype)
    agree(kernels.rotate(x, cos, sin), plain_rotate(x, cos, sin), [x], tolerance(dtype))
    view = leaf(2, 7, 3, 8, dtype=dtype)
    turned = view.transpose(1, 2)
    agree(kernels.rotate(turned, cos, sin), plain_rotate(turned, cos, sin), [view], tolerance(dtype))
    assert torch.equal(kernels.rotate(x, cos, sin)[:, :, 0], x[:, :, 0])            # position 0 does not turn


def test_rotate_gradcheck():
    cos, sin = angles(4, 6)
    assert torch.autograd.gradcheck(lambda x: kernels.rotate(x, cos, sin), (leaf(2, 4, 6),))


# ---- short attention ---------------------------------------------------------------------------------------

def plain_attention(qkv, H, scale, q_weight, k_weight, eps, cos, sin):
    B, T, C = qkv.shape
    q, k, v = (x.view(B, T, H, -1).transpose(1, 2) for x in qkv.chunk(3, -1))
    if q_weight is not None:
        q, k = plain_rms(q, q_weight, eps), plain_rms(k, k_weight, eps)
    if cos is not None:
        q, k = plain_rotate(q, cos, sin), plain_rotate(k, cos, sin)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C // 3)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('normed', [False, True])
@pytest.mark.parametrize('rotated', [False, True])
def test_short_attention(normed, rotated, dtype):
    B, T, H, D = 2, 9, 3, 4
    qkv, eps = leaf(B, T, 3 * H * D, dtype=dtype), 1e-3
    weights = [leaf(D, dtype=dtype), leaf(D, dtype=dtype, seed=1)] if normed else []
    cos, sin = angles(T, D, dtype) if rotated else (None, None)
    rest = (H, 0.4, *(weights or (None, None)), eps, cos, sin)
    agree(kernels.ShortAttention.apply(qkv, *rest, kernels.causal_mask(T, dtype)), plain_attention(qkv, *rest), [qkv, *weights], tolerance(dtype))
    if dtype == torch.float64:
        call = lambda qkv, *w: kernels.ShortAttention.apply(qkv, H, 0.4, *(w or (None, None)), eps, cos, sin, kernels.causal_mask(T, dtype))
        assert torch.autograd.gradcheck(call, (qkv, *weights))


def test_short_attention_in_bf16():
    qkv, w = leaf(2, 16, 3 * 2 * 8, dtype=torch.float32), leaf(8, dtype=torch.float32)
    rest = (2, 8 ** -0.5, w, w, 1e-6, *angles(16, 8, torch.float32))
    plain = plain_attention(qkv, *rest)
    rounded = qkv.detach().bfloat16().requires_grad_()
    ours = kernels.ShortAttention.apply(rounded, *rest, kernels.causal_mask(16, torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    push = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    expected, = torch.autograd.grad(plain, [qkv], push)
    got, = torch.autograd.grad(ours, [rounded], push.bfloat16())
    assert (ours.float() - plain).abs().max() < 0.03 and (got.float() - expected).norm() < 0.03 * expected.norm()


# ---- token statistics --------------------------------------------------------------------------------------

def plain_stats(hidden, weight, targets, temperature=1.0, softcap=0.0):
    z = hidden @ weight.t()
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    log_p = z.log_softmax(-1)
    logp, entropy = log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    return logp, entropy, log_p.mean(-1), z.argmax(-1) == targets


@pytest.fixture(params=['one tile', 'many tiles', 'some kept', 'all kept'])
def tiling(request, monkeypatch):
    """How many logits are kept, with tiles to match for N=11, V=700:
    they are never narrower than 256 columns."""
    tile, keep = {'one tile': (2 ** 20, 0), 'many tiles': (1, 0), 'some kept': (1, 300 * 11),
                  'all kept': (1, 2 ** 20)}[request.param]
    monkeypatch.setattr(kernels, 'TILE', tile)
    return keep


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('temperature, softcap', [(1.0, 0.0), (0.7, 0.0), (1.0, 2.0), (1.3, 2.0)])
def test_token_stats(tiling, dtype, temperature, softcap):
    hidden, weight = leaf(11, 6, dtype=dtype), leaf(700, 6, dtype=dtype)
    targets = torch.randint(0, 700, (11,), generator=torch.Generator().manual_seed(2))
    targets[:4] = torch.tensor([0, 255, 256, 699])                                  # at the edges of tiles
    targets[4] = (hidden @ weight.t())[4].argmax()
    ours = kernels.TokenStats.apply(hidden, weight, targets, temperature, softcap, True, 0 if softcap else tiling)
    plain = plain_stats(hidden, weight, targets, temperature, softcap)
    assert torch.equal(ours[3], plain[3]) and ours[3][4]
    for used in ([0], [1], [2], [0, 1], [0, 1, 2]):                     # gradients come into any of the three
        stacked = (torch.stack([parts[i] for i in used]) for parts in (ours, plain))
        agree(*stacked, [hidden, weight], 3 * tolerance(dtype))
    alone = kernels.TokenStats.apply(hidden, weight, targets, temperature, softcap, False, 0 if softcap else tiling)
    assert alone[1:] == (None, None, None)
    agree(alone[0], plain[0], [hidden, weight], 3 * tolerance(dtype))


def test_token_stats_gradcheck(tiling):
    hidden, weight, targets = leaf(5, 3), leaf(300, 3), torch.tensor([0, 299, 255, 256, 7])
    for softcap in (0.0, 1.5):
        keep = 0 if softcap else tiling
        call = lambda h, w: torch.stack(kernels.TokenStats.apply(h, w, targets, 0.8, softcap, True, keep)[:3])
        assert torch.autograd.gradcheck(call, (hidden, weight), fast_mode=True)


def test_token_stats_without_rows(tiling):
    hidden, weight = leaf(0, 6), leaf(700, 6)
    for extras in (True, False):
        logp = kernels.TokenStats.apply(hidden, weight, torch.zeros(0, dtype=torch.long), 1.0, 0.0, extras, tiling)[0]
        grads = torch.autograd.grad(logp.sum(), [hidden, weight])
        assert logp.shape == (0,) and grads[0].shape == (0, 6) and not grads[1].any() and grads[1].shape == (700, 6)


def test_token_stats_of_huge_logits():
    """Certain to within rounding: nothing overflows, log-probabilities do not exceed 0,
    gradients are finite."""
    hidden, weight = leaf(6, 4, dtype=torch.float32, scale=300), leaf(900, 4, dtype=torch.float32)
    best = (hidden @ weight.t()).argmax(1)
    logp, entropy, _, correct = kernels.TokenStats.apply(hidden, weight, best, 1.0, 0.0, True, 0)
    assert correct.all() and (logp <= 0).all() and (entropy >= 0).all()
    grads = torch.autograd.grad((logp + entropy).sum(), [hidden, weight])
    assert all(g.isfinite().all() for g in grads)


def test_gradients_of_the_head_by_products_in_bf16(tiling):
    """The values are those of float32; the gradients are off by no more than the rounding of factors and results."""
    hidden, weight = leaf(11, 64, dtype=torch.float32), leaf(700, 64, dtype=torch.float32, seed=1)
    targets = torch.randint(0, 700, (11,), generator=torch.Generator().manual_seed(2))
    got, want = (kernels.TokenStats.apply(hidden, weight, targets, 0.8, 0.0, True, tiling, bf16) for bf16 in (True, False))
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    for a, b in zip(*(torch.autograd.grad((s[0] + 0.1 * s[1]).sum(), [hidden, weight]) for s in (got, want))):
        assert a.dtype == torch.float32 and 0 < ((a - b).norm() / b.norm()).item() < 2 ** -7
    frozen = kernels.TokenStats.apply(hidden, weight.detach(), targets, 0.8, 0.0, False, tiling, True)[0]
    assert torch.autograd.grad(frozen.sum(), hidden)[0].isfinite().all()


def test_token_stats_in_bf16_are_computed_in_float32():
    hidden, weight = leaf(11, 64, dtype=torch.bfloat16), leaf(700, 64, dtype=torch.bfloat16)
    targets = torch.randint(0, 700, (11,), generator=torch.Generator().manual_seed(2))
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    ours = kernels.TokenStats.apply(hidden, weight, targets, 1.0, 0.0, False, 0)[0]
    plain = plain_stats(*wide, targets)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.sum(), [hidden, weight]), torch.autograd.grad(plain.sum(), wide)):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2 ** -8, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_head_is_float32(dtype):
    hidden, weight = leaf(2, 3, 64, dtype=dtype), leaf(50, 64, dtype=dtype)
    torch.testing.assert_close(kernels.head(hidden, weight), hidden.float() @ weight.float().t(), rtol=1e-6, atol=1e-5)


def test_masked_targets_have_zeros_and_no_gradient(monkeypatch):
    hidden, weight = leaf(2, 5, 6), leaf(30, 6)
    targets = torch.tensor([[-1, 3, -1, 29, 0], [-1] * 5])
    stats = kernels.token_stats(hidden, weight, targets, 0.9)
    plain = plain_stats(hidden.flatten(0, 1), weight, targets.flatten().clamp(min=0), 0.9)
    for name, expected in zip(('logp', 'entropy', 'mean_logp', 'correct'), plain):
        torch.testing.assert_close(stats[name], expected.view(2, 5) * (targets >= 0))
    grad, = torch.autograd.grad(stats['logp'].sum(), hidden)
    assert grad[0, 1].any() and not grad[targets < 0].any()
    for direct in (0, 2 ** 20):
        monkeypatch.setattr(kernels, 'DIRECT', direct)
        empty = kernels.token_stats(hidden, weight, torch.full((2, 5), -1), extras=False)['logp']
        assert empty.shape == (2, 5) and not any(g.any() for g in torch.autograd.grad(empty.sum(), [hidden, weight]))


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(kernels, 'TILE', 1)
    hidden, weight, used, real = leaf(11, 6), leaf(700, 6), set(), kernels.TokenStats.logits
    monkeypatch.setattr(kernels.TokenStats, 'logits', staticmethod(
        lambda ctx, x, w, buffer: used.add(buffer.data_ptr()) or real(ctx, x, w, buffer)))
    with torch.no_grad():
        kernels.token_stats(hidden, weight, torch.zeros(11, dtype=torch.long))
    assert len(used) == 1
    logp = kernels.token_stats(hidden, weight, torch.zeros(11, dtype=torch.long))['logp']
    assert len(used) > 2 and logp.requires_grad


@pytest.mark.parametrize('temperature, softcap', [(1.0, 0.0), (0.7, 2.0)])
def test_the_direct_path_computes_the_same(monkeypatch, temperature, softcap):
    hidden, weight, targets = leaf(2, 5, 6), leaf(30, 6), torch.tensor([[-1, 3, -1, 29, 0], [-1] * 5])
    direct = kernels.token_stats(hidden, weight, targets, temperature, softcap, extras=False)['logp']
    monkeypatch.setattr(kernels, 'DIRECT', 0)
    tiled = kernels.token_stats(hidden, weight, targets, temperature, softcap, extras=False)['logp']
    agree(direct, tiled, [hidden, weight], 1e-12)


def test_document_lengths():
    # the second row begins in the middle of a document
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 0, 1]])
    assert kernels.document_lengths(positions).tolist() == [3, 2, 2, 1, 2]


@pytest.mark.parametrize('window', [0, 2])
def test_packed_mask_is_the_path_to_the_root(window):
    """Every place with the ones it sees, written out by hand:
    continuations, documents, a row that begins inside one."""
    rows = torch.tensor([[0, 1, 2, 2, 3, 1, 0, 1, 1], [3, 4, 0, 1, 1, 2, 1, 2, 0]])
    paths = [[(0,), (0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 3, 4), (0, 5), (6,), (6, 7), (6, 8)],
             [(0,), (0, 1), (2,), (2, 3), (2, 4), (2, 4, 5), (2, 6), (2, 6, 7), (8,)]]
    expected = torch.zeros(2, 9, 9, dtype=torch.bool)
    for row in range(2):
        for i, path in enumerate(paths[row]):
            expected[row, i, list(path[-window:])] = True
    assert torch.equal(kernels.packed_mask(rows, window), expected)
    assert torch.equal(kernels.packed_mask(rows[0], window), expected[0])


@pytest.mark.parametrize('heads, groups', [(4, 4), (4, 2)])
def test_shared_prefixes_attend_as_the_mask_says(heads, groups):
    """Two rows, documents with none, one and three further continuations, one of a single token;
    values and gradients."""
    spans = [[(0, 6), (4, 7), (4, 5), (4, 9), (0, 3)], [(0, 2), (1, 5), (0, 4), (0, 7), (7, 8), (2, 5)]]
    rows = [torch.cat([torch.arange(*span) for span in row]) for row in spans]
    T = min(map(len, rows))
    positions = torch.stack([row[:T] for row in rows])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, T, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (heads, groups, groups))
    got = kernels.SharedPrefixAttention(positions, kernels.continuations(positions)).attend(q, k, v, 0.3)
    repeat = lambda x: x.repeat_interleave(heads // groups, 1)
    scores = (q @ repeat(k).transpose(2, 3) * 0.3).masked_fill(~kernels.packed_mask(positions)[:, None], float('-inf'))
    want = scores.softmax(-1) @ repeat(v)
    assert torch.allclose(got, want, atol=1e-12)
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), (q, k, v)), torch.autograd.grad((want * weight).sum(), (q, k, v))):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize('window', [0, 3])
@pytest.mark.parametrize('H, G', [(4, 4), (4, 2)])
@pytest.mark.parametrize('normed', [False, True])
def test_varlen_batches_attend_as_the_mask_says(H, G, normed, window, monkeypatch):
    """As above by VarlenAttention, with spans of unlike lengths in a batch and batches cut small;
    gradients of weights, too."""
    monkeypatch.setattr(kernels, 'SCORES', 2 ** 12)
    spans = [[(0, 6), (4, 7), (4, 5), (4, 9), (0, 30)], [(0, 2), (1, 5), (0, 34), (34, 36), (20, 37), (2, 5)]]
    rows = [torch.cat([torch.arange(*span) for span in row]) for row in spans]
    T, D, eps = min(map(len, rows)), 8, 1e-3
    positions = torch.stack([row[:T] for row in rows])
    qkv, weights = leaf(2, T, (H + 2 * G) * D), [leaf(D, seed=1), leaf(D, seed=2)] if normed else []
    angle = positions[:, None, :, None] / torch.arange(1, D // 2 + 1)
    cos, sin = angle.double().cos(), angle.double().sin()
    spans = kernels.VarlenBatches(positions, kernels.continuations(positions), H, G)
    got = kernels.VarlenAttention.apply(qkv, spans, window, 0.3, *(weights or (None, None)), eps, cos, sin)
    q, k, v = qkv.view(2, T, -1, D).transpose(1, 2).split([H, G, G], 1)
    if normed:
        q, k = plain_rms(q, weights[0], eps), plain_rms(k, weights[1], eps)
    q, k, v = plain_rotate(q, cos, sin), *(x.repeat_interleave(H // G, 1) for x in (plain_rotate(k, cos, sin), v))
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~kernels.packed_mask(positions, window)[:, None], -math.inf)
    agree(got, (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, T, -1), [qkv, *weights], 1e-12)


def rows_of_spans(*rows):
    """Each row a list of (begin, end) of positions -> (rows, T)."""
    rows = [torch.cat([torch.arange(*span) for span in row]) for row in rows]
    return torch.stack([row[:min(map(len, rows))] for row in rows])


# three documents, the second with three more branches; documents longer and shorter than a block
LONG_ROWS = [(0, 300), (0, 90), (40, 200), (60, 70), (80, 190), (0, 400)], [(0, 700), (650, 653), (0, 20), (0, 380)]


@pytest.mark.parametrize('window', [0, 40, 128, 200])
def test_flex_mask_says_what_packed_mask_says(window):
    """Blocks that are left out hold nothing, blocks without a mask all, and the others what mask_mod says."""
    positions = rows_of_spans(*LONG_ROWS)[:, :1024]
    mask = kernels.flex_mask(positions, window)
    B, n, size = len(positions), positions.size(1) // kernels.FLEX_BLOCK, kernels.FLEX_BLOCK
    index = torch.arange(n * size)
    got, computed, in_vain = torch.zeros(B, n * size, n * size, dtype=torch.bool), 0, 0
    kinds = [(mask.kv_num_blocks, mask.kv_indices, False), (mask.full_kv_num_blocks, mask.full_kv_indices, True)]
    for (count, order, whole), b, i in itertools.product(kinds, range(B), range(n)):
        for j in order[b, 0, i, :count[b, 0, i]].tolist():
            rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            part = mask.mask_mod(torch.tensor(b), 0, index[rows, None], index[None, columns])
            assert not got[b, rows, columns].any()
            computed, in_vain = computed + 1, in_vain + (not part.any())
            got[b, rows, columns] = True if whole else part
    assert torch.equal(got, kernels.packed_mask(positions, window))
    assert in_vain <= computed // 5 and (window or mask.full_kv_num_blocks.sum() > 10), (in_vain, computed)


@pytest.mark.parametrize('window', [0, 40])
def test_segments_of_flash_attention_are_the_mask(window):
    """Each stretch of queries under a causal mask that is aligned at the ends, as flash attention has it."""
    for positions in (rows_of_spans(*LONG_ROWS), torch.tensor([[3, 4, 0, 1, 2, 1, 2, 3, 0], [0, 1, 1, 1, 2, 2, 0, 0, 1]])):
        segments = kernels.flash_segments(positions)
        tokens = torch.arange(positions.numel())
        keys = tokens if segments.keys is None else segments.keys
        got = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        spans = [list(itertools.pairwise(begins.tolist())) for begins in segments[:2]]
        for (begin, end), (first, last) in zip(*spans):
            place = torch.arange(last - first)
            ahead = place[-(end - begin):, None] - place
            got[begin:end, keys[first:last]] = (ahead >= 0) & (ahead < (window or last))
        longest = [max(end - begin for begin, end in pairs) for pairs in spans]
        assert torch.equal(got, torch.block_diag(*kernels.packed_mask(positions, window).int()).bool())
        assert longest == [segments.longest_query, segments.longest_key]


def test_linear_layers_of_a_gpu(monkeypatch):
    """Those of a CPU in bfloat16, with gradients of the weights that are float32; torch has such products on a GPU."""
    monkeypatch.setattr(kernels, 'product', lambda x, y: x.float() @ y.float())
    x, weights, biases = leaf(2, 5, 24).float(), [leaf(n, 24, seed=n).float() for n in (8, 4)], [leaf(n, seed=n).float() for n in (8, 4)]
    parameters = [p.detach().requires_grad_() for p in (x, *weights, *biases)]
    x, *rest = parameters
    got = kernels.LinearOnGPU.apply(x, 2, *rest)
    want = kernels.linear(x, rest[:2], rest[2:], bf16=True)
    push = torch.randn(want.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(got, want)
    exact = push.float().flatten(0, 1)
    wanted = torch.autograd.grad(want, parameters, push)
    for grad, theirs in zip(torch.autograd.grad(got, parameters, push), wanted):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, theirs, rtol=2e-2, atol=2e-2)
    grad, = torch.autograd.grad(kernels.LinearOnGPU.apply(x, 2, *rest), rest[:1], push)
    torch.testing.assert_close(grad, exact[:, :8].t() @ x.detach().bfloat16().float().flatten(0, 1))
    frozen = kernels.LinearOnGPU.apply(x, 2, *(p.detach() for p in rest))
    torch.testing.assert_close(torch.autograd.grad(frozen, x, push)[0], wanted[0], rtol=2e-2, atol=2e-2)


def test_a_head_in_bfloat16(monkeypatch):
    """Logits are float32 from factors in bfloat16, the weight dithered; the gradient is that of the rounded factors."""
    monkeypatch.setattr(kernels, 'product', lambda x, y: x.float() @ y.float())
    x, weight, targets = leaf(6, 24).float(), leaf(50, 24, seed=1).float(), torch.tensor([3, -1, 0, 49, 7, 7])
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    got = kernels.TargetLogp.apply(kernels.Product.apply(x, weight), targets)
    rounded = [x.detach().bfloat16().float().requires_grad_(), kernels.dither(weight.detach()).float().requires_grad_()]
    want = kernels.token_stats(*rounded, targets, extras=False)['logp']
    torch.testing.assert_close(got, want)
    for grad, theirs in zip(torch.autograd.grad(got.sum(), (x, weight)), torch.autograd.grad(want.sum(), rounded)):
        torch.testing.assert_close(grad, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('window, softcap', [(0, 0.0), (40, 0.0), (0, 3.0), (150, 3.0)])
def test_flex_attention_is_attention_under_the_mask(window, softcap, monkeypatch):
    """Values and gradients, where flex runs uncompiled; torch refuses gradients on a CPU, which it has."""
    monkeypatch.setattr('torch.nn.attention.flex_attention._validate_device', lambda q, k, v: None)
    monkeypatch.setattr(kernels, 'takes_flex', lambda *_: True)
    positions = rows_of_spans(*LONG_ROWS)[:, :600]
    B, T, kind = *positions.shape, 'sliding_attention' if window else 'full_attention'
    cfg = SimpleNamespace(layer_types=[kind], window=lambda _: window or T, attn_scale=0.3, attn_softcap=softcap,
                          n_head=4, n_kv_head=2)
    context = kernels.AttentionContext(cfg, {}, positions, positions, compiled=True)
    q, k, v = leaf(B, 4, T, 16), leaf(B, 2, T, 16, seed=1), leaf(B, 2, T, 16, seed=2)
    want = kernels.attention(q, k, v, kernels.packed_mask(positions, window)[:, None], 0.3, softcap)
    agree(context.attention(q, k, v, kind), want, [q, k, v], 1e-6 if softcap else 1e-10)
