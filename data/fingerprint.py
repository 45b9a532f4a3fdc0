"""A mark by which a run that is resumed sees whether its data are still what they were."""
import hashlib
import os

from data.formats import files_of

BLOCK, BLOCKS = 1 << 18, 256        # up to 64 MiB are read whole, of more so many blocks, spread evenly


def fingerprints(data):
    """{name: fingerprint of its files} of Corpus objects, paths of files, and Sources that are files or
    directories: embedded and hub data sets have none."""
    marks = {}
    for item in data:
        name = getattr(item, 'name', item)
        if hasattr(item, 'files'):
            marks[name] = fingerprint(item.files())
        elif os.path.isfile(name):
            marks[name] = fingerprint([name])
        elif os.path.isdir(name):
            marks[name] = fingerprint(files_of(name, item.split))
    return marks


def fingerprint(paths):
    """Sixteen bytes in hexadecimal: a hash of the files' sizes and of what stands in them."""
    sizes = [os.path.getsize(path) for path in paths]
    digest = hashlib.blake2b(repr(sizes).encode(), digest_size=16)
    distance = max(BLOCK, sum(sizes) // BLOCKS)     # from one block to the next
    for path, size in zip(paths, sizes):
        with open(path, 'rb') as file:
            for place in (*range(0, size, distance), max(0, size - BLOCK)):
                file.seek(place)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
