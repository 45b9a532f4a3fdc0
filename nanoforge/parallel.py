"""Tensor parallelism on torch's own engine: --tensor_parallel=N, in train_agents.py also called GPU_num.

    parallelize(model, mesh)            # run.shard does it; mesh: the N ranks of this group

N neighbouring ranks hold a model together: each has an Nth of every layer's heads and inner channels, sees
the same rows and draws the same samples, also where it generates or evaluates. As in Megatron-LM (Shoeybi et
al. 2019, arXiv 1909.08053, section 3) the projections into heads and inner channels are cut by outputs (rows
of the weight), those out of them by inputs, with one sum over the group behind each. Embedding, norms and
head are whole on every rank and stay equal, as their gradients are.

The parameters of attention and MLP become DTensors, which layers read through tensors.part. One that is whole
on every rank (q_norm, an adapter's A where the outputs are cut, its B where the inputs are) has seen its own
part of the heads alone: its gradient is Partial, and is summed before the optimizer steps.
"""
import re
from dataclasses import replace

import torch.nn as nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, PrepareModuleOutput, parallelize_module

from configurator import UserError
from nanoforge.kernels import Linear, drop_copies
from nanoforge.lora import LoRALinear, has_magnitude, plain_class

BY_OUTPUT = r'(q|k|v|gate|up)_proj\.(weight|bias|lora\.\w+\.lora_B)$'       # cut in dimension 0
BY_INPUT = r'(o|down)_proj\.(weight|lora\.\w+\.lora_A)$'                    # cut in dimension 1


class PartOfBlock(ParallelStyle):
    """Of attention and MLP: cuts their parameters. The input is the same on every rank; its gradient is the
    sum over the ranks."""

    def _apply(self, module, mesh):
        cut = {}            # GPT-2's q, k and v share one adapter's A, and go on sharing it

        def partition(name, submodule, mesh):
            for key, p in submodule.named_parameters(recurse=False):
                if p not in cut:
                    tensor = distribute_tensor(p.detach(), mesh, [placement(f'{name}.{key}')],
                                               src_data_rank=None)
                    cut[p] = nn.Parameter(tensor, requires_grad=p.requires_grad)
                setattr(submodule, key, cut[p])

        def copy_input(module, args, mesh):
            x = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
            return x.to_local(grad_placements=[Partial()]), *args[1:]

        return distribute_module(module, mesh, partition, copy_input)


def placement(name):
    if re.search(BY_OUTPUT, name):
        return Shard(0)
    return Shard(1) if re.search(BY_INPUT, name) else Replicate()


def parallelize(model, mesh):
    """Leaves this rank's part of a GPT in it, in place; mesh: one-dimensional. UserError where it cannot be
    cut evenly, or is of another kind."""
    cfg, n = model.config, mesh.size()
    check(model, n)
    drop_copies(model.parameters())
    local = replace(cfg, n_head=cfg.n_head // n, n_kv_head=cfg.n_kv_head // n, n_inner=cfg.n_inner // n)
    sum_outputs = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())
    plan = {'self_attn': PartOfBlock(), 'mlp': PartOfBlock(), 'self_attn.o_proj': sum_outputs,
            'mlp.down_proj': sum_outputs}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan, src_data_rank=None)
        layer.self_attn.cfg = local
        for name, linear in layer.named_modules():
            if re.search(BY_OUTPUT, f'{name}.weight'):
                linear.out_features //= n
            elif re.search(BY_INPUT, f'{name}.weight'):
                linear.in_features //= n


def check(model, n):
    flag, name = f'--tensor_parallel={n}', getattr(model, 'name_or_path', None) or 'the model'
    if not hasattr(model, 'layers'):
        raise UserError(f'{flag} does not go together with {model.config.arch} yet, which runs as '
                        'transformers has it: leave it out')
    for size in ('n_head', 'n_kv_head', 'n_inner'):
        if getattr(model.config, size) % n:
            raise UserError(f'{flag} cannot share out {size}={getattr(model.config, size)} of {name} evenly')
    for layer in model.layers.modules():
        if not isinstance(layer, nn.Linear):
            continue
        kind = plain_class(layer) if isinstance(layer, LoRALinear) else type(layer)
        if kind is not Linear or has_magnitude(layer):
            raise UserError(f'{flag} does not go together with 4- and 8-bit weights or DoRA yet: leave it '
                            'out')
