"""What is made for a GPU, as far as a CPU shows it: compiled layers, MFU."""
import functools
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import chaos
from configurator import parse
from model import GPT, GPTConfig
from nanoforge import log, plan
from nanoforge.quantize import quantize


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


@pytest.mark.parametrize('script', ['train_sft', 'train_agents'])
def test_compiled_layers_train_the_same(script, tmp_path, monkeypatch):
    """By what the compiler traces; the machine code that it makes of that takes minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, 'compile', functools.partialmethod(nn.Module.compile, backend='eager'))
    weights = train(script, 3, 'plain')[1]
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    compiled = train(script, 3, 'compiled', '--compile')[1]
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
