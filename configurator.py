"""One dataclass per script is its whole configuration; this file reads the rest of the world into it.

Files (YAML recipes, Python files of assignments) and the command line are each turned into (key, value, where) triples,
and one function, assign(), finds the field that a key names, converts the value to the field's type and sets it.
Files come first, then the command line, each from left to right. Nothing that is read is ever executed.

    --batch_size=32  --batch-size 32  --bf16  --no-bf16  --bf16=false       flags, in any of their spellings
    training.learning_rate=3e-4  data.datasets[0].name=x  seed=1            the same, by documented path
    recipe.yaml  recipe.py  --recipe recipe.yaml                            files
"""
import argparse
import ast
import copy
import dataclasses
import difflib
import json
import inspect
import io
import math
import operator
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tokenize
import types
import typing

# A recipe says which algorithm it is for; a recipe for another script is named as such, not as a heap of unknown keys.
SCRIPTS = {'sft': 'train_sft.py', 'dpo': 'train_dpo.py', 'ppo': 'train_rl.py', 'grpo': 'train_rl.py', 'gspo': 'train_rl.py',
           'at_grpo': 'train_agents.py'}
BOOLS = {'true': True, 'yes': True, 'on': True, '1': True, 'false': False, 'no': False, 'off': False, '0': False}
FILES = ('.py', '.yaml', '.yml')
LAUNCHED = 'NANOFORGE_LAUNCHED'  # how launch() tells the processes it starts what they are: 'detached' or 'worker'


class UserError(Exception):
    """A mistake of the user's: one line that says what, where, what was meant and how to fix it."""


def setting(default, path=None, also=(), choices=None, positional=False):
    """A dataclass field with its documented dotted path, other spellings and allowed values.

    A list or dict default is copied for each instance. `positional`: a word of the command line without a flag is its value.
    """
    metadata = dict(path=path, also=also, choices=choices, positional=positional)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---- fields and their types ------------------------------------------------------------------------------------------

def path_of(field):
    return field.metadata.get('path') or field.name


def spellings(cls):
    """{every key that names a field of the dataclass `cls`: the field}"""
    return {key.replace('-', '_'): field for field in dataclasses.fields(cls)
            for key in (field.name, path_of(field), *field.metadata.get('also', ()))}


