"""OpenWebText in GPT-2's BPE: 8 million web pages, 9 billion tokens, 18 GB when prepared whole.

    python data/openwebtext/prepare.py --num_tokens 100000000
"""
import os
import sys
from pathlib import Path

if __name__ == '__main__':    # run as a command: imports start at the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from configurator import run_script
from data.hub import parse, prepare_hub


def prepare(directory=None, num_tokens=None, max_documents=None):
    """Writes the data set into `directory` (default: this folder) and returns its meta."""
    directory = directory or os.path.dirname(os.path.abspath(__file__))
    return prepare_hub(directory, 'Skylion007/openwebtext', None, num_tokens, max_documents)


def main(args):
    prepare(None, args.num_tokens, args.max_documents)


if __name__ == '__main__':
    run_script(main, parse(__doc__))
