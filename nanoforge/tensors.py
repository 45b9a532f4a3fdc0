"""Tensors that lie on several ranks, gathered and written to safetensors one at a time.

    with Gathering(tensors):            # on every rank
        run.on_main(write)              # in which save_tensors(path, layout) asks the others for their rows

torch.distributed.tensor is imported where there is a sharded tensor, not before.
"""
import json

import torch
import torch.distributed as dist

SAFETENSORS = {torch.int64: 'I64', torch.float64: 'F64', torch.float32: 'F32', torch.int32: 'I32',
               torch.bfloat16: 'BF16', torch.float16: 'F16'}        # the widest first, as in its files


def is_sharded(tensor):
    """Whether it is one of torch's DTensors."""
    return hasattr(tensor, 'device_mesh')


def local(tensor):
    """This rank's rows of a sharded tensor, which share its memory."""
    return tensor.detach().to_local()


def gathered(tensor):
    """`tensor` in one piece on every rank, all of which call it."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


@torch.no_grad()
def assign(target, tensor):
    """Copies a whole tensor into one that may be sharded: each rank its own rows, and nothing is sent."""
    if is_sharded(target):
        local(target).copy_(own_part(target, tensor.to(target.device)))
    else:
        target.copy_(tensor)


def own_part(p, tensor):
    """This rank's part of a whole tensor that is shaped as parameter p, or has a number for each of its
    rows."""
    from torch.distributed.tensor import distribute_tensor
    return local(distribute_tensor(tensor, p.device_mesh, placements_of(p, tensor.dim()), src_data_rank=None))


def placements_of(p, dimensions):
    """Those of a parameter, but of its first dimensions alone."""
    from torch.distributed.tensor import Replicate
    return [Replicate() if getattr(placement, 'dim', 0) >= dimensions else placement
            for placement in p.placements]


def part(p):
    """What this rank multiplies by of a parameter, differentiably: under tensor parallelism its part.

    Of what every rank of the group has whole a rank sees the gradient that its part of the model has:
    Partial, to be summed.
    """
    if not is_sharded(p):
        return p
    from torch.distributed.tensor import Partial
    gradients = [Partial() if placement.is_replicate() else placement for placement in p.placements]
    return p.to_local(grad_placements=gradients)


def part_of_bias(bias):
    """As part(); where the ranks' outputs are summed each adds its share of the bias."""
    is_whole = is_sharded(bias) and bias.placements[0].is_replicate()
    return part(bias) / bias.device_mesh.size() if is_whole else part(bias)


def cut_by_input(layer):
    """Whether the ranks of tensor parallelism hold parts of a linear layer's inputs, not of its outputs."""
    return is_sharded(layer.weight) and layer.weight.placements[0].is_shard(1)


class Gathering:
    """While the main rank saves, the others take part in gathering the tensors that it asks for.

    tensors: sharded ones, the same in the same order on every rank. The main rank asks by number, so that
    what it reads in which order, and whether it fails on the way, is its own affair.
    """
    current = None

    def __init__(self, tensors):
        self.tensors = [tensor for tensor in tensors if is_sharded(tensor)]
        self.numbers = {address(tensor): i for i, tensor in enumerate(self.tensors)}

    def __enter__(self):
        Gathering.current = self
        return self

    def __exit__(self, *_):
        Gathering.current = None

    def serve(self):
        """On the other ranks, until the main rank needs no more."""
        number = torch.tensor(0)
        while True:
            dist.broadcast(number, 0)
            if number < 0:
                return
            self.tensors[number].detach().full_tensor()

    def full(self, tensor):
        """On the main rank: one of the tensors, or one that shares its memory, in one piece on the CPU."""
        number = self.numbers[address(tensor)]
        dist.broadcast(torch.tensor(number), 0)
        return self.tensors[number].detach().full_tensor().cpu()

    def end(self):
        """On the main rank: it needs no more."""
        dist.broadcast(torch.tensor(-1), 0)


def address(tensor):
    """Of this rank's rows. The main rank, the first, has some of every tensor."""
    return local(tensor).untyped_storage().data_ptr()


def full(tensor):
    """`tensor` in one piece: on the main rank, while it saves, also a sharded one."""
    return Gathering.current.full(tensor) if is_sharded(tensor) else tensor.detach()


def stack(tensors, transposed=False):
    """Tensors laid on top of each other; a single one is not copied."""
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return whole.t() if transposed else whole


def save_tensors(path, layout, dtype=None, metadata=None):
    """Writes safetensors as its own save_file does, byte for byte, but makes one tensor at a time.

    layout: {key: (tensors to stack, whether transposed)}; dtype: of floating-point tensors, their own if None
    """
    entries = []
    for key, (parts, transposed) in layout.items():
        shape = [sum(part.size(0) for part in parts), *parts[0].shape[1:]] if parts[0].dim() else []
        kind = dtype if dtype and parts[0].is_floating_point() else parts[0].dtype
        entries.append((list(SAFETENSORS).index(kind), key, kind, shape[::-1] if transposed else shape))
    header, at = {'__metadata__': metadata} if metadata else {}, 0
    entries.sort()
    for _, key, kind, shape in entries:
        size = kind.itemsize * torch.Size(shape).numel()
        header[key] = {'dtype': SAFETENSORS[kind], 'shape': shape, 'data_offsets': [at, at + size]}
        at += size
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for _, key, kind, _ in entries:
            parts, transposed = layout[key]
            tensor = stack(list(map(full, parts)), transposed).to('cpu', kind).contiguous()
            file.write(tensor.view(-1).view(torch.uint8).numpy())
