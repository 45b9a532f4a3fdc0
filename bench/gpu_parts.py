"""The parts of bench/gpu.py: each a function of a Bench, which it gives its rows.

First what must be right, then what is to be fast. Models have random weights, so that nothing is downloaded.
"""
import functools
import importlib.util
import math
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from types import SimpleNamespace

import shared     # first: it puts the repository on the import path

import torch
import torch.nn.functional as F
import transformers

import train_dpo
import train_gpt
import train_rl
from configurator import UserError, parse
from data.batches import best_fit, pack, pack_documents
from data.prepare import prepare_files
from model import FAMILIES, GPT, GPTConfig, load_model, read_safetensors
from nanoforge import kernels, plan
from nanoforge.log import device_peak_flops
from nanoforge.lora import add_lora, adapters_off, merge_lora
from nanoforge.optim import AdamW, make_optimizer
from nanoforge.run import LossScale, setup
from sample import generate, logp_gap

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
GIB = 2 ** 30
RATE = 1e-4     # of learning, in steps that are only timed
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}     # of hidden states


class Bench:
    """What a part is given: a device, sizes, the card's limits, and row() for what it finds.

    rates   {'bfloat16', 'float32': operations a second, 'bandwidth': bytes a second}, which `card` measures
    """

    def __init__(self, device, small, nanogpt=None, rates=None, left=540.0, report=None):
        self.device, self.small, self.nanogpt, self.rates = torch.device(device), small, nanogpt, rates or {}
        self.rows, self.end, self.report = [], time.monotonic() + left, report
        self.is_cuda = self.device.type == 'cuda'
        # on a CPU it is the tracing that is tried: machine code takes a minute
        self.compiler = {'backend': 'eager'} if small else {}

    def row(self, name, value, unit='', limit=None, beside=None, ok=None, note=''):
        """value: a number, in the unit. limit: the best that the card allows, in the same unit. beside:
        {who: their number}. ok: whether it is right; None where nothing can be wrong."""
        row = dict(name=name, value=value, unit=unit, limit=limit, beside=beside or {}, ok=ok, note=note)
        self.rows.append(row)
        if self.report:
            self.report(row)

    def pick(self, real, small):
        return small if self.small else real

    def setup(self, dtype='bfloat16', matmul='auto'):
        """The Run of a device, as the scripts have it; matmul='float32': no TF32 in what is checked."""
        return setup(str(self.device), dtype if self.is_cuda else 'float32', matmul)

    def sync(self):
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, step, count=8, warm=3):
        """The median of `count` calls."""
        count, warm = self.pick(count, 1), self.pick(warm, 1)
        times = []
        for _ in range(warm + count):
            self.sync()
            begun = time.perf_counter()
            step()
            self.sync()
            times.append(time.perf_counter() - begun)
        return statistics.median(times[warm:])

    @contextmanager
    def memory(self):
        """Yields an object whose `gib` is the peak of the block: of tensors on a card, else of the
        process."""
        peak = SimpleNamespace(gib=0.0)
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield peak
        most = torch.cuda.max_memory_allocated() if self.is_cuda else shared.peak()
        peak.gib = most / GIB

    def limit_of(self, flops, dtype='bfloat16'):
        """Seconds that so many operations take at the rate of the card's matrix products."""
        return flops / self.rates[dtype if self.is_cuda else 'float32']


# ---- the card ----------------------------------------------------------------------------------------------

def card(b):
    """What matrix products and copies reach: the limits of everything below."""
    b.setup(matmul='float32')
    n = b.pick(8192, 512)
    for dtype in (torch.bfloat16, torch.float32):
        x, y = torch.randn(2, n, n, device=b.device).to(dtype).unbind(0)
        out, name = torch.empty_like(x), str(dtype)[6:]
        rate = 2 * n ** 3 / b.seconds(lambda: torch.mm(x, y, out=out), 20)
        b.rates[name] = rate
        sheet = device_peak_flops(b.device) if dtype == torch.bfloat16 else None
        b.row(f'matrix products, {name}', rate / 1e12, 'TFLOP/s', sheet and sheet / 1e12,
              note='limit: the data sheet' if sheet else '')
    x = torch.zeros(b.pick(2 ** 28, 2 ** 22), device=b.device)
    out = torch.empty_like(x)
    b.rates['bandwidth'] = 2 * x.nbytes / b.seconds(lambda: out.copy_(x), 20)
    b.row('copies, read and written', b.rates['bandwidth'] / 1e9, 'GB/s')
    if b.is_cuda:
        b.row('memory', torch.cuda.get_device_properties(b.device).total_memory / GIB, 'GiB')


# ---- what must be right ------------------------------------------------------------------------------------

