"""The README names only what exists, and its commands are understood."""
import ast
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
    README = file.read()
USERS_OWN = ('mine.py', 'convert_hf_to_gguf.py', 'rows.jsonl', 'pairs.jsonl', 'problems.jsonl', 'book.txt', 'out/loss.png')
COMMANDS = sorted(set(re.findall(r'python (train_\w+\.py[^`#&\n]*)', README)) - {'train_agents.py env.name=mine'})


def defined(path):
    """The names that a file defines at its top."""
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        tree = ast.parse(file.read())
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_commands_are_for_every_shell():
    """zsh takes [0] for a pattern, and finds no file of that name."""
    for code in re.findall(r'```\n(.*?)```', README, re.S) + re.findall(r'`([^`\n]+)`', README):
        if 'python' in code:
            assert not re.search(r'[\[\]*?]', code), code


def test_places_to_change_exist():
    places = re.findall(r'`(?:copy )?([\w/]+\.py):(\w+)`', README)
    assert len(places) >= 14
    for path, name in places:
        assert name in defined(path), f'{path} defines no {name}'


def test_files_exist():
    for path in set(re.findall(r'[\w/]+\.(?:py|sh|md|png|yaml|txt)\b', README)) - set(USERS_OWN):
        assert os.path.exists(os.path.join(ROOT, path)), path


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_understood(command, tmp_path):
    words = [word for word in command.split() if word != '...']
    done = subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *words[1:], '--print_config'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
