"""--shard: ranks that each hold a part compute, save and resume what one process does, in float64.

Ranks are forked from this process, which is fast, and talk through gloo."""
import argparse
import copy
import json
import random
import string
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401      which sharding needs: seconds, once instead of in every fork
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
from conftest import REWARD, ranks
from data.prepare import prepare_files
from model import FAMILIES, GPT, GPTConfig, load_model, save_model
from nanoforge.optim import OPTIMIZERS, FlatOptimizer, make_optimizer
from nanoforge.run import Run, setup
from nanoforge.shard import fsdp_modules
from nanoforge.tensors import Gathering, assign, is_sharded, local, save_tensors

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
        if self.sharded:            # codes of 4 and 8 bits are whole, and so are embeddings under tensor parallelism
            params = [p for p in model.layers.parameters() if p.is_floating_point()]
            mine = sum((local(p) if is_sharded(p) else p).numel() for p in params)
            held.append((mine, sum(p.numel() for p in params)))
        return model

    def record(self, max_norm):
        self.grads                                      # puts them in place
        named = {name: p.grad for flat in self.flats for name, p in zip(flat.names, flat.params)}
        gradients.append({name: (g.full_tensor() if is_sharded(g) else g).clone() for name, g in named.items()})
        return clip(self, max_norm)

    Run.shard, FlatOptimizer.clip_grad_norm = shard_in_float64, record
    if script in (train_gpt, train_sft, train_rl):      # new parameters read those of a checkpoint, too: else rounded to float32
        torch.set_default_dtype(torch.float64)
    cfg = parse(script.Config, [*FAST, *flags])
    script.main(cfg)
    for mine, all_ranks in held:        # rows are dealt out whole: a small model's are not even
        assert mine < 0.75 * all_ranks
    if rank == 0:
        torch.save(gradients, f'{run_folder(cfg)}-gradients.pt')


def run_folder(cfg):
    return getattr(cfg, 'output_dir', None) or cfg.out_dir


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
    (2, ['--n_layer=2', '--n_head=2', '--n_embd=16', '--optimizer=muon', '--gradient_checkpointing', '--checkpoint_every=2']),
    (4, ['--n_layer=1', '--n_head=3', '--n_kv_head=1', '--n_embd=6', '--optimizer=normuon']),
    (2, ['--n_layer=1', '--n_head=2', '--n_embd=16', '--optimizer=sgd', '--momentum=0.9', '--arch=gpt2', '--bias']),
], ids=['adamw', 'empty shards, mean', 'muon', 'normuon', 'sgd'])
def test_pretraining(n, model):
    expected = train(train_gpt, 'one', GPT_FLAGS + model)
    assert len(expected[0]) == 5
    assert_equal(train(train_gpt, 'ranks', GPT_FLAGS + model, n, 'full'), expected)


def test_several_streams():
    """multicontext: tables of their own, each a head as well."""
    Path('capitals.txt').write_text(Path('text.txt').read_text().upper())
    prepare_files('capitals', ['capitals.txt'], 'char', 'written by the test')
    flags = [*GPT_FLAGS, '--n_layer=1', '--n_head=2', '--n_embd=16', '--max_iters=3', '--multicontext_datasets=text,capitals']
    expected = train(train_gpt, 'one', flags)
    assert_equal(train(train_gpt, 'ranks', flags, 2, 'full'), expected)


def test_two_nodes_of_two_ranks():
    """hybrid: each node holds a copy."""
    model = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--ema=0.9']
    expected = train(train_gpt, 'one', GPT_FLAGS + model)
    assert_equal(train(train_gpt, 'ranks', GPT_FLAGS + model, 4, 'hybrid', of_node=2), expected)


