"""--plan: the memory and the time that a run would take, before it is started.

    python train_sft.py --model=DIR --dataset_path=rows.jsonl --plan
    python train_rl.py ... --plan --num-gpus 8 --gpu-memory 80 --gpu-tflops 400

The script comes here once it knows its models, rows and steps; models are on the meta device, where they have
shapes and no numbers. Parameters, gradients and moments are counted on the model and the optimizer
themselves. What a micro-batch keeps for its backward pass follows the forms of model.py and kernels.py, of
the largest micro-batch of the run: tests/test_plan.py holds that arithmetic against what autograd keeps, and
the peaks against those of real runs. On a CPU gaps between tensors are a measured share (GAPS). Not counted:
what an optimizer's step needs for a moment, what a checkpoint is written from.
"""
import copy
import os
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError
from data.batches import micro_batches, pack, pack_documents
from nanoforge import kernels
from nanoforge.decode import FUSE_LIMIT, PACK_ROWS
from nanoforge.lora import lora_layers
from nanoforge.optim import TorchOptimizer, make_optimizer
from nanoforge.policy import is_adapter, load_policy
from nanoforge.quantize import head_of, is_linear
from nanoforge.run import Run, cpu_multiplies_bf16

GIB = 2 ** 30
CPU = torch.device('cpu')
SIZES = {'float32': 4, 'bfloat16': 2, 'float16': 2}
CUDA_CONTEXT = GIB // 2         # what a process takes on a card before its first tensor
REFERENCES = 'copy', 'adapters_off'     # kinds whose forward pass is part of each step
STEPS_SEEN = 2000               # of a run, in which the largest micro-batch is looked for
# On a CPU, of activations and logits: what malloc holds beside them in gaps. The gap that a tensor leaves
# cannot take another of its size, as one that is to begin on a cache line asks for 96 bytes more (memalign of
# glibc 2.36). 0.28 to 0.48 in runs of three steps (bench/README.md), 0.02 with unaligned tensors. To map each
# tensor by itself (a low threshold in run.keep_freed_memory) leaves none and costs a fifth of the time.
GAPS = 0.35


# ---- what it runs on ---------------------------------------------------------------------------------------

@dataclass
class Hardware:
    """One of the run's processes: what it computes on."""
    kind: str                   # 'cpu' or 'cuda'
    processes: int
    product: int                # bytes of a number in the layers' matrix products
    memory: float               # bytes that it may have
    flops: float | None         # floating-point operations a second; None: to be measured
    process: float              # bytes that it has without any model
    shards: int = 1             # how many processes share weights, gradients and moments
    stacks: bool = False        # whether q, k and v are one product, whose weights are laid together

    @property
    def is_cpu(self):
        return self.kind == 'cpu'


def device_type(cfg):
    """'cuda' or 'cpu': what the run that is planned would compute on."""
    described = bool(cfg.gpu_memory or cfg.gpu_tflops)
    wanted = cfg.device.partition(':')[0]
    has_gpu = described or torch.cuda.is_available()
    return 'cuda' if wanted == 'cuda' or wanted == 'auto' and has_gpu else 'cpu'


def hardware(cfg):
    """As the flags describe it; what they leave open is that of this machine."""
    kind = device_type(cfg)
    if kind == 'cuda':
        product = SIZES.get(cfg.autocast_dtype(), 2)            # auto: bfloat16, or float16
        process = CUDA_CONTEXT
    else:
        wants_bf16 = cfg.matmul == 'bf16' or cfg.matmul == 'auto' and cpu_multiplies_bf16()
        product = 2 if wants_bf16 else 4
        process = resident()
    if cfg.gpu_memory:
        memory = cfg.gpu_memory * GIB
    elif kind == 'cuda':
        if not torch.cuda.is_available():
            raise UserError('--plan for a GPU that is not here: say how much memory it has, --gpu-memory=80')
        memory = torch.cuda.get_device_properties(0).total_memory
    elif hasattr(os, 'sysconf'):
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / cfg.num_gpus
    else:
        raise UserError('--plan finds no memory size on this system: say it, --gpu-memory=16')
    shards = cfg.tensor_parallel if cfg.shard == 'none' else cfg.num_gpus
    flops = cfg.gpu_tflops and cfg.gpu_tflops * 1e12
    stacks = kind == 'cpu' and not is_quantised(cfg)
    return Hardware(kind, cfg.num_gpus, product, memory, flops, process, shards, stacks)


def is_quantised(cfg):
    """Whether the frozen matrices of the blocks are in 4 or 8 bits."""
    return getattr(cfg, 'load_in_4bit', False) or getattr(cfg, 'load_in_8bit', False)


def resident():
    """Bytes that this process holds: Python, torch, the other libraries, the tokenizer."""
    try:
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:             # another system than Linux
        return 0.4 * GIB


