"""--sampler_url: runs whose completions real HTTP servers draw are the runs in one process, token by token;
servers that do not reload, lie, hang or die are found out in one line."""
import glob
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train_agents
import train_rl
from conftest import ROOT
from configurator import UserError, parse
from data.completions import read_completions
from model import load_model, save_model
from nanoforge import sampler_client
from sampler_server import SamplerServer

RL = ['--device=cpu', '--matmul=float32', '--report_to=none', '--per_device_train_batch_size=8', '--gradient_accumulation_steps=1',
      '--steps_per_generation=2', '--num_generations=4', '--max_steps=4', '--logging_steps=1', '--eval_steps=4', '--eval_problems=3',
      '--num_problems=64', '--max_completion_length=12', '--learning_rate=1e-3', '--warmup_steps=0', '--temperature=0.9',
      '--importance_cap=0']
AGENTS = ['--device=cpu', '--matmul=float32', '--report_to=none', 'env.benchmark=plan_path', 'env.max_turns=2', '--train_sample_num=3',
          '--epoch_size=3', '--max_response_length=8', '--learning_rate=1e-3', '--total_training_steps=1', '--val_freq=1',
          '--val_before_train=false', '--validate_episodes=2', 'env.rules=false']
VENDORS = 'sglang', 'vllm'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_rl, 'show', lambda *arguments: None)      # pictures cost more than these runs
    monkeypatch.setattr(sampler_client, 'PAUSE', 0.01)


def of(small):
    return [f'--model={small}', f'--rewards={small}/reward.py:score']


def rl(small, out, *flags):
    """main() of a short run -> (its completions' ids, its log lines of updates, its weights)"""
    train_rl.main(parse(train_rl.Config, [*RL, *of(small), f'--output_dir={out}', *flags]))
    return rollouts(out)


def rollouts(out):
    with open(f'{out}/log.jsonl') as file:
        lines = [line for line in map(json.loads, file) if 'loss' in line]
    weights = load_file(next(path for name in ('model', 'adapter_model')
                             if os.path.exists(path := f'{out}/checkpoint-{lines[-1]["step"]}/{name}.safetensors')))
    ids = {(c.step, c.group, c.sample): c.completion_ids for c in read_completions(f'{out}/rollouts.jsonl')}
    return ids, lines, weights


def same(a, b):
    """Whether two runs drew the same tokens and ended with the same weights."""
    assert len(a[0]) == 32 and a[0] == b[0] and len(set(map(len, a[0].values()))) > 3       # some stopped
    assert a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][name], b[2][name]) for name in a[2])


@pytest.fixture(scope='module')
def alone(small, tmp_path_factory):
    """The run in one process: without and with LoRA."""
    runs, folder = {}, tmp_path_factory.mktemp('alone')
    for name, flags in (('full', []), ('lora', ['--use_lora'])):
        train_rl.main(parse(train_rl.Config, [*RL, *of(small), f'--output_dir={folder}/{name}', *flags]))
        runs[name] = rollouts(f'{folder}/{name}')
    return runs


# ---- the same run

@pytest.mark.parametrize('vendor', VENDORS)
def test_the_run_is_that_of_one_process(small, alone, vendor, capsys):
    with SamplerServer(vendor, small) as one, SamplerServer(vendor, small) as two:
        there = rl(small, 'there', f'--sampler_url={one.url},{two.url}')
    same(alone['full'], there)
    assert there[1][0]['sampling/logp_gap_mean'] <= there[1][0]['sampling/logp_gap_max'] < 1e-4
    asked = '/generate' if vendor == 'sglang' else '/v1/completions'
    for server in (one, two):
        assert server.most_in_flight > 1 and sum(path == asked for path, _ in server.calls) >= 8
        # weights at the start, after each rollout's two updates, and at the end; each under its own label
        key = 'weight_version' if vendor == 'sglang' else 'new_version'
        labels = [body[key] for path, body in server.calls if key in body]
        assert [label.rpartition('-')[2] for label in labels] == ['0', '2', '4'] and len({label[:5] for label in labels}) == 1
    # every sample has a seed of its own, which SGLang needs in a field of another name than vLLM
    seeds = [body['seed'] if vendor == 'vllm' else body['sampling_params']['sampling_seed']
             for server in (one, two) for path, body in server.calls if path == asked]
    assert len(set(seeds)) >= 32 and all(0 <= seed < 2 ** 63 for seed in seeds)
    said = capsys.readouterr().out
    assert f'{one.url}: {"SGLang 0.5.23" if vendor == "sglang" else "vLLM 0.33.0"}' in said and 'byte for byte' in said


