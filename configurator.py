"""One dataclass per script is its whole configuration; this file reads files and the command line into it.

Both become (key, value) pairs; assign() finds the field that a key names, converts the value to the field's
type and sets it. Files come first, then the command line, left to right. Nothing that is read is executed.

    --batch_size=32  --batch-size 32  --names a b  --bf16  --no-bf16  --bf16=false      flags, in any spelling
    seed=1  training.learning_rate=3e-4  "data.datasets[0].name=x"                      the same by path
    recipe.yaml  recipe.py  --recipe recipe.yaml                                        files
"""
import argparse, ast, copy, dataclasses, difflib, inspect, json, math, operator, os, re, shutil
import sys, textwrap, time, types, typing

from nanoforge.errors import LOST_RANK, UserError, fail, print_anywhere
from nanoforge.launch import launch
from nanoforge.synonyms import SYNONYMS

# Whose recipe it is: one for another script is named as such, not as a heap of unknown keys.
SCRIPTS = {'sft': 'train_sft.py', 'dpo': 'train_dpo.py', 'ppo': 'train_rl.py', 'grpo': 'train_rl.py',
           'gspo': 'train_rl.py', 'at_grpo': 'train_agents.py'}
BOOLS = {'true': True, 'yes': True, 'on': True, '1': True,
         'false': False, 'no': False, 'off': False, '0': False}
FILES = ('.py', '.yaml', '.yml')
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
BOUNDS = {'min': (operator.ge, '{} or more'), 'max': (operator.le, '{} or less'),
          'above': (operator.gt, 'above {}'), 'below': (operator.lt, 'below {}')}


class Accepted(typing.NamedTuple):
    """A documented key that changes nothing here: it is taken, stored, printed, and said when it is set."""
    default: typing.Any
    why: str
    refused: bool = False  # any other value than the default is an error that says why
    also: tuple = ()  # other spellings


def setting(default, path=None, also=None, choices=None, positional=None, open=None, needs=None, empty=None,
            min=None, max=None, above=None, below=None):
    """A field of a config class: what the documents call it, and the values that it may have.

    path        its documented dotted path
    also        other spellings
    choices     its values; min and max are inclusive bounds, above and below exclusive ones. None is allowed
                besides where the annotation allows it.
    positional  a word without a flag is its value
    empty       '' is a value of its own, not None
    open        a dict field that takes any key of the section `path` that names no other field. cfg.check()
                judges them; open() gives what --help shows: (key, default, text)
    needs       ('name=value', ...): without one of these it changes nothing, which is said where it is a flag
    A list or dict default is copied for each instance.
    """
    facts = dict(path=path, also=also, choices=choices, positional=positional, open=open, needs=needs,
                 empty=empty, min=min, max=max, above=above, below=below)
    metadata = {key: fact for key, fact in facts.items() if fact is not None}
    return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


def configclass(cls):
    """@dataclass for a script's Config and for the flags that scripts share, which a Config inherits.

    section   a class attribute: where the documented paths of its fields begin, unless a field names its own.
              Fields of a base class without a section stand in that of the class that inherits them.
    defaults  `name = value`, without an annotation, changes the default of an inherited field, nothing else.
    """
    section = cls.__dict__.get('section')
    annotations = dict(cls.__dict__.get('__annotations__', {}))
    inherited, hints = {}, {}
    for base in reversed(cls.__mro__[1:]):
        inherited.update(getattr(base, '__dataclass_fields__', {}))
        hints.update(base.__dict__.get('__annotations__', {}))
    for name in [*inherited, *annotations]:
        field = cls.__dict__.get(name, inherited.get(name))
        if not isinstance(field, dataclasses.Field):
            field = setting(field)
        facts = dict(field.metadata)
        if name in inherited:
            facts = {**inherited[name].metadata, **facts}
        if section is not None:
            facts.setdefault('path', f'{section}.{name}'.strip('.'))
        setattr(cls, name, dataclasses.field(default_factory=field.default_factory, metadata=facts))
        annotations.setdefault(name, hints.get(name))
    cls.__annotations__ = annotations
    return dataclasses.dataclass(cls)


def path_of(field):
    return field.metadata.get('path') or field.name


def spellings(cls):
    """{key: field of `cls` that it names}, each name also behind its section.

    A field without a section answers to training.NAME, too.
    """
    table, behind_section = {}, {}
    for field in dataclasses.fields(cls):
        path = path_of(field)
        for key in (field.name, path, *field.metadata.get('also', ())):
            key = key.replace('-', '_')
            table[key] = field
            if '.' not in key:
                behind_section[f'{path.rpartition(".")[0] or "training"}.{key}'] = field
    return {**behind_section, **table}


