"""--shard: ranks that each hold a part compute, save and resume what one process does, in float64.

Ranks are forked from this process, which is fast, and talk through gloo."""
import json
import os
import random
import signal
import socket
import string
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

import train_agents
import train_dpo
import train_gpt
import train_rl
import train_sft
from configurator import UserError, parse
from data.prepare import prepare_files
from model import FAMILIES, GPT, GPTConfig, load_model, save_model
from nanoforge.optim import FlatOptimizer
from nanoforge.run import Run, setup
from nanoforge.tensors import Gathering, is_sharded, local, save_tensors

FAST = ['--device=cpu', '--matmul=float32', '--report_to=none']
GPT_FLAGS = ['--dataset=text', '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=2', '--max_iters=5',
             '--eval_interval=5', '--eval_iters=2', '--warmup_iters=0', '--sample_tokens=4', '--log_interval=1']


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own, with a text of 65 characters prepared in it; and no handlers that stay."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    characters = string.ascii_letters + string.digits + ' \n.'
    Path('text.txt').write_text(characters + ''.join(rng.choices(characters, k=4000)))
    prepare_files('text', ['text.txt'], 'char', 'written by the test')


def float64_run(rank, script, flags):
    """main() of a script in this process, in float64; rank 0 leaves each step's summed gradients in
    OUT-gradients.pt."""
    gradients, held = [], []
    shard, clip = Run.shard, FlatOptimizer.clip_grad_norm

    def shard_in_float64(self, model):
        model = shard(self, model.double())
        if self.sharded:
            params = list(model.layers.parameters())
            mine = sum((local(p) if is_sharded(p) else p).numel() for p in params)
            held.append((mine, sum(p.numel() for p in params)))
        return model

    def record(self, max_norm):
        self.grads                                      # puts them in place
        named = {name: p.grad for flat in self.flats for name, p in zip(flat.names, flat.params)}
        gradients.append({name: (g.full_tensor() if is_sharded(g) else g).clone() for name, g in named.items()})
        return clip(self, max_norm)

    Run.shard, FlatOptimizer.clip_grad_norm = shard_in_float64, record
    if script is train_gpt:             # whose new model reads a checkpoint's weights, too
        torch.set_default_dtype(torch.float64)
    cfg = parse(script.Config, [*FAST, *flags])
    script.main(cfg)
    for mine, all_ranks in held:        # rows are dealt out whole: a small model's are not even
        assert mine < 0.75 * all_ranks
    if rank == 0:
        torch.save(gradients, f'{run_folder(cfg)}-gradients.pt')


def run_folder(cfg):
    return getattr(cfg, 'output_dir', None) or cfg.out_dir


def ranks(n, work, of_node=None):
    """work(rank) in n processes that know of each other; fails where one of them does."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(n):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                if n > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1',
                                      LOCAL_WORLD_SIZE=str(of_node or n), MASTER_PORT=str(port))
                signal.alarm(100)       # a hang ends, too
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * n


def train(script, out, flags, n=1, shard='none', of_node=None):
    """What `n` ranks leave: (a list of {name: gradient} of each step, {name: final weight})."""
    name = 'out_dir' if script is train_gpt else 'output_dir'
    flags = [*flags, f'--{name}={out}', f'--shard={shard}']
    ranks(n, lambda rank: float64_run(rank, script, flags), of_node)
    root, weights = Path(out, 'latest', 'checkpoints') if script is train_agents else Path(out), {}
    for path in sorted([*root.glob('*model.safetensors'), *root.glob('[pt]o*/*model.safetensors')]):
        weights.update((f'{path.parent.name if path.parent != root else ""}/{key}', t) for key, t in load_file(path).items())
    assert weights
    return torch.load(f'{out}-gradients.pt'), weights


def assert_equal(run, expected):
    for a, b in zip((*run[0], run[1]), (*expected[0], expected[1]), strict=True):
        assert {t.dtype for t in a.values()} == {torch.float64}
        assert_close(a, b)


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('n, model', [
    (2, ['--n_layer=2', '--n_head=2', '--n_embd=16']),
    (4, ['--n_layer=1', '--n_head=3', '--n_kv_head=1', '--n_embd=6', '--ema=0.9']),     # 6 rows, 2 of them in k
    (2, ['--n_layer=2', '--n_head=2', '--n_embd=16', '--optimizer=muon']),
    (4, ['--n_layer=1', '--n_head=3', '--n_kv_head=1', '--n_embd=6', '--optimizer=normuon']),
    (2, ['--n_layer=1', '--n_head=2', '--n_embd=16', '--optimizer=sgd', '--momentum=0.9', '--arch=gpt2', '--bias']),
], ids=['adamw', 'empty shards, mean', 'muon', 'normuon', 'sgd'])
def test_pretraining(n, model):
    expected = train(train_gpt, 'one', GPT_FLAGS + model)
    assert len(expected[0]) == 5
    assert_equal(train(train_gpt, 'ranks', GPT_FLAGS + model, n, 'full'), expected)


def test_two_nodes_of_two_ranks():
    """hybrid: each node holds a copy."""
    model = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--ema=0.9']
    expected = train(train_gpt, 'one', GPT_FLAGS + model)
    assert_equal(train(train_gpt, 'ranks', GPT_FLAGS + model, 4, 'hybrid', of_node=2), expected)


# ---- fine-tuning: steps at whose end ranks have no rows, two forward passes a backward ---------------------

def small_model(directory, vocab_size, **more):
    """A random Qwen3 with tiny's tokenizer."""
    _, tokenizer = load_model('tiny')
    settings = {**FAMILIES['qwen3'], 'n_head': 3, 'n_kv_head': 1, 'n_embd': 6, **more}
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=128, n_layer=2, **{'arch': 'qwen3', **settings}))
    save_model(model.init_weights(std=0.3), tokenizer, directory)


