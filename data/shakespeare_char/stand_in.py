"""A stand-in for Shakespeare where the real text cannot be had: plays by a small grammar, always the same.

    python data/shakespeare_char/stand_in.py | head -50

Nobody's words: the lists and rules below are nanoforge's own. What makes it worth learning: speakers who come
in turn, nouns that stay with a scene, verbs that agree with their subjects (I walk, thou walkest, he walks),
common and rare words, questions with answers, verse cut at ten syllables and prose cut at the margin.
"""
import random
import re
import textwrap

NAMES = '''Aldren Maren Corvin Ysolde Tobren Hesper Dunstan Lirael Osric Wenna Garrow Perrin Sabine Rook
Thessaly Bram Edony Faulk Imogene Jory Kestrel Lowen Merrick Nessa Orrin Quill Rosamund Selwyn Tamsin Ulric
Verity Wystan'''.split()
TITLES = 'King Queen Duke Lady Lord Captain Friar Mistress Old Young Sir Master'.split()
CROWD = '''First Watchman|Second Watchman|First Sailor|Second Sailor|Messenger|Nurse|Gravedigger|
Innkeeper|Shepherd|Miller|First Gentleman|Second Gentleman|Page|Boatman|Chorus|Beggar|Physician|
Steward'''.replace('\n', '').split('|')
PERSONS = '''king queen father mother brother sister lord lady soldier traitor friend servant master prince
child son daughter captain priest fool neighbour lover widow thief stranger sailor cousin judge poet
shepherd maid knight beggar merchant watchman uncle gaoler herald miller pilgrim hunter weaver orphan enemy
guest husband wife tyrant scholar piper'''.split()
THINGS = '''heart hand sword crown letter ring tongue eye night day sea ship horse house door cup candle
rose field storm star moon sun wind river stone tree flower bed grave throne wall garden tower bell lamp key
coat glove blade shield banner book song dream word oath name promise secret wound kiss tear shadow fire
winter summer spring harvest road bridge forest mountain cloud candlestick chamber window feather bird wolf
lion hound lamb raven serpent bee ghost drum trumpet purse coin jewel mirror veil cradle anchor sail oar net
plough scythe loaf apple orchard hill meadow castle city market church island island shore tide lantern
torch mask cloak saddle spur bow arrow spear helmet chain rope ladder kettle pipe fiddle'''.split()
FEELINGS = '''love grief honour fortune sorrow joy mercy justice death time fear hope pride wrath patience
virtue envy beauty sleep silence truth shame courage youth age faith folly wisdom peace war pity hunger
plague treason memory duty'''.split()
QUALITIES = '''sweet gentle cruel noble bitter false true fair dark cold proud poor old young bright heavy
silent golden pale merry honest foolish wise strange bloody holy weary humble hollow bold faithful sudden
secret broken lonely mighty patient idle hungry ancient silver tender savage wretched worthy crooked quiet
wild careless careful grey narrow deep drowsy stubborn eager frozen gallant grievous heedless kindly lawful
nimble painted rotten royal shallow sharp subtle thankless unhappy vain wanton windy withered'''.split()
DEEDS = '''love:loved fear:feared see:saw hear:heard keep:kept bring:brought hold:held break:broke give:gave
take:took serve:served leave:left know:knew find:found call:called curse:cursed bless:blessed
follow:followed praise:praised hate:hated mourn:mourned honour:honoured betray:betrayed forgive:forgave
remember:remembered forget:forgot steal:stole sell:sold buy:bought bury:buried carry:carried seek:sought
trust:trusted mock:mocked kill:killed save:saved strike:struck bear:bore wear:wore touch:touched
guard:guarded hide:hid burn:burned lose:lost win:won beg:begged command:commanded despise:despised
teach:taught wake:woke question:questioned pardon:pardoned banish:banished crown:crowned deceive:deceived
defend:defended envy:envied paint:painted shame:shamed weigh:weighed welcome:welcomed wound:wounded'''.split()
MOTIONS = '''come:came go:went sleep:slept weep:wept die:died live:lived fall:fell rise:rose speak:spoke
wait:waited stand:stood laugh:laughed tremble:trembled ride:rode sing:sang walk:walked burn:burned
wander:wandered kneel:knelt fade:faded rest:rested sail:sailed dance:danced sigh:sighed starve:starved
return:returned vanish:vanished watch:watched linger:lingered'''.split()
THOUGHTS = '''think:thought say:said swear:swore know:knew believe:believed fear:feared hope:hoped
dream:dreamed confess:confessed hear:heard'''.split()
PLACES = '''in the garden|by the river|at the gate|upon the hill|beneath the moon|beside the fire|
in the dark|before the throne|within these walls|beyond the sea|under the old oak|on the cold stones|
near the church|along the shore|at the market|from the tower|across the field|through the storm|
in my chamber|about the town'''.replace('\n', '').split('|')
TIMES = '''to-night|before the dawn|at noon|this morning|ere the bell rings|when winter comes|
all the day|once more|too soon|long ago|for ever|by candle-light|till the spring|
at last|in time'''.replace('\n', '').split('|')
MANNERS = '''gently proudly softly bravely slowly swiftly sadly gladly bitterly truly falsely freely humbly
wisely boldly coldly sweetly vainly quietly'''.split()
CRIES = ('O|Alas|Nay|Ay|Come|Hark|Fie|Well|Peace|Why|Good now|Indeed|Marry|Heaven help us|By my faith|'
         'Alack').split('|')