def accepted_key(cls, key):
    """The documented path of a key that `cls` takes without effect, named by the path or its end; else
    None."""
    key = key.replace('-', '_')
    for path, known in getattr(cls, 'accepted', {}).items():
        if key in (path, path.rpartition('.')[2], *known.also):
            return path


def kinds(hint):
    """The types that an annotation allows, but None: (int,) for int | None, (bool, str) for bool | str."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    allowed = typing.get_args(hint) if is_union else (hint,)
    return tuple(kind for kind in allowed if kind is not type(None))


def entry_type(hint):
    """The type of what a list[...] or dict[str, ...] holds, else None."""
    return (typing.get_args(kinds(hint)[0]) or (None,))[-1]


def describe(hint):
    """An annotation in words: 'int', 'list of str', 'bool or str'."""
    words = []
    for kind in kinds(hint):
        if entry_type(kind):
            plural = {list: 'list of ', dict: 'names of '}[typing.get_origin(kind)]
            words.append(plural + describe(entry_type(kind)))
        else:
            words.append(kind.__name__)
    return ' or '.join(words)


def closest(word, known, mark=''):
    """What was meant, for the end of a message: what others call so, else what is spelled alike."""
    known = known if isinstance(known, dict) else list(known)
    name = word.rpartition('.')[2].replace('-', '_').lower()
    near = [key for key in (name, *SYNONYMS.get(name, ())) if key in known]
    if not near and name not in SYNONYMS:
        near = difflib.get_close_matches(word, known, 1, 0.7)
        near = near or [key for key in known if key.startswith(word)]
    if near and '.' in word and isinstance(known, dict):
        near = [path_of(known[near[0]])]
    return f"; did you mean '{mark}{near[0]}'?" if near else ''


def convert(value, hint):
    """`value` (text, or a Python value) as the type `hint`; ValueError where it is none."""
    if kinds(hint) != (hint,):
        if type(None) in typing.get_args(hint) and str(value).lower() in ('none', 'null', '~', ''):
            return None
        for kind in sorted(kinds(hint), key=lambda kind: kind is str):  # any text is a str: tried last
            try:
                return convert(value, kind)
            except ValueError:
                pass
    elif typing.get_origin(hint) is list and isinstance(value, (list, tuple, str)):
        if isinstance(value, str):
            value = split_list(value.strip('[] '))
        return [convert(item, entry_type(hint)) for item in value]
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


def split_list(text):
    """The words of 'a b' or 'a,b'. Quotes, and the path of a file that is there (as in path.py:function), may
    have spaces and commas inside."""
    words, found = [], list(re.finditer(r'''"[^"]*"|'[^']*'|[^,\s]+''', text))
    while found:
        for n in range(len(found), 0, -1):  # the longest run that is a path, else one word
            word = text[found[0].start():found[n - 1].end()]
            if n == 1 or os.path.exists(re.sub(r':\w+$', '', word)):
                break
        words.append(word.strip('\'"'))
        found = found[n:]
    return words


def assign(owner, key, value, where=''):
    """Sets what `key` names in the dataclass instance `owner`; returns the name of its field of `owner`.

    A key is a spelling of a field, then for nested ones an index or a name: data.datasets[0].name,
    data.datasets.name (of every entry), base_models.policy_0.path. The next entry of a list, or a new name of
    a dict, makes a new entry. `where` ('recipe.yaml: ') stands before the message of an error.
    """
    key = getattr(type(owner), 'aliases', {}).get(key, key)
    table, parts = spellings(type(owner)), key.split('.')
    if key.replace('-', '_') not in table and (path := accepted_key(type(owner), key)):
        return accept(owner, path, key, value, where)
    for n in range(len(parts), 0, -1):  # the longest beginning that names a field
        head, index = re.fullmatch(r'(.*?)(?:\[(\d+)\])?', '.'.join(parts[:n]), re.S).groups()
        if head.replace('-', '_') in table:
            break
    else:
        raise UserError(f"{where}there is no setting '{key}'{closest(key, table)}")
    field, tail = table[head.replace('-', '_')], '.'.join(parts[n:])
    hint = typing.get_type_hints(type(owner))[field.name]
    held = getattr(owner, field.name)
    if not tail and index is None:
        setattr(owner, field.name, checked(field, hint, key, value, where))
    elif tail and isinstance(held, list) and dataclasses.is_dataclass(entry_type(hint)):
        place = int(index or 0)
        if place > len(held):
            raise UserError(f'{where}{key}: {head} has only {len(held)} entries, and the first is [0]')
        if place == len(held):
            held.append(entry_type(hint)())
        for item in held if index is None else [held[place]]:
            assign(item, tail, value, where)
    elif tail and field.metadata.get('open') and '.' not in tail:
        held[tail.replace('-', '_')] = value
    elif len(parts) > n + 1 and entry_type(hint) and isinstance(held, dict) and index is None:
        assign(held.setdefault(parts[n], entry_type(hint)()), '.'.join(parts[n + 1:]), value, where)
    elif tail and dataclasses.is_dataclass(held) and index is None:
        assign(held, tail, value, where)
    else:
        raise UserError(f"{where}there is no setting '{key}': {head} is {describe(hint)}")
    return field.name


def accept(owner, path, key, value, where):
    """Stores the value of a key that changes nothing (see Accepted); returns its name."""
    known = type(owner).accepted[path]
    kind = type(known.default) if known.default is not None else str | None
    try:
        value = convert(value, kind)
    except (ValueError, OverflowError):
        raise UserError(f"{where}{key}: '{value}' is not {describe(kind)}") from None
    if known.refused and value != known.default:
        raise UserError(f'{where}{key}={value}: {known.why}')
    owner.__dict__.setdefault('accepted_values', {})[path] = value
    return path.rpartition('.')[2]


def without_effect(cfg):
    """A line for each key that was set and changes nothing, with the reason.

    What depends on another setting is said of flags alone: a recipe may well spell out what it does not use.
    """
    for field in dataclasses.fields(cfg):
        needs = field.metadata.get('needs', ())
        if field.name in cfg.flags and needs and not any(holds(cfg, need) for need in needs):
            value = as_text(getattr(cfg, field.name))
            yield f'{field.name}={value} changes nothing: it is for {needs[0]}'
    for path, value in getattr(cfg, 'accepted_values', {}).items():
        known = type(cfg).accepted[path]
        if value != known.default:
            yield f'{path.rpartition(".")[2]}={json.dumps(value)} changes nothing here: {known.why}'


def holds(cfg, need):
    """Whether 'name=value' is so in cfg, or among a list's entries; True where cfg has no such setting."""
    name, _, value = need.partition('=')
    held = getattr(cfg, name, value)
    return value in [as_text(item).lower() for item in (held if isinstance(held, list) else [held])]


