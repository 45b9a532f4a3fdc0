"""More training rows: copies whose questions have other words, synonyms and typing mistakes.

    augment(records, seed, factor=2.0, synonyms=0.15, typos=0.05, wordings=0.5, print0=print) -> records

Only what the user said last is changed, and in it no word that the answer contains, no number, name,
quotation or code, and none of the words that turn a meaning round (not, before, all): the answer of a row
stays the right one. No network, no model: the words are below. What happens to a row depends on the seed and
its index alone.
"""
import dataclasses
import json
import random
import re
from collections import Counter

from configurator import UserError

# Words for one another, in the forms that are exchanged.
SYNONYMS = '''
    show/display shows/displays big/large bigger/larger small/little quick/fast quickly/rapidly begin/start
    begins/starts buy/purchase buys/purchases choose/select/pick create/make explain/describe repair/fix
    often/frequently maybe/perhaps about/regarding important/essential difference/distinction problem/issue
    problems/issues method/approach methods/approaches main/primary common/usual commonly/usually movie/film
    company/firm improve/enhance prevent/avoid allow/permit allows/permits need/require needs/requires
    together/altogether also/additionally several/various sure/certain finds/discovers gives/hands obtain/get
    ensure/guarantee benefits/advantages typical/usual kind/sort kinds/sorts build/construct functions/works
'''.split()
OTHERS = {}             # word: its synonyms; a word of several groups has those of the first
for group in SYNONYMS:
    words = group.split('/')
    for word in words:
        OTHERS.setdefault(word, [other for other in words if other != word])
SHORTER = {
    'What is': "What's",
    'Where is': "Where's",
    'Who is': "Who's",
    'do not': "don't",
    'cannot': "can't",
    'I am': "I'm",
    'I would': "I'd",
    'does not': "doesn't",
    'is not': "isn't",
    'you are': "you're",
}
WRAPPED = [
    'I have a question. {}',
    'A question: {}',
    'Tell me this, please. {}',
    'Hello! {}',
    'Please help me. {}',
    '{} Please tell me.',
    '{} I would like to know.',
    '{} Thank you.',
]
MEANING = frozenset('''
    not no nor never none nothing without except only all any every some few many more most less least before
    after above below over under between up down left right in out on off and or but if unless than first last
'''.split())
KEYS = ('qwertyuiop', 'asdfghjkl', 'zxcvbnm')
# never changed: code, quotations, addresses, words with a digit or a sign in them
FIXED = re.compile(r'```.*?```|`[^`]*`|"[^"]*"|“[^”]*”|https?://\S+|'
                   r'\S*[\d_/\\@=<>{}\[\]]\S*', re.DOTALL)


def augment(records, seed, factor=2.0, synonyms=0.15, typos=0.05, wordings=0.5, print0=print):
    """`records` (of data/formats.py) and after them copies of the training ones with a reworded last
    question.

    factor    rows for training afterwards to those before: 2 = a copy of each, 1.5 = of about every other row
    synonyms  probability that a word which has a synonym here is replaced
    typos     probability that a word of four small letters or more gets a typing mistake
    wordings  probability that the whole question is put in another way
    print0    is given one line that counts what was done

    Rows held out pass through as they are, and a copy whose question another row asks already is left out.
    UserError: settings without meaning.
    """
    if not 1 <= factor <= 100:
        raise UserError(f'augmentation factor {factor}: 1 (no copies) to '
                        '100 (rows afterwards to rows before)')
    for name, value in (('synonyms', synonyms), ('typos', typos), ('wordings', wordings)):
        if not 0 <= value <= 1:
            raise UserError(f'augmentation, {name}={value}: a probability from 0 to 1')
    asked = {key_of(record) for record in records}
    training = [record for record in records if record.split == 'train']
    copies, counts = [], Counter()
    whole = int(factor)
    for i, record in enumerate(training):
        for copy in range(whole):
            draw = random.Random(f'augment/{seed}/{i}/{copy}')
            is_last = copy + 1 == whole
            if is_last and draw.random() >= factor - whole:     # made with the probability of the fraction
                continue
            changed, made = reworded(record, draw, synonyms, typos, wordings)
            if key_of(changed) in asked:
                counts['left out'] += 1
                continue
            asked.add(key_of(changed))
            copies.append(changed)
            counts.update(made)
    done = ', '.join(f'{counts[name]} {name}' for name in ('wordings', 'synonyms', 'typos'))
    print0(f'augmentation: {len(training):,} training rows and {len(copies):,} copies of them ({done}); '
        f'{counts["left out"]:,} copies left out, as nothing in them could change or the question is there '
        f'already; {len(records) - len(training):,} held-out rows as they were')
    return [*records, *copies]