def measured_flops(hw, rows=1024, size=1024, seconds=0.2):
    """Operations a second of this machine's matrix products, in the precision of the run; over all its
    processes on a CPU, which they share."""
    dtype = torch.float32 if hw.product == 4 else torch.bfloat16
    x, w = (torch.ones(n, size, device=hw.kind, dtype=dtype) for n in (rows, size))
    best, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float('inf'):
        begun = time.perf_counter()
        (x @ w).sum().item()                                    # waits for a GPU
        best = min(best, time.perf_counter() - begun)
    return 2 * rows * size * size / best / (hw.processes if hw.is_cpu else 1)


# ---- what a run holds from its beginning to its end --------------------------------------------------------

@dataclass
class Estimate:
    """Bytes of one process. held: {part: bytes} of all of the run; phases: {phase: {part: bytes}}, of which
    one comes after the other: the largest counts."""
    held: dict = field(default_factory=dict)
    phases: dict = field(default_factory=dict)

    def add(self, part, count):
        if count:
            self.held[part] = self.held.get(part, 0) + count

    @property
    def peak(self):
        return sum(self.held.values()) + max(sum(taken.values()) for taken in self.phases.values())


def parameters(model, trained=None):
    """The parameters of a model, a tied one once; with `trained` those that train, or do not."""
    return [p for p in model.parameters() if trained in (None, p.requires_grad)]


def numbers(tensors):
    return sum(tensor.numel() for tensor in tensors)


def block_linears(model):
    """The linear layers but the head."""
    return [layer for layer in model.modules() if is_linear(layer) and layer is not head_of(model)]


def block_matrices(model):
    """Their weights: what bfloat16 copies and 4 and 8 bits are for."""
    return [layer.weight for layer in block_linears(model)]


def multiplied(layer):
    """Weights of a linear layer, which may hold them in 4 bits."""
    weight = layer.weight
    return weight.numel() if weight.is_floating_point() else layer.in_features * layer.out_features


def quantised_bytes(cfg, weights):
    """In bitsandbytes' formats: 4 bits with a float32 scale for each 64 values, itself in 8 bits (a float32
    for each 256 of those) with double quantisation; 8 bits with a float32 scale for each row."""
    if cfg.load_in_8bit:
        return sum(w.numel() + 4 * len(w) for w in weights)
    scale = 1 / 64 + 4 / (64 * 256) if cfg.bnb_4bit_use_double_quant else 4 / 64
    return numbers(weights) * (0.5 + scale)


def weight_bytes(cfg, hw, model):
    """What trains is float32; what is frozen is torch_dtype on a GPU, or 4 or 8 bits in each process."""
    trained, frozen = numbers(parameters(model, True)), parameters(model, False)
    size = SIZES[cfg.torch_dtype] if hw.kind == 'cuda' and hasattr(cfg, 'torch_dtype') else 4
    quantised = 0
    if frozen and is_quantised(cfg):
        matrices = block_matrices(model)
        quantised = quantised_bytes(cfg, matrices)
        frozen = [p for p in frozen if all(p is not w for w in matrices)]
    return (4 * trained + size * numbers(frozen)) / hw.shards + quantised


def optimizer_bytes(name, model):
    """(gradients, moments): counted on the optimizer itself, made for the parameters that train."""
    optimizer = make_optimizer(name, model, 1e-3)
    gradients = sum(flat.grad.nbytes for flat in optimizer.flats)
    # two of torch's ask for numbers, which the meta device has not
    if name == 'adafactor':                     # a mean of each row and each column of a matrix; the step
        return gradients, 4 * sum(sum(p.shape) + 1 for p in parameters(model, True))
    if name == 'asgd':                          # the mean of the weights
        return gradients, 4 * numbers(parameters(model, True))
    if isinstance(optimizer, TorchOptimizer):
        optimizer.step()                        # which makes its state
    return gradients, sum(tensor.nbytes for tensor in optimizer.state_dict().values())


def hold(estimate, cfg, hw, model, name='', optimizer=None, averaged=False):
    """Adds a model; with the name of an `optimizer` one that trains, and with `averaged` its running mean."""
    called = f'{name} ' if name else ''
    estimate.add(f'{name or "weights"}', weight_bytes(cfg, hw, model))
    matrices = block_matrices(model)
    if cfg.shard != 'none':                     # run.unsharded
        evaluation = estimate.phases.setdefault('evaluation', {'weights, gathered': 0})
        evaluation['weights, gathered'] += weight_bytes(cfg, replace(hw, shards=cfg.tensor_parallel), model)
    is_kept = hw.is_cpu or hw.shards == 1           # what a GPU gathers is rounded where it is used
    if hw.product == 2 and not is_quantised(cfg) and is_kept:
        copied = matrices if hw.is_cpu else [w for w in [*matrices, model.lm_head.weight] if w.requires_grad]
        estimate.add('bf16 copies of weights', 2 * numbers(copied) / hw.shards)
    if not optimizer:
        return
    gradients, moments = optimizer_bytes(optimizer, model)
    trained = 4 * numbers(parameters(model, True))
    estimate.add(f'{called}gradients', gradients / hw.shards)
    estimate.add(f'{called}moments ({optimizer})', moments / hw.shards)
    if averaged:
        estimate.add('mean of the weights', trained / hw.shards)
    # its buffers are there before the weights that they take over are given back
    start = estimate.phases.setdefault('start', {'weights as loaded': 0})
    start['weights as loaded'] = max(start['weights as loaded'], trained)


