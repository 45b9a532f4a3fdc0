"""What is made for a GPU, as far as a CPU shows it: compiled layers, MFU, bench/gpu.py."""
import functools
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import chaos
from conftest import ROOT
from configurator import parse
from model import GPT, GPTConfig
from nanoforge import log, plan, plots
from nanoforge.quantize import quantize

sys.path.insert(0, os.path.join(ROOT, 'bench'))
import gpu


def train(script, steps, out, *flags):
    """main() of a tiny run -> (lines of its log, the weights of its end)."""
    module, argv = import_module(script), chaos.small_run(script, steps)
    if script == 'train_agents':
        flags = [f'training.experiment_name={out}', *flags]
    else:
        flags = [f'--out_dir={out}', *flags]
    module.main(parse(module.Config, [*argv, *flags]))
    folders = [Path('logs', out), Path(out)]
    folder = next(folder for folder in folders if folder.exists())
    lines = [json.loads(line) for path in folder.rglob('log.jsonl') for line in path.read_text().splitlines()]
    path = next(path for path in folder.rglob('*model.safetensors') if f'checkpoint-{steps}' in str(path))
    return lines, load_file(path)


@pytest.mark.parametrize('script', chaos.SMALL)
def test_each_script_logs_its_mfu(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log, 'device_peak_flops', lambda device: 1e9)
    lines, _ = train(script, 3, 'out')
    for line in lines:
        assert ('mfu' in line) == ('tokens_per_second' in line and 'loss' in line)
    assert any(0 < line.get('mfu', 0) < 100 for line in lines)


def test_compiled_layers_train_the_same(tmp_path, monkeypatch):
    """By what the compiler traces; the machine code that it makes of that takes minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, 'compile', functools.partialmethod(nn.Module.compile, backend='eager'))
    weights = train('train_sft', 3, 'plain')[1]
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    compiled = train('train_sft', 3, 'compiled', '--compile')[1]
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > graphs
    for name, weight in weights.items():
        torch.testing.assert_close(compiled[name], weight, rtol=0, atol=2e-5)


def test_operations_of_a_rollout():
    """A group whose prompt is computed once is what its tokens take one by one; quantised layers count whole."""
    model = GPT(GPTConfig(arch='llama', vocab_size=97, n_layer=2, n_head=2, n_embd=16))
    alone = plan.sampled_flops(model, 0, 24, 1, learned=2, forwards=3)
    assert alone == 2 * plan.train_flops(model, 24) + 3 * plan.forward_flops(model, 24)
    head = 2 * 97 * 16
    group = plan.sampled_flops(model, 40, 10, 8, learned=0)
    assert group * 80 == pytest.approx(120 * (plan.forward_flops(model, 50) - head) + 80 * head)
    before = plan.train_flops(model.requires_grad_(False), 24)
    quantize(model, bits=4)
    assert plan.train_flops(model, 24) == before


# ---- bench/gpu.py ------------------------------------------------------------------------------------------

# what a lent machine may lack: Python does not find it, but for torch, transformers and numpy
BARE = '''import sys
from importlib.machinery import PathFinder
MISSING = """accelerate bitsandbytes datasets matplotlib peft pytest rouge_score sacrebleu tensorboard tiktoken""".split()

class Bare:
    find_distributions, invalidate_caches = PathFinder.find_distributions, PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition('.')[0] not in MISSING:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
'''


@pytest.mark.skipif(not shutil.which('nvidia-smi'), reason='there is no NVIDIA GPU')
def test_what_must_be_right_on_a_gpu(tmp_path):
    parts = 'triton', 'parity', 'sampler', 'scaler', 'lora', 'resume', 'out_of_memory', 'packed'
    environment = {name: value for name, value in os.environ.items() if name != 'CUDA_VISIBLE_DEVICES'}
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'bench', 'gpu.py'), '--only', *parts], cwd=tmp_path,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not find_spec('triton'), reason='Triton comes with PyTorch for a GPU')
def test_triton_kernels_interpreted(tmp_path):
    """The part `triton` of bench/gpu.py, run by Triton's interpreter."""
    program = ('import gpu_parts\nfrom nanoforge import kernels\nb = gpu_parts.Bench("cpu", True)\n'
               'kernels.has_triton = lambda device: True\ngpu_parts.triton(b)\n'
               'assert len(b.rows) == 5 and all(row["ok"] for row in b.rows), b.rows')
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': os.path.join(ROOT, 'bench')}
    subprocess.run([sys.executable, '-c', program], cwd=tmp_path, check=True, env=environment)


