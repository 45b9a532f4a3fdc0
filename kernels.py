"""The few operations for which torch's own CPU form is slow at the sizes people train on a CPU, each beside its plain meaning.

Everything here computes what its docstring says, in float32 unless `bf16` is asked for, and is checked against the plain
formula in tests/test_kernels.py. On a GPU torch's own kernels are used (model.py chooses).
"""
import torch
import torch.nn.functional as F


def linear(x, weights, biases=(), bf16=False):
    """x (..., K) times the stacked `weights`, each (N_i, K) -> (..., sum of N_i).

    bf16: both factors are rounded to bfloat16 and multiplied with float32 sums (twice the speed where the processor has it); the
    result stays bfloat16, gradients reach the float32 weights as float32.
    """
    weight = torch.cat([w.bfloat16() if bf16 else w for w in weights]) if len(weights) > 1 else weights[0]
    bias = torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None
    if not bf16:
        return F.linear(x, weight, bias)
    return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4)."""
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
        out, scale = _rms_forward(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scale, weight = ctx.saved_tensors
        return *_rms_backward(grad.contiguous(), x, scale, weight), None


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, eq. 34) on halves, as Llama stores them. x (..., T, D), cos and sin (..., T, D/2)."""
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
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos.to(grad.dtype), -sin.to(grad.dtype), torch.empty_like(grad)), None, None


class ShortAttention(torch.autograd.Function):
    """QK norm, rotary positions and causal attention of a short block on a CPU, as one node of batched products.

    qkv (B, T, 3 * H * D), heads of q, then of k, then of v -> (B, T, H * D). Below about two hundred positions the batched
    products beat torch's blockwise attention, whose backward is slow on a CPU, and one node saves a dozen copies a layer.
    q_weight, k_weight (D,) or None: RMS norm of each head; cos, sin (T, D/2) or None: rotary positions. Products run in the dtype
    of qkv; norm, rotation and softmax in float32.
    """

    @staticmethod
    def forward(ctx, qkv, n_head, scale, q_weight, k_weight, eps, cos, sin):
        B, T, C = qkv.shape
        H, D = n_head, C // n_head // 3
        split = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)              # (3, B, H, T, D)
        norms, x = None, split
        if q_weight is not None or cos is not None:                         # at least float32 for norm and rotation
            raw = split[:2].to(torch.promote_types(qkv.dtype, torch.float32), memory_format=torch.contiguous_format)
            qk = raw
            if q_weight is not None:
                (q, q_scale), (k, k_scale) = _rms_forward(raw[0], q_weight, eps), _rms_forward(raw[1], k_weight, eps)
                qk, norms = torch.stack((q, k)), (raw, q_scale, k_scale)
            if cos is not None:
                qk = _rotate(qk, cos, sin, torch.empty_like(qk))
            x = torch.empty(3, B, H, T, D, dtype=qkv.dtype)
            x[:2].copy_(qk)
            x[2].copy_(split[2])
        x = x.reshape(3, B * H, T, D)
        q, k, v = x.unbind(0)                                               # (B * H, T, D) each
        future = torch.full((T, T), float('-inf'), dtype=q.dtype).triu_(1)
        p = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scale).softmax(-1)        # (B * H, T, T)
        ctx.save_for_backward(x, p, q_weight, k_weight, cos, sin, *(norms or ()))
        ctx.sizes, ctx.scale = (B, T, H, D), scale
        return torch.bmm(p, v).view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)

    @staticmethod
    def backward(ctx, grad):
        x, p, q_weight, k_weight, cos, sin, *norms = ctx.saved_tensors
        (B, T, H, D), (q, k, v) = ctx.sizes, x.unbind(0)
        grad = grad.view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        dx = torch.empty_like(x)
        torch.bmm(p.transpose(1, 2), grad, out=dx[2])
        dscores = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
        torch.bmm(dscores, k, out=dx[0])
        torch.bmm(dscores.transpose(1, 2), q, out=dx[1])
        dx[:2].mul_(ctx.scale)
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
                raw, q_scale, k_scale = norms
                dq, dq_weight = _rms_backward(dqk[0], raw[0], q_scale, q_weight)
                dk, dk_weight = _rms_backward(dqk[1], raw[1], k_scale, k_weight)
                dqk = (dq, dk)
            split[0].copy_(dqk[0])
            split[1].copy_(dqk[1])
            split[2].copy_(dx[2])
        return out.view(B, T, 3 * H * D), None, None, dq_weight, dk_weight, None, None, None


class TokenStats(torch.autograd.Function):
    """Log-probabilities and their kin from hidden states, a chunk of rows at a time; logits are recomputed in backward.

    hidden (N, C), weight (V, C), targets (N,) -> logp, entropy, mean_logp (N,) float32 and correct (N,) bool. With z the
    logits over temperature and p = softmax(z): logp = z_y - lse, entropy = lse - sum p z, mean_logp = mean z - lse; each takes
    its own incoming gradient per row. Peak memory is one chunk of logits, never (N, V).
    """

    @staticmethod
    def _logits(hidden, weight, bias, temperature, softcap):
        z = F.linear(hidden.float() if hidden.dtype != torch.float64 else hidden, weight, bias)
        if softcap:
            z = z.div_(softcap).tanh_().mul_(softcap)
        return z.div_(temperature) if temperature != 1.0 else z

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, chunk):
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp, entropy, mean_logp = (torch.empty(len(hidden), dtype=kind, device=hidden.device) for _ in range(3))
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        lse = torch.empty_like(logp)
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            z = TokenStats._logits(hidden[rows], weight, bias, temperature, softcap)
            lse[rows] = z.logsumexp(-1)
            logp[rows] = z.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
            mean_logp[rows] = z.mean(-1) - lse[rows]
            correct[rows] = z.argmax(-1) == targets[rows]
            p = (z - lse[rows, None]).exp_()
            entropy[rows] = lse[rows] - torch.linalg.vecdot(p, z)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.settings = temperature, softcap, chunk
        ctx.mark_non_differentiable(correct)
        return logp, entropy, mean_logp, correct

    @staticmethod
    def backward(ctx, dlogp, dentropy, dmean, _):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, softcap, chunk = ctx.settings
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        dbias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        uses_entropy = bool(dentropy.any())
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            z = TokenStats._logits(hidden[rows], weight, bias, temperature, softcap)
            slope = 1 - (z * temperature / softcap).square() if softcap else None       # derivative of the soft cap
            if uses_entropy:
                log_p = z.sub_(lse[rows, None])
                p = log_p.exp()
                dz = log_p.add_(entropy[rows, None]).mul_(p).mul_(-dentropy[rows, None])
                dz.addcmul_(p, -(dlogp + dmean)[rows, None])
            else:
                dz = z.sub_(lse[rows, None]).exp_().mul_(-(dlogp + dmean)[rows, None])
            dz.add_(dmean[rows, None] / z.size(1))
            dz.scatter_add_(1, targets[rows, None], dlogp[rows, None])
            dz = dz.div_(temperature) if slope is None else dz.mul_(slope).div_(temperature)
            dhidden[rows] = (dz @ weight).to(hidden.dtype)
            if dweight is not None:
                dweight.addmm_(dz.t(), hidden[rows].to(dz.dtype))
            if dbias is not None:
                dbias += dz.sum(0)
        return dhidden, dweight, dbias, None, None, None, None