def test_optimizers_of_torch():
    """On this rank's rows, some ranks having none of a matrix: as on the whole, and so from a checkpoint."""
    names = [name for name in OPTIMIZERS[4:] if name != 'adafactor']
    config = GPTConfig(**{**FAMILIES['qwen2'], 'arch': 'qwen2'}, vocab_size=65, block_size=8, n_layer=1, n_head=3, n_kv_head=1, n_embd=6)

    def work(rank):
        run = setup('cpu')
        run.cfg = argparse.Namespace(shard='full')
        idx = torch.arange(16).view(2, 8)
        for name in names:
            torch.manual_seed(0)
            whole = GPT(config).init_weights(0.3).double()
            models = whole, run.shard(copy.deepcopy(whole)), run.shard(copy.deepcopy(whole))
            optimizers = [make_optimizer(name, model, 1e-2) for model in models]
            for step in range(3):
                if step == 2:               # the third goes on with what the second has saved
                    with Gathering([*models[1].parameters(), *optimizers[1].state_dict().values()]):
                        for path, tensors in (('model', dict(models[1].named_parameters())), ('state', optimizers[1].state_dict())):
                            run.on_main(lambda: save_tensors(path, {key: ([tensor], False) for key, tensor in tensors.items()}))
                    optimizers[2].load_state_dict(load_file('state'))
                    for key, tensor in load_file('model').items():
                        assign(models[2].get_parameter(key), tensor)
                for model, optimizer, parts in zip(models, optimizers, (1, 3, 3)):
                    if step >= 2 or model is not models[2]:
                        (-model(idx, idx.roll(1)).sum() / parts).backward()         # each rank's third
                        optimizer.step()
                        optimizer.zero_grad()
            for model in models[1:]:
                assert_close({key: p.full_tensor() for key, p in model.named_parameters()}, dict(whole.named_parameters()))
            run.sharded.clear()
        run.close()
    ranks(3, work)


# ---- fine-tuning: steps at whose end ranks have no rows, two forward passes a backward ---------------------

def small_model(directory, vocab_size, arch='qwen3', **more):
    """A random one with tiny's tokenizer."""
    _, tokenizer = load_model('tiny')
    settings = {**FAMILIES[arch], 'n_head': 3, 'n_kv_head': 1, 'n_embd': 6, **more}
    torch.manual_seed(1)
    model = GPT(GPTConfig(arch=arch, vocab_size=vocab_size, block_size=128, n_layer=2, **settings))
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
    (2, {'vocab_size': 1031}, ['--use_lora', '--use_dora', '--use_rslora']),
    (2, {'vocab_size': 1031, 'arch': 'qwen2'}, ['--use_lora', '--lora_dropout=0', '--load_in_4bit', '--save_merged']),
    (2, {'vocab_size': 1031}, ['--use_lora', '--lora_dropout=0', '--load_in_8bit', '--max_steps=1', '--sample_rows=0']),
], ids=['50257 ids', 'tied, recomputed, muon', 'lora', 'dora', '4 bits', '8 bits'])
def test_fine_tuning(n, model, more):
    """Ten rows, four a step: the third has two of them, and on four ranks two ranks nothing."""
    small_model('model', **model)
    write_rows('rows.jsonl', [{'question': f'What is {n} and {n}?', 'answer': 'More ' * (n % 4) + str(2 * n),
                               'metadata': 'eval' if n > 9 else 'train'} for n in range(13)])
    flags = [*FINE_TUNING, '--dataset_path=rows.jsonl', '--sample_rows=1', '--eval_steps=3', *more]
    expected = train(train_sft, 'one', [*flags, '--batch_size=4'])
    assert_equal(train(train_sft, 'ranks', [*flags, f'--batch_size={4 // n}'], n, 'full'), expected)
    if '--save_merged' in more:
        assert_close(*(load_file(f'{out}/merged/model.safetensors') for out in ('ranks', 'one')))


def test_noise_on_embeddings():
    """NEFTune's depends on the rank: two that hold a part each compute what two do that hold everything."""
    small_model('model', 1031)
    write_rows('rows.jsonl', [{'question': f'What is {n} and {n}?', 'answer': str(2 * n)} for n in range(6)])
    flags = [*FINE_TUNING, '--dataset_path=rows.jsonl', '--eval_strategy=no', '--eval_fraction=0', '--neftune_noise_alpha=5', '--max_steps=2']
    expected = train(train_sft, 'whole', flags, 2)
    assert_equal(train(train_sft, 'ranks', flags, 2, 'full'), expected)


