"""Data sets of documents streamed from the Hugging Face hub: only the token ids are written to the disk."""
from itertools import islice

from tqdm import tqdm

from configurator import UserError
from data.prepare import Parser, prepare
from data.documents import split_documents


def prepare_hub(directory, dataset, subset=None, num_tokens=None, max_documents=None, val_fraction=0.005):
    """A hub data set (its column 'text') in GPT-2's BPE, up to num_tokens or max_documents."""
    def documents():
        from datasets import load_dataset
        try:
            rows = load_dataset(dataset, subset, split='train', streaming=True)
            for row in islice(rows, max_documents):
                yield True, row['text']
        except OSError as e:    # what datasets raises when no hub answers, at the start or on the way
            raise UserError(f'{dataset}: the hub does not answer ({e}): prepare it where there is a network')

    def stream(label):
        bar = tqdm(documents(), label, max_documents, unit=' documents', disable=None)
        return split_documents(bar, val_fraction)

    source = f'{dataset}/{subset}' if subset else dataset
    source += ' on the Hugging Face hub'
    if num_tokens:
        source += f', the first {num_tokens:,} tokens'
    if max_documents:
        source += f', the first {max_documents:,} documents'
    print(f'{directory}: {source}: streaming')
    return prepare(directory, stream, 'gpt2', source, num_tokens=num_tokens)


def parse(doc, argv=None):
    parser = Parser(doc)
    parser.add_argument('--num_tokens', type=int,
                        help='stop after the document that reaches it (default: all)')
    parser.add_argument('--max_documents', type=int, help='stop after so many documents (default: all)')
    return parser.parse_args(argv)