def bench(tmp_path, *flags, files=BARE):
    """bench/gpu.py on the CPU -> (exit status, its JSON, its page)."""
    (tmp_path / 'sitecustomize.py').write_text(files)
    command = [sys.executable, os.path.join(ROOT, 'bench', 'gpu.py'), '--device=cpu', '--small', *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path), 'OMP_NUM_THREADS': '1'})
    assert (tmp_path / 'gpu.json').exists(), done.stdout + done.stderr
    return done.returncode, json.loads((tmp_path / 'gpu.json').read_text()), (tmp_path / 'gpu.html').read_text()


def test_bench_shows_all_where_little_is_installed(tmp_path):
    """Every part with its real work in tiny sizes."""
    code, found, html = bench(tmp_path, '--together')
    rows = {part['name']: part['rows'] for part in found['parts']}
    assert code == 0, [part for part in found['parts'] if part['error'] or not all(
        row['ok'] in (True, None) for row in part['rows'])]
    assert list(rows) == list(gpu.PARTS) and all(rows.values())
    for name in ('parity', 'packed', 'sampler', 'scaler', 'lora', 'resume', 'out_of_memory'):
        assert any(row['ok'] for row in rows[name])
    for name in ('sft', 'dpo', 'grpo', 'generation'):
        assert rows[name][0]['limit'] > 0 and rows[name][0]['beside']['transformers'] > 0
    assert all(html.count(f'<h2>{name} ') == 1 for name in rows) and 'http' not in html


def test_bench_goes_on_past_a_part_that_fails(tmp_path):
    """In processes of their own: one part raises, one dies; what each has shown before is kept."""
    broken = BARE + '''
if any(arg.startswith('--part=') for arg in sys.argv):
    sys.path.insert(0, BENCH)
    import os
    import gpu_parts

    def raising(b):
        b.row('before it', b.rates['bandwidth'])
        raise RuntimeError('a mistake')

    def dying(b):
        b.row('before the end', 2.0)
        os._exit(7)
    gpu_parts.sampler, gpu_parts.lora = raising, dying
'''.replace('BENCH', repr(os.path.join(ROOT, 'bench')))
    code, found, html = bench(tmp_path, '--only', 'sampler', 'lora', 'memory', files=broken)
    parts = {part['name']: part for part in found['parts']}
    assert code == 1 and list(parts) == ['card', 'sampler', 'lora', 'out_of_memory', 'memory']
    assert parts['sampler']['error'] == 'RuntimeError: a mistake' and 'a mistake' in html
    assert parts['sampler']['rows'][0]['value'] == parts['card']['rows'][-1]['value'] * 1e9
    assert parts['lora']['error'].startswith('exit 7') and parts['lora']['rows'][0]['value'] == 2.0
    assert parts['memory']['error'] is None and parts['memory']['rows'][0]['limit'] > 0


def test_bench_keeps_to_its_time(tmp_path):
    code, found, _ = bench(tmp_path, '--minutes=0')
    assert code == 1 and all(part['error'].startswith('not reached') for part in found['parts'])
    options = SimpleNamespace(device='cpu', small=True, nanogpt=None)
    part = gpu.Child('packed', options, tmp_path)
    assert part.run({}, left=0.1)['error'] == 'stopped, as the time was over'
    assert part.process.returncode is not None


@pytest.mark.pictures
def test_a_run_without_matplotlib_draws_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setattr(plots.importlib.util, 'find_spec', lambda name: None)
    plots.has_matplotlib.cache_clear()
    for _ in range(2):
        plots.loss_picture(tmp_path / 'log.jsonl', tmp_path / 'loss.png', 'title')
    plots.has_matplotlib.cache_clear()
    assert capsys.readouterr().out == 'no pictures: pip install matplotlib\n'