@pytest.mark.parametrize('n, arch, more', [
    (4, 'qwen3', ['--reference=copy', '--gradient_checkpointing']), (2, 'qwen3', ['--use_lora']), (2, 'qwen3', ['--loss_type=simpo']),
    (2, 'gpt2', ['--use_lora', '--lora_bias=all']), (2, 'qwen2', ['--use_lora', '--lora_bias=lora_only', '--reference=cache']),
], ids=['a copy', 'adapters off', 'none', 'biases off', 'cache'])
def test_preferences(n, arch, more):
    small_model('model', 1031, arch)
    write_rows('rows.jsonl', [{'prompt': f'How many are {n} and {n + 1}?', 'chosen': f'{2 * n + 1}.' + '!' * (n % 3), 'rejected': 'No idea.',
                               'metadata': 'eval' if n > 9 else 'train'} for n in range(13)])
    flags = [*FINE_TUNING, '--dataset_path=rows.jsonl', '--eval_steps=5', '--eval_samples=2', '--max_new_tokens=4', *more]
    expected = train(train_dpo, 'one', [*flags, '--batch_size=4', '--reference_cache=of one'])
    assert_equal(train(train_dpo, 'ranks', [*flags, f'--batch_size={4 // n}', '--reference_cache=of ranks'], n, 'full'), expected)
    for path in Path('of one').glob('*'):           # named by the weights, however they lie
        assert_close(load_file(f'of ranks/{path.name}'), load_file(path))


@pytest.mark.parametrize('more', [
    ['--algorithm=grpo', '--beta=0.05', '--num_iterations=2'],
    ['--algorithm=dapo', '--use_lora', '--lora_dropout=0', '--beta=0.05'],
], ids=['reference', 'lora, uneven'])
def test_rl(more):
    """Groups of four, of which some ranks have none."""
    small_model('model', 1031)
    Path('reward.py').write_text(REWARD.replace('% 17 / 17', '% 2'))         # so that some groups are equal, and drawn anew
    flags = ['--model=model', '--num_generations=4', '--steps_per_generation=2', '--gradient_accumulation_steps=1', '--max_steps=3',
             '--num_problems=64', '--eval_problems=6', '--eval_steps=2', '--max_completion_length=16', '--learning_rate=1e-3',
             '--warmup_steps=0', '--logging_steps=1', '--rewards=reward.py:score', '--temperature=1.5', *more]
    expected = train(train_rl, 'one', [*flags, '--batch_size=12'])
    assert any(gradient.abs().max() > 1e-4 for gradient in expected[0][0].values())
    assert_equal(train(train_rl, 'ranks', [*flags, '--batch_size=6'], 2, 'full'), expected)


@pytest.mark.parametrize('more', [[], ['--share_critic', '--use_lora', '--lora_dropout=0']], ids=['its own', 'a head on the policy'])
def test_critic(more):
    """Three groups of four: one rank has two micro-batches, the other one."""
    small_model('model', 1031, tied=False)
    flags = ['--model=model', '--algorithm=ppo', '--value_model_name=model', '--num_generations=4', '--gradient_accumulation_steps=1',
             '--max_steps=3', '--num_problems=8', '--eval_problems=2', '--max_completion_length=8', '--learning_rate=1e-2', '--beta=0.1',
             '--warmup_steps=0', '--logging_steps=1', '--num_iterations=3', '--rewards=length', *more]
    expected = train(train_rl, 'one', [*flags, '--batch_size=12'])
    assert any(gradient.abs().max() > 1e-4 for gradient in expected[0][-1].values())
    assert_equal(train(train_rl, 'ranks', [*flags, '--batch_size=6'], 2, 'full'), expected)
    assert_close(*(load_file(f'{out}/checkpoint-3/optimizer.safetensors') for out in ('ranks', 'one')))


