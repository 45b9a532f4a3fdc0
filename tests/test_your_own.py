"""docs/your_own.md is pasted: its files are written and its commands run, as they stand there."""
import importlib
import os
import re
import shlex
import sys

import pytest

from configurator import parse
from conftest import ROOT
from data.prepare import prepare_files

PAGE = open(os.path.join(ROOT, 'docs', 'your_own.md'), encoding='utf-8').read()
SECTIONS = {title: body for title, body in re.findall(r'^## (.*?)\n(.*?)(?=^## |\Z)', PAGE, re.S | re.M)}
FILES = dict(re.findall(r'^```\w+ (\S+)\n(.*?)^```$', PAGE, re.S | re.M))
# what a minute on a CPU is shortened by
SHORT = {'train_gpt.py': '--max_iters=4 --eval_interval=2 --sample_tokens=4', 'train_sft.py': '--max_steps=2',
         'train_dpo.py': '--max_steps=2 --eval_samples=2', 'train_rl.py': '--max_steps=1'}


def test_each_is_about_ten_lines():
    assert {'book.txt', 'chats.jsonl', 'calls.jsonl', 'pairs.jsonl', 'problems.jsonl', 'mine.py', 'guess.py'} == FILES.keys()
    assert all(len(text.splitlines()) <= 16 for text in FILES.values())


def test_the_reward_finds_the_number():
    names = {}
    exec(FILES['mine.py'], names)
    right, plain, wrong = names['score'](['6+8=14;<answer>38</answer>', '38.', 'It is 3 + 9.'], [{'answer': '38'}] * 3)
    assert plain > right > 0.5 and wrong < 0


@pytest.mark.parametrize('title', SECTIONS)
def test_what_is_pasted_runs(title, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    [commands] = [text for kind, text in re.findall(r'^```([^\n]*)\n(.*?)^```$', SECTIONS[title], re.S | re.M) if not kind]
    for command in commands.splitlines():
        words = shlex.split(command)[1:]
        if words[0] == 'data/prepare.py':           # writes into data/ of the repository
            prepare_files(tmp_path / words[1], [str(tmp_path / words[2])], 'char', words[2])
            continue
        script = importlib.import_module(words[0].removesuffix('.py'))
        words += [*SHORT[words[0]].split(), '--tensorboard=false', '--device=cpu']
        words = [f'--dataset={tmp_path / "mine"}' if word == '--dataset=mine' else word for word in words]
        monkeypatch.setattr(sys, 'argv', words)
        script.main(parse(script.Config, words[1:]))
        assert 'Traceback' not in capsys.readouterr().err
