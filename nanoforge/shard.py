"""Sharding on torch's own engine: --shard=full and --shard=hybrid.

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
import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from configurator import UserError
from nanoforge.kernels import drop_copies
from nanoforge.tensors import local


def make_mesh(run, mode):
    """The DeviceMesh of a Run: ('shard',), in hybrid ('replicate', 'shard')."""
    if mode == 'full':
        return init_device_mesh(run.device.type, (run.world_size,), mesh_dim_names=('shard',))
    of_node = int(os.environ.get('LOCAL_WORLD_SIZE') or run.world_size)
    if run.world_size % of_node:
        raise UserError(f'--shard=hybrid: {run.world_size} processes are not the same number on every node '
                        f'({of_node} on this one)')
    sizes = run.world_size // of_node, of_node
    return init_device_mesh(run.device.type, sizes, mesh_dim_names=('replicate', 'shard'))


def shard_model(model, mesh):
    """Leaves this rank's shard of every parameter in a GPT, in place; each block is gathered alone."""
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


@torch.no_grad()
def copy_rows(target, tensor):
    """Copies a whole tensor into a sharded one: each rank its own rows, and nothing is sent."""
    tensor = tensor.to(target.device)
    tensor = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
    local(target).copy_(local(tensor))


class Shards:
    """What optim.Flat is, of sharded parameters: this rank's rows of each, its gradient and its state.

    Not views of one flat tensor: each backward makes gradients anew, and uneven shards are padded.
    """
    is_sharded = True

    def __init__(self, group, names, params, slots):
        self.group, self.names, self.params = group, names, params
        mesh = params[0].device_mesh
        self.ranks = mesh.get_group('shard')
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
        """No gradient is one of zero, as in Flat."""
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

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
        shape = torch.Size((p.size(0), *p.shape[1:part.dim()]))
        stride = torch.empty(shape, device='meta').stride()
        return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape,
                                  stride=stride)

    def named_state(self, slot):
        return self.named(self.state[slot])

    def new_rows(self):
        return [part.new_zeros(part.size(0)) for part in self.weights]

    def named_rows(self):
        return self.named(self.row_squares)

    def sum_over_shards(self, value):
        dist.all_reduce(value, group=self.ranks)
        return value

    # ---- matrices that one rank works on as a whole

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