def members(hint):
    """The types that `hint` allows: (int, NoneType) for Optional[int], (str,) for str."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def entry_type(hint):
    """The type of the entries of a list[...] or dict[str, ...], else None."""
    return next((typing.get_args(kind)[-1] for kind in members(hint) if typing.get_origin(kind) in (list, dict)), None)


def describe(hint):
    """A type in words: 'int', 'list of float', 'bool or str'."""
    return ' or '.join(f'list of {describe(entry_type(kind))}' if entry_type(kind) else kind.__name__
                       for kind in members(hint) if kind is not type(None))


def convert(value, hint):
    """`value` (text, or a Python value) as the type `hint`; ValueError where it is none."""
    kinds = members(hint)
    if len(kinds) > 1:
        if type(None) in kinds and str(value).lower() in ('none', 'null', '~', ''):
            return None
        for kind in sorted(set(kinds) - {type(None)}, key=lambda kind: kind is str):  # any text is a str: try that last
            try:
                return convert(value, kind)
            except ValueError:
                pass
    elif typing.get_origin(hint) is list and isinstance(value, (list, tuple, str)):
        if isinstance(value, str):  # 'a b', 'a,b' or '[a, b]'
            value = [word.strip('\'"') for word in re.split(r'[,\s]+', value.strip('[] ')) if word]
        return [convert(item, entry_type(hint)) for item in value]
    elif typing.get_origin(hint) is dict and value == {}:
        return {}
    elif hint is bool and str(value).lower() in BOOLS:
        return BOOLS[str(value).lower()]
    elif hint is str and isinstance(value, (str, int, float)):
        return str(value)
    elif hint in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        if isinstance(value, str):
            value = int(value) if re.fullmatch(r'[+-]?\d+', value) else float(value)
        if math.isfinite(value) and hint(value) == value:  # 1e5 is an int, 1.5 is not
            return hint(value)
    raise ValueError


def closest(word, known):
    """'; did you mean X?' or nothing."""
    near = difflib.get_close_matches(word, known, 1) or [key for key in known if key.startswith(word)]
    return f"; did you mean '{near[0]}'?" if near else ''


# ---- the one way in: a key, a value, a place to blame ------------------------------------------------------------------

def assign(owner, key, value, where=''):
    """Set what `key` names in the dataclass instance `owner`; return the name of the field of `owner` that it lies in.

    key    'learning_rate', 'training.learning_rate', 'data.datasets[0].name', 'data.datasets.name' (every entry),
           'base_models.policy_0.path'; an entry of a dict, or the next of a list, is made when it does not exist
    where  'recipe.yaml line 3: ', put before the message of an error
    """
    table, parts = spellings(type(owner)), key.split('.')
    for n in range(len(parts), 0, -1):
        head, index = re.fullmatch(r'(.*?)(?:\[(\d+)\])?', '.'.join(parts[:n])).groups()
        if head.replace('-', '_') in table:
            break
    else:
        raise UserError(f"{where}there is no setting '{key}'{closest(key, table)}")
    field, tail = table[head.replace('-', '_')], '.'.join(parts[n:])
    hint, held = typing.get_type_hints(type(owner))[field.name], getattr(owner, field.name)
    entry = entry_type(hint)

    if not tail and index is None:
        setattr(owner, field.name, checked(field, hint, key, value, where))
    elif tail and isinstance(held, list) and dataclasses.is_dataclass(entry):
        if int(index or 0) > len(held):
            raise UserError(f'{where}{key}: {head} has only {len(held)} entries, and the first is [0]')
        if int(index or 0) == len(held):
            held.append(entry())
        for item in held if index is None else [held[int(index)]]:
            assign(item, tail, value, where)
    elif tail and isinstance(held, dict) and index is None:
        name, _, tail = tail.partition('.')
        if tail and dataclasses.is_dataclass(entry):
            assign(held.setdefault(name, entry()), tail, value, where)
        elif not tail and not dataclasses.is_dataclass(entry):
            held[name] = checked(field, entry, key, value, where)
        else:
            raise UserError(f"{where}{key}: write {head}.NAME{'.SETTING' * dataclasses.is_dataclass(entry)}=VALUE")
    elif tail and dataclasses.is_dataclass(held) and index is None:
        assign(held, tail, value, where)
    else:
        raise UserError(f"{where}there is no setting '{key}': '{head}' is {describe(hint)}")
    return field.name


def checked(field, hint, key, value, where):
    """`value` as the type `hint`, one of the field's choices; UserError where it is not."""
    try:
        value = convert(value, hint)
    except ValueError:
        raise UserError(f"{where}{key}: '{value}' is not {describe(hint)}") from None
    choices = field.metadata.get('choices')
    for item in value if isinstance(value, list) else [value]:
        if choices and item not in choices and not isinstance(item, (bool, type(None))):
            if field.name == 'algorithm' and item in SCRIPTS:
                raise UserError(f"{where}algorithm '{item}' is trained by {SCRIPTS[item]}, not {os.path.basename(sys.argv[0])}")
            raise UserError(f"{where}{key}: '{item}' is none of {', '.join(map(str, choices))}{closest(str(item), choices)}")
    return value


# ---- what is read: files and the command line ---------------------------------------------------------------------------

@dataclasses.dataclass
class Always:
    """What every script takes beside its own Config."""
    recipe: str = ''  # read settings from this YAML or Python file; a file name without the flag does the same
    print_config: bool = False  # print the resolved configuration as JSON and stop
    help: bool = False  # print this page and stop
    local_rank: int = 0  # older launchers pass it; LOCAL_RANK in the environment is what counts


