"""What the benchmarks share: the model, a side in a process of its own, its clocks and memory, the machine's
rate of multiplication."""
import json
import os
import resource
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
WEIGHTS = 4 * (4 * 256 * 256 + 3 * 256 * 512)       # of llama() that are multiplied, without the head
# of TRL's trainers: float32 on the CPU, nothing written on the way, a constant rate
TRL_SETTINGS = dict(use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to='none',
                    save_strategy='no', disable_tqdm=True, lr_scheduler_type='constant')


def llama(**more):
    """transformers' Llama of 3M random parameters: 4 layers, 256 channels, vocabulary 1,024."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{
        **dict(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
               num_attention_heads=4,
               max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0), **more}))


def llama_with_words(directory):
    """llama() with the embedded model's tokenizer, saved in directory/model; returns the tokenizer."""
    from data.tokenizer import load_tokenizer
    tokenizer, path = load_tokenizer(os.path.join(ROOT, 'data', 'tiny')), os.path.join(directory, 'model')
    llama(eos_token_id=2).save_pretrained(path)
    tokenizer.save(path)
    return tokenizer


def read(path):
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def child(script, *flags, python=sys.executable, **environment):
    """What `script`, started with these flags, prints in its last line, as JSON."""
    done = subprocess.run([python, os.path.abspath(script), *flags], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f'{" ".join(flags)}: exit {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


def now():
    """Seconds of the clock and of this process's processors."""
    return time.perf_counter(), time.process_time()


def resident():
    """Bytes that this process holds."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def memory(start):
    """Megabytes at the peak, and above `start` bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {'peak_mb': peak / 2 ** 20, 'above_start_mb': (peak - start) / 2 ** 20}


def trl_clock(times, losses):
    """A callback for TRL's trainers: now() before the first step and after each, and the losses that are
    logged."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(now())

        def on_step_end(self, *_, **__):
            times.append(now())

        def on_log(self, *_, logs=None, **__):
            losses.append(logs.get('loss'))
    return Clock()


def multiplication_rate(dtype='float32'):
    """Floating-point operations a second of matrix products of this type, at the sizes of llama()."""
    import torch
    a, b = (torch.randn(size, dtype=getattr(torch, dtype)) for size in ((2048, 256), (256, 1024)))
    for _ in range(20):
        a @ b
    begun = time.perf_counter()
    for _ in range(100):
        a @ b
    return 100 * 2 * 2048 * 256 * 1024 / (time.perf_counter() - begun)


def product_seconds(passes, matmul='float32'):
    """Seconds that the products of llama()'s layers and head take alone: passes [(times, tokens through the
    layers, tokens through the head)], a backward pass counting as two. The head is multiplied in float32;
    attention is not counted."""
    layers = sum(times * 2 * WEIGHTS * in_layers for times, in_layers, _ in passes)
    head = sum(times * 2 * 1024 * 256 * in_head for times, _, in_head in passes)
    precision = 'bfloat16' if matmul == 'bf16' else matmul
    return layers / multiplication_rate(precision) + head / multiplication_rate()
