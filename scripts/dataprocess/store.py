"""What the load_*.py share: their flags, whether the hub answers, and files that are complete or absent."""
import json
import os
import sys
import urllib.error
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from configurator import UserError
from data.prepare import Parser
from data.tasks.stored import GAME, GENERATED

GENERATED_ROWS = {'train': 1000, 'test': 300}


def arguments(doc, stems, argv=None):
    """The parsed flags; stems: what can be loaded."""
    parser = Parser(doc)
    parser.add_argument('--names', nargs='+', default=list(stems), choices=stems, metavar='NAME',
                        help=f'which: {", ".join(stems)} (default: all)')
    parser.add_argument('--output', default='datasets', help='the folder to write to (default: datasets)')
    generated = f'{GENERATED_ROWS["train"]} for training, {GENERATED_ROWS["test"]} held out'
    parser.add_argument('--num_rows', type=int,
                        help=f'rows of a file at most (default: all; generated ones: {generated})')
    parser.add_argument('--seed', type=int, default=0, help='of generated problems (default: 0)')
    parser.add_argument('--offline', action='store_true', help='generated problems, without asking the hub')
    parser.add_argument('--overwrite', action='store_true', help='replace files that are there')
    parser.add_argument('--allow_weak_sandbox', action='store_true',
                        help='run programs where the system cannot shut them in')
    args = parser.parse_args(argv)
    if args.num_rows is not None and args.num_rows < 1:
        parser.error(f'--num_rows={args.num_rows}: at least 1')
    return args


def use_hub(args, domain):
    """Whether to load from the hub; where not, it is said loudly what is written instead."""
    endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co')
    reason = '--offline'
    if not args.offline:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method='HEAD'), timeout=10):
                return True
        except urllib.error.HTTPError:      # it answers
            return True
        except (OSError, ValueError) as error:
            reason = f'{endpoint} does not answer ({getattr(error, "reason", error)})'
    rule = '=' * 100
    print(f'{rule}\n{reason}: these files will hold problems of the generator in data/tasks/{domain}.py, not '
          f'the data sets whose names they bear.\nThey are called NAME.{GENERATED}.jsonl, and are read where '
          f'there is no NAME.jsonl. With a network: the same command.\n{rule}',
          file=sys.stderr, flush=True)
    return False


def hub(name, subset=None, split='train', files=None, streaming=False):
    """The rows of a data set of the hub; files: JSON files of it to read instead. UserError on failure."""
    import datasets
    try:
        if files:
            paths = [f'hf://datasets/{name}/{file}' for file in files]
            yield from datasets.load_dataset('json', data_files=paths, split='train', streaming=streaming)
        else:
            yield from datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:      # of a dozen kinds: not found, gated, no such split, the network went away
        reason = f'{type(error).__name__}: {str(error).splitlines()[0][:150]}'
        raise UserError(f'{name} on the Hugging Face hub: {reason}; leave '
                        'it out of --names, or say --offline') from None


def write_sets(args, domain, stems, generate, load=None):
    """Writes the files of those stems, {'train': [stem], 'test': [stem]}, that args.names has.

    load(stem, split) gives the rows of the hub; without it generate(stem, 'train' or 'eval', n) gives those
    of the project's own generator, in files whose names say so where a data set has that name.
    """
    for split, names in stems.items():
        for stem in names:
            if stem in args.names and load:
                write(args, domain, split, stem, load(stem, split))
            elif stem in args.names:
                name = stem if domain == GAME else f'{stem}.{GENERATED}'
                write(args, domain, split, name, generated_rows(args, stem, split, generate))


def generated_rows(args, stem, split, generate):
    num_rows = args.num_rows or GENERATED_ROWS[split]
    for row in generate(stem, 'train' if split == 'train' else 'eval', num_rows):
        yield {**row, 'source': GENERATED}


def write(args, domain, split, stem, rows):
    """Rows (dicts) into OUTPUT/DOMAIN/SPLIT/STEM.jsonl, first under a temporary name.

    A file that is there stays, unless --overwrite.
    """
    path = os.path.join(args.output, domain, split, f'{stem}.jsonl')
    temporary = f'{path}.writing'
    if os.path.exists(path) and not args.overwrite:
        print(f'{path}: is there already; --overwrite replaces it')
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    count = 0
    try:
        with open(temporary, 'w', encoding='utf-8') as file:
            for count, row in enumerate(rows, 1):
                file.write(json.dumps(row, ensure_ascii=False) + '\n')
                if count == args.num_rows:
                    break
        if not count:
            raise UserError(f'{path}: the data set has no row of the expected form')
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    print(f'{path}: {count:,} rows')