def check_settings(cfg):
    """UserError where a value is out of its field's range, or cfg.check() finds a contradiction."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        for bound, (is_inside, words) in BOUNDS.items():
            limit = field.metadata.get(bound)
            if None not in (value, limit) and not (is_inside(value, limit) and math.isfinite(value)):
                raise UserError(f'{field.name} must be {words.format(limit)}, not {value}')
    if hasattr(cfg, 'check'):
        cfg.check()


def fill_in(cfg, **values):
    """Sets those of the fields that are None or empty, in place; returns what was chosen, as text."""
    chosen = {name: value for name, value in values.items() if getattr(cfg, name) in (None, [])}
    for name, value in chosen.items():
        setattr(cfg, name, value)
    return ', '.join(f'{name}={as_text(value)}' for name, value in chosen.items() if value != [])


def as_text(value):
    """As it would be typed: a list with spaces, 1e-05 for 0.00001."""
    if isinstance(value, list):
        return ' '.join(map(str, value))
    return f'{value:g}' if isinstance(value, float) else str(value)


def checked(field, hint, key, value, where):
    """convert(), then the choices of the field; UserError where either fails."""
    try:
        value = value if value == '' and field.metadata.get('empty') else convert(value, hint)
    except (ValueError, OverflowError):
        entries = ''
        if dataclasses.is_dataclass(entry_type(hint)):
            first = dataclasses.fields(entry_type(hint))[0].name
            entries = f": its entries are set one by one, \"{path_of(field)}[0].{first}={value}\""
        raise UserError(f"{where}{key}: '{value}' is not {describe(hint)}{entries}") from None
    choices = field.metadata.get('choices')
    for item in value if isinstance(value, list) else [value]:
        if choices and item not in choices and not isinstance(item, (bool, type(None))):
            if field.name == 'algorithm' and item in SCRIPTS:
                raise UserError(f"{where}'{item}' is trained by {SCRIPTS[item]}, not "
                                f"{os.path.basename(sys.argv[0])}")
            near = closest(str(item), map(str, choices))
            raise UserError(f"{where}{key}: '{item}' is none of {', '.join(map(str, choices))}{near}")
    return value


def flatten(tree, key=''):
    """(key, value) of every leaf of nested dicts and lists of dicts; such a list replaces an earlier one."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from flatten(value, f'{key}.{name}' if key else name)
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        yield key, []
        for i, item in enumerate(tree):
            yield from flatten(item, f'{key}[{i}]')
    else:
        yield key, tree


