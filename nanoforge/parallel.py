"""Tensor parallelism on our GPT: the ranks of a group hold a shard of every layer's heads and inner channels,
and run together.

    run = Run.open(..., share=functools.partial(init_tp, shards=2))     # two neighbouring ranks hold a model
    shard_model(model, run)                                             # in place, after loading
    full = gather_model(model, run)                                     # on every rank, to save it

With one shard all three leave what they are given as it is.

As in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3): the projections into heads and inner
channels are column parallel (each rank has some outputs: rows of the weight), those out of them row parallel
(some inputs), with one sum over the group behind each. Embedding, norms and head are whole on every rank and
stay equal, as their gradients are.
"""
import copy
import re
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn

from configurator import UserError
from model import GPT
from nanoforge import kernels
from nanoforge.hf import load_weights
from nanoforge.kernels import Linear
from nanoforge.run import Run

COLWISE = r'\.(q|k|v|gate|up)_proj\.(weight|bias)$'      # cut in dimension 0, the output channels
ROWWISE = r'\.(o|down)_proj\.weight$'                    # cut in dimension 1, the input channels
PARTIAL = r'\.(q|k)_norm\.weight$'      # whole on every rank, each sees the gradient of its own heads only


@dataclass
class ShardedRun(Run):
    """A Run whose ranks share models. `rank`, `world_size`, sum() and gather() are those of data parallelism:
    the processes that hold one model count as one."""
    shards: int = 1
    shard_index: int = 0
    first: bool = True          # of all processes
    dp_group: object = None     # process group of the ranks that hold this shard of other copies
    tp_group: object = None     # process group of the ranks that hold the shards of this copy

    @property
    def is_main(self):
        return self.first

    def max(self, value):
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)      # over all processes
        return int(tensor)

    def clip_grad_norm(self, optimizer, max_norm):
        """As the optimizer's own: the norm is that of the whole model's gradient.

        First the gradients of what each shard saw a part of are summed over the shards.
        """
        grads = optimizer.grads                                     # which puts p.grad in place
        squares = torch.zeros(2, device=self.device)                # of what is cut, of what is not
        for flat in optimizer.flats:
            for name, p in zip(flat.names, flat.params):
                if re.search(PARTIAL, name):
                    dist.all_reduce(p.grad, group=self.tp_group)
                squares[int(dimension(name) is None)] += p.grad.square().sum()
        dist.all_reduce(squares[0], group=self.tp_group)
        norm = squares.sum().sqrt()
        if max_norm > 0 and norm.isfinite():
            for grad in grads:
                grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def optimizer_state(self, optimizer):
        return gather(optimizer.state_dict(), self)

    def load_optimizer_state(self, optimizer, tensors):
        optimizer.load_state_dict({key: shard_tensor(key, tensor, self) for key, tensor in tensors.items()})


def init_tp(run, shards):
    """A Run -> ShardedRun, `shards` neighbouring ranks to a copy of each model; the Run itself for one shard.
    UserError where the ranks do not come out even."""
    if shards == 1:
        return run
    if run.world_size % shards:
        raise UserError(f'GPU_num={shards} ranks hold a model, but there are {run.world_size}: start '
                        f'a multiple of {shards}')
    copies = run.world_size // shards
    tp_groups = [dist.new_group(range(c * shards, (c + 1) * shards)) for c in range(copies)]
    dp_groups = [dist.new_group(range(s, run.world_size, shards)) for s in range(shards)]
    copy_of, shard = divmod(run.rank, shards)
    return ShardedRun(run.device, run.dtype, run.matmul, copy_of, run.local_rank, copies, shards, shard,
                      run.rank == 0, dp_groups[shard], tp_groups[copy_of])


class CopyToGroup(torch.autograd.Function):
    """The same input on every shard; its gradient is the sum of the shards' gradients (Megatron-LM's f)."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class ReduceFromGroup(torch.autograd.Function):
    """The sum of the shards' partial outputs; each shard gets its gradient as it is (Megatron-LM's g)."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class RowwiseLinear(Linear):
    """A linear layer of which each shard holds some input channels: x (..., in / shards) -> the whole output
    (..., out). A class of its own, so that the sampler calls it as it is."""
    group = None

    def forward(self, x):
        y = ReduceFromGroup.apply(kernels.linear(x, [self.weight], bf16=self.bf16), self.group)
        return y if self.bias is None else y + self.bias


def shard_model(model, run):
    """Leaves this rank's shard of a loaded model in it. model.whole_config is what it was; model.config
    counts the shard's heads."""
    if not isinstance(run, ShardedRun):
        return
    plain = isinstance(model, GPT) and not getattr(model, 'adapters', None)
    if not plain or type(model.layers[0].self_attn.q_proj) is not Linear:
        raise UserError('GPU_num above 1 shards models of our own families, without adapters and in full '
                        'precision: set GPU_num=1')
    cfg, n = model.config, run.shards
    for name in ('n_head', 'n_kv_head', 'n_inner'):
        if getattr(cfg, name) % n:
            raise UserError(f'GPU_num={n} cannot share out {name}={getattr(cfg, name)} of '
                            f'{model.name_or_path} evenly')
    model.whole_config = cfg
    model.config = replace(cfg, n_head=cfg.n_head // n, n_kv_head=cfg.n_kv_head // n,
                           n_inner=cfg.n_inner // n)
    for name, p in list(model.named_parameters()):
        parent, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(parent), leaf, nn.Parameter(shard_tensor(name, p.data, run).clone()))
    if cfg.tied:
        model.lm_head.weight = model.embed_tokens.weight

    def copy_input(module, args):
        return CopyToGroup.apply(args[0], run.tp_group), *args[1:]

    for layer in model.layers:
        layer.self_attn.cfg = model.config
        layer.self_attn.register_forward_pre_hook(copy_input)
        layer.mlp.register_forward_pre_hook(copy_input)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.__class__, linear.group = RowwiseLinear, run.tp_group


def dimension(name):
    """The dimension in which a parameter (or its optimizer state) is cut; None: every shard has it whole."""
    if re.search(COLWISE, name):
        return 0
    return 1 if re.search(ROWWISE, name) else None


def shard_tensor(name, tensor, run):
    """This rank's shard of a whole tensor."""
    cut = dimension(name)
    if cut is None or not tensor.dim():
        return tensor
    return tensor.chunk(run.shards, cut)[run.shard_index]


def gather(tensors, run):
    """{name: shard} -> {name: whole tensor}; called on all ranks together."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor, cut = tensor.detach(), dimension(name)
        if cut is None or not tensor.dim():
            gathered[name] = tensor
            continue
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(run.shards)]
        dist.all_gather(parts, tensor.contiguous(), group=run.tp_group)
        gathered[name] = torch.cat(parts, cut)
    return gathered


def gather_model(model, run):
    """A copy of a sharded model in one piece, to save; called on all ranks together."""
    if not isinstance(run, ShardedRun):
        return model
    state = gather(dict(model.named_parameters()), run)
    with torch.device('meta'):
        full = GPT(copy.deepcopy(model.whole_config))
    load_weights(full, state, model.name_or_path, device=run.device)
    return full