def write_rows(path, rows):
    Path(path).write_text(''.join(json.dumps(row) + '\n' for row in rows))


FINE_TUNING = ['--logging_steps=1', '--max_steps=5', '--lr_scheduler=constant', '--warmup_steps=0', '--learning_rate=1e-2',
               '--model=model', '--matmul=float32']
ODD = {'vocab_size': 50257, 'tied': False}


@pytest.mark.parametrize('n, model, more', [
    (2, ODD, ['--ema=0.5']),
    (4, {'vocab_size': 1031}, ['--gradient_checkpointing', '--optimizer=muon']),
    (4, {'vocab_size': 1031}, ['--use_lora', '--lora_dropout=0']),
], ids=['50257 ids', 'tied, recomputed, muon', 'lora'])
def test_fine_tuning(n, model, more):
    """Ten rows, four a step: the third has two of them, and on four ranks two ranks nothing."""
    small_model('model', **model)
    write_rows('rows.jsonl', [{'question': f'What is {n} and {n}?', 'answer': 'More ' * (n % 4) + str(2 * n),
                               'metadata': 'eval' if n > 9 else 'train'} for n in range(13)])
    flags = [*FINE_TUNING, '--dataset_path=rows.jsonl', '--sample_rows=1', '--eval_steps=3', *more]
    expected = train(train_sft, 'one', [*flags, '--batch_size=4'])
    assert_equal(train(train_sft, 'ranks', [*flags, f'--batch_size={4 // n}'], n, 'full'), expected)


@pytest.mark.parametrize('n, more', [
    (4, ['--reference=copy', '--gradient_checkpointing']), (2, ['--use_lora']), (2, ['--loss_type=simpo']),
], ids=['a copy', 'adapters off', 'none'])
def test_preferences(n, more):
    small_model('model', 1031)
    write_rows('rows.jsonl', [{'prompt': f'How many are {n} and {n + 1}?', 'chosen': f'{2 * n + 1}.' + '!' * (n % 3), 'rejected': 'No idea.',
                               'metadata': 'eval' if n > 9 else 'train'} for n in range(13)])
    flags = [*FINE_TUNING, '--dataset_path=rows.jsonl', '--eval_steps=5', '--eval_samples=2', '--max_new_tokens=4', *more]
    expected = train(train_dpo, 'one', [*flags, '--batch_size=4'])
    assert_equal(train(train_dpo, 'ranks', [*flags, f'--batch_size={4 // n}'], n, 'full'), expected)


@pytest.mark.parametrize('more', [
    ['--algorithm=grpo', '--beta=0.05', '--num_iterations=2'],
    ['--algorithm=dapo', '--use_lora', '--lora_dropout=0', '--beta=0.05'],
], ids=['reference', 'lora, uneven'])
def test_rl(more):
    """Groups of four, of which some ranks have none."""
    flags = ['--model=tiny', '--num_generations=4', '--steps_per_generation=2', '--gradient_accumulation_steps=1', '--max_steps=3',
             '--num_problems=64', '--eval_problems=6', '--eval_steps=2', '--max_completion_length=16', '--learning_rate=1e-3',
             '--warmup_steps=0', '--logging_steps=1', '--rewards', 'task', 'length', '--length_buffer=10', '--temperature=1.5', *more]
    expected = train(train_rl, 'one', [*flags, '--batch_size=12'])
    assert any(gradient.abs().max() > 1e-4 for gradient in expected[0][0].values())
    assert_equal(train(train_rl, 'ranks', [*flags, '--batch_size=6'], 2, 'full'), expected)