def read_python(path, text):
    """{name: value} of a file of assignments, which is parsed and not run."""
    names = {}

    def constant(node):
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            left, right = constant(node.left), constant(node.right)
            if isinstance(left, str) == isinstance(right, str):  # 'a' * 10**9 is no setting
                return ARITHMETIC[type(node.op)](left, right)
        if ast.unparse(node) == 'str(time.time())':  # so nanoGPT names a run
            return str(time.time())
        return ast.literal_eval(node)

    def is_docstring(node):
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

    node = None
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
                names.update({target.id: constant(node.value) for target in node.targets})
            elif not isinstance(node, ast.Import) and not is_docstring(node):
                raise ValueError
    except (SyntaxError, ValueError, TypeError, ArithmeticError) as error:
        line = getattr(error if isinstance(error, SyntaxError) else node, 'lineno', 1)
        reason = 'only NAME = VALUE of constants and + - * / is read here'
        raise UserError(f'{path} line {line}: {reason}') from None
    return names


def read_yaml(path, text):
    """{key: value} of a YAML file, where a repeated key is a mistake: YAML itself keeps the last."""
    import yaml

    class Loader(yaml.BaseLoader):  # leaves text as text: `3e-4`, `no`, `null` mean what a field's type says
        def construct_scalar(self, node):  # `key: ''` is an empty text, `key:` is None
            return node.value if node.value or node.style else None

        def construct_mapping(self, node, deep=False):
            lines = {}
            for key, _ in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines:
                    raise UserError(f"{path} line {line}: '{name}' stands in line {lines[name]} already: "
                                    'put them together')
                lines[name] = line
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise UserError(f'{path} is not YAML: {error}') from None


def read_file(cls, path):
    """[(key, value, where)] of the settings in a file."""
    try:
        with open(path, encoding='utf-8-sig') as file:  # Windows' editors put a byte order mark in front
            text = file.read()
        tree = read_python(path, text) if path.endswith('.py') else read_yaml(path, text)
    except UnicodeDecodeError:
        raise UserError(f'{path} is not UTF-8: save it in that encoding') from None
    except (OSError, ImportError) as error:
        raise UserError(f'{path}: {getattr(error, "strerror", None) or error}') from None
    if not isinstance(tree, dict):
        raise UserError(f'{path}: a recipe is made of `section:` and `key: value` lines')
    table, named = spellings(cls), {}
    sections = {key.rpartition('.')[0] for key in table}
    found = []
    for key, value in flatten(tree):
        field = table.get(key.replace('-', '_'))
        if value is None and not path.endswith('.py') and not (field and field.metadata.get('empty')):
            value = ''
        if value == '' and key in sections:
            continue
        found.append((key, value, f'{path}: '))
        if field and field.name in named:
            raise UserError(f'{path}: {named[field.name]} and {key} are one setting: leave one of them out')
        if field:
            named[field.name] = key
    # is it a recipe for this script at all?
    return sorted(found, key=lambda pair: pair[0] != 'training.algorithm')


@dataclasses.dataclass
class Always:
    """Flags of every script that are no settings."""
    recipe: str = ''  # a YAML or Python file of settings; its name without the flag does the same
    print_config: bool = False  # print the resolved configuration as JSON and stop
    help: bool = False  # print this page and stop
    local_rank: int = 0  # passed by older launchers; only LOCAL_RANK in the environment counts