@pytest.mark.parametrize('vendor', VENDORS)
def test_of_a_run_with_adapters_only_these_are_sent(small, alone, vendor, tmp_path):
    seen = []

    class Server(SamplerServer):
        def load_adapter(self, name, path):
            seen.append((name, path, sorted(os.listdir(path)), sorted(getattr(self.model, 'adapters', {}))))
            super().load_adapter(name, path)

    with Server(vendor, small) as server:
        there = rl(small, 'there', '--use_lora', f'--sampler_url={server.url}', '--sampler_dir=passed')
    same(alone['lora'], there)
    assert not {'/update_weights_from_disk', '/collective_rpc'} & {path for path, _ in server.calls}
    assert [name.split('-', 1)[1] for name, *_ in seen] == ['0-default', '2-default', '4-default']
    for _, path, files, others in seen:
        assert files == ['adapter_config.json', 'adapter_model.safetensors'] and not others        # the last one is gone
        assert path.startswith(str(tmp_path / 'passed/nanoforge-'))


@pytest.mark.parametrize('how', ['prompt', 'lora'])
def test_a_team_is_that_of_one_process(small, how):
    flags = [*AGENTS, f'--model={small}', f'--specialization={how}']
    train_agents.main(parse(train_agents.Config, [*flags, '--output_dir=alone']))
    with SamplerServer('vllm' if how == 'lora' else 'sglang', small) as server:
        train_agents.main(parse(train_agents.Config, [*flags, '--output_dir=there', f'--sampler_url={server.url}']))
    for name in ('episodes.jsonl', 'validate/step-1.jsonl'):
        drawn = [[[c['tokens'] for turn in json.loads(line)['turns'] for c in turn['candidates']]
                  for line in open(f'{out}/latest/{name}')] for out in ('alone', 'there')]
        assert drawn[0] == drawn[1] and sum(map(len, drawn[0])) > 4
    metrics = [line for line in map(json.loads, open('there/latest/log.jsonl')) if 'loss' in line]
    assert metrics[0]['sampling/logp_gap_mean'] <= metrics[0]['sampling/logp_gap_max'] < 1e-4
    if how == 'lora':
        names = {body['model'].split('-', 1)[1] for path, body in server.calls if path == '/v1/completions'}
        assert {'0-plan_agent', '0-tool_agent', '1-plan_agent'} <= names, names