def triton(b):
    """The kernels of nanoforge/triton_kernels.py against torch's operations, in float64 where there are
    numbers."""
    if not b.is_cuda and not os.environ.get('TRITON_INTERPRET'):
        return b.row('Triton', None, note='needs a GPU')
    from nanoforge import triton_kernels
    N, V, C = b.pick((4000, 50257, 256), (7, 5000, 16))         # of a card two tiles
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, C, device=b.device), torch.randn(V, C, device=b.device) / C ** 0.5
    targets = tokens(b, N, vocabulary=V)
    for name, temperature, softcap, extras in (
            ('logp', 1.0, 0.0, False), ('entropy and mean', 0.7, 0.0, True), ('soft-capped', 0.7, 5.0, True)):
        outputs = {}
        for function, dtype in ((kernels.RowStats, torch.float32), (kernels.TokenStats, torch.float64)):
            x, w = (part.detach().to(dtype).requires_grad_() for part in (hidden, weight))
            keep = 0 if softcap else kernels.GPU_TILE        # the second tile is made again
            stats = function.apply(x, w, targets, temperature, softcap, extras, keep, False)
            stats = [part for part in stats if part is not None and part.is_floating_point()]
            torch.autograd.grad(stats[0].sum(), x, retain_graph=True)       # the first of two backward passes
            push = torch.arange(N, device=b.device) % 3
            total = sum((part * (push + i)).sum() for i, part in enumerate(stats))
            outputs[function] = *stats, *torch.autograd.grad(total, (x, w))
        found = max(error(*pair) for pair in zip(*outputs.values()))
        b.row(f'{name}: error of values and gradients', found, ok=found < 1e-5)
    weight, grad = torch.randn(2, 100_003, device=b.device)
    updated = []
    for dtype in (torch.float32, torch.float64):
        p = torch.nn.Parameter(weight.to(dtype))
        optimizer = AdamW([p], 1e-2)
        for _ in range(3):
            p.grad.copy_(grad)
            optimizer.step()
        updated.append(p)
    found = error(updated[0] - weight, updated[1] - weight)
    b.row('AdamW: error of three updates', found, ok=found < 1e-5)
    by_triton = triton_kernels.dither(weight, torch.empty_like(weight, dtype=torch.bfloat16),
                                      kernels.thresholds(b.device), kernels.PERIOD)
    same = torch.equal(by_triton.cpu(), kernels.dither(weight.cpu()))
    b.row('weights in bfloat16', float(same), ok=same, note='1: to the bit those of a CPU')