def flatten(tree, key=''):
    """(key, value) of every leaf of nested dicts and lists of dicts; such a list replaces the one before it."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from flatten(value, f'{key}.{name}' if key else str(name))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        yield key, []
        for i, item in enumerate(tree):
            yield from flatten(item, f'{key}[{i}]')
    else:
        yield key, tree


def read_yaml(path, text):
    """(nested dict, {key: line}) of a YAML file. Scalars stay text: `3e-4`, `no` and `null` mean what the field makes of them."""
    try:
        import yaml
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except ImportError:
        raise UserError(f'{path}: YAML needs PyYAML: pip install pyyaml') from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f'{path} line {error.problem_mark.line + 1}: not YAML: {error.problem}') from None
    lines = {}

    def plain(node, key):
        lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, f'{key}[{i}]') for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return node.value
        tree = {}
        for name, value in node.value:
            inner = f'{key}.{name.value}' if key else str(name.value)
            if name.value in tree:
                raise UserError(f'{path} line {name.start_mark.line + 1}: {inner} is already set on line {lines[inner]}')
            lines[inner] = name.start_mark.line + 1
            tree[name.value] = plain(value, inner)
        return tree

    return (plain(root, '') if root else {}), lines


ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}


def constant(node, names):
    """The value of an expression of constants, arithmetic and `names`; ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = constant(node.left, names), constant(node.right, names)
        if isinstance(left, str) == isinstance(right, str):  # 'a' * 10**9 is no configuration
            return ARITHMETIC[type(node.op)](left, right)
    if ast.unparse(node) == 'str(time.time())':  # nanoGPT's config files name runs so
        return str(time.time())
    return ast.literal_eval(node)


