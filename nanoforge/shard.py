"""Sharding on torch's own engine: --shard=full and --shard=hybrid; --tensor_parallel is in parallel.py.

    model = run.prepare(model)                  # after its adapter and its weights, before its optimizer
    with run.unsharded():                       # whole on every rank: evaluation, generation
        ...
    for batch in run.even(batches, model):      # as many forward passes on every rank
        ...

Every rank holds 1/N of each parameter (rows of its first dimension), of its gradient and of the optimizer's
state. FSDP2 (torch.distributed.fsdp.fully_shard; Zhao et al. 2023, arXiv 2304.11277) gathers a block before
its forward and backward pass, and sums the gradients as it cuts them. hybrid: N are the ranks of a node, and
the nodes hold copies. A checkpoint is the same as without: tensors are gathered and written one at a time.
"""
import contextlib
import logging
import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from configurator import UserError
from nanoforge.kernels import drop_copies
from nanoforge.tensors import local, own_part, placements_of


def make_mesh(run, mode):
    """The DeviceMesh of a Run: ('shard',), in hybrid ('replicate', 'shard'); ('data',) where a rank holds
    all of a model. Behind it 'tensor', if processes hold a model together."""
    sizes = {'data' if mode == 'none' else 'shard': run.world_size}
    if mode == 'hybrid':
        processes = run.world_size * run.tensor_parallel
        of_node = int(os.environ.get('LOCAL_WORLD_SIZE') or processes)
        if processes % of_node or of_node % run.tensor_parallel:
            raise UserError(f'--shard=hybrid: {processes} processes, {run.tensor_parallel} to a model, are '
                            f'not the same number on every node ({of_node} on this one)')
        sizes = {'replicate': processes // of_node, 'shard': of_node // run.tensor_parallel}
    if run.tensor_parallel > 1:
        sizes['tensor'] = run.tensor_parallel
        # it warns that a tensor that is cut twice is gathered in two steps, which is all right for a save
        logging.getLogger('torch.distributed.tensor._redistribute').setLevel(logging.ERROR)
    return init_device_mesh(run.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def shard_model(model, mesh):
    """Leaves this rank's shard of every parameter in a GPT, in place; each block is gathered alone.

    mesh: as make_mesh() makes it; where it has a dimension 'tensor' the model is parallelized already."""
    names = [name for name in mesh.mesh_dim_names if name != 'tensor']
    mesh = mesh[tuple(names)]
    if not hasattr(model, 'layers'):
        raise UserError(f'--shard does not go together with {model.config.arch} yet, which runs as '
                        'transformers has it: leave out --shard')
    drop_copies(model.parameters())         # in bf16, of whole weights: products make their own of what comes
    ignored = {p for p in model.parameters() if not p.is_floating_point()}      # 4- and 8-bit codes
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)   # the rest, a tied head and its embedding as one
    for module in fsdp_modules(model):
        # a loss is divided by what the whole step counts, so gradients are summed, not averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # Only `hidden` gathers the root, which stays whole until backward, for the head. Where calling the model
    # gathered it, too, it would be cut again in between.
    register_fsdp_forward_method(model, 'hidden')
    type(model).__call__ = type(model).forward
    # of a view, which nobody may change in place: nobody does
    warnings.filterwarnings('ignore', message='FSDP2-wrapped module')


def fsdp_modules(model):
    """The root first, then its blocks."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def unsharded(models):
    """Within, every rank holds the weights of these models whole: forward passes wait for no other rank."""
    modules = [module for model in models for module in fsdp_modules(model)]
    blocks = [module for module in modules if not any(module is model for model in models)]
    for module in modules:
        module.reshard()                    # what a forward pass left gathered may be older than the shards
    for module in modules:
        module.unshard()
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        for module in modules:
            module.reshard()


def one_token(model, token):
    """(): a forward pass of token (1, 1) as in training: through a policy and its head, or a critic's
    backbone, whose own head every rank holds whole."""
    if hasattr(model, 'backbone'):
        return model.backbone.hidden(token).sum()
    return model.token_stats(model.hidden(token), token, extras=False)['logp'].sum()


def sharded_like(p, part):
    """This rank's part of a tensor as own_part() gives it -> the sharded tensor, in the same memory."""
    shape = torch.Size((p.size(0), *p.shape[1:part.dim()]))
    stride = torch.empty(shape, device='meta').stride()
    return DTensor.from_local(part, p.device_mesh, placements_of(p, part.dim()), run_check=False, shape=shape,
                              stride=stride)


class Shards:
    """What optim.Flat is, of sharded parameters: this rank's rows of each, its gradient and its state.

    Not views of one flat tensor: each backward makes gradients anew, and uneven shards are padded.
    """
    is_sharded, takes_triton = True, False

    def __init__(self, group, names, params, slots):
        self.group, self.names, self.params = group, names, params
        self.mesh = params[0].device_mesh
        self.cut_by = [name for name in self.mesh.mesh_dim_names if name in ('shard', 'tensor')]
        self.is_summed = 'shard' in self.cut_by         # backward has summed gradients over all rows
        self.ranks = self.mesh.get_group(self.cut_by[0])
        self.state = {slot: [torch.zeros_like(part) for part in self.weights] for slot in slots}

    @property
    def weights(self):
        return [local(p) for p in self.params]

    @property
    def grads(self):
        """This rank's rows of each gradient."""
        self.gather()
        return [local(p.grad) for p in self.params]

    def gather(self):
        """No gradient is one of zero, as in Flat. What a tensor-parallel rank saw in part is summed."""
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif p.grad.placements != p.placements or not local(p.grad).is_contiguous():
                p.grad = p.grad.redistribute(placements=p.placements).contiguous()

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def flat_grads(self):
        return [grad.view(-1) for grad in self.grads]

    @property
    def chunks(self):
        return list(zip(self.weights, self.grads, *self.state.values()))

    def named(self, parts):
        """(name, sharded tensor) of this rank's rows of each parameter, or of a number for each row."""
        for name, p, part in zip(self.names, self.params, parts):
            yield name, self.sharded(p, part)

    def sharded(self, p, part):
        """This rank's rows of what parameter p has, or of a number for each row, as a sharded tensor."""
        return sharded_like(p, part)

    def named_state(self, slot):
        return self.named(self.state[slot])

    def new_rows(self):
        return [part.new_zeros(part.size(0)) for part in self.weights]

    def named_rows(self):
        return self.named(self.row_squares)

    def squares(self):
        """[sum of the squares of the whole gradient]."""
        total = 0.0
        for p, grad in zip(self.params, self.flat_grads()):
            is_copy = 'tensor' in self.cut_by and p.placements[-1].is_replicate()
            total = total + grad.dot(grad) / (self.mesh.size(-1) if is_copy else 1)
        for name in self.cut_by:
            dist.all_reduce(total, group=self.mesh.get_group(name))
        return [total]

    # ---- matrices that one rank works on as a whole; under tensor parallelism every rank on all of them

    def beside(self, matrix, column):
        return torch.cat([matrix, column[:, None]], 1)

    def rows(self, index):
        """How many rows of a parameter each rank holds."""
        size, n = self.params[index].size(0), dist.get_world_size(self.ranks)
        most = -(-size // n)
        return [min(max(size - rank * most, 0), most) for rank in range(n)]

    def to_owners(self, parts):
        """This rank's rows of each matrix -> {number: whole matrix} of those that it owns: of N ranks every
        N-th. One exchange for N matrices."""
        if 'tensor' in self.cut_by:
            return {i: self.gathered(p, part) for i, (p, part) in enumerate(zip(self.params, parts))}
        n, rank, whole = dist.get_world_size(self.ranks), dist.get_rank(self.ranks), {}
        for start in range(0, len(parts), n):
            group, number = parts[start:start + n], start + rank
            sent = torch.cat([part.flatten() for part in group])
            sizes = [part.numel() for part in group] + [0] * (n - len(group))
            theirs = [0] * n
            if number < len(parts):
                columns = parts[number].size(1)
                theirs = [rows * columns for rows in self.rows(number)]
            received = sent.new_empty(sum(theirs))
            dist.all_to_all_single(received, sent, theirs, sizes, group=self.ranks)
            if number < len(parts):
                whole[number] = received.view(-1, columns)
        return whole

    def from_owners(self, whole, parts):
        """The way back: {number: whole matrix} -> this rank's rows of each, shaped as `parts`."""
        if 'tensor' in self.cut_by:
            return [self.cut(p, whole[i]) for i, p in enumerate(self.params)]
        n, rank, returned = dist.get_world_size(self.ranks), dist.get_rank(self.ranks), []
        for start in range(0, len(parts), n):
            group, number = parts[start:start + n], start + rank
            sizes = [part.numel() for part in group] + [0] * (n - len(group))
            sent, theirs = parts[0].new_empty(0), [0] * n
            if number in whole:
                sent = whole[number].reshape(-1)
                theirs = [rows * whole[number].size(1) for rows in self.rows(number)]
            received = sent.new_empty(sum(sizes))
            dist.all_to_all_single(received, sent, sizes, theirs, group=self.ranks)
            returned += [rows.view(part.shape) for rows, part in zip(received.split(sizes), group)]
        return returned

    # Where tensor parallelism cuts the inputs, each rank has a number for every row: `beside` goes behind its
    # own columns.

    def gathered(self, p, part):
        columns = local(p).size(1)
        whole = [sharded_like(p, part[:, :columns].contiguous()).full_tensor()]
        for column in part.t()[columns:].contiguous():
            whole.append(sharded_like(p, column).full_tensor()[:, None])
        return torch.cat(whole, 1)

    def cut(self, p, whole):
        columns = p.size(1)
        part = [own_part(p, whole[:, :columns])]
        part += [own_part(p, column)[:, None] for column in whole.t()[columns:]]
        return torch.cat(part, 1)
