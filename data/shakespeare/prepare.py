"""Tiny Shakespeare in GPT-2's BPE: the text of data/shakespeare_char, cut at the same character.

    python data/shakespeare/prepare.py
"""
import os
import sys

if __name__ == '__main__':    # run as a command: imports start at the root of the repository
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from configurator import run_script
from data.shakespeare_char import prepare as characters


def prepare(directory=None):
    """Writes the data set into `directory` (default: this folder) and returns its meta."""
    return characters.prepare(directory or os.path.dirname(os.path.abspath(__file__)), tokenizer='gpt2')


if __name__ == '__main__':
    run_script(lambda _: prepare(), None)