def family_configs(b):
    """{family: transformers' config} of small random models."""
    C = b.pick(256, 32)
    sizes = dict(vocab_size=999, hidden_size=C, intermediate_size=2 * C, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=C // 4, max_position_embeddings=2048,
                 pad_token_id=None, bos_token_id=None, eos_token_id=None)
    window = dict(sizes, sliding_window=b.pick(100, 9))
    gemma = dict(window, query_pre_attn_scalar=C // 4)
    gpt2 = transformers.GPT2Config(vocab_size=999, n_embd=C, n_layer=4, n_head=4, n_positions=2048,
                                   bos_token_id=None, eos_token_id=None)
    return {'gpt2': gpt2,
            'llama': transformers.LlamaConfig(**sizes),
            'mistral': transformers.MistralConfig(**window),
            'qwen2': transformers.Qwen2Config(**sizes),
            'qwen3': transformers.Qwen3Config(**sizes, tie_word_embeddings=True),
            'gemma2': transformers.Gemma2Config(**gemma),
            'gemma3': transformers.Gemma3TextConfig(**gemma)}


def theirs_of(b, config):
    """A random model of transformers in float32, whose norms and biases are not at their neutral values."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return theirs.to(b.device)


def ours_of(b, theirs):
    """The same as one of ours, through a directory as a user has it."""
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return load_model(directory, b.device)[0]


def error(got, want):
    """The root of the mean square error, as a share of what is wanted."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def tokens(b, *shape, vocabulary=999, seed=1):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(b.device)


def parity(b):
    """Logits and a gradient of each family against transformers; in bfloat16 both against float32."""
    idx = tokens(b, 2, b.pick(300, 40))
    for family, config in family_configs(b).items():
        theirs = theirs_of(b, config)
        ours = ours_of(b, theirs)
        b.setup('float32', 'float32')
        want = theirs(idx).logits
        theirs_grad, = torch.autograd.grad(-want.log_softmax(-1).gather(2, idx[..., None]).mean(),
                                           theirs.get_input_embeddings().weight)
        grad, = torch.autograd.grad(-ours(idx, idx).mean(), ours.embed_tokens.weight)
        with torch.no_grad():
            exact = max(error(ours(idx), want), error(grad, theirs_grad))
        b.row(f'{family}, float32: error of logits and gradient', exact, '', ok=exact < 2e-5)
        run = b.setup('bfloat16', 'float32')
        ours.set_matmul(run.matmul)
        with torch.no_grad(), run.autocast():
            rounded = error(ours(idx), want)
        with torch.no_grad():
            of_theirs = error(theirs.to(torch.bfloat16)(idx).logits, want)
        b.row(f'{family}, bfloat16: error of logits', rounded, '', beside={'transformers': of_theirs},
              ok=rounded < 1.5 * of_theirs)


def spans_of(*rows):
    """Rows of (begin, end) of positions -> (rows, T)."""
    rows = [torch.cat([torch.arange(*span) for span in row]) for row in rows]
    return torch.stack([row[:min(map(len, rows))] for row in rows])


def packed(b):
    """Packed rows against their documents one by one, prompts with two continuations among them; and what a
    layer's attention takes in both forms."""
    scale = b.pick(60, 1)
    first = [(0, 13 * scale), (0, 7 * scale), (5 * scale, 11 * scale), (0, 9 * scale)]      # 2,100 on a card
    positions = spans_of(first, first[::-1]).to(b.device)
    idx = tokens(b, *positions.shape)
    # the second has windows, the third soft caps, too: then, and in float32, flex attention is compiled first
    for family, dtype in (('qwen2', 'bfloat16'), ('mistral', 'bfloat16'), ('gemma2', 'bfloat16'),
                          ('qwen2', 'float32'), ('gemma2', 'float32')):
        run, ours = b.setup(dtype, 'float32'), ours_of(b, theirs_of(b, family_configs(b)[family]))
        weights, tolerance = list(ours.set_matmul(run.matmul).parameters()), TOLERANCE[dtype]
        push = torch.randn(*idx.shape, ours.config.n_embd, generator=torch.Generator().manual_seed(2))
        with run.autocast():
            got = ours.hidden(idx, positions)
            grads = torch.autograd.grad((got * push.to(b.device)).sum(), weights, allow_unused=True)
            want = torch.cat([one_by_one(ours, row, at) for row, at in zip(idx, positions)])
            plain = torch.autograd.grad((want * push.to(b.device)).sum(), weights, allow_unused=True)
        found = error(got, want)
        of_grads = error(*(torch.cat([x.flatten() for x in parts if x is not None])
                           for parts in (grads, plain)))
        is_flash = kernels.takes_flash(ours.config, b.device, getattr(torch, dtype))
        form = ('flash attention' if is_flash else 'flex attention') if b.is_cuda else 'the forms of a CPU'
        b.row(f'{family}, {dtype}: error of hidden states', found, ok=found < tolerance, note=form)
        b.row(f'{family}, {dtype}: error of the gradient', of_grads, ok=of_grads < 5 * tolerance)
    attention_forms(b)


def one_by_one(model, idx, positions):
    """hidden states (1, T, C) of a packed row (T,), each branch computed behind a copy of its prompt."""
    parts = []
    for begin, shared, start, end in kernels.continuations(positions[None]):
        row = torch.cat((idx[begin:begin + shared], idx[start:end]))[None]
        parts.append(model.hidden(row)[:, shared:])
    return torch.cat(parts, 1)


def attention_forms(b):
    """Forward and backward of one layer's attention over a packed row of eight documents."""
    T, H, G, D = b.pick((8192, 14, 2, 64), (256, 4, 2, 16))
    positions = torch.arange(T // 8, device=b.device).repeat(8)[None]
    q, k, v = (torch.randn(1, n, T, D, device=b.device, requires_grad=True) for n in (H, G, G))
    if b.is_cuda:
        q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    forms = {'mask': (kernels.attention, kernels.packed_mask(positions)[:, None])}
    if b.is_cuda:
        segments = kernels.flash_attention(), kernels.flash_segments(positions)
        forms['flash attention'] = lambda q, k, v, _, scale: kernels.flash(q, k, v, *segments, 0, scale), None
    if b.is_cuda and kernels.flex_works(b.device, q.dtype, H, G, D, 0.0):
        forms['flex attention'] = kernels.flex, kernels.flex_mask(positions)
    times, peaks = {}, {}
    for name, (form, mask) in forms.items():
        with b.memory() as peak:
            times[name] = 1000 * b.seconds(lambda: form(q, k, v, mask, D ** -0.5).sum().backward())
        peaks[name] = peak.gib
    fastest = min(times, key=times.get)
    # of the pairs that are seen; forward, and backward with its recomputation
    flops = 4 * H * D * (T // 8) ** 2 / 2 * 8 * 3.5
    b.row(f'attention of 8 documents in a row of {T:,}, {fastest}', times[fastest], 'ms',
          limit=1000 * b.limit_of(flops), beside={name: ms for name, ms in times.items() if name != fastest},
          note=', '.join(f'{name} {gib:.2f} GiB' for name, gib in peaks.items()))


def sampler(b):
    """Log-probabilities as sampled against those of training."""
    draw = random.Random(0)
    prompts = [[draw.randrange(999) for _ in range(draw.randint(3, 60))] for _ in range(b.pick(32, 3))]
    for family in ('gpt2', 'qwen3', 'gemma2'):
        ours = ours_of(b, theirs_of(b, family_configs(b)[family]))
        for dtype, most in (('float32', 1e-3), ('bfloat16', 0.3)):
            run = b.setup(dtype, 'float32')
            ours.set_matmul(run.matmul)
            with run.autocast():
                samples = generate(ours, prompts, b.pick(64, 6), num_samples=2)
                largest, mean = logp_gap(ours, prompts, samples)
            b.row(f'{family}, {dtype}: largest gap of a log-probability', largest, 'nats',
                  ok=largest < most, note=f'mean {mean:.1e}')


def small_gpt(b, **more):
    C = b.pick(256, 32)
    torch.manual_seed(0)
    return GPT(GPTConfig(arch='llama', **{**FAMILIES['llama'], **dict(
        vocab_size=999, block_size=256, n_layer=4, n_head=4, n_embd=C), **more})).init_weights().to(b.device)


def gpt_step(run, model, optimizer, idx):
    """An optimizer step on rows (B, T + 1); returns the loss, a tensor ()."""
    with run.autocast():
        loss = -model(idx[:, :-1], idx[:, 1:]).mean()
    run.backward(loss)
    run.step(optimizer, RATE, 1.0)
    return loss.detach()


def scaler(b):
    """Training in float16: the loss follows float32's, and an overflow skips its step and halves the
    scale."""
    losses, steps = {}, b.pick(40, 4)
    for dtype in ('float32', 'float16'):
        run, model = b.setup(dtype, 'float32'), small_gpt(b)
        run.scaler = LossScale(getattr(torch, dtype))       # on a CPU, too
        optimizer = make_optimizer('adamw', model, RATE)
        losses[dtype] = [gpt_step(run, model, optimizer, tokens(b, 8, 65, seed=step % 2))
                         for step in range(steps)]
    last, want = (float(losses[dtype][-1]) for dtype in ('float16', 'float32'))
    b.row('loss in float16', last, 'nats', beside={'float32': want}, ok=abs(last - want) < 0.02 * want,
          note=f'from {float(losses["float16"][0]):.3f}, scale {run.scaler.value:g}')
    run.scaler.value = 2.0 ** 130                           # every gradient is infinite
    before = model.lm_head.weight.detach().clone()
    gpt_step(run, model, optimizer, tokens(b, 8, 65))
    kept = torch.equal(before, model.lm_head.weight) and run.scaler.value == 2.0 ** 129
    b.row('a gradient that overflows', float(kept), ok=kept, note='the step is skipped, the scale halved')


def lora(b):
    """An adapter learns over a frozen bfloat16 base, which stays as it was; merged it gives the same
    logits."""
    run, model, idx = b.setup(), small_gpt(b), tokens(b, 8, 65)
    if b.is_cuda:
        model.bfloat16().set_matmul(run.matmul)
    with torch.no_grad(), run.autocast():
        base = model(idx)
    add_lora(model, 8, 16, 0.0, 'all-linear')
    optimizer = make_optimizer('adamw', model, 1e-2)
    for _ in range(b.pick(40, 4)):
        with run.autocast():
            loss = -model(idx[:, :-1], idx[:, 1:]).mean()
        run.backward(loss)
        run.step(optimizer, 1e-2, 1.0)
    last = loss.item()
    with torch.no_grad(), run.autocast():
        with adapters_off(model):
            off = error(model(idx), base)
        learned = model(idx)
        merge_lora(model, keep=False)
        merged = error(model(idx), learned)
    b.row('adapters off against the base: error of logits', off, ok=off < 1e-6)
    b.row('merged against the adapter: error of logits', merged, ok=merged < (5e-2 if b.is_cuda else 1e-5))
    b.row('loss', last, 'nats', ok=last < math.log(999))


def resume(b):
    """train_gpt.py, stopped half-way and resumed, ends with the bytes of a run that was not."""
    with tempfile.TemporaryDirectory() as directory:
        text = os.path.join(directory, 'text.txt')
        with open(text, 'w', encoding='utf-8') as file:
            file.write('what was, is what will be\n' * 400)
        data = os.path.join(directory, 'data')
        prepare_files(data, [text], 'char', 'written by bench/gpu.py')
        size = b.pick('--n_layer=4 --n_head=4 --n_embd=128', '--n_layer=1 --n_head=2 --n_embd=16').split()
        flags = [f'--dataset={data}', *size, '--block_size=32', '--batch_size=8', '--eval_iters=2',
                 '--sample_tokens=0', '--eval_interval=4', f'--device={b.device}', '--tensorboard=false',
                 '--dropout=0.1']

        def train(name, *more):
            out = os.path.join(directory, name)
            train_gpt.main(parse(train_gpt.Config, [*flags, f'--out_dir={out}', *more]))
            return read_safetensors(os.path.join(out, 'last'))

        whole, again = train('whole', '--max_iters=8'), train('again', '--max_iters=8')
        train('halved', '--max_iters=4')
        halved = train('halved', '--init_from=resume', '--max_iters=8')
    resumed, twice = (max(float((whole[name] - other[name]).abs().max()) for name in whole)
                      for other in (halved, again))
    # kernels of a card may add in another order each time: a resume changes no more than that
    b.row('largest difference of a weight', resumed, beside={'the same run twice': twice},
          ok=resumed <= 10 * twice, note='0: byte for byte')


def out_of_memory(b):
    """More than the card has is one line that names the flags to lower, and the process goes on."""
    run = b.setup()
    run.memory_flags = '--batch_size', '--block_size'
    size = 4 * torch.cuda.get_device_properties(b.device).total_memory if b.is_cuda else 2 ** 55
    said = ''
    try:
        with run.autocast():
            torch.empty(size, dtype=torch.uint8, device=b.device)
    except UserError as message:
        said = str(message)
    model = small_gpt(b)
    loss = gpt_step(run, model, make_optimizer('adamw', model, RATE), tokens(b, 2, 33))
    names_the_knob = '--batch_size' in said
    b.row('out of memory', float(names_the_knob), ok=names_the_knob and loss.isfinite().item(),
          note=said)


# ---- what is to be fast: pretraining -----------------------------------------------------------------------

def enough_memory(b, gib):
    return b.is_cuda and torch.cuda.get_device_properties(b.device).total_memory >= gib * GIB


def gpt2(b, compiled=False):
    """A step of GPT-2 124M, all of it: forward, backward, clipping, AdamW."""
    B, T = b.pick((32 if enough_memory(b, 60) else 8, 1024), (2, 32))
    sizes = b.pick(dict(n_layer=12, n_head=12, n_embd=768), dict(n_layer=2, n_head=2, n_embd=32))
    V = b.pick(50304, 999)
    run = b.setup()
    torch.manual_seed(0)
    fields = {**FAMILIES['gpt2'], 'activation': 'gelu', 'bias': False, **sizes}
    model = GPT(GPTConfig(arch='gpt2', vocab_size=V, block_size=T, **fields)).init_weights()
    model = model.to(b.device).set_matmul(run.matmul).train()
    optimizer, idx = make_optimizer('adamw', model, RATE), tokens(b, B, T + 1, vocabulary=V)
    flops = plan.train_flops(model, T)
    if compiled:
        model.compile_layers(**b.compiler)
    with b.memory() as peak:
        seconds = b.seconds(functools.partial(gpt_step, run, model, optimizer, idx))
    beside = {}
    del model, optimizer
    if b.nanogpt:
        beside['nanoGPT'] = B * T / b.seconds(nanogpt_step(b, sizes, V, idx, compiled))
    name = f'GPT-2 124M, {B} x {T:,}' if not b.small else 'a tiny GPT-2'
    sheet = device_peak_flops(b.device)
    mfu = f'MFU {B * T / seconds * flops / sheet:.1%}, ' if sheet else ''
    name += ', compiled' if compiled else ''
    b.row(name, B * T / seconds, 'tokens/s', 1 / b.limit_of(flops), beside,
          note=f'{mfu}{peak.gib:.1f} GiB')


def nanogpt_step(b, sizes, V, idx, compiled):
    """A step of nanoGPT's model and optimizer, as its train.py makes it."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(b.nanogpt, 'model.py'))
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    T = idx.size(1) - 1
    model = module.GPT(module.GPTConfig(block_size=T, vocab_size=V, dropout=0.0, bias=False, **sizes))
    model = model.to(b.device)
    optimizer = model.configure_optimizers(0.1, RATE, (0.9, 0.95), b.device.type)
    model = torch.compile(model, **b.compiler) if compiled else model
    run, x, y = b.setup(), idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    torch.set_float32_matmul_precision('high')

    def step():
        with run.autocast():
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


# ---- fine-tuning: a model of Qwen2.5-0.5B's shape ----------------------------------------------------------

def half_billion(b):
    """transformers' config, of ours and theirs."""
    sizes = b.pick(dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=4096),
                   dict(vocab_size=999, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512))
    return transformers.Qwen2Config(**sizes, tie_word_embeddings=True, pad_token_id=None, bos_token_id=None,
                                    eos_token_id=None)


def our_policy(b, dtype=torch.float32):
    from nanoforge.hf import config_from_hf
    torch.manual_seed(0)
    with b.device:
        model = GPT(config_from_hf(half_billion(b).to_dict())).init_weights()
    return model.to(dtype).set_matmul('bf16' if b.is_cuda else 'float32')


def their_policy(b, dtype=torch.float32):
    torch.manual_seed(0)
    with b.device:
        model = transformers.AutoModelForCausalLM.from_config(half_billion(b), attn_implementation='sdpa')
    return model.to(dtype)


def their_optimizer(b, model):
    return torch.optim.AdamW(model.parameters(), lr=RATE, fused=b.is_cuda)


def their_update(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def padded_rows(b, rows):
    """Lists of ids -> (ids, attention mask), padded on the right."""
    rows = [torch.tensor(row) for row in rows]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return idx.to(b.device), (torch.arange(idx.size(1)) < lengths[:, None]).long().to(b.device)


def name_of(b, what):
    return f'{what}, {"0.5B" if not b.small else "a tiny model"}'


def chats_of(b):
    """Rows (ids, is a target) of a batch, the second half of each learned."""
    import numpy as np
    draw = np.random.default_rng(0)
    low, high = b.pick((256, 768), (8, 24))
    lengths = draw.integers(low, high, b.pick(8, 3))
    V = b.pick(151936, 999)
    return [(draw.integers(1, V, n), np.arange(n) >= n // 2) for n in lengths]


def sft(b, compiled=False):
    """A step of fine-tuning all weights: 8 chats of 256 to 767 tokens, the second half of each learned."""
    chats, run = chats_of(b), b.setup()
    fed = sum(len(ids) - 1 for ids, _ in chats)
    capacity = b.pick(2048, 64)
    bins = best_fit([len(ids) for ids, _ in chats], capacity)
    batches = {'padded': pack_documents([[chat] for chat in chats], b.device, one_row=False)}
    if not compiled:
        batches['packed'] = pack_documents([[chats[i] for i in row] for row in bins], b.device, one_row=False,
                                           packed=True)
    model = our_policy(b).train()
    learned = sum(int(mask[1:].sum()) for _, mask in chats)
    flops = plan.train_flops(model, fed / len(chats), learned / fed)
    if compiled:
        model.compile_layers(**b.compiler)
    optimizer, speeds, peaks = make_optimizer('adamw', model, RATE), {}, {}
    for name, batch in batches.items():
        def step(batch=batch):
            with run.autocast():
                hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions)
                logp = model.token_stats(hidden, batch.targets, extras=False)['logp']
            run.backward(-logp.sum() / learned)
            run.step(optimizer, RATE, 1.0)
        with b.memory() as peak:
            speeds[name] = fed / b.seconds(step)
        peaks[name] = peak.gib
    del model, optimizer, step
    beside, note = {}, ''
    if not compiled:
        with b.memory() as peak:
            beside['transformers'] = fed / b.seconds(their_sft(b, run, chats))
        note = f', transformers {peak.gib:.1f} GiB'
    for name, speed in speeds.items():
        b.row(name_of(b, f'SFT step, {name}{", compiled" if compiled else ""}'), speed, 'tokens/s',
              1 / b.limit_of(flops), beside, note=f'{peaks[name]:.1f} GiB{note}')


def their_sft(b, run, chats):
    model = their_policy(b).train()
    optimizer = their_optimizer(b, model)
    idx, mask = padded_rows(b, [ids.tolist() for ids, _ in chats])
    targets, _ = padded_rows(b, [(is_target + 0).tolist() for _, is_target in chats])
    labels = idx.masked_fill(targets == 0, -100)

    def step():
        with run.autocast():
            loss = model(input_ids=idx, attention_mask=mask, labels=labels).loss
        their_update(model, optimizer, loss)
    return step


def their_logp(model, idx, mask, is_target):
    """(B,) sums of log-probabilities of the tokens where is_target (B, T)."""
    logits = model(input_ids=idx, attention_mask=mask).logits[:, :-1]
    logp = logits.float().log_softmax(-1).gather(2, idx[:, 1:, None]).squeeze(2)
    return (logp * is_target[:, 1:]).sum(1)


def dpo(b):
    """A step of DPO with a reference: 4 pairs, prompts of 192 tokens, answers of 128 to 255."""
    draw = random.Random(0)
    V, prompt = b.pick(151936, 999), b.pick(192, 8)
    low, high = b.pick((128, 255), (4, 8))

    def ids(n):
        return [draw.randrange(1, V) for _ in range(n)]
    pairs = [SimpleNamespace(prompt=ids(prompt), chosen=ids(draw.randint(low, high)),
                             rejected=ids(draw.randint(low, high))) for _ in range(b.pick(4, 2))]
    run, policy = b.setup(), our_policy(b)
    reference = our_policy(b, torch.bfloat16 if b.is_cuda else torch.float32)
    reference.requires_grad_(False)
    cfg, optimizer = parse(train_dpo.Config, []), make_optimizer('adamw', policy, RATE)
    batch = pack([(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs], b.device, share=True)
    flops = plan.dpo_flops(policy, pairs, 'copy')

    def step():
        with run.autocast():
            logp = train_dpo.answer_logp(policy, batch)
            with torch.no_grad():
                ref_logp = train_dpo.answer_logp(reference, batch)
        loss, _ = train_dpo.pair_loss(cfg, logp, ref_logp, train_dpo.answer_lengths(batch))
        run.backward(loss.mean())
        run.step(optimizer, RATE, 1.0)
    with b.memory() as peak:
        seconds = b.seconds(step)
    del policy, reference, optimizer, step
    with b.memory() as of_theirs:
        theirs = b.seconds(their_dpo(b, run, pairs))
    fed = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    b.row(name_of(b, 'DPO step'), 1000 * seconds, 'ms', 1000 * b.limit_of(flops * fed),
          {'transformers': 1000 * theirs},
          note=f'{peak.gib:.1f} GiB, transformers {of_theirs.gib:.1f} GiB')


def their_dpo(b, run, pairs):
    policy, reference = their_policy(b), their_policy(b, torch.bfloat16 if b.is_cuda else torch.float32)
    optimizer = their_optimizer(b, policy)
    answers = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    idx, mask = padded_rows(b, [prompt + answer for prompt, answer in answers])
    is_target, _ = padded_rows(b, [[0] * len(prompt) + [1] * len(answer) for prompt, answer in answers])

    def step():
        with run.autocast():
            logp = their_logp(policy, idx, mask, is_target)
            with torch.no_grad():
                ref_logp = their_logp(reference, idx, mask, is_target)
        chosen, rejected = (logp - ref_logp).view(-1, 2).unbind(1)
        their_update(policy, optimizer, -F.logsigmoid(0.1 * (chosen - rejected)).mean())
    return step


def decoding_seconds(b, model, rows, prompt, new, size=2):
    """What sampling takes at least: each token its products, or the reading of weights, keys and values."""
    c = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if 'embed' not in name or c.tied)
    slot = 2 * c.n_layer * c.n_kv_head * c.head_size
    size = size if b.is_cuda else 4
    total = 0.0
    for length in range(prompt, prompt + new):
        read = size * (weights + rows * slot * length) / b.rates['bandwidth']
        total += max(read, b.limit_of(rows * plan.forward_flops(model, length)))
    return total


def grpo(b):
    """A step of GRPO without a KL term: 4 prompts of 128 tokens, 8 completions of 128 of each, one update."""
    draw = random.Random(0)
    V, groups, G, P, T = b.pick((151936, 4, 8, 128, 128), (999, 2, 2, 8, 4))
    prompts = [[draw.randrange(1, V) for _ in range(P)] for _ in range(groups)]
    run, policy = b.setup(), our_policy(b)
    optimizer = make_optimizer('adamw', policy, RATE)
    advantages = torch.tensor([1.0, -1.0], device=b.device).repeat(groups * G // 2)
    flops = groups * G * T * plan.sampled_flops(policy, P, T, G, learned=1, forwards=0)
    least = (b.limit_of(flops + groups * P * plan.forward_flops(policy, P, 1 / P))
             + decoding_seconds(b, policy, groups * G, P, T))

    def sampled():
        with run.autocast():
            return generate(policy, prompts, T, num_samples=G).tokens

    def step():
        completions = sampled().view(groups, G, T).tolist()
        batch = pack(list(zip(prompts, completions)), b.device)
        with run.autocast():
            logp, *_ = train_rl.forward(SimpleNamespace(temperature=1.0), policy, None, batch)
        loss, _ = train_rl.policy_loss(logp, logp.detach(), advantages, batch.targets >= 0)
        run.backward(loss)
        run.step(optimizer, RATE, 1.0)
    with b.memory() as peak:
        seconds, of_sampling = b.seconds(step, 4, 2), b.seconds(sampled, 3, 1)
    del policy, optimizer, step, sampled
    with b.memory() as of_theirs:
        theirs = b.seconds(their_grpo(b, run, prompts, G, T, advantages), 3, 1)
    b.row(name_of(b, 'GRPO step'), 1000 * seconds, 'ms', 1000 * least, {'transformers': 1000 * theirs},
          note=f'sampling {1000 * of_sampling:.0f} ms of it; {peak.gib:.1f} GiB, transformers '
               f'{of_theirs.gib:.1f} GiB')


def their_grpo(b, run, prompts, G, T, advantages):
    model = their_policy(b)
    optimizer = their_optimizer(b, model)
    idx = torch.tensor(prompts, device=b.device).repeat_interleave(G, 0)

    def step():
        with torch.no_grad(), run.autocast():
            rows = their_samples(model.eval(), idx, T)
        mask = torch.ones_like(rows)
        model.train()
        with run.autocast():
            logits = model(input_ids=rows, attention_mask=mask).logits[:, idx.size(1) - 1:-1]
        logp = logits.float().log_softmax(-1).gather(2, rows[:, idx.size(1):, None]).squeeze(2)
        ratio = (logp - logp.detach()).exp()
        their_update(model, optimizer, -(ratio * advantages[:, None]).mean())
    return step


def their_samples(model, idx, new):
    return model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, temperature=1.0, top_k=0,
                          top_p=1.0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)


def generation(b):
    """Sampling with weights in bfloat16, prompts of 128 tokens, 128 new ones, at batch 1 and 64."""
    P, T = b.pick((128, 128), (8, 4))
    dtype = torch.bfloat16 if b.is_cuda else torch.float32
    for rows in b.pick((1, 64), (1, 4)):
        idx = tokens(b, rows, P)
        model = our_policy(b, dtype).eval()
        least = decoding_seconds(b, model, rows, P, T)
        with b.memory() as peak:
            seconds = b.seconds(lambda: generate(model, idx.tolist(), T), 3, 1)
        del model
        theirs = their_policy(b, dtype).eval()
        with torch.no_grad():
            of_theirs = b.seconds(lambda: their_samples(theirs, idx, T), 3, 1)
        del theirs
        b.row(name_of(b, f'generation, batch {rows}'), rows * T / seconds, 'tokens/s', rows * T / least,
              {'transformers': rows * T / of_theirs}, note=f'{peak.gib:.1f} GiB')


def memory(b):
    """The peak of a training step on 4 rows of 1,024 tokens; the limit is what is held between steps."""
    B, T = b.pick((4, 1024), (2, 16))
    run, idx = b.setup(), tokens(b, B, T + 1)
    frozen = torch.bfloat16 if b.is_cuda else torch.float32
    for name, dtype, checkpointing in (('all weights', torch.float32, False),
                                       ('all weights, checkpointing', torch.float32, True),
                                       ('LoRA', frozen, False), ('LoRA, checkpointing', frozen, True)):
        model = our_policy(b, dtype).train()
        with b.memory() as peak:
            if name.startswith('LoRA'):
                add_lora(model, 16, 32, 0.0, 'all-linear')
            model.gradient_checkpointing = checkpointing
            optimizer = make_optimizer('adamw', model, RATE)
            trained = plan.numbers(plan.parameters(model, True))
            held = sum(p.nbytes for p in plan.parameters(model, False)) + 16 * trained
            for _ in range(2):
                gpt_step(run, model, optimizer, idx)
        del model, optimizer
        b.row(name_of(b, f'peak memory, {name}'), peak.gib, 'GiB', held / GIB,
              note='' if b.is_cuda else 'of the process, so far')


def scripts(b):
    """Every script's default, for some steps, as long as there is time: bench/gpu_runs.py."""
    from gpu_runs import ROWS, run_row
    with tempfile.TemporaryDirectory() as scratch:
        for name in b.pick(('gpt', 'sft', 'dpo', 'rl grpo', 'sft packed', 'sft lora'), ('sample',)):
            left = b.end - time.monotonic()
            if left < 20:
                b.row(name, None, note='not reached')
                continue
            result = run_row(name, ROWS[name], str(b.device), scratch, timeout=left)
            losses = f'loss {result["first_loss"]} to {result["last_loss"]}, ' if result['first_loss'] else ''
            b.row(f'{name}: {" ".join(ROWS[name][:1])}', result['tokens_per_second'] or result['seconds'],
                  'tokens/s' if result['tokens_per_second'] else 's', ok=result['exit'] == 0,
                  note=f'{losses}{result["seconds"]} s, {result["memory_mb"]} MB {result["tail"][-300:]}')


gpt2_compiled = functools.partial(gpt2, compiled=True)
sft_compiled = functools.partial(sft, compiled=True)