@pytest.mark.parametrize('level', ['prompt', 'lora', 'full'])
def test_teams(level):
    """Uneven episodes, a warm-up on demonstrations with Muon; two adapters on one base, two models."""
    small_model('model', 1031)
    flags = ['base_models.policy_0.path=model', f'specialization={level}', 'training.total_training_steps=2', 'training.epoch_size=3',
             'training.train_sample_num=3', 'training.max_prompt_length=100', 'training.max_response_length=8', 'env.max_turns=2',
             'training.validate_episodes=2', 'demonstrations.steps=2', 'demonstrations.batch_size=5', 'training.learning_rate=1e-3']
    expected = train(train_agents, 'one', flags)
    assert_equal(train(train_agents, 'ranks', flags, 2, 'full'), expected)


# ---- checkpoints -------------------------------------------------------------------------------------------

def test_a_sharded_run_goes_on_with_other_ranks():
    """Two ranks, then four, then one that holds everything: as if one process had done all of it. And what
    they leave has the same names, settings and headers."""
    model = ['--n_layer=2', '--n_head=2', '--n_embd=16', '--optimizer=normuon', '--eval_interval=2']
    gradients, weights = train(train_gpt, 'one', [*GPT_FLAGS, *model, '--max_iters=6'])
    train(train_gpt, 'out', [*GPT_FLAGS, *model, '--max_iters=2'], 2, 'full')
    go_on = ['--init_from=resume', '--device=cpu']
    second = train(train_gpt, 'out', [*go_on, '--max_iters=4'], 4, 'full')
    last = train(train_gpt, 'out', [*go_on, '--max_iters=6'])
    assert_equal((second[0] + last[0], last[1]), (gradients[2:], weights))
    for name in ('model.safetensors', 'optimizer.safetensors'):
        one, other = (load_file(f'{out}/checkpoint-4/{name}') for out in ('one', 'out'))
        assert_equal(([], other), ([], one)) if name[0] == 'm' else assert_close(other, one)
        headers = [Path(f'{out}/checkpoint-4/{name}').read_bytes().partition(b'}}')[0] for out in ('one', 'out')]
        assert headers[0] == headers[1]
    manifests = [json.loads(Path(f'{out}/checkpoint-4/manifest.json').read_text()) for out in ('one', 'out')]
    assert manifests[0]['files'].keys() == manifests[1]['files'].keys()
    assert Path('one/config.json').read_bytes() == Path('out/config.json').read_bytes()
    AutoModelForCausalLM.from_pretrained('out/checkpoint-4')


def test_tensors_are_written_as_safetensors_does(tmp_path):
    tensors = {'b': torch.randn(3, 5), 'a': torch.randn(7, dtype=torch.float64), 'step': torch.tensor(3), 'z': torch.randn(2, 2).bfloat16(),
               'c\u00e9': torch.randn(0, 4), 'h': torch.randn(4).half()}
    for metadata in (None, {'format': 'pt'}):
        save_file(tensors, 'theirs', metadata)
        save_tensors('ours', {key: ([tensor], False) for key, tensor in tensors.items()}, metadata=metadata)
        assert Path('ours').read_bytes() == Path('theirs').read_bytes()
    save_tensors('ours', {'w': ([tensors['b'], tensors['b'][:1]], True)}, torch.bfloat16)
    assert load_file('ours')['w'].equal(torch.cat([tensors['b'], tensors['b'][:1]]).t().bfloat16())


def test_a_save_that_fails_ends_on_every_rank():
    def work(rank):
        run = setup('cpu')
        mesh = init_device_mesh('cpu', (2,))
        tensor = torch.arange(6.0).view(3, 2)
        with Gathering([distribute_tensor(tensor, mesh, [Shard(0)])]) as gathering:
            def fail():
                assert gathering.full(gathering.tensors[0]).equal(tensor)
                raise UserError('no space left')
            with pytest.raises(UserError):
                run.on_main(fail)
        run.close()
    ranks(2, work)


@pytest.mark.parametrize('script, flags, word', [
    (train_sft, ['--neftune_noise_alpha=5'], 'neftune_noise_alpha=5'), (train_sft, ['--optimizer=adagrad'], 'optimizer=adagrad'),
    (train_dpo, ['--reference=cache'], 'reference=cache'),
    (train_sft, ['--use_lora', '--load_in_4bit'], 'load_in_4bit=True'), (train_gpt, ['--compile'], 'compile=True'),
    (train_rl, ['--algorithm=ppo', '--value_model_name=tiny'], 'algorithm=ppo'),
])
def test_what_is_not_done_yet_is_one_line(script, flags, word, capsys):
    with pytest.raises(SystemExit):
        parse(script.Config, ['--shard=full', *flags])
    assert f'--shard=full does not go together with {word} yet' in capsys.readouterr().err
