"""The words that all embedded tasks use, and the one rule that decides which of them are held out.

There are few words, so that a model of a million parameters has each as one token; open values (times,
numbers, texts) are made of digits and words. What belongs to 'eval' occurs in no training text of its task,
nor in what the embedded model was pretrained on.
"""
import hashlib

NAMES = 'Tom Mia Ben Zoe Leo Ann Max Eva Sam Ida Tim Amy Jon Lea Ali Kim Rob Nina Paul Lisa'.split()
CITIES = 'Oslo Rome Paris Lima Cairo Delhi Tokyo Bern Riga Seoul Dakar Milan'.split()
JOBS = 'baker doctor teacher driver farmer painter pilot singer'.split()
PETS = 'cat dog bird fish horse mouse rabbit goat'.split()
FOODS = 'bread soup rice cake cheese pasta salad honey milk corn'.split()
COLOURS = 'red blue green yellow black white brown pink'.split()
ITEMS = 'apples books eggs pens cups coins stones shells balls cards'.split()
ROOMS = 'kitchen bedroom garage garden office bathroom hall attic'.split()
DAYS = 'Monday Tuesday Wednesday Thursday Friday Saturday Sunday'.split()
APPS = 'Maps Camera Notes Mail Clock Photos Radio Chess'.split()
LANGUAGES = 'French German Spanish Polish Greek Hindi'.split()
THINGS = 'house river bridge tree star moon sun rain snow window'.split()
PLACES = 'station airport museum library market hospital school beach'.split()
EVENTS = 'lunch meeting dinner party lesson exam trip concert'.split()


def lines(text):
    """The lines of a text without the spaces around them: a list of wordings, as it is written here."""
    return [line.strip() for line in text.strip().splitlines()]


def hash_of(text):
    """64 bits that are always the same for the same text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big')


def split_of(key, share=0.1):
    """'eval' for about `share` of all keys (strings), 'train' for the rest, by a hash of the key."""
    return 'eval' if hash_of(key) < share * 2 ** 64 else 'train'


def part(values, split, share=0.2):
    """The values of a short list that belong to `split`: a fifth, at least one, is held out, by hash."""
    num_held_out = max(1, round(share * len(values)))
    by_hash = sorted(values, key=lambda value: hash_of(str(value)))
    held_out = by_hash[:num_held_out]
    return [value for value in values if (value in held_out) == (split == 'eval')]