# ---- what a micro-batch keeps for its backward pass --------------------------------------------------------

class Shape(NamedTuple):
    """A micro-batch as the model sees it."""
    tokens: int                 # through the layers, padding included where a device computes it
    rows: int                   # of the last layer behind its attention: places that predict something
    targets: int                # that reach the head
    attention: float            # bytes that the attention of a layer keeps
    length: float               # tokens of a document, the mean: what attention's operations grow with


def shape_of(c, hw, batch):
    """The Shape of a PackedBatch, for a GPTConfig."""
    idx, positions, wanted = batch.idx, batch.positions, batch.logit_positions
    if batch.last is not None:
        wanted = torch.cat((wanted, batch.last[:, None]), 1)
    length = idx.size(1)
    if positions is not None:
        length = float(kernels.document_lengths(positions).float().mean())
        if hw.is_cpu and hw.product == 2 and len(idx) == 1:     # as GPT.hidden pads the row
            padding = torch.arange(-idx.size(1) % kernels.ALIGN)[None]
            idx, positions = torch.cat((idx, padding), 1), torch.cat((positions, padding), 1)
    return Shape(idx.numel(), len(wanted.unique()), int((batch.targets >= 0).sum()),
                 attention_bytes(c, hw, idx, positions), length)


def attention_bytes(c, hw, idx, positions):
    """What a layer's attention keeps, but for what o_proj reads: queries, keys and values, probabilities or
    what stands for them, by the form that kernels.AttentionContext takes for rows idx (B, T)."""
    H, G, D, (B, T), p = c.n_head, c.n_kv_head, c.head_size, idx.shape, hw.product
    N, qkv = B * T, H + 2 * G
    normed = 4 * (H + G) * (D + 1) * N if c.qk_norm else 0      # q and k before their norm, and its scale
    rotated = (H + G) * D if c.position == 'rope' else 0        # else q and k are parts of qkv, as v is
    if not hw.is_cpu:
        is_flex = positions is not None and B * T * T >= kernels.FLEX_FROM
        mask = B * T * T * p if positions is not None and not is_flex else 0
        # scores with a soft cap are written out
        capped = 2 * 4 * H * B * T * T if c.attn_softcap and not is_flex else 0
        return N * (p * (qkv * D + rotated) + 4 * H) + mask + capped + normed
    context = kernels.AttentionContext(c, {}, idx, positions)
    if context.short:
        return N * p * (3 * H * D + H * T) + normed
    if context.varlen:
        scores = sum(len(batch.grad_rows) * batch.K for batch in context.varlen.batches)
        return 4 * (D * sum(len(batch.rows) for batch in context.varlen.batches) + scores) + normed
    if context.shared_prefix:
        form = context.shared_prefix
        trunk, query, key = form.trunk.numel(), form.query.numel(), form.key.numel()
        kept = trunk * (qkv * D + H * D + H) + query * (2 * H * D + H) + key * 2 * G * D + form.mask.numel()
        return 4 * kept + normed
    # q and k rotated, the heads that v is a part of; masks of documents with branches
    kept = N * (rotated + qkv * D)
    documents = context.documents or [range(T)] * B
    if context.documents:
        masks = next(iter(context.masks.values()))
        kept += sum(mask.numel() for mask in masks if mask is not None)
    if c.attn_softcap:
        kept += 2 * H * sum(len(document) ** 2 for document in documents)
    else:
        kept += N * H                                           # the sum of each row of scores
        # the output, unless it lies as o_proj reads it: documents are joined, bf16 is another number, and it
        # comes in the order of q, which its norm has changed
        if context.documents or p == 2 or c.qk_norm:
            kept += N * H * D
    return 4 * kept + normed


def layer_bytes(c, hw, layer, N, M, attention):
    """What one Block keeps: N tokens up to its attention, M behind it."""
    C, HD, D, I, p = c.n_embd, c.n_head * c.head_size, c.head_size, c.n_inner, hw.product
    attn, mlp = layer.self_attn, layer.mlp
    norms = (4 * C + 4) * (N + M * (3 if c.post_norms else 1))  # the residual stream, which each norm reads
    dropped = 2 * M * C * (4 if hw.is_cpu else 1) if c.dropout else 0
    up = [module for module in (mlp.gate_proj, mlp.up_proj) if module is not None]
    qkv = [attn.q_proj, attn.k_proj, attn.v_proj]
    kept = norms + dropped + attention
    kept += input_bytes(hw, qkv, N, C, stacked=hw.stacks)
    kept += input_bytes(hw, [attn.o_proj], M, HD)
    kept += input_bytes(hw, up, M, C, shared=p == 4)
    kept += input_bytes(hw, [mlp.down_proj], M, I)
    kept += p * I * M * len(up)                                 # gate and up
    recomputed = hw.is_cpu and M * I >= kernels.LARGE_GATE
    if len(up) > 1 and not recomputed:
        kept += p * I * M                                       # act(gate)
    if hw.stacks:
        kept += p * C * (c.n_head + 2 * c.n_kv_head) * D        # the three weights as one matrix
    return kept