BE = {'I': 'am', 'thou': 'art', 'he': 'is', 'we': 'are'}        # by person; 'we' stands for every plural
HAVE = {'I': 'have', 'thou': 'hast', 'he': 'hath', 'we': 'have'}
DO = {'I': 'do', 'thou': 'dost', 'he': 'doth', 'we': 'do'}
MODALS = [{'I': base, 'thou': thou, 'he': base, 'we': base} for base, thou in
          (('will', 'wilt'), ('shall', 'shalt'), ('can', 'canst'), ('must', 'must'), ('may', 'mayst'))]
PRONOUNS = [*2 * [('I', 'I'), ('thou', 'thou')], ('he', 'he'), ('she', 'he'), ('we', 'we'), ('they', 'we')]
OBJECTS = 'him her them it'.split()
OWNERS = 'my thy his her our their'.split()


class Playwright:
    """Writes from its own stream of random numbers; `theme`: the nouns that a scene keeps coming back to."""

    def __init__(self, seed):
        self.random = random.Random(seed).random    # the one method that is the same in every Python
        self.theme = []

    def chance(self, probability):
        return self.random() < probability

    def pick(self, words):
        """The first words of a list are the common ones."""
        return words[int(len(words) * self.random() ** 1.8)]

    def even(self, words):
        return words[int(len(words) * self.random())]

    def noun(self):
        if self.theme and self.chance(0.4):
            return self.even(self.theme)
        return self.pick(THINGS if self.chance(0.6) else PERSONS)

    def phrase(self, depth=0):
        """(noun phrase, its person)."""
        kind = self.random()
        quality = self.pick(QUALITIES) + ' ' if self.chance(0.35) else ''
        if kind < 0.15:
            return quality + self.pick(FEELINGS), 'he'
        if kind < 0.35:
            noun = quality + plural(self.noun())
            return f'{self.even(["the", "these", "those", "all", "two", *OWNERS])} {noun}', 'we'
        if kind < 0.45:
            return f'the {quality}{self.noun()} of {self.pick(FEELINGS)}', 'he'
        if kind < 0.55 and not depth:
            person = self.pick(PERSONS)
            return f'the {quality}{person} who {self.act("he", 1)}', 'he'
        owner = self.even(['the', 'the', 'a', 'this', 'that', 'every', *OWNERS])
        noun = quality + self.noun()
        return f'{"an" if owner == "a" and noun[0] in "aeiou" else owner} {noun}', 'he'

    def subject(self):
        return self.even(PRONOUNS) if self.chance(0.6) else self.phrase()

    def thing(self, depth=0):
        return self.even(OBJECTS) if self.chance(0.2) else self.phrase(depth)[0]

    def deed(self):
        """(base, past, what follows)."""
        if self.chance(0.65):
            return *self.pick(DEEDS).split(':'), ' ' + self.thing(1)
        return *self.pick(MOTIONS).split(':'), ' ' + self.even(PLACES) if self.chance(0.6) else ''

    def act(self, person, depth=0):
        """A predicate that agrees with its subject's person."""
        kind = self.random()
        base, past, rest = self.deed()
        manner = self.pick(MANNERS) + ' ' if self.chance(0.1) else ''
        if kind < 0.3:
            return manner + present(base, person) + rest
        if kind < 0.45:
            return manner + past + rest if person != 'thou' else f'didst {manner}{base}{rest}'
        if kind < 0.65:
            return f'{self.even(MODALS)[person]}{self.even(["", "", " not", " never"])} {manner}{base}{rest}'
        if kind < 0.75:
            return f'{DO[person]} {self.even(["not", "but", "still"])} {base}{rest}'
        if kind < 0.93 or depth:
            quality = f'{self.even(["", "", "so ", "too ", "not ", "most "])}{self.pick(QUALITIES)}'
            return f'{BE[person]} {quality}{" as " + self.thing(1) if self.chance(0.25) else ""}'
        base, past = self.pick(THOUGHTS).split(':')
        return f'{present(base, person)} that {self.clause(1)}'

    def clause(self, depth=0):
        subject, person = self.subject()
        time = ' ' + self.even(TIMES) if not depth and self.chance(0.15) else ''
        return f'{subject} {self.act(person, depth)}{time}'

    def question(self):
        subject, person = self.subject()
        base, _, rest = self.deed()
        return self.even([
            lambda: f'{self.even(["why", "how", "when", "where"])} {DO[person]} {subject} {base}{rest}',
            lambda: f'{BE[person]} {subject} {self.pick(QUALITIES)}',
            lambda: f'what {self.noun()} is this',
            lambda: f'who {HAVE["he"]} seen {self.thing()}',
            lambda: f'{self.even(MODALS)[person]} {subject} {base}{rest}',
            lambda: f'where is {self.phrase(1)[0]}'])() + '?'

    def command(self):
        base, _, rest = self.deed()
        return f'{self.even(["", "", "let us ", "go, ", "pray you, ", "do not "])}{base}{rest}'

    def sentence(self, other):
        """One sentence, spoken to `other`."""
        kind = self.random()
        if kind < 0.18:
            text = self.question()
        elif kind < 0.32:
            text = self.command() + self.even(['!', '.', '.'])
        elif kind < 0.42:
            conjunction = self.even(['if', 'when', 'though', 'since', 'while'])
            text = f'{conjunction} {self.clause(1)}, {self.clause()}.'
        elif kind < 0.6:
            first = self.clause()
            joint = self.even([', and ', ', but ', '; ', ': ', ', for ', ', yet '])
            text = f'{first}{joint}{self.clause(1)}.'
        elif kind < 0.65:
            text = f'O {self.pick(QUALITIES)} {self.noun()}, O {self.pick(QUALITIES)} {self.noun()}!'
        else:
            text = self.clause() + self.even(['.', '.', '.', '!'])
        if self.chance(0.12):
            text = f'{self.even(CRIES)}, {text}'
        if self.chance(0.1):
            name = self.even(['my lord', 'my lady', 'sir', 'good ' + other, other])
            text = f'{text[:-1]}, {name}{text[-1]}'
        return text[0].upper() + text[1:]

    def answer(self, other):
        return self.even([
            lambda: f'Ay, {self.clause()}.',
            lambda: f'No, {other}, {self.clause()}.',
            lambda: f'I know not, {other}.',
            lambda: f'{self.phrase()[0]}, my lord.'.capitalize(), lambda: f'Ask {self.thing()}, not me.',
            lambda: f'Because {self.clause()}.'])()

    def speech(self, other, asked, prose):
        sentences = [self.answer(other)] if asked else []
        sentences += [self.sentence(other) for _ in range(1 + int(5 * self.random() ** 2))]
        text = ' '.join(sentences)
        lines = textwrap.wrap(text, 68) if prose else verse(text)
        return '\n'.join(lines), text.endswith('?')

    def scene(self, number):
        self.theme = [self.even(THINGS) for _ in range(3)] + [self.even(PERSONS)]
        cast = []
        while len(cast) < 2 + int(3 * self.random()):
            name = self.even(NAMES)
            if self.chance(0.4):
                name = f'{self.even(TITLES)} {name}'
            speaker = self.even(CROWD) if self.chance(0.3) else name
            if speaker not in cast:
                cast.append(speaker)
        place = self.even(PLACES).capitalize()
        yield f'SCENE {number}. {place}.\nEnter {", ".join(cast[:-1])} and {cast[-1]}.'
        asked, speaker = False, cast[0]
        for _ in range(8 + int(20 * self.random())):
            other, speaker = speaker, self.even([name for name in cast if name != speaker])
            text, asked = self.speech(other, asked, prose=speaker in CROWD)
            yield f'{speaker}:\n{text}'
        yield self.even(['Exeunt.', f'Exit {speaker}.', 'They go out.', 'A bell rings.'])


