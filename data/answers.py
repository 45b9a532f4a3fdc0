"""Answers as texts: which one a completion gives, which number it is, whether two are the same.

    extract_answer('so <answer> 3 </answer>')       # '3'
    as_number('\\frac12')                           # Fraction(1, 2)
    same_answer('\\{1, 0.5\\}', '\\{\\frac12,1\\}')    # True
"""
import itertools
import re
from fractions import Fraction

# what may be written otherwise, and how it is written here
SAME_SIGN = (
    ('\u2212', '-'), ('\u2013', '-'), ('\u00a0', ' '), ('\u221e', '\\infty'), ('\\$', '$'), ('\\%', '%'),
    ('{,}', ','), ('\\!', ''), ('\\lbrace', '\\{'), ('\\rbrace', '\\}'),
    ('^{\\circ}', '°'), ('^\\circ', '°'), ('\\degree', '°'))
TEXT = r'\\(?:text(?:rm|bf|it)?|math(?:rm|bf)|mbox)'
CURRENCIES = '$€£¥'
# units of measurement, the names of one in a line; a plural s may follow
UNIT_NAMES = '''
    millimeter mm millimetre
    centimeter cm centimetre
    meter m metre
    kilometer km kilometre
    inch in inches
    foot ft feet
    yard yd
    mile mi
    milligram mg
    gram g
    kilogram kg
    pound lb £
    ounce oz
    ton tonne
    milliliter ml millilitre
    liter l litre
    gallon
    second s sec
    minute min
    hour h hr
    day
    week
    month
    year
    dollar $
    cent
    euro €
    yen ¥
    percent %
    degree °
    radian rad
'''
UNITS = {name: names.split()[0] for names in UNIT_NAMES.strip().splitlines() for name in names.split()}
UNITS['unit'] = ''                  # says no more than none
# a value and its unit, marked as text or, with two letters or more (5m is rather a product), bare; its power
UNIT = re.compile(rf'(.+?) ?(?:{TEXT}\{{([^{{}}]+)\}}|(?<=[\d}} ])([a-zA-Z][a-zA-Z/ ]*[a-zA-Z]))'
                  r'(?:\^\{?([23])\}?)?')
MAX_DEPTH = 20                      # of brackets in each other that an answer is taken apart by


def extract_answer(text):
    """The answer that a text gives: the last <answer>...</answer>, in it or else in the whole text the last
    \\boxed{...}, else what follows the last ####; without any of these all of it."""
    answers = re.findall(r'<answer>((?:(?!<answer>).)*?)</answer>', text, re.DOTALL)
    if answers:
        text = answers[-1]
    _, boxed, inside = text.rpartition('\\boxed{')
    if boxed:
        depth = 1
        for end, character in enumerate(inside):
            depth += {'{': 1, '}': -1}.get(character, 0)
            if depth == 0:
                return inside[:end].strip()
    return text.rpartition('####')[2].strip()


def as_number(text):
    """The number that a text writes, exactly (a Fraction), or None.

    It may have a sign, thousands' commas, decimals, an exponent, be a/b, \\frac{a}{b} or mixed (1 1/2), with
    or without currency, degrees, percent sign (left out, not divided by), full stop, $ and LaTeX spaces.
    """
    return number_in(unwrapped(tidy(text)))


def number_in(text):
    """as_number of a text that is tidy."""
    if len(text) > 100:
        return None
    text = re.sub(rf'^([+-]?)[{CURRENCIES}]|[{CURRENCIES}%°]$', r'\1', text).strip()
    text = re.sub(r'^([+-]?)\\frac\{ ?([^{}]+?) ?\}\{ ?([^{}]+?) ?\}$', r'\1\2/\3', text)
    text = re.sub(r'^([+-]?[\d,]+) ?\\frac\{ ?(\d+) ?\}\{ ?(\d+) ?\}$', r'\1 \2/\3', text)
    digits = r'(?:\d{1,3}(?:,\d{3})+|\d+)'
    mixed = re.fullmatch(rf'([+-]?)({digits}) ({digits})/({digits})', text)
    if mixed:
        part = fraction(mixed[3], mixed[4])
        if part is None or part >= 1:           # 2 3/2 may be meant as a product
            return None
        value = integer(mixed[2]) + part
        return -value if mixed[1] == '-' else value
    ratio = re.fullmatch(rf'([+-]?{digits}) ?/ ?([+-]?{digits})', text)
    if ratio:
        return fraction(ratio[1], ratio[2])
    if re.fullmatch(rf'[+-]?(?:{digits}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{{1,2}})?', text):
        return Fraction(text.replace(',', ''))
    return None


def integer(text):
    return int(text.replace(',', ''))


def fraction(a, b):
    """a/b of two texts of integers, None where b is 0."""
    return Fraction(integer(a), integer(b)) if integer(b) else None