def command_line(cls, argv):
    """[[key, value]] in the order of the words, a list's value being its words with spaces between them.

    argparse lays out --help but cannot do this: keep the order, end a list before key=value or a file.
    """
    table = {**spellings(Always), **spellings(cls)}
    hints = {**typing.get_type_hints(Always), **typing.get_type_hints(cls)}
    positional = [field.name for field in dataclasses.fields(cls) if field.metadata.get('positional')]
    aliases = getattr(cls, 'aliases', {})
    words = []  # what is returned
    takes, choices = '', ()  # what the last flag may still take: a 'value', a 'bool', a 'list' or nothing
    for word in argv:
        name, equals, value = word.partition('=')
        if word == '-h':
            name = '--help'
        key = name[2:].replace('-', '_')
        if name.startswith('--'):
            if key.startswith('no_') and key not in table and not equals:
                if key[3:] in table or accepted_key(cls, key[3:]):
                    key, equals, value = key[3:], '=', 'false'
            hint, choices = str, ()
            if key in table:
                hint, choices = hints[table[key].name], table[key].metadata.get('choices', ())
            elif path := accepted_key(cls, key):
                hint = type(cls.accepted[path].default)
            elif key not in aliases:
                if not re.search(r'[.[]', key):  # assign() judges dotted keys
                    raise UserError(f"there is no flag {name}{closest(key, {**table, **aliases}, '--')}")
                key = name[2:]
            takes = '' if equals else takes_of(hint)
            if takes == 'bool':
                value = 'true'
            words.append([key, value if equals or takes == 'bool' else None])
        elif takes == 'value' or takes == 'bool' and word.lower() in (*BOOLS, *choices):
            words[-1][1], takes = word, ''
        elif re.match(r'[A-Za-z_][\w.[\]-]*=', word):
            words.append([name, value])
            takes = ''
        elif word.endswith(FILES):
            words.append(['recipe', word])
            takes = ''
        elif takes == 'list':
            words[-1][1] = f'{words[-1][1] or ""} {word}'.strip()
        elif positional:
            words.append([positional.pop(0), word])
            takes = takes_of(hints[words[-1][0]]).replace('value', '')
        else:
            raise UserError(f"'{word}' belongs to no flag: write --name=value, name=value or a "
                            f"{'|'.join(FILES)} file")
    for key, value in words:
        if value is None:
            raise UserError(f'--{key} needs a value')
    return words


def takes_of(hint):
    """What may follow a flag of this type: 'bool' (if anything), 'list' (several words) or 'value'."""
    if bool in kinds(hint):
        return 'bool'
    return 'list' if entry_type(hint) else 'value'


def comments(cls):
    """{field: (heading, comment)} from the source of `cls` and of the flags that it inherits.

    A comment beside a field, or above it, explains it, and goes on in comment lines indented further; where a
    field has both, or an inherited explanation, the one above is the heading of a group.
    """
    headings, notes = {}, {}
    for base in reversed(cls.__mro__[:-1]):  # a field that is declared again may leave its comment as it is
        heading, above, name = '', [], None
        for line in inspect.getsource(base).splitlines():
            code, _, note = line.partition('  # ')
            indent, note = len(line) - len(line.lstrip()), note.strip('- ')
            if indent == 4 and not code.strip():
                above.append(note)
            elif indent == 4:
                name = re.match(r'\w*', line.strip())[0]
                if above and (note or name in notes):
                    heading = ' '.join(above)
                headings[name] = heading or headings.get(name, '')
                notes[name] = note or notes.get(name) or ' '.join(above)
                above = []
            elif name and note:
                notes[name] = f'{notes[name]} {note}'.strip()
    return {name: (headings[name], notes[name]) for name in notes}