@pytest.mark.parametrize('more', [[], ['--use_lora', '--lora_dropout=0']], ids=['full', 'lora'])
def test_reward_model(more):
    """Trained here, seven pairs in steps of four, of which the last rank has none; merged, saved and sharded again."""
    small_model('model', 1031, 'qwen2')
    write_rows('rows.jsonl', [{'prompt': f'How many are {n} and {n + 1}?', 'chosen': f'{2 * n + 1}.', 'rejected': 'No idea.' + '!' * (n % 3),
                               'metadata': 'eval' if n > 6 else 'train'} for n in range(9)])
    flags = ['--model=model', '--algorithm=rloo', '--dataset_path=rows.jsonl', '--chosen_column=chosen', '--rejected_column=rejected',
             '--num_generations=4', '--gradient_accumulation_steps=1', '--max_steps=1', '--max_completion_length=8', '--rewards=model',
             '--max_prompt_length=100', '--reward_batch_size=3', '--eval_steps=0', '--learning_rate=1e-2', '--reward_learning_rate=1e-2', *more]
    expected = train(train_rl, 'one', [*flags, '--batch_size=8'])
    assert_equal(train(train_rl, 'ranks', [*flags, '--batch_size=2'], 4, 'full'), expected)
    assert_close(*(load_file(f'{out}/reward_model/model.safetensors') for out in ('ranks', 'one')))


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
    assert_same_files()


def assert_same_files():
    """checkpoint-4 of the runs in one/ and out/: names, headers, settings; transformers opens it."""
    for name in ('model.safetensors', 'optimizer.safetensors'):
        headers = [Path(f'{out}/checkpoint-4/{name}').read_bytes().partition(b'}}')[0] for out in ('one', 'out')]
        assert headers[0] == headers[1]
    manifests = [json.loads(Path(f'{out}/checkpoint-4/manifest.json').read_text()) for out in ('one', 'out')]
    assert manifests[0]['files'].keys() == manifests[1]['files'].keys()
    assert Path('one/config.json').read_bytes() == Path('out/config.json').read_bytes()
    AutoModelForCausalLM.from_pretrained('out/checkpoint-4')


def test_an_adapter_goes_on_with_other_ranks():
    small_model('model', 1031)
    write_rows('rows.jsonl', [{'question': f'What is {n} and {n}?', 'answer': str(2 * n)} for n in range(12)])
    flags = [*FINE_TUNING, '--dataset_path=rows.jsonl', '--eval_strategy=no', '--eval_fraction=0', '--use_lora', '--lora_dropout=0',
             '--optimizer=rmsprop']
    gradients, weights = train(train_sft, 'one', [*flags, '--batch_size=4', '--max_steps=3'])
    train(train_sft, 'out', [*flags, '--batch_size=2', '--max_steps=1'], 2, 'full')
    second = train(train_sft, 'out', ['--resume', '--device=cpu', '--batch_size=1', '--max_steps=2'], 4, 'full')
    last = train(train_sft, 'out', ['--resume', '--device=cpu', '--batch_size=4', '--max_steps=3'])
    assert_equal((second[0] + last[0], last[1]), (gradients[1:], weights))


def test_nothing_stays_gathered():
    """Behind an evaluation, whose forward passes the ranks make unequally, and behind a step."""
    def work(rank):
        run = setup('cpu')
        run.cfg = argparse.Namespace(shard='full')
        torch.manual_seed(0)
        model = run.shard(GPT(GPTConfig(**FAMILIES['gpt2'], vocab_size=64, block_size=8, n_layer=2, n_head=2, n_embd=8)))
        idx = torch.arange(16).view(2, 8)

        def gathered_bytes():
            parts = [part for module in fsdp_modules(model) for part in module._get_fsdp_state()._fsdp_param_group.fsdp_params]
            return sum(t.untyped_storage().nbytes() for part in parts for t in getattr(part, 'all_gather_outputs', ()))

        with run.unsharded(), torch.no_grad():
            for _ in range(rank):
                model(idx)
            assert gathered_bytes() == 4 * model.num_params()
            assert not any(map(is_sharded, model.parameters()))
        assert gathered_bytes() == 0 and all(map(is_sharded, model.parameters()))
        for _ in run.even([idx] * rank, model):
            run.backward(model(idx, idx).sum())
        assert gathered_bytes() == 0 and all(map(is_sharded, model.parameters()))
        run.close()
    ranks(2, work)


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
    (train_sft, ['--optimizer=adafactor'], 'optimizer=adafactor'), (train_gpt, ['--compile'], 'compile=True'),
])
def test_what_is_not_done_yet_is_one_line(script, flags, word, capsys):
    with pytest.raises(SystemExit):
        parse(script.Config, ['--shard=full', *flags])
    assert f'--shard=full does not go together with {word} yet' in capsys.readouterr().err
