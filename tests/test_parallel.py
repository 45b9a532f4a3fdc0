"""--tensor_parallel: ranks that hold a model together compute, save and resume what one process does, in float64;
alone, and with --shard on the other dimension of the mesh."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_agents
import train_dpo
import train_gpt
import train_rl
import train_sft
from configurator import UserError, parse
from conftest import REWARD, ranks
from model import load_model
from nanoforge.lora import add_lora
from nanoforge.parallel import check
from nanoforge.run import Run
from test_shard import (FINE_TUNING, GPT_FLAGS, assert_close, assert_equal, assert_same_files, here, small_model,     # noqa: F401
                        train, write_rows)

TWO = ['--tensor_parallel=2']
EVEN = {'n_head': 4, 'n_kv_head': 2, 'n_embd': 8}
LAYERS = ['--n_layer=2', '--n_head=4', '--n_embd=16']
SGD = ['--optimizer=sgd', '--momentum=0.9']             # of a key's bias the gradient is 0, which Adam would blow up
GPT2 = [*LAYERS, '--arch=gpt2', '--bias', *SGD]


@pytest.mark.parametrize('n, shard, model', [
    (2, 'none', [*LAYERS, '--n_kv_head=2']), (2, 'none', GPT2), (4, 'none', [*LAYERS, '--optimizer=normuon']),
    (4, 'full', [*LAYERS, '--optimizer=muon', '--ema=0.9']),
], ids=['qk norm', 'biases', '2 x 2, normuon', 'sharded, muon, mean'])
def test_pretraining(n, shard, model):
    expected = train(train_gpt, 'one', GPT_FLAGS + model)
    assert_equal(train(train_gpt, 'ranks', [*GPT_FLAGS, *model, *TWO], n, shard), expected)
    samples = [Path(out, 'samples.txt').read_text() for out in ('one', 'ranks')]
    assert samples[0] == samples[1]


@pytest.mark.parametrize('n, shard, model, more', [
    (2, 'none', EVEN, ['--use_lora', '--lora_dropout=0.2', '--neftune_noise_alpha=5']),
    (2, 'none', {**EVEN, 'arch': 'gpt2', 'n_kv_head': 4}, ['--use_lora', '--lora_dropout=0']),
    (4, 'full', EVEN, ['--use_lora', '--lora_dropout=0', '--gradient_checkpointing']),
], ids=['lora, dropout, noise', 'lora, c_attn', '2 x 2, lora'])
def test_fine_tuning(n, shard, model, more):
    small_model('model', 1031, **model)
    write_rows('rows.jsonl', [{'question': f'What is {n} and {n}?', 'answer': 'More ' * (n % 4) + str(2 * n),
                               'metadata': 'eval' if n > 9 else 'train'} for n in range(13)])
    flags = [*FINE_TUNING, '--dataset_path=rows.jsonl', '--sample_rows=1', '--eval_steps=3', *more]
    expected = train(train_sft, 'one', [*flags, '--batch_size=4'])
    assert_equal(train(train_sft, 'ranks', [*flags, f'--batch_size={8 // n}', *TWO], n, shard), expected)


@pytest.mark.parametrize('n, shard, more', [
    (2, 'none', ['--reference=copy', '--gradient_checkpointing']), (4, 'full', ['--use_lora']),
], ids=['a copy', '2 x 2, adapters off'])
def test_preferences(n, shard, more):
    small_model('model', 1031, **EVEN)
    write_rows('rows.jsonl', [{'prompt': f'How many are {n} and {n + 1}?', 'chosen': f'{2 * n + 1}.' + '!' * (n % 3), 'rejected': 'No idea.',
                               'metadata': 'eval' if n > 9 else 'train'} for n in range(13)])
    flags = [*FINE_TUNING, '--dataset_path=rows.jsonl', '--eval_steps=5', '--eval_samples=2', '--max_new_tokens=4', *more]
    expected = train(train_dpo, 'one', [*flags, '--batch_size=4'])
    assert_equal(train(train_dpo, 'ranks', [*flags, f'--batch_size={8 // n}', *TWO], n, shard), expected)


RL = ['--model=model', '--num_generations=4', '--steps_per_generation=2', '--gradient_accumulation_steps=1', '--max_steps=3',
      '--num_problems=64', '--eval_problems=6', '--eval_steps=2', '--max_completion_length=16', '--learning_rate=1e-3',
      '--warmup_steps=0', '--logging_steps=1', '--rewards=reward.py:score', '--temperature=1.5']


@pytest.mark.parametrize('n, shard, more', [
    (2, 'none', ['--algorithm=grpo', '--beta=0.05', '--num_iterations=2']),
    (4, 'full', ['--algorithm=ppo', '--value_model_name=model', '--max_steps=2']),
], ids=['reference', '2 x 2, critic'])
def test_rl(n, shard, more):
    small_model('model', 1031, **EVEN)
    Path('reward.py').write_text(REWARD)
    expected = train(train_rl, 'one', [*RL, *more, '--batch_size=12'])
    assert any(gradient.abs().max() > 1e-4 for gradient in expected[0][0].values())
    assert_equal(train(train_rl, 'ranks', [*RL, *more, f'--batch_size={24 // n}', *TWO], n, shard), expected)
    completions = [sorted(Path(out, 'rollouts.jsonl').read_text().splitlines()) for out in ('one', 'ranks')]
    assert len(completions[0]) == len(completions[1]) > 0


@pytest.mark.parametrize('n, shard, level', [(2, 'none', 'prompt'), (4, 'full', 'lora')])
def test_teams(n, shard, level):
    """Uneven episodes, a warm-up on demonstrations with Muon; two adapters on one base, two models."""
    small_model('model', 1031, **EVEN)
    flags = ['base_models.policy_0.path=model', f'specialization={level}', 'training.total_training_steps=2', 'training.epoch_size=3',
             'training.train_sample_num=3', 'training.max_prompt_length=100', 'training.max_response_length=8', 'env.max_turns=2',
             'training.validate_episodes=2', 'demonstrations.steps=2', 'demonstrations.batch_size=5', 'training.learning_rate=1e-3']
    expected = train(train_agents, 'one', flags)
    assert_equal(train(train_agents, 'ranks', [*flags, 'GPU_num=2'], n, shard), expected)


# ---- checkpoints -------------------------------------------------------------------------------------------

def test_a_run_goes_on_with_other_ranks():
    """Two ranks of a model, then two times two with shards, then one process: as if one had done all of it."""
    model = [*LAYERS, '--optimizer=normuon', '--eval_interval=2', '--ema=0.9']
    gradients, weights = train(train_gpt, 'one', [*GPT_FLAGS, *model, '--max_iters=6'])
    train(train_gpt, 'out', [*GPT_FLAGS, *model, '--max_iters=2', *TWO], 2)
    go_on = ['--init_from=resume', '--device=cpu']
    second = train(train_gpt, 'out', [*go_on, '--max_iters=4', *TWO], 4, 'full')
    last = train(train_gpt, 'out', [*go_on, '--max_iters=6'])
    assert_equal((second[0] + last[0], last[1]), (gradients[2:], weights))
    for name in ('model.safetensors', 'optimizer.safetensors'):
        assert_close(*(load_file(f'{out}/checkpoint-4/{name}') for out in ('out', 'one')))
    assert_same_files()


def test_a_model_counts_once():
    """Processes that hold a model are one rank of data parallelism; what its first one says counts."""
    def work(rank):
        run = Run.open(parse(train_gpt.Config, ['--device=cpu', *TWO]), 'train_gpt.py', 'out')
        assert (run.rank, run.tp_rank, run.world_size, run.num_processes) == (rank // 2, rank % 2, 2, 4)
        assert run.is_main == (rank == 0) and run.gather([rank]) == [0, 2]
        assert run.max(rank) == 3 and run.sum(torch.tensor(run.rank + 1)).item() == 3
        run.close()
    ranks(4, work)


def test_what_cannot_be_shared_out_is_one_line():
    small_model('model', 1031)
    with pytest.raises(UserError, match='--tensor_parallel=2 cannot share out n_head=3 of model evenly'):
        check(load_model('model')[0], 2)
    with pytest.raises(UserError, match='does not go together with .* DoRA'):
        check(add_lora(load_model('tiny')[0], dora=True), 2)
    run = Run(torch.device('cpu'), torch.float32, 'float32', world_size=4)
    with pytest.raises(UserError, match='tensor_parallel=3 processes hold a model, but there are 4'):
        run.share_models(3)


@pytest.mark.parametrize('script, flags, word', [
    (train_sft, ['--use_lora', '--load_in_4bit'], 'load_in_4bit=True'), (train_gpt, ['--compile'], 'compile=True'),
    (train_sft, ['--optimizer=adafactor'], 'optimizer=adafactor'),
])
def test_what_is_not_done_yet_is_one_line(script, flags, word, capsys):
    with pytest.raises(SystemExit):
        parse(script.Config, [*TWO, *flags])
    assert f'--tensor_parallel=2 does not go together with {word} yet' in capsys.readouterr().err


def test_the_guides_word():
    for script in (train_agents, train_sft):
        for word in ('GPU_num=2', '--tensor_parallel=2'):
            cfg = parse(script.Config, [word, '--plan'])        # else processes would be started
            assert cfg.tensor_parallel == cfg.num_gpus == 2