def input_bytes(hw, layers, tokens, width, stacked=False, shared=False):
    """What is kept of the input (tokens, width) of layers that read the same one. stacked: they are one
    product; shared: each would keep the very same tensor."""
    p, kept = hw.product, 0
    count = 1 if stacked else len(layers)
    for layer in layers[:count]:
        adapter = getattr(layer, 'adapter', None)
        if adapter is None:
            copies = layer.weight.requires_grad
        elif adapter.dropout:                   # the dropped input and the mask, in place of the input
            kept += tokens * width * (2 * p if hw.is_cpu else p + 1)
            copies = 0
        else:
            copies = 1
        if adapter is not None:
            kept += tokens * p * len(adapter.lora_A) * (len(layers) if stacked else 1)
        if copies:
            kept += tokens * p * width
            if shared:
                break
    return kept


def activation_bytes(c, hw, model, shape, checkpointing):
    """(bytes that the layers keep at the beginning of the backward pass, and what they add in its course)."""
    C, N, M = c.n_embd, shape.tokens, shape.rows
    first, last = model.layers[0], model.layers[-1]
    whole = layer_bytes(c, hw, first, N, N, shape.attention)
    end = layer_bytes(c, hw, last, N, M, shape.attention)
    # the last norm, the head's input, the angles of the positions
    around = (4 * C + 4) * M + 4 * C * shape.targets + 4 * c.head_size * N
    # of a layer: the gradients of the gate's two inputs and its output, of the stream, of a matrix
    course = N * (3 * hw.product * c.n_inner + 8 * C)
    if any(p.requires_grad and p.dim() > 1 for p in first.mlp.up_proj.parameters()):
        course += 4 * C * c.n_inner
    if checkpointing:           # of every n-th layer the input alone
        recomputed = len(model.layers[::checkpointing])
        kept = whole * (len(model.layers) - recomputed)
        return kept + 4 * C * N * recomputed + around, course + whole
    return whole * (len(model.layers) - 1) + end + around, course


def head_bytes(c, hw, model, targets, extras=False):
    """(what the head keeps, what its backward adds, what of that stays until the embedding's gradient)."""
    on_gpu = 0 if hw.is_cpu else hw.memory
    logits = 4 * min(targets * c.vocab_size, kernels.kept_logits(torch.device(hw.kind), on_gpu))
    if targets * c.vocab_size <= kernels.DIRECT and not extras:
        logits *= 2                             # with their log-probabilities
    gradient = 4 * c.vocab_size * c.n_embd if head_of(model).weight.requires_grad else 0
    return logits, gradient + 8 * c.n_embd * targets, gradient if c.tied else 0


def train_phase(estimate, cfg, hw, model, shape, extras=False, critic=None):
    """Adds what forward and backward of a micro-batch take; critic: a second model, in the same pass."""
    c = model.config
    checkpointing = cfg.gradient_checkpointing and cfg.checkpoint_every
    kept, course = activation_bytes(c, hw, model, shape, checkpointing)
    if critic is not None:
        kept += activation_bytes(critic.config, hw, critic, shape, checkpointing)[0]
    logits, at_head, held = head_bytes(c, hw, model, shape.targets, extras)
    training = estimate.phases.setdefault('training', {})
    training['activations'] = kept
    training['logits'] = logits
    training['gradients on their way'] = max(at_head, held + course - logits)
    if hw.is_cpu:
        training['gaps in the heap'] = GAPS * (kept + logits)
    if cfg.shard != 'none':     # a block and what is around the blocks, with their gradients
        whole = numbers(model.layers[0].parameters()) + numbers(model.embed_tokens.parameters())
        training['a block, gathered'] = 2 * 4 * whole


# ---- generation --------------------------------------------------------------------------------------------

def generate_phase(estimate, cfg, hw, model, prompts, samples, new):
    """Adds what sample.generate takes for prompts of these lengths: `new` tokens for `samples` of each."""
    c, rows, longest = model.config, len(prompts) * samples, max(prompts)
    p = 4 if hw.is_cpu else hw.product
    slot = 2 * c.n_layer * c.n_kv_head * c.head_size * p                # a key and a value of every layer
    matrices, size, V = block_matrices(model), hw.product, c.vocab_size
    small = model.num_params() <= FUSE_LIMIT[hw.kind]
    is_packed = hw.is_cpu and small and rows >= PACK_ROWS
    copies = 0
    if small and not lora_layers(model):
        stacked = [layer for block in model.layers for name, layer in block.named_modules()
                   if name.endswith(('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj'))]
        is_copied = is_packed or not hw.is_cpu and size == 2
        copies = size * numbers(matrices if is_copied else [layer.weight for layer in stacked])
    if is_packed and not c.logit_softcap:
        copies += 4 * V * c.n_embd                                      # the head in oneDNN's layout
    estimate.phases['generation'] = {
        **estimate.phases.get('evaluation', {}),
        'KV cache': slot * (rows * (longest + new) + len(prompts) * longest),   # of the prompts' pass, too
        'weights as the sampler reads them': copies,
        'logits': 3 * 4 * rows * V}