def test_ranks_that_share_the_weights_ask_for_their_own_prompts(small, alone):
    with SamplerServer('sglang', small) as server:
        flags = [*RL, *of(small), '--output_dir=there', f'--sampler_url={server.url}', '--num_gpus=2', '--shard=full',
                 '--per_device_train_batch_size=4']
        done = subprocess.run([sys.executable, f'{ROOT}/train_rl.py', *flags], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    there = rollouts('there')
    assert there[0] == alone['full'][0]
    for name, weights in alone['full'][2].items():
        assert torch.allclose(weights, there[2][name], atol=1e-4)
    assert [path for path, _ in server.calls].count('/update_weights_from_disk') == 3       # the main rank's alone
    ids = [body['rid'] for path, body in server.calls if path == '/generate']
    assert len(ids) == 32 + 12 and len(set(ids)) == 32 + 3          # 3 problems are evaluated four times
    folders = {os.path.dirname(body['model_path']) for path, body in server.calls if 'model_path' in body}
    assert len(folders) == 1 and not os.path.exists(folders.pop())                          # gone with the run


def test_one_update_by_hand(small):
    """Log-probabilities that are 0.05 too low make every token count exp(0.05) times, but at most the cap."""
    once = ['--max_steps=1', '--steps_per_generation=1', '--optimizer=sgd', '--learning_rate=0.1', '--max_grad_norm=0', '--eval_steps=0',
            '--num_generations=8']
    before = load_file(f'{small}/model.safetensors')
    step = {}
    for cap in (0, 2, 1.02):
        with SamplerServer('vllm', small, fault='lies', shift=-0.05) as server:
            cfg = parse(train_rl.Config, [*RL, *once, *of(small), f'--output_dir=cap{cap}', f'--sampler_url={server.url}',
                                          f'--importance_cap={cap}'])
            train_rl.main(cfg)
        with open(f'cap{cap}/log.jsonl') as file:
            line = next(line for line in map(json.loads, file) if 'loss' in line)
        assert line['sampling/logp_gap_mean'] == pytest.approx(0.05, abs=1e-4)
        after = load_file(f'cap{cap}/model.safetensors')
        step[cap] = torch.cat([(after[name] - before[name]).flatten() for name in before]).double()
    assert step[0].norm() > 1e-3
    assert (step[2] - 2.718281828 ** 0.05 * step[0]).norm() < 1e-4 * step[0].norm()
    assert (step[1.02] - 1.02 * step[0]).norm() < 1e-4 * step[0].norm()


def test_the_importance_cap_is_on_with_servers_alone(small):
    run = type('', (), dict(print0=lambda text: None))
    for flags, cap in ((['--sampler_url=http://h:1'], 2.0), ([], 0.0), (['--sampler_url=http://h:1', '--importance_cap=0'], 0.0)):
        cfg = parse(train_rl.Config, flags)
        train_rl.resolve_defaults(cfg, run)
        assert cfg.importance_cap == cap


# ---- servers that are not what they should be

@pytest.mark.parametrize('fault, vendor, expected', [
    ('keeps', 'sglang', 'differ from ours by [0-9.]+ on average'), ('keeps', 'vllm', 'differ from ours by [0-9.]+ on average'),
    ('forgets', 'sglang', 'answers with weights default, not [0-9a-f]+-0'), ('forgets', 'vllm', 'answers with weights default, not'),
    ('lies', 'sglang', r'differ from ours by 0.(49|50)\d'), ('raw', 'vllm', '--logprobs-mode=processed_logprobs'),
    ('hangs', 'sglang', r'/generate does not answer within 0.3 s .*tried 3 times'), ('hangs', 'vllm', '/v1/completions does not answer'),
    ('dies', 'sglang', 'cannot be reached .*tried 3 times'), ('dies', 'vllm', 'cannot be reached'),
    ('silent', 'sglang', 'gave no token ids with a log-probability each'), ('silent', 'vllm', 'gave no token ids'),
    ('nan', 'sglang', 'gave no token ids'), ('stops', 'sglang', 'ended a completion with token .*, which ends none here'),
    ('short', 'vllm', 'cut a completion off after 3 tokens of 12: its context is shorter'),
    ('full', 'sglang', 'status 400: .*CUDA out of memory'), ('other', 'vllm', 'neither SGLang nor vLLM')])
def test_a_bad_server_is_found_out_in_one_line(small, fault, vendor, expected):
    other = small
    if fault == 'keeps':                        # not the weights that the run begins with
        model, tokenizer = load_model(small)
        torch.manual_seed(1)
        save_model(model.init_weights(0.2), tokenizer, other := 'other')
    hot = ['--temperature=2'] if fault == 'raw' else []
    with SamplerServer(vendor, other, fault=fault) as server:
        with pytest.raises(UserError, match=expected) as caught:
            rl(small, 'out', f'--sampler_url={server.url}', '--sampler_timeout=0.3', '--eval_steps=0', *hot)
    assert server.url in str(caught.value) or 'differ' in str(caught.value)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 500
    assert not glob.glob('out/checkpoint-*')


def test_adapters_that_were_not_loaded_are_found_out(small):
    for fault, vendor, expected in (('keeps', 'vllm', 'differ from ours'), ('forgets', 'vllm', 'weights base, not [0-9a-f]+-0-default'),
                                    ('forgets', 'sglang', 'weights default, not')):
        with SamplerServer(vendor, small, fault=fault) as server:
            with pytest.raises(UserError, match=expected):
                rl(small, f'{fault}-{vendor}', f'--sampler_url={server.url}', '--use_lora', '--eval_steps=0')


@pytest.mark.parametrize('fault', ['busy', 'slow'])
def test_what_passes_is_tried_again(small, alone, fault):
    with SamplerServer('sglang', small, fault=fault) as server:
        same(alone['full'], rl(small, 'there', f'--sampler_url={server.url}', '--sampler_timeout=2'))
    again = [body['rid'] for path, body in server.calls if path == '/generate' and re.search(r'-\d+-\d+-1$', body['rid'])]
    assert len(again) == (2 if fault == 'busy' else 1)


def test_a_server_that_leaves_in_the_middle(small):
    """It serves the first rollout, and is gone at the next."""
    class Server(SamplerServer):
        def load(self, path):
            super().load(path)
            if path.endswith('/2'):
                self.fault = 'dies'

    with Server('vllm', small) as server:
        with pytest.raises(UserError, match='/v1/completions cannot be reached'):
            rl(small, 'out', f'--sampler_url={server.url}', '--eval_steps=0', '--save_steps=2')
    # the run goes on from its checkpoint, with another server or here
    train_rl.main(parse(train_rl.Config, [*RL, '--output_dir=out', '--resume', '--sampler_url=']))
    assert sorted({step for step, *_ in rollouts('out')[0]}) == [0, 2]


def test_a_missing_server_is_said_before_the_work(small):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{unused.getsockname()[1]}'
        with pytest.raises(UserError, match=f'sampler_url: {url}/model_info cannot be reached .*tried 3 times'):
            rl(small, 'out', f'--sampler_url={url}')
    assert not os.path.exists('out')


@pytest.mark.parametrize('script, flags, expected', [
    (train_rl, ['--sampler_url=localhost:30000'], "'localhost:30000' is no address of a server, http://host:port"),
    (train_rl, ['--sampler_url=http://a:1,ftp://b'], "'ftp://b'"), (train_rl, ['--sampler_url=http://a:port'], "'http://a:port'"),
    (train_rl, ['--sampler_url=http://:30000'], 'no address'), (train_rl, ['--sampler_url=http://a:1/?x=1'], 'no address'),
    (train_rl, ['--sampler_url=http://a:99999'], 'no address'),
    (train_rl, ['--sampler_url=http://a:1', '--sampler_timeout=0'], 'sampler_timeout'),
    (train_rl, ['--sampler_url=http://a:1', '--use_lora', '--load_in_4bit'], 'load_in_4bit=True'),
    (train_rl, ['--sampler_url=http://a:1', '--use_lora', '--lora_bias=all'], 'lora_bias=all'),
    (train_rl, ['--importance_cap=-1'], 'importance_cap'),
    (train_agents, ['--sampler_url=http://a:1', '--GPU_num=2'], 'tensor_parallel=2'),
    (train_agents, ['--sampler_url=http://a:1', '--specialization=full'], 'specialization=full'),
    (train_agents, ['--sampler_url=http://a:1', '--eval_only'], 'eval_only=True')])
def test_mistakes_are_one_line(script, flags, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(script.Config, flags)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and expected in said and len(said.splitlines()) == 1