def plural(noun):
    irregular = {'child': 'children', 'wife': 'wives', 'thief': 'thieves', 'wolf': 'wolves', 'loaf': 'loaves',
                 'watchman': 'watchmen'}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith('y') and noun[-2] not in 'aeiou':
        return noun[:-1] + 'ies'
    return noun + ('es' if noun.endswith(('s', 'sh', 'ch', 'x')) else 's')


def present(verb, person):
    if person == 'thou':
        return re.sub('[^aeiou]y$', lambda end: end[0][0] + 'i', verb).removesuffix('e') + 'est'
    if person != 'he':
        return verb
    return verb + 'es' if verb == 'go' else plural(verb)


def verse(text):
    """Lines of about ten syllables, each beginning with a capital."""
    lines, line, count = [], [], 0
    for word in text.split():
        line.append(word)
        count += max(1, len(re.findall('[aeiouy]+', word.lower())) - word.lower().endswith('e'))
        if count >= 10:
            lines.append(' '.join(line))
            line, count = [], 0
    lines += [' '.join(line)] if line else []
    return [line[0].upper() + line[1:] for line in lines]


def play(length=1_115_394, seed=1):
    """The first `length` characters of the play without end that `seed` writes."""
    writer, parts, size, number = Playwright(seed), [], 0, 0
    while size < length:
        number += 1
        for part in writer.scene(number):
            parts.append(part)
            size += len(part) + 2
    return '\n\n'.join(parts)[:length - 1] + '\n'


def rows(split, n, seed):
    """n scenes {'text', 'metadata'} of a split ('train', 'eval'), each of plays of its own."""
    writer = Playwright(f'{split}/{seed}')
    scenes = ['\n\n'.join(writer.scene(number)) + '\n' for number in range(1, n + 1)]
    return [{'text': scene, 'metadata': split} for scene in scenes]


if __name__ == '__main__':
    print(play(), end='')
