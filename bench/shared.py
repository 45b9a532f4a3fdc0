"""What the benchmarks share: the model, a side in a process of its own, TRL's trainers, clocks and memory,
and the time that matrix products take alone."""
import functools
import json
import os
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# of TRL's trainers: nothing written on the way, a constant rate
TRL_SETTINGS = dict(fp16=False, gradient_checkpointing=False, dataloader_pin_memory=False, report_to='none',
                    save_strategy='no', disable_tqdm=True, lr_scheduler_type='constant', warmup_steps=0)
# of a child: neither bars nor warnings of libraries between the lines that count
QUIET = {'TQDM_DISABLE': '1', 'HF_DATASETS_DISABLE_PROGRESS_BARS': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1',
         'PYTHONWARNINGS': 'ignore', 'TRANSFORMERS_VERBOSITY': 'error'}
FEW_ROWS = 64           # of a sampler's batch, whose weights may lie in oneDNN's layout


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


def rendered(tokenizer, messages, tools=None):
    """A chat as the texts (prompt, completion), so that both sides train on the same tokens; what the
    template puts behind the last answer's stop token is left out."""
    from data import chat
    (prompt, _), (completion, _), *_ = chat.segments(tokenizer, messages, tools)[0]
    return prompt, completion.rstrip('\n')


def read(path):
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def child(script, *flags, python=sys.executable, **environment):
    """What `script`, started with these flags, prints in its last line, as JSON."""
    done = subprocess.run([python, os.path.abspath(script), *flags], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, **QUIET, **environment})
    if done.returncode:
        sys.exit(f'{" ".join(flags)}: exit {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


def has_bf16():
    """Whether the processor multiplies bfloat16, so that --matmul=auto does."""
    from nanoforge.run import setup
    return setup('cpu').matmul == 'bf16'


def now():
    """Seconds of the clock and of this process's processors."""
    return time.perf_counter(), time.process_time()


def resident():
    """Bytes that this process holds."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def peak():
    """Bytes that this process has held at most. Not ru_maxrss, where that of whoever started it counts."""
    with open('/proc/self/status') as file:
        return 1024 * int(next(line for line in file if line.startswith('VmHWM')).split()[1])


def memory(start, most):
    """Megabytes at the peak of `most` bytes, and above `start` bytes."""
    return {'peak_mb': most / 2 ** 20, 'above_start_mb': (most - start) / 2 ** 20}


def clock_steps(Run, times, peaks):
    """Makes Run.step, the last thing that a step of a script of ours does, add now() to `times` and peak() to
    `peaks`: that of training, without the checkpoint that is written in the end."""
    step = Run.step

    def step_timed(run, *given, **more):
        grad_norm = step(run, *given, **more)
        times.append(now())
        peaks.append(peak())
        return grad_norm

    Run.step = step_timed


def training_flags(model, data, output, batch, steps, rate, matmul):
    """What train_sft.py and train_dpo.py are started with: on the CPU, a constant rate, nothing held out."""
    return [f'--base_model_name={model}',
            f'--dataset_path={data}',
            f'--output_dir={output}',
            '--eval_fraction=0',
            f'--per_device_train_batch_size={batch}',
            '--gradient_accumulation_steps=1',
            f'--learning_rate={rate}',
            '--lr_scheduler_type=constant',
            '--warmup_steps=0',
            f'--max_steps={steps}',
            f'--logging_steps={steps}',
            f'--matmul={matmul}',
            '--device=cpu',
            '--tensorboard=false']


def trl_trainer(kind, model, rows, settings, bf16=False, **more):
    """TRL's trainer of this kind, 'SFT', 'DPO' or 'GRPO', of the float32 model in the directory `model` on
    `rows`; bf16: under autocast. settings: of its Config; more: of the trainer itself."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    use_cpu = not torch.cuda.is_available()
    config = getattr(trl, f'{kind}Config')(bf16=bf16, use_cpu=use_cpu, **TRL_SETTINGS, **settings)
    return getattr(trl, f'{kind}Trainer')(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        **more)


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


class Shapes(NamedTuple):
    """The matrix products of a model: so many layers, each of products (inputs, outputs), the first of them
    for every token, the others only for those that the layer after it needs; and the head's."""
    layers: int
    products: list
    head: tuple


LLAMA = Shapes(4, [(256, 768), (256, 256), (256, 512), (256, 512), (512, 256)], (256, 1024))       # llama()'s


def product_seconds(passes, matmul='float32', shapes=LLAMA):
    """Seconds that the products of layers and head take alone, attention not counted.

    passes: [(forward passes, backward passes, tokens through the layers, tokens through the head)], where
    tokens that do not reach the head pass no more of the last layer than its first product, that of
    attention's inputs. The head's logits are multiplied in float32, their gradients as the layers are.
    """
    total = 0.0
    for forwards, backwards, tokens, at_head in passes:
        for i, product in enumerate(shapes.products):
            in_last = tokens if i == 0 else at_head
            for count, rows in ((shapes.layers - 1, tokens), (1, in_last)):
                forward, backward = seconds_of_product(rows, *product, matmul)
                total += count * (forwards * forward + backwards * backward)
        forward, _ = seconds_of_product(at_head, *shapes.head, 'float32')
        _, backward = seconds_of_product(at_head, *shapes.head, matmul)
        total += forwards * forward + backwards * backward
    return total


@functools.cache
def seconds_of_product(rows, inputs, outputs, matmul='float32'):
    """(forward, backward): seconds of x (rows, inputs) times a weight (outputs, inputs) transposed, and of
    the two products that give the gradients of x and of the weight. Few rows are multiplied by weights in
    oneDNN's layout, too, as a sampler has them; the faster form counts."""
    import torch
    from nanoforge.decode import linear_function
    rows, dtype = round(rows), torch.bfloat16 if matmul == 'bf16' else torch.float32
    x, weight, y = (torch.randn(size, dtype=dtype)
                    for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    forward = fastest(lambda: torch.mm(x, weight.t(), out=y))
    if rows < FEW_ROWS:
        packed = linear_function(weight, None, dtype, rows)
        forward = min(forward, fastest(lambda: packed(x)))
    to_input = fastest(lambda: torch.mm(y, weight, out=dx))
    to_weight = fastest(lambda: torch.mm(y.t(), x, out=dweight))
    return forward, to_input + to_weight


def fastest(function):
    """Seconds of the fastest of several calls: what the machine can do where others use it, too."""
    function()
    seconds, end = [], time.perf_counter() + 0.2
    while len(seconds) < 5 or time.perf_counter() < end:
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
