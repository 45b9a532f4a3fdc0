"""Tiny Shakespeare in GPT-2's BPE: the text of data/shakespeare_char, cut at the same character.

    python data/shakespeare/prepare.py
"""
import os
import sys
from pathlib import Path

if __name__ == '__main__':    # run as a command: imports start at the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from configurator import run_script
from data.shakespeare_char import prepare as characters


def prepare(directory=None):
    """Writes the data set into `directory` (default: this folder) and returns its meta."""
    return characters.prepare(directory or os.path.dirname(os.path.abspath(__file__)), tokenizer='gpt2')


def main(_):
    prepare()


if __name__ == '__main__':
    run_script(main, None)
