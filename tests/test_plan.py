"""--plan against the real thing: what autograd keeps, what torch counts, what processes take."""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configurator import UserError, parse
from conftest import ROOT
from data.batches import PackedBatch, pack, pack_documents
from data.prepare import prepare_files
from data.tokenizer import load_tokenizer
from model import FAMILIES, GPT, GPTConfig, add_lora, save_model
from nanoforge import plan
from nanoforge.optim import OPTIMIZERS, make_optimizer

sys.path.insert(0, os.path.join(ROOT, 'scripts'))
from document_recipes import MARK, RECIPES

CPU = torch.device('cpu')
SIZES = dict(vocab_size=97, block_size=2048, n_layer=6, n_head=4, n_embd=64, n_inner=160)


def new_model(arch='llama', lora_dropout=None, **more):
    model = GPT(GPTConfig(arch=arch, **{**FAMILIES[arch], **SIZES, **more})).init_weights().train()
    return model if lora_dropout is None else add_lora(model, 4, 8, lora_dropout, 'all-linear')


def chats(*lengths):
    """Rows of which the second half is learned."""
    return pack_documents([[(np.zeros(n, int), np.arange(n) >= n // 2)] for n in lengths], CPU)


def plain(rows, length):
    places = torch.arange(rows * length).view(rows, length)
    return PackedBatch(torch.zeros_like(places), None, places, torch.zeros_like(places), None)


SHORT, LONG = chats(100, 120, 90, 80), chats(300, 320, 301)
PAIRS = pack([([0] * 160, [[0] * 150, [0] * 140])] * 2, CPU, share=True)        # one of the forms of attention each
SHORT_PAIRS = pack([([0] * 60, [[0] * 50, [0] * 40])] * 2, CPU, share=True)
UNEVEN_PAIRS = pack([([0] * 20, [[0] * 400, [0] * 20])] * 2, CPU, share=True)
GROUPS = pack([([0] * 60, [[0] * 40] * 8)] * 2, CPU)


@pytest.mark.parametrize('batch, model, product', [
    (SHORT, dict(), 4), (SHORT, dict(arch='qwen3', n_kv_head=2), 4), (SHORT, dict(arch='gpt2'), 4),
    (LONG, dict(n_kv_head=2), 4), (LONG, dict(arch='qwen3'), 4), (LONG, dict(n_embd=256, n_inner=1024), 4),
    (PAIRS, dict(n_kv_head=2), 4), (PAIRS, dict(arch='qwen3'), 4), (SHORT_PAIRS, dict(), 4),
    (UNEVEN_PAIRS, dict(n_kv_head=2), 4), (GROUPS, dict(n_kv_head=2), 4),
    (plain(8, 64), dict(arch='qwen3'), 4), (plain(3, 256), dict(arch='gpt2'), 4), (plain(3, 256), dict(arch='qwen3'), 4),
    (SHORT, dict(arch='gemma2'), 4), (SHORT, dict(arch='gemma3_text', n_kv_head=2), 4),
    (SHORT, dict(lora_dropout=0.0), 4), (SHORT, dict(lora_dropout=0.05), 4),
    (LONG, dict(lora_dropout=0.05, n_kv_head=2), 4),
    (SHORT, dict(), 2), (LONG, dict(n_kv_head=2), 2), (SHORT, dict(lora_dropout=0.05), 2)])
def test_activations_are_what_autograd_keeps(batch, model, product):
    model = new_model(**model).set_matmul('bf16' if product == 2 else 'float32')
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {p.bf16_copy.untyped_storage().data_ptr() for p in model.parameters() if hasattr(p, 'bf16_copy')}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions)
    hw = plan.Hardware('cpu', 1, product, 0, None, 0, stacks=True)
    shape = plan.shape_of(model.config, hw, batch)
    planned, _ = plan.activation_bytes(model.config, hw, model, shape, checkpointing=False)
    planned -= 4 * hidden.numel()               # which autograd keeps for the head, not for the layers
    assert planned == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.03)


def test_operations_are_those_that_torch_counts():
    for model in (new_model(), new_model('gpt2'), new_model('qwen3', tied=False)):
        x = torch.zeros(2, 48, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            logp = model(x, x)
        forward = counter.get_total_flops()
        with counter:                           # which begins at 0 again
            logp.sum().backward()
        assert 96 * plan.forward_flops(model, 48) == forward
        assert 96 * plan.train_flops(model, 48) == forward + counter.get_total_flops()


def test_operations_under_lora():
    """But for the zeros between stacked adapters, and for the first layer, whose input has no gradient."""
    model, x = new_model(lora_dropout=0.0, n_layer=24), torch.zeros(2, 48, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, x).sum().backward()
    assert 96 * plan.train_flops(model, 48) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_moments_are_those_that_the_optimizer_makes(name):
    with torch.device('meta'):
        empty = GPT(new_model().config)
    model = new_model()
    optimizer = make_optimizer(name, model, 1e-3)
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    made = [tensor for key, tensor in optimizer.state_dict().items()]
    gradients, moments = plan.optimizer_bytes(name, empty)
    assert gradients == sum(flat.grad.nbytes for flat in optimizer.flats)
    assert moments == pytest.approx(sum(tensor.nbytes for tensor in made), rel=1e-3)


# ---- runs --------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Llama of 19 million random parameters that reads the embedded model's tokens, and rows for it."""
    directory = tmp_path_factory.mktemp('plan')
    tokenizer = load_tokenizer(os.path.join(ROOT, 'data', 'tiny'))
    config = GPTConfig(arch='llama', **{**FAMILIES['llama'], 'tied': True}, vocab_size=tokenizer.vocab_size,
                       block_size=1024, n_layer=6, n_head=8, n_kv_head=4, n_embd=512, n_inner=1536)
    save_model(GPT(config).init_weights(), tokenizer, directory / 'model')
    for name, row in (('sft', {'prompt': 'a b ' * 60, 'completion': 'c d ' * 60}),
                      ('dpo', {'prompt': 'a b ' * 60, 'chosen': 'c d ' * 60, 'rejected': 'd c ' * 50})):
        rows = [{**row, 'prompt': f'{i} {row["prompt"]}'} for i in range(8)]
        (directory / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return directory


def common(folder, batch):
    return [f'--base_model_name={folder}/model', f'--per_device_train_batch_size={batch}', '--max_steps=1',
            '--gradient_accumulation_steps=1', '--warmup_steps=0', '--matmul=float32', '--device=cpu',
            '--tensorboard=false', '--eval_fraction=0', '--logging_steps=1']


def of_script(name, folder):
    return {'sft': [*common(folder, 4), f'--dataset_path={folder}/sft.jsonl', '--sample_rows=0'],
            'dpo': [*common(folder, 2), f'--dataset_path={folder}/dpo.jsonl', '--apply_chat_template=false',
                    '--prediction_loss_only'],
            'rl': [*common(folder, 16), '--beta=0.1', '--eval_steps=0', '--eval_problems=4', '--num_problems=64']}[name]


@pytest.mark.parametrize('script', ('sft', 'dpo', 'rl'))
def test_a_run_takes_what_its_plan_says(script, folder, tmp_path):
    """All weights: under LoRA so small a model is lost among libraries; bench/plan.py has the real one."""
    command = [sys.executable, os.path.join(ROOT, 'bench', 'plan.py'), f'--measure=train_{script}',
               *of_script(script, folder), '--max_steps=2', f'--output_dir={tmp_path}/out']
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    process = row['plan']['memory']['process']
    assert row['plan']['peak'] - process == pytest.approx(row['peak'] - process, rel=0.15)


@pytest.fixture
def plan_of(tmp_path, monkeypatch, capsys):
    """What `python train_SCRIPT.py ... --plan` prints."""
    monkeypatch.chdir(tmp_path)

    def printed(script, *flags):
        module = importlib.import_module(f'train_{script}')
        monkeypatch.setattr(sys, 'argv', [f'train_{script}.py', *flags])
        capsys.readouterr()
        module.main(parse(module.Config, [*flags, '--plan']))
        return capsys.readouterr().out
    return printed


@pytest.mark.parametrize('script', ('sft', 'dpo', 'rl', 'gpt', 'agents'))
def test_every_script_plans_and_leaves_nothing(script, folder, tmp_path, plan_of):
    """For GPUs that are not here, from config.json and the tokenizer alone."""
    model = tmp_path / 'without_weights'
    shutil.copytree(folder / 'model', model, ignore=lambda *_: ['model.safetensors'])
    flags = {'gpt': ['--init_from=gpt2', f'--gpt2_type={model}', f'--dataset={tmp_path}/text'],
             'agents': [f'--model={model}']}.get(script) or of_script(script, folder)
    if script == 'gpt':
        (tmp_path / 'words.txt').write_text('a b c d ' * 4000)
        prepare_files(str(tmp_path / 'text'), [str(tmp_path / 'words.txt')], str(model), 'written by the tests')
    else:
        flags = [flag.replace(f'{folder}/model', str(model)) for flag in flags if flag != '--device=cpu']
    before = sorted(tmp_path.rglob('*'))
    text = plan_of(script, *flags, '--num-gpus=8', '--gpu-memory=0.3', '--gpu-tflops=400')
    assert 'parameters' in text and '8 x GPU' in text and 'of 0.3: does not fit' in text and '400 TFLOP/s' in text
    assert sorted(tmp_path.rglob('*')) == before


def test_sizes_of_pretraining_are_those_of_the_device(tmp_path, plan_of):
    (tmp_path / 'words.txt').write_text('a b c d ' * 4000)
    prepare_files(str(tmp_path / 'text'), [str(tmp_path / 'words.txt')], 'char', 'written by the tests')
    flags = [f'--dataset={tmp_path}/text', '--gpu-memory=80', '--gpu-tflops=400']
    assert 'sizes for cpu: n_layer=4' in plan_of('gpt', *flags, '--device=cpu')
    assert 'sizes for cuda: n_layer=6' in plan_of('gpt', *flags)


def test_what_would_make_it_fit(folder, tmp_path, plan_of):
    flags = [*of_script('sft', folder), f'--output_dir={tmp_path}/out']
    text = plan_of('sft', *flags)
    peaks = dict(re.findall(r'(--[\w=. -]*\S) +([\d.]+): fits', text))
    whole = float(re.search(r'peak +([\d.]+)', text)[1])
    assert {'--use_lora', '--gradient_checkpointing', '--per_device_train_batch_size=1'} <= peaks.keys()
    assert all(float(peak) < whole for peak in peaks.values())
    assert not os.path.exists(tmp_path / 'out')
    with pytest.raises(UserError, match='--gpu-memory'):
        plan_of('sft', *flags, '--device=cuda')


def test_what_takes_more_is_not_called_smaller(tmp_path, plan_of):
    """Adapters of a model as small as tiny hold more than its optimizer."""
    text = plan_of('rl', f'--output_dir={tmp_path}/out', '--gpu_memory=1', '--gpu_tflops=1')
    peaks = re.findall(r'--[\w=. -]*\S +([\d.]+): fits', text)
    assert peaks and all(float(peak) <= float(re.search(r'peak +([\d.]+)', text)[1]) for peak in peaks)


def test_shards_hold_their_part(folder, tmp_path, plan_of):
    """Of 8, and an evaluation gathers the whole."""
    flags = [*of_script('sft', folder), '--num-gpus=8', '--gpu-memory=4', '--gpu-tflops=100', '--device=cuda',
             f'--output_dir={tmp_path}/out']
    whole, part = (plan_of('sft', *flags, *more) for more in ((), ('--shard=full',)))

    def parts(text):
        return {name: float(held) for name, held in re.findall(r'^ {10}(\w[\w() ,]*?) {2,}([\d.]+)', text, re.M)}

    one, eighth = parts(whole), parts(part)
    for name in ('weights', 'gradients', 'moments (adamw)'):
        assert eighth[name] == pytest.approx(one[name] / 8, abs=0.006)
    assert 'evaluation' in part and 'evaluation' not in whole
    assert '--shard=full' in whole and '--shard' not in part.partition('smaller')[2]


@pytest.mark.parametrize('flags, said', [
    (['--tensor_parallel=3'], 'cannot share out n_head'), (['--tensor_parallel=2', '--num_gpus=3'], 'no multiple of tensor_parallel=2')])
def test_a_plan_refuses_what_the_run_would(flags, said, folder, tmp_path, plan_of, capsys):
    with pytest.raises((UserError, SystemExit)) as refused:
        plan_of('sft', *of_script('sft', folder), f'--output_dir={tmp_path}/out', *flags)
    assert said in capsys.readouterr().err + str(refused.value)


def test_servers_that_sample_are_not_planned_for(folder, tmp_path, plan_of):
    flags = [*of_script('rl', folder), f'--output_dir={tmp_path}/out']
    text = plan_of('rl', *flags, '--sampler_url=http://127.0.0.1:9')
    assert not re.search('phases:.*generation', text) and 'load_in_4bit' not in text


# ---- recipes

ROWS = {'sft': {'messages': [{'role': 'user', 'content': 'a b'}, {'role': 'assistant', 'content': 'c d'}]},
        'dpo': {'prompt': 'a b', 'chosen': 'c d', 'rejected': 'd'}, 'rl': {'question': 'a b', 'answer': '3'}}
SCRIPT = {'sft': 'sft', 'dpo': 'dpo', 'agents': 'agents'}


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_every_recipe_can_be_planned(path, tmp_path, monkeypatch, capsys):
    """Its settings with the embedded model and rows of one's own, from flags to sizes: all but the run itself."""
    monkeypatch.chdir(tmp_path)
    kind = 'gpt' if path.suffix == '.py' else SCRIPT.get(path.parent.name, 'rl')
    flags = [str(path), '--plan', '--device=cpu', '--gpu-tflops=1', '--gpu-memory=80']
    if kind == 'gpt':
        book = tmp_path / 'book.txt'
        book.write_text('To be, or not to be. ' * 3000)
        prepare_files(tmp_path / 'mine', [str(book)], 'char', 'a test')
        flags += [f'--dataset={tmp_path / "mine"}', *(['--init_from=scratch'] if 'finetune' in path.name else [])]
    elif kind == 'agents':
        flags += ['base_models.policy_0.path=tiny']
    else:
        rows = [json.dumps({**ROWS[kind], 'prompt_id': i}).replace('a b', f'a {i}') for i in range(80)]
        (tmp_path / 'rows.jsonl').write_text('\n'.join(rows))
        flags += ['--base_model_name=tiny', '--dataset_path=rows.jsonl', '--load_in_4bit=false', '--load_in_8bit=false',
                  '--max_prompt_length=128', *(['--max_completion_length=128'] if kind == 'rl' else [])]
        if kind == 'rl' and 'value_model_name' in path.read_text(encoding='utf-8').partition(MARK)[0]:
            flags += ['--value_model_name=tiny']
    script = importlib.import_module(f'train_{kind}')
    monkeypatch.setattr(sys, 'argv', [f'train_{kind}.py'])
    script.main(parse(script.Config, flags))
    said = capsys.readouterr().out
    assert 'operations' in said and 'peak' in said