def read_python(path, text):
    """(dict, {key: line}) of a Python file of assignments, which is parsed and not run."""
    names, lines = {}, {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
                for target in node.targets:
                    names[target.id], lines[target.id] = constant(node.value, names), node.lineno
            elif not isinstance(node, ast.Import) and not (isinstance(node, ast.Expr) and ast.get_docstring(ast.Module([node], []))):
                raise ValueError
    except SyntaxError as error:
        raise UserError(f'{path} line {error.lineno}: not Python: {error.msg}') from None
    except (ValueError, TypeError, ArithmeticError):
        raise UserError(f'{path} line {node.lineno}: only NAME = VALUE with constants and + - * / is read here') from None
    return names, lines


def read_file(cls, path):
    """(key, value, where) of every setting in a file."""
    if not path.endswith(FILES):
        raise UserError(f'{path}: a configuration file ends in {", ".join(FILES)}')
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: {getattr(error, "strerror", None) or "not UTF-8 text"}') from None
    tree, lines = (read_python if path.endswith('.py') else read_yaml)(path, text)
    if not isinstance(tree, dict):
        raise UserError(f'{path}: a recipe is made of `section:` and `key: value` lines')
    sections = {key.rpartition('.')[0] for key in spellings(cls)}
    found = [(key, value, f'{path} line {lines[key]}: ') for key, value in flatten(tree)
             if not (key in sections and value == '')]  # a section with nothing in it
    return sorted(found, key=lambda setting: setting[0] != 'training.algorithm')  # a recipe for another script is told first


def command_line(cls, argv):
    """[[key, value]] in the order of the words. `takes` is what the flag before may still take: one value, a bool, a list."""
    table, found, takes = spellings(Always) | spellings(cls), [], ''
    hints = typing.get_type_hints(Always) | typing.get_type_hints(cls)
    positional = [field.name for field in dataclasses.fields(cls) if field.metadata.get('positional')]
    for word in ('--help' if word == '-h' else word for word in argv):
        name, equals, value = word.partition('=')
        if word.startswith('--'):
            key = name[2:].replace('-', '_')
            if key.startswith('no_') and key not in table and key[3:] in table and not equals:
                key, equals, value = key[3:], '=', 'false'
            if key not in table and not re.search(r'[.[]', key):  # assign() judges dotted keys
                raise UserError(f"there is no flag {name}{closest(key, table)}")
            kinds = members(hints[table[key].name]) if key in table else (str,)
            takes = '' if equals else 'bool' if bool in kinds else 'list' if entry_type(kinds[0]) else 'value'
            found.append([key if key in table else name[2:], value if equals else 'true' if takes == 'bool' else None])
        elif takes == 'value' or takes == 'bool' and word.lower() in (*BOOLS, *(table[key].metadata.get('choices') or ())):
            found[-1][1], takes = word, ''
        elif word.endswith(FILES):
            found.append(['recipe', word])
            takes = ''
        elif re.match(r'[A-Za-z_][\w.[\]-]*=', word):
            found.append([name, value])
            takes = ''
        elif takes == 'list':
            found[-1][1] = f'{found[-1][1] or ""} {word}'
        elif positional:
            found.append([positional.pop(0), word])
        else:
            raise UserError(f"'{word}' belongs to no flag: write --name=value, name=value, or a file ending in {', '.join(FILES)}")
    for key, value in found:
        if value is None:
            raise UserError(f'--{key} needs a value')
    return found


# ---- the help page -----------------------------------------------------------------------------------------------------

def comments(cls):
    """{field name: (heading, comment)} from the source. A comment beside a field or right above it explains it; where a field
    has both, the one above is the heading of a group."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # no source file, as in an interactive session
        return {}
    notes, above, name = {}, [], None  # {field: (comments above, comments beside)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        column = token.start[1]
        if token.type == tokenize.COMMENT and column == 4:
            above.append(token.string.strip('#- '))
        elif token.type == tokenize.COMMENT and name:
            notes[name][1].append(token.string.strip('#- '))
        elif token.type == tokenize.NAME and column == 4:
            name, notes[token.string], above = token.string, (above, []), []
    found, heading = {}, ''
    for name, (above, beside) in notes.items():
        heading = ' '.join(above) if above and beside else heading
        found[name] = (heading, ' '.join(beside or above))
    return found


def help_page(cls):
    """The text of --help: argparse lays it out, one group for each heading in the source or section of the paths."""
    parser = argparse.ArgumentParser(
        add_help=False, usage='%(prog)s [--setting=value] [section.setting=value] [file.yaml | file.py] ...',
        description=(sys.modules[cls.__module__].__doc__ or '').split('\n\n')[0].replace('%', '%%'),
        epilog='- and _ are alike in a flag; --no-flag turns one off. Files are read first, then the command line, left to right.',
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120))
    groups = {}

    def add(cls, prefix, group):
        notes, hints = comments(cls), typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            heading, comment = notes.get(field.name, ('', ''))
            title = group or heading or path_of(field).rpartition('.')[0] or 'settings'
            hint, entry = hints[field.name], entry_type(hints[field.name])
            inner = next((kind for kind in (*members(hint), entry) if dataclasses.is_dataclass(kind)), None)
            if title not in groups:
                groups[title] = parser.add_argument_group(title, None)
            if inner:
                add(inner, prefix + path_of(field) + ('[0].' if list in map(typing.get_origin, members(hint)) else '.NAME.' if entry else '.'), title)
                continue
            facts = [f'{prefix}{path_of(field)}' if path_of(field) != field.name and not prefix else '']
            facts += ['--' + key for key in field.metadata.get('also', ())]
            facts += ['one of ' + ', '.join(map(str, field.metadata['choices']))] if field.metadata.get('choices') else []
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            facts += [] if default is None else [f'default {json.dumps(default)}']
            text = f"{comment} ({'; '.join(filter(None, facts))})"
            groups[title].add_argument(f'--{prefix}{field.name if not prefix else path_of(field)}', help=text.replace('%', '%%'),
                                       metavar='' if hint is bool else describe(hint).replace(' ', '_').upper())

    add(cls, '', '')
    add(Always, '', 'always')
    return parser.format_help()


# ---- what scripts call -------------------------------------------------------------------------------------------------

def parse(cls, argv=None):
    """The configuration of one run: an instance of the dataclass `cls` with an attribute `typed` more.

    typed   frozenset of the fields that the command line, or a file named there, has set
    Calls cls.check() if there is one: it raises UserError where settings contradict each other, and must print nothing, since
    launched processes come here again. Exits 0 after --help and --print_config, 2 after a mistake. Then launch().
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        words = command_line(cls, argv)
        always = {key: value for key, value in words if key in spellings(Always)}
        if 'help' in always:
            print(help_page(cls), end='')
            sys.exit(0)
        settings = [found for key, value in words if key == 'recipe' for found in read_file(cls, value)]
        settings += [(key, value, '') for key, value in words if key not in always]
        cfg = cls()
        cfg.typed = frozenset([assign(cfg, *found) for found in settings])
        if hasattr(cfg, 'check'):
            cfg.check()
        if convert(always.get('print_config', 'false'), bool):
            print(json.dumps(as_dict(cfg), indent=2))
            sys.exit(0)
        launch(cfg, argv)
        return cfg
    except UserError as error:
        fail(error)


def run(main, cfg):
    """main(cfg); a UserError becomes one line and exit status 2, Ctrl-C exit status 130."""
    try:
        main(cfg)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error):
    rank = f" (rank {os.environ['RANK']})" if os.environ.get('RANK', '0') != '0' else ''
    print(f"{os.path.basename(sys.argv[0])}{rank}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def choose(cfg, name, value, why):
    """Fill in a setting that was left unset (None), and say so once."""
    if getattr(cfg, name) is None:
        setattr(cfg, name, value)
        if os.environ.get('RANK', '0') == '0':
            print(f'{name} = {value} ({why})', flush=True)


def as_dict(cfg):
    """The configuration as nested JSON-able dicts, each setting at its documented path; from_dict() reads it back."""
    def plain(value):
        if dataclasses.is_dataclass(value):
            return as_dict(value)
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    tree = {}
    for field in dataclasses.fields(cfg):
        *sections, name = path_of(field).split('.')
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = plain(getattr(cfg, field.name))
    return tree


def from_dict(cls, saved, cfg=None):
    """The configuration that as_dict() wrote, for a resume. Fields that were typed in `cfg`, the one just parsed, come from there."""
    result = cls()
    for key, value in flatten(saved):
        assign(result, key, value, 'saved configuration: ')
    result.typed = getattr(cfg, 'typed', frozenset())
    for name in result.typed:
        setattr(result, name, getattr(cfg, name))
    return result


# ---- launch ------------------------------------------------------------------------------------------------------------

def launch(cfg, argv):
    """Starts this command line again as the settings `num_gpus` and `nohup` say, where `cfg` has them, and exits; or returns.

    num_gpus  one process per GPU with torchrun's environment. torchrun itself turns every failure into exit status 1 and a
              traceback; here the exit status is that of the first process that fails, and stop signals are passed on.
    nohup     a detached process, which outlives the terminal, writes to logs/training_<date>_<time>.log; its last line is
              the exit status.
    """
    role = os.environ.pop(LAUNCHED, None)
    if role == 'worker' or 'RANK' in os.environ:
        return
    ranks = getattr(cfg, 'num_gpus', None) or 1
    if ranks < 1:
        raise UserError(f'num_gpus: {ranks} is not a number of processes')
    command = [sys.executable, sys.argv[0], *argv]
    if getattr(cfg, 'nohup', False) and role != 'detached':
        process, log = detach(command)
        print(f'PID {process.pid} writes to {log}\nfollow it: tail -f {log}')
        sys.exit(0)
    if ranks > 1 or role == 'detached':
        status = supervise(command, ranks)
        if role == 'detached':
            print(f'exit status {status}', flush=True)
        sys.exit(status)
    if getattr(cfg, 'distributed', False):
        print('--distributed without a launcher is one process: use --num_gpus=N or torchrun', file=sys.stderr)


def detach(command):
    """(process, name of its log). The log is a new file: two starts in one second get two names."""
    os.makedirs('logs', exist_ok=True)
    while True:
        log = time.strftime('logs/training_%Y%m%d_%H%M%S.log')
        try:
            file = open(log, 'x')
            break
        except FileExistsError:
            time.sleep(0.1)
    env = {**os.environ, LAUNCHED: 'detached', 'PYTHONUNBUFFERED': '1'}
    with file:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True), log


def supervise(command, ranks):
    """Run `command` in `ranks` processes; the exit status: 0, or that of the first that failed (128 + signal for a killed one)."""
    env, workers, stopped = {**os.environ, LAUNCHED: 'worker'}, [], []

    def stop(signum, frame):
        stopped.append(signum)
        for worker in workers:
            worker.send_signal(signum)

    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    if ranks > 1:
        with socket.socket() as free:  # any port that is free now
            free.bind(('127.0.0.1', 0))
            env.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]),
                       WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        env.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // ranks)))
    for rank in range(ranks):
        place = {'RANK': str(rank), 'LOCAL_RANK': str(rank)} if ranks > 1 else {}
        # in a session of its own: Ctrl-C reaches this process only, which passes it on once
        workers.append(subprocess.Popen(command, env={**env, **place}, start_new_session=True))
    status, deadline = 0, math.inf
    while True:
        codes = [worker.poll() for worker in workers]
        if any(codes) and not status:
            status, deadline = next(filter(None, codes)), time.monotonic() + 10
        if None not in codes:
            return 128 - status if status < 0 else status
        if time.monotonic() > deadline and not stopped:  # the others wait for the one that failed; stopped ones are saving
            for worker in workers:
                worker.kill()
        time.sleep(0.1)