def tidy(text):
    """An answer without what does not change it: LaTeX's spaces, delimiters and sizes, typographic signs, a
    final full stop. \\frac12 and \\sqrt2 become \\frac{1}{2} and \\sqrt{2}."""
    for sign, plain in SAME_SIGN:
        text = text.replace(sign, plain)
    text = re.sub(r'\\[,;: ]|\\q?quad(?![a-zA-Z])', ' ', text).strip().removesuffix('.').strip()
    for opening, closing in (('\\(', '\\)'), ('\\[', '\\]'), ('$', '$')):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            text = text[len(opening):-len(closing)].strip()
    text = re.sub(r'\\(?:left|right|displaystyle)(?![a-zA-Z])', '', text)
    text = re.sub(r'\\[dtc]frac(?![a-zA-Z])', r'\\frac', text)
    # TeX takes one character where no brace begins: \frac123 is \frac{1}{2}3
    text = re.sub(r'\\(frac|sqrt)(?: ?(\d)| ([a-zA-Z]))', r'\\\1{\2\3}', text)
    text = re.sub(r'\\frac(\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w)', r'\\frac\1{\2}', text)
    return re.sub(r'\s+', ' ', text).strip().removesuffix('.').strip()


def unwrapped(text):
    """What stands in \\text{...} and its like without them."""
    return re.sub(rf'{TEXT}\{{([^{{}}]*)\}}', r'\1', text).strip()


def same_answer(given, wanted):
    """Whether two answers are the same.

    Numbers are compared by value; tuples, intervals and lists entry by entry, sets in any order; all else as
    text, but for case and spaces. One side may leave out a unit, but not have another one.
    """
    given, wanted = tidy(given), tidy(wanted)
    return '' not in (given, wanted) and same(given, wanted)


def same(a, b):
    """same_answer of texts that are tidy."""
    brackets, parts = entries(a)
    other_brackets, others = entries(b)
    if brackets != other_brackets or len(parts) != len(others):
        return False
    if brackets == '{}':
        for part in parts:
            match = next((other for other in others if same(part, other)), None)
            if match is None:
                return False
            others.remove(match)
        return True
    if brackets or len(parts) > 1:
        return all(map(same, parts, others))
    (a, unit), (b, other_unit) = quantity(a), quantity(b)
    if unit and other_unit and unit != other_unit:
        return False
    x, y = number_in(a), number_in(b)
    if x is not None or y is not None:
        return x == y
    return without_spaces(a) == without_spaces(b)


def entries(text):
    """(its brackets or '', the entries between them) of a list, tuple, interval or set; a single value is one
    entry without brackets. A comma as in 1,234 divides nothing, unless no other kind is between brackets."""
    brackets, bare = '', text.replace('\\{', '{').replace('\\}', '}')
    depths = list(itertools.accumulate((c in '([{') - (c in ')]}') for c in bare))
    if depths[-1:] == [0] and 0 not in depths[:-1] and bare[0] in '([{' and max(depths) < MAX_DEPTH:
        brackets, bare = bare[0] + bare[-1], bare[1:-1]
    divides = r'(?<!\d),|,(?!\d{3}(?!\d))'      # no comma between digits and three digits
    if brackets and not re.search(r',\s', bare):
        divides = ','
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf'[(\[{{]|[)\]}}]|{divides}', bare):
        depth += (match[0] in '([{') - (match[0] in ')]}')
        if match[0] == ',' and depth == 0:
            parts.append(bare[start:match.start()].strip())
            start = match.end()
    return brackets, [*parts, bare[start:].strip()]


def quantity(text):
    """'5\\text{ cm}^2' -> ('5', 'centimeter 2'): a value, and its unit by its first name in UNIT_NAMES or ''.
    A sign stays in the value: '$5' -> ('$5', 'dollar')."""
    sign = re.match(rf'[+-]?([{CURRENCIES}])', text) or re.search(rf'([{CURRENCIES}%°])$', text)
    if sign:
        return unwrapped(text), UNITS[sign[1]]
    match = UNIT.fullmatch(text) if len(text) < 100 else None
    if match:
        value, marked, bare, power = match.groups(default='')
        unit = (marked or bare).strip().lower()
        for prefix, meant in (('square ', '2'), ('sq ', '2'), ('cubic ', '3')):
            if unit.startswith(prefix):
                unit, power = unit.removeprefix(prefix), meant
        parts = re.split(r' ?/ ?| per ', unit)
        names = [UNITS.get(part, UNITS.get(part.removesuffix('s'))) for part in parts]
        if names == ['']:                           # units of nothing: the value alone
            return unwrapped(value), ''
        if None not in names:
            return unwrapped(value), f'{"/".join(names)} {power}'.strip()
    return unwrapped(text), ''


def without_spaces(text):
    """A text to be compared: in lower case, without the spaces beside signs."""
    return re.sub(r'(?<=\W) | (?=\W)', '', text.casefold()).removeprefix('+')