# ---- operations and time -----------------------------------------------------------------------------------

def forward_flops(model, length, predicted=1.0):
    """Floating-point operations of a token's forward pass: 2 for each weight that it is multiplied by (the
    head's for the share `predicted` of the tokens), 4 for each channel of the queries and position that
    attention compares and sums, of documents of this length."""
    c = model.config
    weights = sum(map(multiplied, block_linears(model))) + predicted * head_of(model).weight.numel()
    weights += sum(p.numel() for name, p in model.named_parameters() if '.lora.' in name)
    if not hasattr(c, 'n_layer'):           # a model as transformers has it: how it attends is not known
        return 2 * weights
    return 2 * weights + 4 * c.n_layer * c.n_head * c.head_size * length


def train_flops(model, length, predicted=1.0):
    """Forward and backward: the backward pass multiplies twice as much, or once where a weight is frozen."""
    frozen = sum(multiplied(layer) for layer in block_linears(model) if not layer.weight.requires_grad)
    head = head_of(model).weight
    if not head.requires_grad:
        frozen += predicted * head.numel()
    return 3 * forward_flops(model, length, predicted) - 2 * frozen


def sft_flops(model, rows):
    """Operations for each token that train_sft.py feeds, of rows (TokenizedRows)."""
    lengths = rows.lengths[~rows.held_out] - 1
    return train_flops(model, lengths.mean(), rows.targets[~rows.held_out].sum() / lengths.sum())


def dpo_flops(policy, pairs, kind):
    """Operations for each token of train_dpo.py's pairs (TokenPair), a prompt counted once; kind: of its
    reference."""
    answers = np.mean([len(pair.chosen) + len(pair.rejected) for pair in pairs])
    length = answers + np.mean([len(pair.prompt) for pair in pairs])
    scored = forward_flops(policy, length, answers / length) if kind in REFERENCES else 0
    return train_flops(policy, length, answers / length) + scored


def rollout_flops(cfg, policy, lengths):
    """Operations of train_rl.py for each token that was sampled; lengths: [(prompt, completion)]. A prompt is
    computed once for its group; a critic and a teacher are taken to be of the policy's size."""
    prompt, completion = np.mean(lengths or [(0, 1)], 0)
    ppo = cfg.algorithm == 'ppo'
    return sampled_flops(policy, prompt, completion, cfg.num_generations, cfg.num_iterations * (1 + ppo),
                         1 + bool(cfg.beta or cfg.teacher_model_name) + ppo)


def team_flops(cfg, model, groups):
    """Operations of train_agents.py for each token that was sampled; groups: its comparable_groups. What has
    no advantage is not learned."""
    candidates = [c for members in groups.values() for member in members for c in member]
    prompt, completion = np.mean([(len(c.prompt), len(c.tokens)) for c in candidates] or [(0, 1)], 0)
    learned = np.mean([bool(c.advantage or cfg.entropy_coef) for c in candidates] or [0])
    samples = cfg.train_sample_num if cfg.rollout_mode == 'tree' else 1
    return sampled_flops(model, prompt, completion, samples, learned)


def sampled_flops(model, prompt, completion, samples, learned, forwards=1):
    """Operations for each token of completions of such lengths: `forwards` passes, sampling among them, and
    `learned` times forward and backward; a prompt is computed once for `samples` of them."""
    tokens = prompt / samples + completion
    length, share = prompt + completion, completion / tokens
    passes = learned * train_flops(model, length, share) + forwards * forward_flops(model, length, share)
    return float(passes * tokens / completion)


@dataclass
class Work:
    """What there is to do in the whole run."""
    steps: int
    tokens: float               # that are trained on
    per_token: float            # operations of forward and backward, for one of them
    more: float = 0.0           # operations besides: a reference, a critic, sampling
    words: str = ''             # what is more


# ---- the scripts -------------------------------------------------------------------------------------------

