"""The house rules of DESIGN: where a line lives, what may import what, what a reader is spared.
torch is not imported.

Each failure names file and line. A rule is a function that yields them,
so that a mistake shows all of its places.
"""
import ast
import os
import re

import pytest

from conftest import ROOT

SCRIPTS = ('train_gpt.py', 'train_sft.py', 'train_dpo.py', 'train_rl.py', 'train_agents.py')
READ = ('nanoforge', 'data')        # folders that people read, besides the scripts in the root
WIDTH, LOOP_BY = 110, 170
# words of earlier versions, for which the field has better ones
RETIRED = {'look', 'places', 'behind', 'pupil', 'painted', 'alive', 'announce', 'choose', 'say', 'machine', 'lay_out',
           'Learner', 'Feed', 'Table', 'Plan', 'Rows', 'ColumnLinear', 'Enter', 'Leave'}


def python_files(*folders):
    """Paths under ROOT: those of the root itself and of `folders`."""
    paths = [name for name in os.listdir(ROOT) if name.endswith('.py')]
    for folder in folders:
        for where, _, names in os.walk(os.path.join(ROOT, folder)):
            paths += [os.path.relpath(os.path.join(where, name), ROOT) for name in names if name.endswith('.py')]
    return sorted(paths)


def text_of(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        return file.read()


PATHS = python_files(*READ)
TREES = {path: ast.parse(text_of(path)) for path in PATHS}


def imports():
    """{path: {path that it imports, anywhere in it: line}}"""
    modules = {path[:-3].replace(os.sep, '.').removesuffix('.__init__'): path for path in PATHS}
    graph = {}
    for path, tree in TREES.items():
        graph[path] = {}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parents = path[:-3].split(os.sep)[:-node.level] if node.level else []
                base = '.'.join(filter(None, [*parents, node.module]))
                names = [base, *(f'{base}.{alias.name}' for alias in node.names)]
            for name in names:
                if modules.get(name, path) != path:
                    graph[path].setdefault(modules[name], node.lineno)
    return graph


def reachable(graph, path):
    seen, todo = set(), [path]
    while todo:
        for other in graph[todo.pop()]:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def is_flags(node):
    return isinstance(node, ast.ClassDef) and (node.name == 'Config' or node.name.endswith('Flags'))


def declared():
    """(path, line, name, default as text) of every setting of a training script or of flags
    that scripts share."""
    for path, tree in TREES.items():
        if path in SCRIPTS or path.startswith('nanoforge'):
            for item in (item for node in tree.body if is_flags(node) for item in node.body):
                if isinstance(item, ast.AnnAssign):
                    default = item.value
                    if isinstance(default, ast.Call):       # setting(default, ...)
                        default = default.args[0]
                    yield path, item.lineno, item.target.id, ast.unparse(default)


# ---- the rules

def import_cycles():
    graph = imports()
    for path in PATHS:
        for other, line in graph[path].items():
            if path in reachable(graph, other):
                yield f'{path}:{line}: {other}, which it imports, imports it again'


def scripts_as_libraries():
    for path, others in imports().items():
        for other in set(others) & set(SCRIPTS):
            yield f'{path}:{others[other]}: a training script is no library: {other}'


def settings_that_nothing_reads():
    graph = imports()
    names, prefixes = {}, {}
    for path, tree in TREES.items():
        names[path], prefixes[path] = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names[path].add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names[path].add(node.value)                 # getattr(cfg, name) for name in ('...', '...')
            elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                prefixes[path].add(node.values[0].value)    # getattr(cfg, f'wandb_{key}')
    for path, line, name, _ in declared():
        readers = {path, *reachable(graph, path)} if path in SCRIPTS else PATHS
        by_prefix = any(name.startswith(start) for p in readers for start in prefixes[p] if start.endswith('_'))
        if not by_prefix and not any(name in names[reader] for reader in readers):
            yield f'{path}:{line}: nothing reads {name}'


def settings_declared_twice():
    """With one default in two classes, one of which is shared; or in three scripts, which is no accident."""
    places = {}
    for path, line, name, default in declared():
        places.setdefault((name, default), []).append((path in SCRIPTS, f'{path}:{line}'))
    for (name, default), found in places.items():
        (is_script, first), *others = sorted(found)         # shared flags first
        if others and not is_script or len(others) > 1:
            for _, place in others:
                yield f'{place}: {name} = {default} is declared in {first}, too: inherit it'


def wide_lines():
    for path in PATHS:
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if len(line) > WIDTH:
                yield f'{path}:{number}: {len(line)} columns'


def loops_that_begin_late():
    for path in SCRIPTS:
        main = next(node for node in TREES[path].body if getattr(node, 'name', '') == 'main')
        loops = [node.lineno for node in ast.walk(main) if isinstance(node, ast.While)
                 or isinstance(node, ast.For) and 'step' in ast.unparse(node.target) + ast.unparse(node.iter)]
        if not loops or min(loops) > LOOP_BY:
            yield f'{path}:{main.lineno}: no loop of main begins by line {LOOP_BY}'


def retired_names():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            name = ''
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                name = node.name
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
            if name in RETIRED:
                yield f'{path}:{node.lineno}: the name {name} is retired'


RULES = (import_cycles, scripts_as_libraries, settings_that_nothing_reads, settings_declared_twice, wide_lines,
         loops_that_begin_late, retired_names)


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_house(rule):
    broken = sorted(set(rule()))
    assert not broken, '\n' + '\n'.join(broken)


def test_the_rules_see_what_they_are_for(monkeypatch, tmp_path):
    """Each rule finds a file that breaks it, and nothing in one that does not."""
    wide = 'x = "' + 'a' * WIDTH + '"'
    files = {
        'train_gpt.py': 'class Config:\n    seed: int = setting(1, min=0)\n    unread: int = 3\n'
                        'def main(cfg):\n    while cfg.seed:\n        pass\n',
        'train_sft.py': 'import train_gpt\nclass Config:\n    seed: int = 1\n    rate: float = 0.5\n'
                        'def main(cfg):\n    look = cfg.rate\n' + '\n' * LOOP_BY + '    while cfg.seed:\n        pass\n',
        'nanoforge/a.py': f'def f():\n    from nanoforge import b\n{wide}\n',
        'nanoforge/flags.py': 'class RunFlags:\n    seed: int = 1  # read as cfg.seed\n',
        'nanoforge/b.py': 'from nanoforge.a import f\n',
    }
    for path in SCRIPTS[2:]:
        files[path] = 'def main(cfg):\n    for step in range(3):\n        pass\n'
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setitem(globals(), 'ROOT', str(tmp_path))
    monkeypatch.setitem(globals(), 'PATHS', sorted(files))
    monkeypatch.setitem(globals(), 'TREES', {path: ast.parse(text) for path, text in files.items()})
    found = {rule.__name__: [re.match(r'(.+?:\d+):', line)[1] for line in rule()] for rule in RULES}
    assert found == {
        'import_cycles': ['nanoforge/a.py:2', 'nanoforge/b.py:1'],
        'scripts_as_libraries': ['train_sft.py:1'],
        'settings_that_nothing_reads': ['train_gpt.py:3'],
        'settings_declared_twice': ['train_gpt.py:2', 'train_sft.py:3'],
        'wide_lines': ['nanoforge/a.py:3'],
        'loops_that_begin_late': ['train_sft.py:5'],
        'retired_names': ['train_sft.py:6'],
    }