def help_page(cls):
    """The text of --help, laid out by argparse as wide as the terminal: what the script is and its examples,
    then the settings of cls.most_used, then a group for each heading in the source, else each section."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    what, _, rest = (sys.modules[cls.__module__].__doc__ or '').partition('\n\n')
    examples = rest.partition('\n\n')[0] if rest.startswith('    ') else ''
    parser = argparse.ArgumentParser(
        usage='%(prog)s [--setting=value] [section.setting=value] [file.yaml | file.py] ...', add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width))
    most_used = getattr(cls, 'most_used', ())
    groups = {'most used': parser.add_argument_group('most used')} if most_used else {}

    def add(cls, prefix='', title=''):
        notes, hints = comments(cls), typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            heading, text = notes.get(field.name, ('', ''))
            path, hint = path_of(field), hints[field.name]
            group = title or heading or path.rpartition('.')[0] or 'settings'
            if field.name in most_used and not prefix:
                group = 'most used'
            if group not in groups:
                groups[group] = parser.add_argument_group(group)
            if field.metadata.get('open'):
                for key, default, text in field.metadata['open']():
                    text += '' if default is None else f' (default {json.dumps(default)})'
                    groups[group].add_argument(f'{path}.{key}', nargs='?', help=text.replace('%', '%%'))
                continue
            entry = entry_type(hint) or hint
            if dataclasses.is_dataclass(entry):
                add(entry, path + {list: '[0].', dict: '.NAME.'}.get(typing.get_origin(hint), '.'), group)
                continue
            facts = ['--' + key for key in field.metadata.get('also', ())]
            if path != field.name:
                facts.insert(0, path)
            if 'choices' in field.metadata:
                facts.append(', '.join(map(str, field.metadata['choices'])))
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            if default is not None:
                facts.append(f'default {json.dumps(default)}')
            if facts:
                text += f" ({'; '.join(facts)})"
            kind = '' if hint is bool else describe(hint).upper().replace(' ', '_')
            groups[group].add_argument('--' + prefix + field.name, help=text.replace('%', '%%'), metavar=kind)

    add(cls)
    add(Always, title='always')
    usage, _, settings = parser.format_help().partition('\n\n')
    return '\n\n'.join(filter(None, [usage, textwrap.fill(what, width), examples, settings]))


def parse(cls, argv=None):
    """The configuration of this run: an instance of the dataclass `cls`, with the names of the fields that
    were set as cfg.typed, and of those that the command line itself set, not a file, as cfg.flags.

    Calls cls.check() if there is one: it raises UserError where settings contradict each other, and prints
    nothing, as launched processes come here again. Exits 0 after --help and --print_config, 2 after a
    mistake. Then launch().
    """
    print_anywhere()
    argv = sys.argv[1:] if argv is None else argv
    try:
        words = command_line(cls, argv)
        always = {key: value for key, value in words if key in spellings(Always)}
        if 'help' in always:
            print(help_page(cls), end='')
            sys.exit(0)
        found = [setting for key, value in words if key == 'recipe' for setting in read_file(cls, value)]
        found += [(key, value, '') for key, value in words if key not in always]
        cfg = cls()
        origins = [(assign(cfg, *setting), setting[2]) for setting in found]
        cfg.typed = frozenset(name for name, _ in origins)
        cfg.flags = frozenset(name for name, file in origins if not file)
        check_settings(cfg)
        if BOOLS.get(always.get('print_config')):
            print(json.dumps(as_dict(cfg), indent=2))
            sys.exit(0)
        launch(cfg, argv)
        return cfg
    except UserError as error:
        fail(error)


def run_script(main, cfg):
    """main(cfg); a UserError becomes one line and exit status 2, Ctrl-C exit status 130."""
    print_anywhere()
    try:
        main(cfg)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if os.environ.get('WORLD_SIZE', '1') == '1' or not LOST_RANK.search(str(error)):
            raise
        time.sleep(1)  # the one that ended has the first word
        fail('another process of this run ended, and the others cannot go on without it: was it killed?')


def as_dict(cfg):
    """The configuration as nested dicts for JSON, each setting at its documented path; see from_dict()."""
    tree, values = {}, dataclasses.asdict(cfg)
    leaves = {path_of(field): values[field.name] for field in dataclasses.fields(cfg)}
    for field in dataclasses.fields(cfg):
        if field.metadata.get('open'):      # its keys stand among the section's fields
            section = path_of(field)
            leaves.update((f'{section}.{key}', value) for key, value in leaves.pop(section).items())
    for path, known in getattr(cfg, 'accepted', {}).items():
        leaves.setdefault(path, getattr(cfg, 'accepted_values', {}).get(path, known.default))
    for path, value in leaves.items():
        *sections, name = path.split('.')
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    return tree


def from_dict(cls, saved, cfg=None):
    """The configuration that as_dict() gave; but fields typed in `cfg`, the one just parsed, are kept."""
    result, hints = cls(), typing.get_type_hints(cls)
    for key, value in flatten(saved):
        known = spellings(cls).get(key)
        if value is None and known and type(None) not in typing.get_args(hints[known.name]):
            continue            # an earlier version had no default there
        assign(result, key, value, 'saved configuration: ')
    result.typed, result.flags = getattr(cfg, 'typed', frozenset()), getattr(cfg, 'flags', frozenset())
    for name in result.typed & {field.name for field in dataclasses.fields(cls)}:
        value, saved_value = getattr(cfg, name), getattr(result, name)
        # of a dict only the typed entries change
        setattr(result, name, {**saved_value, **value} if isinstance(value, dict) else value)
    if getattr(cfg, 'accepted_values', None):
        result.__dict__.setdefault('accepted_values', {}).update(cfg.accepted_values)
    return result
