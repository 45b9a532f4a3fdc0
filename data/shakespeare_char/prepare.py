"""Tiny Shakespeare, one id per character: the first 90% of the characters train, the rest validates.

    python data/shakespeare_char/prepare.py

The text is the first of: input.txt in this folder, a download checked by its hash, a stand-in that
stand_in.py writes.
"""
import hashlib
import os
import sys
import urllib.request
from pathlib import Path

if __name__ == '__main__':    # run as a command: imports start at the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from configurator import run_script
from data.prepare import prepare as write, prepare_files
from data.shakespeare_char.stand_in import play
from data.documents import split_at

HERE = os.path.dirname(os.path.abspath(__file__))
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SECONDS = 4    # to wait for the download
STAND_IN = 'stand-in text written by nanoforge, NOT Shakespeare'


def prepare(directory=None, tokenizer='char', text_directory=None):
    """Writes the data set into `directory` (default: this folder) and returns its meta.

    text_directory holds input.txt, or takes the download (default: this folder, for data/shakespeare too).
    """
    directory = directory or HERE
    path = os.path.join(text_directory or HERE, 'input.txt')
    if os.path.exists(path) or download(path):
        with open(path, 'rb') as file:
            known = hashlib.file_digest(file, 'sha256').hexdigest() == SHA256
        source = f'Tiny Shakespeare ({URL})'
        if not known:
            source = "the user's own input.txt, not the known Tiny Shakespeare"
        return prepare_files(directory, [path], tokenizer, source=source)
    print(f'WARNING: Shakespeare is not here: no {path}, and no download of\n'
          f'WARNING: {URL}.\n'
          'WARNING: The data set is made of a STAND-IN text that nanoforge writes itself: simpler than '
          'Shakespeare,\nWARNING: with lower losses, not to be compared with anyone\'s. For the real text, '
          'put input.txt there and\nWARNING: prepare again.', file=sys.stderr)
    text = play()
    border = int(len(text) * 0.9)

    def stream(label):
        return split_at([(True, text)], border)

    return write(directory, stream, tokenizer, STAND_IN, stand_in=True)


def download(path):
    """Whether the text was downloaded to `path`: complete and with the right hash, or not at all."""
    try:
        with urllib.request.urlopen(URL, timeout=SECONDS) as response:
            text = response.read(1 << 24)
    except OSError:    # no network, no such page, too slow
        return False
    if hashlib.sha256(text).hexdigest() != SHA256:
        print(f'WARNING: what {URL} sent has another hash than Tiny Shakespeare: not used', file=sys.stderr)
        return False
    temporary = f'{path}.{os.getpid()}'
    with open(temporary, 'wb') as file:
        file.write(text)
    os.replace(temporary, path)
    return True


def main(_):
    prepare()


if __name__ == '__main__':
    run_script(main, None)
