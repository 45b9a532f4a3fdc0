"""4- and 8-bit linear layers through bitsandbytes: the frozen base of QLoRA (Dettmers et al. 2023).

The weights are stored as bitsandbytes stores them; the product is taken here, the same in training,
evaluation and merging: on a CPU its own layers, once in eval mode, round the activations (8-bit) or repack
the weights for bf16 and lose the gradient (4-bit), so that log-probabilities as sampled and as trained would
not agree.
"""
import functools
import logging

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@functools.cache
def bitsandbytes():
    """The library, imported on first use, or a UserError with the remedy."""
    # it misses a kernel not used here
    logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as e:
        raise UserError('4- and 8-bit weights need bitsandbytes, which does not load here '
                        f'({type(e).__name__}: {str(e)[:80]}): pip install bitsandbytes, or leave out '
                        'load_in_4bit / load_in_8bit') from None
    return bitsandbytes


class Quantized:
    """Mixed into bitsandbytes' layers: x (..., in) -> (..., out); the weight is dequantised for each
    product."""
    bf16 = False                        # set by model.set_matmul, as for the plain layers

    def forward(self, x):
        dtype = self.product_dtype(x)
        if self.bits == 4 and x.is_cuda:            # its fused kernels need no float copy of the weight
            y = bitsandbytes().matmul_4bit(x.to(dtype), self.weight, self.weight.quant_state)
        else:
            y = QuantizedProduct.apply(x.to(dtype), self)
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def product_dtype(self, x):
        device = x.device.type
        if self.compute_dtype:
            return self.compute_dtype
        if self.bf16 and device == 'cpu':
            return torch.bfloat16
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def weight_matrix(self):
        """The matrix (out, in) that the layer multiplies by."""
        return dequantize(self)


class QuantizedProduct(torch.autograd.Function):
    """x W^T, where W is dequantised once more in backward rather than saved."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, dequantize(layer).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize(ctx.layer).to(grad.dtype), None


def head_of(model):
    """The output layer of a GPT, or of a transformers model that a wrapper holds as its one submodule."""
    return model.lm_head if hasattr(model, 'lm_head') else next(model.children()).get_output_embeddings()


def is_quantized(layer):
    return isinstance(layer, Quantized)


def is_linear(layer):
    """Whether it is a plain product, quantised or not. What is made in another way than nn.Linear does more,
    as a router that returns several tensors."""
    made_alike = type(layer).__init__ is nn.Linear.__init__
    return isinstance(layer, nn.Linear) and (made_alike or is_quantized(layer))


def dequantize(layer):
    """A quantised layer's weight (out, in) without adapters, in the dtype that it was quantised from."""
    if layer.bits == 4:
        return bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scale = layer.weight.SCB.to(layer.weight.device) / 127             # (out,): largest magnitude of each row
    return (layer.weight.data * scale[:, None]).to(layer.dtype)


@functools.cache
def layer_class(bits):
    layers = bitsandbytes().nn
    base = layers.Linear4bit if bits == 4 else layers.Linear8bitLt
    return type(f'Linear{bits}bit', (Quantized, base), {'bits': bits})


def quantize(model, bits=4, quant_type='nf4', double_quant=True, compute_dtype=None, state=None, device=None):
    """Replaces the linear layers, but for the head, by 4- or 8-bit ones, one after the other. Returns the
    model.

    quant_type: 'nf4' or 'fp4'; double_quant: the 4-bit scales are quantised too; compute_dtype: of the
    products (a torch dtype or its name; None = that of autocast or of the input). state: {name: tensor} to
    take the weights out of, for a model on the meta device, so that a float copy of the whole is never held;
    device: where to put them. UserError where bitsandbytes cannot do it.
    """
    compute_dtype = DTYPES.get(str(compute_dtype).removeprefix('torch.'), compute_dtype)
    if bits not in (4, 8) or quant_type not in ('nf4', 'fp4') or isinstance(compute_dtype, str):
        raise UserError('quantisation takes bits 4 or 8, quant_type nf4 or fp4, compute_dtype '
                        f'{", ".join(DTYPES)}; not {bits}, {quant_type}, {compute_dtype}')
    bnb = bitsandbytes()
    layers = [(path, layer) for path, layer in model.named_modules()
              if is_linear(layer) and layer is not head_of(model)]
    if any(hasattr(layer, 'lora') or is_quantized(layer) for _, layer in layers):
        raise UserError('quantize the plain model, before add_lora and only once')
    device = torch.device(device or next(model.parameters()).device)
    for path, layer in layers:
        weight = layer.weight.data if state is None else state.pop(f'{path}.weight', None)
        if weight is None or weight.shape != layer.weight.shape:
            expected = tuple(layer.weight.shape)
            problem = 'missing' if weight is None else f'{tuple(weight.shape)}, not {expected}'
            raise UserError(f'{path}.weight is {problem}: the weights do not fit config.json')
        options = {} if bits == 4 else {'has_fp16_weights': False}
        new = layer_class(bits)(layer.in_features, layer.out_features, bias=False, device='meta', **options)
        weight = weight.to(layer.weight.dtype).contiguous()
        try:
            if bits == 4:
                new.weight = bnb.nn.Params4bit(
                    weight, compress_statistics=double_quant, quant_type=quant_type).to(device)
            else:
                new.weight = bnb.nn.Int8Params(weight, requires_grad=False).to(device)
                new.weight.CB = None                           # a second reference, which deepcopy would copy
        except (RuntimeError, NotImplementedError, AttributeError) as e:
            raise UserError(f'bitsandbytes cannot hold {bits}-bit weights on {device} here '
                            f'({type(e).__name__}: {str(e)[:80]}): use another device, or leave out '
                            'load_in_4bit / load_in_8bit') from None
        new.bias, new.dtype, new.compute_dtype = layer.bias, weight.dtype, compute_dtype
        new.plain_class, new.bf16 = type(layer), getattr(layer, 'bf16', False)
        model.set_submodule(path, new.train(layer.training))
    return model


def base_state(model):
    """The model's state_dict without adapters and quantised weights: what a base checkpoint still has to
    fill."""
    left_out = []
    for path, layer in model.named_modules():
        if hasattr(layer, 'lora'):
            left_out.append(f'{path}.lora.')
        if is_quantized(layer):
            left_out += [f'{path}.weight', f'{path}.SCB']
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(tuple(left_out))}


def check_trainable(model):
    """UserError where nothing can train, or 4- or 8-bit weights are to train without LoRA."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if any(map(is_quantized, model.modules())) and not any('.lora.' in name for name in trainable):
        raise UserError('4- and 8-bit weights do not train: add LoRA (use_lora=true), or leave out '
                        'load_in_4bit and load_in_8bit')
    if not trainable:
        raise UserError('no parameter is trainable: the model or its adapter was loaded frozen (see '
                        'trainable=True)')