def key_of(record):
    return json.dumps([record.prompt, record.tools], sort_keys=True)


def reworded(record, draw, synonyms, typos, wordings):
    """(a copy of the record with another question, Counter of changes).

    A text to be completed gets no other wording, as its end is where the answer begins; rows without a
    question stay as they are.
    """
    answer = json.dumps(record.completion, ensure_ascii=False)
    kept = {word.lower() for word in re.findall(r'[^\W_]+', answer)}
    where = f'{record.where} (augmented)'
    if isinstance(record.prompt, str):
        text, made = change(record.prompt, kept, draw, synonyms, typos, 0.0)
        return dataclasses.replace(record, prompt=text, where=where), made
    questions = [i for i, message in enumerate(record.prompt) if message['role'] == 'user']
    if not questions:
        return record, Counter()
    prompt, last = list(record.prompt), questions[-1]
    text, made = change(prompt[last]['content'], kept, draw, synonyms, typos, wordings)
    prompt[last] = {**prompt[last], 'content': text}
    return dataclasses.replace(record, prompt=prompt, where=where), made


def change(text, kept, draw, synonyms, typos, wordings):
    """(`text` in other words, Counter of changes); words of `kept` (small letters) stay."""
    made = Counter()

    def change_word(match):
        return other_word(match[0], kept, draw, synonyms, typos, made)

    pieces, end = [], 0
    for fixed in FIXED.finditer(text):
        pieces.append(re.sub(r"[A-Za-z']+", change_word, text[end:fixed.start()]))
        pieces.append(fixed[0])
        end = fixed.end()
    pieces.append(re.sub(r"[A-Za-z']+", change_word, text[end:]))
    text = ''.join(pieces)
    if text.strip() and draw.random() < wordings:
        text = other_wording(text, draw)
        made['wordings'] += 1
    return text, made


def other_word(word, kept, draw, synonyms, typos, made):
    """A word, a synonym of it, or itself mistyped; `made` counts which."""
    lower = word.lower()
    if lower in kept or lower in MEANING:
        return word
    others = [other for other in OTHERS.get(lower, ()) if other not in kept]
    if others and draw.random() < synonyms:
        made['synonyms'] += 1
        other = draw.choice(others)
        return other.capitalize() if word[0].isupper() else other
    if len(word) > 3 and word.isalpha() and word.islower() and draw.random() < typos:
        made['typos'] += 1
        return mistyped(word, draw)
    return word


def mistyped(word, draw):
    """A word with two letters swapped, one left out, doubled or hit beside its key, never the first."""
    i = draw.randrange(1, len(word) - 1)
    before, letter, after = word[:i], word[i], word[i + 1:]
    row = next(keys for keys in KEYS if letter in keys)
    neighbour = row[row.index(letter) - 1] if letter != row[0] else row[1]
    return before + draw.choice([
        after[0] + letter + after[1:],
        after,
        letter + letter + after,
        neighbour + after,
    ])


def other_wording(text, draw):
    """The question in another way: in a short form, with words around it, or carelessly written."""
    long_forms = [long for long in SHORTER if re.search(rf'\b{long}\b', text)]
    way = draw.choice(['short', 'wrapped', 'wrapped', 'careless'])
    if way == 'short' and long_forms:
        long = draw.choice(long_forms)
        return re.sub(rf'\b{long}\b', SHORTER[long], text)
    careless = text.rstrip()
    if way == 'careless' and careless.endswith(('?', '.', '!')) and len(careless.split()) > 2:
        return careless[:-1].rstrip()
    return draw.choice(WRAPPED).format(text.strip())
