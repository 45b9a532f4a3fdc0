"""The small closed world that every embedded task speaks of, and the one rule by which parts of it are held out.

Few words, so that a model of a million parameters knows each as one token; open values (times, numbers, texts) are made
of digits and words. What is 'eval' here is in no training text of the task that asks, the embedded model's pretraining
included.
"""
import hashlib

NAMES = ['Tom', 'Mia', 'Ben', 'Zoe', 'Leo', 'Ann', 'Max', 'Eva', 'Sam', 'Ida', 'Tim', 'Amy', 'Jon', 'Lea', 'Ali', 'Kim',
         'Rob', 'Nina', 'Paul', 'Lisa']
CITIES = ['Oslo', 'Rome', 'Paris', 'Lima', 'Cairo', 'Delhi', 'Tokyo', 'Bern', 'Riga', 'Seoul', 'Dakar', 'Milan']
JOBS = ['baker', 'doctor', 'teacher', 'driver', 'farmer', 'painter', 'pilot', 'singer']
PETS = ['cat', 'dog', 'bird', 'fish', 'horse', 'mouse', 'rabbit', 'goat']
FOODS = ['bread', 'soup', 'rice', 'cake', 'cheese', 'pasta', 'salad', 'honey', 'milk', 'corn']
COLOURS = ['red', 'blue', 'green', 'yellow', 'black', 'white', 'brown', 'pink']
ITEMS = ['apples', 'books', 'eggs', 'pens', 'cups', 'coins', 'stones', 'shells', 'balls', 'cards']
ROOMS = ['kitchen', 'bedroom', 'garage', 'garden', 'office', 'bathroom', 'hall', 'attic']
DAYS = ['Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday', 'Sunday']
APPS = ['Maps', 'Camera', 'Notes', 'Mail', 'Clock', 'Photos', 'Radio', 'Chess']
LANGUAGES = ['French', 'German', 'Spanish', 'Polish', 'Greek', 'Hindi']
THINGS = ['house', 'river', 'bridge', 'tree', 'star', 'moon', 'sun', 'rain', 'snow', 'window']
PLACES = ['station', 'airport', 'museum', 'library', 'market', 'hospital', 'school', 'beach']
EVENTS = ['lunch', 'meeting', 'dinner', 'party', 'lesson', 'exam', 'trip', 'concert']


def split_of(key, share=0.1):
    """'eval' for about `share` of all keys (strings), 'train' for the rest; always the same for the same key."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return 'eval' if int.from_bytes(digest, 'big') < share * 2 ** 64 else 'train'


def part(values, split, share=0.2):
    """The values of a short list that belong to `split`: a fifth, at least one, is held out, picked by hash."""
    ranked = sorted(values, key=lambda value: hashlib.blake2b(str(value).encode(), digest_size=8).digest())
    held_out = ranked[:max(1, round(share * len(values)))]
    return [value for value in values if (value in held_out) == (split == 'eval')]
