"""Writes into each recipe the settings of its script that it leaves alone, with default and meaning.

    python scripts/document_recipes.py [FILE ...]       all of recipes/ if none is named

They stand below MARK, commented, and are made anew; what stands above is the recipe's own and stays as it is.
"""
import dataclasses
import importlib
import json
import sys
import textwrap
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import comments, entry_type, path_of, read_file, run_script, spellings

RECIPES = sorted([*ROOT.glob('recipes/*.py'), *ROOT.glob('recipes/training/*/*.yaml')])
SCRIPTS = {'sft': 'train_sft', 'dpo': 'train_dpo', 'agents': 'train_agents'}    # of other folders: train_rl
MARK = '# ---- All other settings, with their defaults: take away a # to change one.'
# where the first entry of a list or dict stands
ENTRIES = {'datasets': '[0]', 'base_models': '.policy_0', 'agents': '.agent_0'}


def config_of(path):
    """The Config that a recipe is for: train_gpt's of a .py, else by the folder of the .yaml."""
    script = SCRIPTS.get(path.parent.name, 'train_rl') if path.suffix == '.yaml' else 'train_gpt'
    return importlib.import_module(script).Config


def settings_of(cls, task, prefix=''):
    """(field, key, heading, default, meaning) of every setting; of an environment's own those of `task`."""
    notes, hints = comments(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        heading, text = notes.get(field.name, ('', ''))
        key, entry = prefix + path_of(field), entry_type(hints[field.name])
        if field.metadata.get('open'):
            for name, default, text in field.metadata['open']():
                if text.startswith(f'{task}: '):
                    yield field, f'{key}.{name}', heading, default, text.removeprefix(f'{task}: ')
        elif dataclasses.is_dataclass(entry):
            yield from settings_of(entry, task, f'{key}{ENTRIES[field.name]}.')
        else:
            default = field.default
            if default is dataclasses.MISSING:
                default = field.default_factory()
            choices = [str(choice) for choice in field.metadata.get('choices', ())]
            if not all(choice in text for choice in choices):
                text += f' ({", ".join(choices)})'
            yield field, key, heading, default, text


def documented(path):
    """The text of a recipe, with what stands below MARK made anew."""
    cls, is_python = config_of(path), path.suffix == '.py'
    table, groups = spellings(cls), {}
    keys = [key.replace('-', '_') for key, _, _ in read_file(cls, str(path))]
    given = {path_of(table[key]) if key in table else key for key in keys}
    for key in keys:                                # sections in the order of the recipe
        groups.setdefault(key.partition('.')[0] if '.' in key and not is_python else '', [])
    for field, key, heading, default, text in settings_of(cls, path.stem):
        if key not in given:
            if is_python:
                line = f'# {field.name} = {default!r}  # {text}'
            else:
                line = f'# {key}: {as_yaml(default)}  # {text}'
                heading = key.rpartition('.')[0].partition('.')[0]
            # a line that goes on is a comment still when its # is taken away
            lines = textwrap.wrap(line, 110, subsequent_indent='#     # ', break_on_hyphens=False)
            groups.setdefault(heading, []).extend(lines)
    own = path.read_text('utf-8-sig').partition(MARK)[0].rstrip()
    blocks = ['\n'.join(lines) for lines in groups.values() if lines]
    return '\n\n'.join([own, MARK, *blocks]) + '\n'


def as_yaml(value):
    plain = isinstance(value, str) and value and not set(value) & set(':#{}[]')
    return value if plain else json.dumps(value)


def main(paths):
    for path in paths:
        path.write_text(documented(path), 'utf-8')


if __name__ == '__main__':
    run_script(main, [Path(name) for name in sys.argv[1:]] or RECIPES)