def sft(cfg, model, rows, epochs, total, run):
    """Of train_sft.py: rows (TokenizedRows), the Epochs of them, optimizer steps."""
    def build(cfg, hw, model):
        estimate = Estimate()
        hold(estimate, cfg, hw, model, optimizer=cfg.optimizer, averaged=cfg.ema)
        shapes = []
        for part in largest_parts(cfg, epochs, total, lambda item: rows.lengths[item].sum()):
            documents = [[document(rows, i) for i in np.atleast_1d(item)] for item in part]
            batch = pack_documents(documents, CPU, one_row=hw.is_cpu, packed=cfg.packing)
            shapes.append(shape_of(model.config, hw, batch))
        extras = cfg.label_smoothing > 0 or cfg.logging_steps <= total
        train_phase(estimate, cfg, hw, model, max(shapes), extras)
        return estimate, f'{max(shapes).tokens:,} tokens, {max(shapes).targets:,} of them learned'

    fed = rows.lengths[~rows.held_out] - 1
    total, size = over_processes(cfg, total, epochs.size)
    tokens = total * size * fed.mean()
    work = Work(total, tokens, sft_flops(model, rows))
    return report(cfg, run, build, model, work, cfg.base_model_name)


def over_processes(cfg, steps, size):
    """(optimizer steps, rows of a step over all processes) from those of a single one: an epoch has fewer."""
    ranks = cfg.num_gpus // cfg.tensor_parallel
    if cfg.max_steps < 0:
        steps = -(-steps // ranks)
    return steps, size * ranks


def document(rows, i):
    """A row as pack_documents takes it: ids that do not matter, and which of them are targets."""
    length, targets = rows.lengths[i], rows.targets[i]
    return np.zeros(length, np.int64), np.arange(length) >= length - targets


def largest_parts(cfg, epochs, total, length):
    """The micro-batches with the most tokens, and with the longest row: one of them takes the most memory."""
    parts = [part for step in range(min(total, epochs.per_epoch, STEPS_SEEN))
             for part in micro_batches(epochs.of_step(step), cfg.per_device_train_batch_size)]
    sizes = [[length(item) for item in part] for part in parts]
    most = {max(range(len(parts)), key=lambda i: how(sizes[i])) for how in (sum, lambda s: len(s) * max(s))}
    return [parts[i] for i in most]


def dpo(cfg, policy, pairs, epochs, total, kind, run):
    """Of train_dpo.py: pairs (TokenPair), the Epochs of them, optimizer steps, the kind of its reference."""
    def size(i):
        return len(pairs[i].prompt) + len(pairs[i].chosen) + len(pairs[i].rejected)

    def build(cfg, hw, policy):
        estimate = Estimate()
        hold(estimate, cfg, hw, policy, optimizer=cfg.optimizer)
        if kind == 'copy' and not off_is_reference(cfg):
            hold(estimate, cfg, hw, frozen(cfg, cfg.base_model_name), 'reference')
        shapes = []
        for part in largest_parts(cfg, epochs, total, size):
            groups = [(pairs[i].prompt, [pairs[i].chosen, pairs[i].rejected]) for i in part]
            batch = pack(groups, CPU, share=True, one_row=hw.is_cpu)
            # as answer_logp does: only what predicts a token
            is_token = batch.targets >= 0
            batch = batch._replace(logit_positions=batch.logit_positions[is_token],
                                   targets=batch.targets[is_token])
            shapes.append(shape_of(policy.config, hw, batch))
        train_phase(estimate, cfg, hw, policy, max(shapes))
        return estimate, f'{max(shapes).tokens:,} tokens, {max(shapes).targets:,} of them of answers'

    used = [i for step in range(min(total, epochs.per_epoch, STEPS_SEEN)) for i in epochs.of_step(step)]
    fed = np.mean([size(i) for i in used])
    answers = np.mean([len(pairs[i].chosen) + len(pairs[i].rejected) for i in used])
    total, size_of_step = over_processes(cfg, total, epochs.size)
    tokens = total * size_of_step * fed
    work = Work(total, tokens, train_flops(policy, fed, answers / fed))
    if kind in (*REFERENCES, 'cache'):
        work.more, work.words = tokens * forward_flops(policy, fed, answers / fed), 'the reference'
    return report(cfg, run, build, policy, work, cfg.base_model_name)


def rl(cfg, policy, problems, sizes, run):
    """Of train_rl.py: its Problems and the Sizes of a step, a rollout and the run. Completions are taken to
    be as long as they may be."""
    prompts = np.array([len(problem['prompt_ids']) for problem in problems.train if 'prompt_ids' in problem])
    G, T, ppo = cfg.num_generations, cfg.max_completion_length, cfg.algorithm == 'ppo'

    def build(cfg, hw, policy):
        estimate = Estimate()
        hold(estimate, cfg, hw, policy, optimizer=cfg.optimizer)
        if cfg.teacher_model_name:
            hold(estimate, cfg, hw, frozen(cfg, cfg.teacher_model_name), 'teacher')
        elif cfg.beta and not off_is_reference(cfg):
            hold(estimate, cfg, hw, frozen(cfg, cfg.base_model_name), 'reference')
        critic = None
        if ppo and not cfg.share_critic:
            critic = load_policy(cfg, quiet(run), cfg.value_model_name)[0]
            hold(estimate, cfg, hw, critic, 'critic', cfg.optimizer)
        if 'model' in cfg.rewards:
            name = cfg.reward_model_path or cfg.value_model_name or cfg.base_model_name
            estimate.add('reward model', 4 * numbers(frozen(cfg, name).parameters()) / hw.shards)
        # a rollout's prompts are drawn: its longest is near the longest of all
        rows = cfg.per_device_train_batch_size
        groups = max(1, rows * cfg.steps_per_generation // G)
        longest = int(np.sort(prompts)[::-1][:groups].mean())
        if not cfg.sampler_url:                 # else servers sample
            generate_phase(estimate, cfg, hw, policy, [longest] * groups, G, T)
        members = [min(G, rows - i) for i in range(0, rows, G)]
        batch = pack([([0] * longest, [[0] * T] * n) for n in members], CPU, keep_last=ppo,
                     one_row=None if hw.is_cpu else False)
        shape = shape_of(policy.config, hw, batch)
        train_phase(estimate, cfg, hw, policy, shape, cfg.entropy_coef > 0, critic)
        return estimate, f'{rows} completions, {shape.tokens:,} tokens; {groups * G} sampled at once'

    total, of_step = over_processes(cfg, sizes.total_steps, sizes.completions_per_step)
    completions = total * of_step
    prompt = prompts.mean()
    per_completion = prompt / G + T                             # a prompt is computed once for its group
    tokens, share = completions * per_completion, T / per_completion
    work = Work(total, tokens, train_flops(policy, prompt + T, share))
    forward = forward_flops(policy, prompt + T, share)
    work.more = tokens / cfg.num_iterations * forward * (1 + bool(cfg.beta))
    work.words = 'sampling' + (' and the reference' if cfg.beta else '')
    if cfg.teacher_model_name:
        of_teacher = forward_flops(frozen(cfg, cfg.teacher_model_name), prompt + T, share)
        work.more += tokens / cfg.num_iterations * of_teacher
        work.words += ' and the teacher'
    if ppo:
        work.more, work.words = work.more + 4 * tokens * forward, f'{work.words} and the critic'
    return report(cfg, run, build, policy, work, cfg.base_model_name)


def gpt(cfg, corpora, build_model, run):
    """Of train_gpt.py: its data sets, and its build_model."""
    with torch.device('meta'):
        model, _ = build_model(cfg, corpora, run)
    streams = len(cfg.multicontext_datasets) if cfg.training_mode == 'multicontext' else 1

    def build(cfg, hw, model):
        estimate = Estimate()
        hold(estimate, cfg, hw, model, optimizer=cfg.optimizer, averaged=cfg.ema)
        rows, T = max(1, cfg.batch_size // hw.processes), cfg.block_size
        idx = torch.zeros(rows, T, dtype=torch.long)
        shape = Shape(rows * T, rows * T, rows * T * streams, attention_bytes(model.config, hw, idx, None), T)
        train_phase(estimate, cfg, hw, model, shape)
        return estimate, f'{rows} x {T} tokens'

    tokens = cfg.max_iters * cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    work = Work(cfg.max_iters, tokens, train_flops(model, cfg.block_size))
    return report(cfg, run, build, model, work, model.config.arch)


def agents(cfg, policies, run):
    """Of train_agents.py: its policies. Prompts and answers are taken to be as long as they may be."""
    models = list({id(policy.model): policy.model for policy in policies}.values())
    context = min(model.config.block_size for model in models)
    response = min(cfg.max_response_length, context // 2)       # as resolve_defaults has it
    prompt, K = min(cfg.max_prompt_length, context - response), cfg.train_sample_num

    def build(cfg, hw, model):
        estimate = Estimate()
        for other in models:
            hold(estimate, cfg, hw, other, optimizer='adamw')
        most = max(models, key=lambda model: model.num_params())
        problems = -(-cfg.epoch_size // hw.processes)
        if not cfg.sampler_url:
            generate_phase(estimate, cfg, hw, most, [prompt] * problems, K, response)
        each = max(1, (cfg.micro_batch_tokens - prompt) // response)
        batch = pack([([0] * prompt, [[0] * response] * min(each, K))], CPU,
                     one_row=None if hw.is_cpu else False)
        shape = shape_of(most.config, hw, batch)
        train_phase(estimate, cfg, hw, most, shape, extras=True)
        return estimate, f'{shape.tokens:,} tokens; {problems * K} answers sampled at once'

    model = models[0]
    answers = cfg.epoch_size * K * cfg.max_turns * len(cfg.turn_order)
    tokens = cfg.total_training_steps * answers * (response + prompt / K)
    length = prompt + response
    work = Work(cfg.total_training_steps, tokens, train_flops(model, length),
                tokens * forward_flops(model, length), 'sampling')
    return report(cfg, run, build, model, work, model.config.arch)


def quiet(run):
    """The same run, which prints nothing."""
    return Run(run.device, run.dtype, run.matmul, rank=1)


def off_is_reference(cfg):
    """Whether the policy without its adapter is what training begins from, so no second model is held."""
    return cfg.use_lora and not is_adapter(cfg.base_model_name)


def frozen(cfg, name):
    """A model of this name that does not train, on the meta device."""
    run = quiet(Run(torch.device('meta'), torch.float32, 'float32'))
    return load_policy(cfg, run, name, trainable=False)[0]


# ---- the report --------------------------------------------------------------------------------------------

def alternatives(cfg, hw):
    """[(words, settings)]: what makes a run smaller, of the settings that its script has."""
    lora, four_bits = {'use_lora': True}, {'use_lora': True, 'load_in_4bit': True}
    checkpointing, one = {'gradient_checkpointing': True}, {'per_device_train_batch_size': 1}
    wanted = [checkpointing, one, {'batch_size': hw.processes}, {'micro_batch_tokens': 1}, lora,
              {**lora, **checkpointing}, {**four_bits, **checkpointing}]
    if hw.processes > 1 and cfg.shard == 'none':
        shard = {'shard': 'full'}
        wanted += [shard, {**shard, **checkpointing}, {**shard, **lora, **checkpointing}]
    for changes in wanted:
        known = all(hasattr(cfg, name) for name in changes)
        if not known or all(getattr(cfg, name) == value for name, value in changes.items()):
            continue
        changed = copy.copy(cfg)
        for name, value in changes.items():
            setattr(changed, name, value)
        if not changed.clash():
            flags = [f'--{name}' if value is True else f'--{name}={value}' for name, value in changes.items()]
            yield ' '.join(flags), changed


def report(cfg, run, build, model, work, name):
    """Prints the plan, and returns it as a dict: bytes, operations, hours.

    build(cfg, hw, model) -> (Estimate, what a micro-batch is, as text); it is asked again for each of the
    alternatives, with the settings and the model of those.
    """
    if cfg.tensor_parallel > 1:
        from nanoforge import parallel
        parallel.check(model, cfg.tensor_parallel)
    hw = hardware(cfg)
    flops = hw.flops or measured_flops(hw)

    def estimated(cfg, hw, model):
        estimate, batch = build(cfg, hw, model)
        estimate.held = {'process' if hw.is_cpu else 'CUDA context': hw.process, **estimate.held}
        return estimate, batch

    estimate, batch = estimated(cfg, hw, model)
    peaks = {phase: sum(estimate.held.values()) + sum(taken.values())
             for phase, taken in estimate.phases.items()}
    largest = max(peaks, key=peaks.get)
    parts = {**estimate.held, **estimate.phases[largest]}
    count, trained = numbers(parameters(model)), numbers(parameters(model, True))
    run.print0(f'plan      {name}: {count:,} parameters, {trained:,} of them train; {hw.processes} x '
               f'{"process on this CPU" if hw.is_cpu else "GPU"}')
    run.print0(f'memory    GiB of each in its largest phase, {largest} ({batch})')
    for part, held in parts.items():
        run.print0(f'          {part:38}{held / GIB:8.2f}')
    run.print0(f'          {"peak":38}{peaks[largest] / GIB:8.2f} of {hw.memory / GIB:.1f}: '
               f'{verdict(peaks[largest], hw)}')
    others = ', '.join(f'{phase} {peak / GIB:.2f}' for phase, peak in peaks.items() if phase != largest)
    run.print0(f'          other phases: {others}')

    total = work.tokens * work.per_token + work.more
    hours = total / flops / hw.processes / 3600
    more = f', and {work.more / total:.0%} of all for {work.words}' if work.more else ''
    run.print0(f'flops     {work.per_token / 1e9:.3g} billion a token that is trained on{more}')
    speed = 'as given' if hw.flops else 'of its matrix products alone: a run takes about twice as long'
    run.print0(f'run       {work.steps:,} steps, {work.tokens:,.0f} tokens, {total:.3g} operations')
    run.print0(f'          {hours:.3g} hours at {flops / 1e12:.3g} TFLOP/s each ({speed})')
    smaller = {}
    for words, changed in alternatives(cfg, hw):
        its_model = model
        if changed.__dict__.get('use_lora') and not cfg.use_lora:
            its_model = load_policy(changed, quiet(run), cfg.base_model_name)[0]
        peak = estimated(changed, hardware(changed), its_model)[0].peak
        if peak < peaks[largest]:           # of a small model adapters hold more than they save
            smaller[words] = peak
            run.print0(f'{"" if len(smaller) > 1 else "smaller":9} {words:56}{peak / GIB:8.2f}: '
                       f'{verdict(peak, hw)}')
    return {'parameters': count, 'trained': trained, 'memory': parts, 'phases': peaks, 'peak': peaks[largest],
            'fits': peaks[largest] <= hw.memory, 'flops_per_token': work.per_token, 'flops': total,
            'tokens': work.tokens, 'hours': hours, 'smaller': smaller}


def verdict(peak, hw):
    return 'fits' if peak <= hw.memory else 'does not fit'
