"""The README and docs/ name only what exists, and their commands are understood."""
import ast
import importlib
import os
import re
import subprocess
import sys

import pytest

from configurator import spellings
from conftest import ROOT

PAGES = {name: open(os.path.join(ROOT, name), encoding='utf-8').read()
         for name in ('README.md', *(f'docs/{page}.md' for page in ('pretraining', 'sft', 'dpo', 'rl', 'teams', 'your_own', 'scaling')))}
README = PAGES['README.md']
TEXT = '\n'.join(PAGES.values())
USERS_OWN = ('mine.py', 'guess.py', 'convert_hf_to_gguf.py', 'rows.jsonl', 'pairs.jsonl', 'problems.jsonl', 'book.txt', 'out/loss.png')
COMMANDS = sorted({found.strip() for found in re.findall(r'python (train_\w+\.py[^`#&\n]*)', TEXT)} - {'train_agents.py env.name=mine'})


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
    indented = re.findall(r'^    (python [^#\n]*|bash [^#\n]*)', TEXT, re.M)
    blocks = [code for kind, code in re.findall(r'^```([^\n]*)\n(.*?)^```$', TEXT, re.S | re.M) if not kind]
    for code in blocks + re.findall(r'`([^`\n]+)`', TEXT) + indented:
        if 'python' in code:
            assert not re.search(r'[\[\]*?]', code), code


def test_places_to_change_exist():
    places = re.findall(r'`(?:copy )?([\w/]+\.py):(\w+)`', TEXT)
    assert len(places) >= 40
    for path, name in places:
        assert name in defined(path), f'{path} defines no {name}'


def test_files_exist():
    for page, text in PAGES.items():
        files = set(re.findall(r'[\w/.-]+\.(?:py|sh|md|png|yaml|txt)\b', text)) - set(USERS_OWN)
        for path in files - {'rollouts.html', 'episodes.html'}:
            beside = os.path.join(ROOT, os.path.dirname(page), path)
            assert os.path.exists(os.path.join(ROOT, path)) or os.path.exists(beside), f'{page}: {path}'


def test_settings_and_code_that_pages_name_exist():
    """Flags in the text, and lines of a loop that a page walks through."""
    for method, script in (('pretraining', 'gpt'), ('sft', 'sft'), ('dpo', 'dpo'), ('rl', 'rl'), ('teams', 'agents')):
        text = PAGES[f'docs/{method}.md']
        config = importlib.import_module(f'train_{script}').Config
        known = set(spellings(config)) | {'replay', 'check', 'prompt', 'chat', 'baselines'}
        of_others = r'python (?!train_)[^\n]*'
        for flag in re.findall(r'--([\w]+)', re.sub(of_others, '', text)):
            assert flag in known, f'docs/{method}.md: --{flag}'
        source = open(os.path.join(ROOT, f'train_{script}.py'), encoding='utf-8').read()
        for code in re.findall(r'\*\*`([^`]+?)`\*\*', text):
            start = code.partition('...')[0].partition(', ...')[0]
            assert start in source, f'docs/{method}.md: {code}'


def test_what_the_table_of_troubles_quotes_is_printed():
    printed = set()
    for folder in ('', 'nanoforge', 'data'):
        for name in os.listdir(os.path.join(ROOT, folder)):
            if name.endswith('.py'):
                with open(os.path.join(ROOT, folder, name), encoding='utf-8') as file:
                    printed |= {node.value for node in ast.walk(ast.parse(file.read()))
                                if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    table = README.partition('## When something goes wrong')[2].partition('\n## ')[0]
    quotes = re.findall(r'"([^"]+)"', table)
    assert len(quotes) >= 4
    for quote in quotes:
        words = quote.removesuffix('...').strip()
        assert any(words in text for text in printed), f'no script prints {quote!r}'


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_understood(command, tmp_path):
    words = [word for word in command.split() if word != '...']
    done = subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *words[1:], '--print_config'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
