"""Every script survives stop signals, a full disk, a SIGKILL and a damaged checkpoint: it ends as the run
that was left alone. The long form is bench/chaos.py."""
import re

import pytest

from chaos import SMALL, small_run, survive

# what stop signals break in on: (function of the script, signal, in which call of it after a start)
SIGNALS = {'train_gpt': [('validate', 'SIGTERM', 2), ('validate', 'SIGINT', 1)],
           'train_sft': [('evaluate', 'SIGTERM', 1), ('evaluate', 'SIGINT', 1)],
           'train_dpo': [('evaluate', 'SIGTERM', 2), ('evaluate', 'SIGINT', 1)],
           'train_rl': [('evaluate', 'SIGTERM', 2), ('generate_rollout', 'SIGINT', 1)],
           'train_agents': [('validate', 'SIGTERM', 2), ('rollout', 'SIGINT', 1)]}
SHARDED = 'train_sft', 'train_rl'       # whose ranks hold a part of the weights each


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('script', SMALL)
def test_stopped_short_of_disk_killed_and_damaged(script):
    """Two ranks. Stop signals come to the second alone, in the middle of an evaluation or a rollout."""
    flags = [*small_run(script, steps=8), '--shard=full' if script in SHARDED else '--shard=none']
    report = survive(script, flags, kills=1, damage=True, signals=SIGNALS[script], full_disk=True, ranks=2)
    assert report['codes'] == [[143, 143], [130, 130]] and report['kills'] == 1
    assert report['full_disk'] == [2, 2]
    assert report['skipped'] == [report['damage'].partition('/')[0]]        # said once, by name
    assert report['differences'] == []
    with open('killed.log') as file:
        said = file.read()
    assert said.count('saved; go on with: python') == 2
    assert re.search('--output_dir=killed --(init_from=)?resume', said)
    assert said.count('cannot write killed') == 1 and 'checkpoints written before are intact' in said
    assert 'Traceback' not in said and 'another process of this run ended' in said
