"""Scores of what a model wrote: pure functions of texts, tool calls and token ids, for evaluate.py.

A response is compared as text (exact match, F1, ROUGE, BLEU) and, where tools are called, as calls. Calls are
never compared as strings: neither the order of keys nor white space means anything.
"""
import functools
import importlib
import math
import re
import string
from collections import Counter, defaultdict

# score: (its name, its format); reports show them in this order
SCORES = {
    'accuracy': ('accuracy', '{:.1%}'),
    'reward': ('reward', '{:.3f}'),
    'exact_call': ('exact call', '{:.1%}'),
    'right_tool': ('right tool', '{:.1%}'),
    'right_arguments': ('right arguments', '{:.1%}'),
    'perplexity': ('perplexity', '{:,.4g}'),
    'token_accuracy': ('token accuracy', '{:.1%}'),
    'exact_match': ('exact match', '{:.1%}'),
    'f1': ('F1', '{:.1%}'),
    'rouge1': ('ROUGE-1', '{:.1%}'),
    'rouge2': ('ROUGE-2', '{:.1%}'),
    'rougeL': ('ROUGE-L', '{:.1%}'),
    'bleu': ('BLEU', '{:.1f}'),
    'bleu1': ('BLEU-1', '{:.1f}'),
    'bleu2': ('BLEU-2', '{:.1f}'),
    'bleu3': ('BLEU-3', '{:.1f}'),
    'stopped': ('stopped by itself', '{:.1%}'),
    'mean_tokens': ('tokens a response', '{:.1f}'),
}
# what can be wrong with a response: what it means; the first that fits counts
ERRORS = {
    'empty': 'nothing was written',
    'loops': 'the end repeats itself over and over',
    'never stops': 'no stop token within the tokens allowed',
    'malformed call': 'a call that cannot be read',
    'wrong tool': 'other tools called, or in another order, or none',
    'wrong argument': 'the right tools with other arguments',
    'echo': 'the question is repeated',
    'too short': 'less than a third of the words of the answer',
    'partly right': 'F1 of 0.5 or more, but not the answer',
    'wrong answer': 'none of the above',
}


# ---- texts ------------------------------------------------------------------------------------------------

def normal_words(text):
    """The words of a text as SQuAD's scorer compares them: lower case, no punctuation, no articles.
    (Rajpurkar et al. 2016)"""
    text = ''.join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r'\b(a|an|the)\b', ' ', text).split()


def exact_match(response, reference):
    """Whether both are the same text but for white space."""
    return response.split() == reference.split()


def squad_match(response, reference):
    """Whether both have the same normal_words: SQuAD's exact match, for which -5 equals 5."""
    return normal_words(response) == normal_words(reference)


def f1(response, reference):
    """Harmonic mean of precision and recall over normal_words, each counted as often as it occurs (SQuAD);
    1 if both have none."""
    ours, theirs = normal_words(response), normal_words(reference)
    if not ours and not theirs:
        return 1.0
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


class UnicodeWords:
    """The tokenizer that rouge_score is given. Its own knows a-z and 0-9 only, so that texts in other scripts
    are empty; on ASCII both agree."""

    def tokenize(self, text):
        return re.findall(r'[^\W_]+', text.lower())


@functools.cache        # what is missing is said once
def optional(module, package, scores):
    """A module that only some scores need; None where it is not installed, after one line that says so."""
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f'{scores} is left out, {package} is not installed: pip install {package}')
        return None


def rouge(pairs):
    """[(response, reference)] -> {'rouge1', 'rouge2', 'rougeL'}: mean F-measures in 0..1 (Lin 2004), by
    rouge_score without stemming; {} where that is not installed."""
    rouge_scorer = optional('rouge_score.rouge_scorer', 'rouge-score', 'ROUGE')
    if not rouge_scorer:
        return {}
    names = ['rouge1', 'rouge2', 'rougeL']
    scorer = rouge_scorer.RougeScorer(names, tokenizer=UnicodeWords())
    scores = [scorer.score(reference, response) for response, reference in pairs]
    return {name: mean(score[name].fmeasure for score in scores) for name in names}


def bleu(pairs):
    """[(response, reference)] -> {'bleu', 'bleu1', 'bleu2', 'bleu3'}: BLEU of the whole set in 0..100, up to
    4-, 1-, 2- and 3-grams (Papineni et al. 2002), by sacrebleu with its defaults (13a tokens, exponential
    smoothing); {} where that is not installed."""
    sacrebleu = optional('sacrebleu.metrics', 'sacrebleu', 'BLEU')
    if not sacrebleu:
        return {}
    responses, references = map(list, zip(*pairs))
    scores = {}
    for name, order in (('bleu', 4), ('bleu1', 1), ('bleu2', 2), ('bleu3', 3)):
        scores[name] = sacrebleu.BLEU(max_ngram_order=order).corpus_score(responses, [references]).score
    return scores


# ---- tool calls -------------------------------------------------------------------------------------------

def same_value(a, b):
    """Equality of JSON values: 1 is 1.0 but not true; what is null is not there."""
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = without_nulls(a), without_nulls(b)
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def without_nulls(value):
    return {key: entry for key, entry in value.items() if entry is not None}


def compare_calls(called, wanted):
    """Two lists of {'name', 'arguments'}, in order -> {'exact_call', 'right_tool', 'right_arguments'}: do all
    agree in both, in their names, in their arguments? called None: what was written could not be read."""
    if called is None or len(called) != len(wanted):
        return {'exact_call': False, 'right_tool': False, 'right_arguments': False}
    pairs = list(zip(called, wanted))
    names = all(ours['name'] == theirs['name'] for ours, theirs in pairs)
    arguments = all(same_value(ours['arguments'], theirs['arguments']) for ours, theirs in pairs)
    return {'exact_call': names and arguments, 'right_tool': names, 'right_arguments': arguments}


def per_tool(pairs):
    """[(called, wanted)] -> {tool: {'wanted', 'right_tool', 'exact_call', 'instead'}}, most wanted first.

    Counts of wanted calls, each compared with the call at its place in the response. instead: what most often
    stood there when it was not this tool.
    """
    empty = {'wanted': 0, 'right_tool': 0, 'exact_call': 0}
    table = {}
    for called, wanted in pairs:
        for i, call in enumerate(wanted):
            row = table.setdefault(call['name'], {**empty, 'instead': Counter()})
            got = call_at(called, i)
            row['wanted'] += 1
            if got['name'] == call['name']:
                row['right_tool'] += 1
                row['exact_call'] += same_value(got['arguments'], call['arguments'])
            else:
                row['instead'][got['name']] += 1
    for row in table.values():
        row['instead'] = max(row['instead'], key=row['instead'].get, default='')
    return dict(sorted(table.items(), key=lambda entry: (-entry[1]['wanted'], entry[0])))


def call_at(called, i):
    """The call at place i of a response, or the name of what is wrong there."""
    if called is None:
        return {'name': '(malformed)'}
    return called[i] if i < len(called) else {'name': '(no call)'}


# ---- what is wrong ----------------------------------------------------------------------------------------

def loops(tokens, times=4, least=8):
    """Whether a sequence ends in the same tokens `times` times or more, which are at least `least` in all."""
    for period in range(1, len(tokens) // times + 1):
        tail = tokens[-max(times * period, least):]
        if len(tail) >= least and tail[period:] == tail[:-period]:
            return True
    return False


def echoes(response, question):
    """Whether a response of three words or more is a part of the question, or begins with all of it."""
    ours, asked = normal_words(response), normal_words(question)
    if len(ours) < 3 or len(asked) < 3:
        return False
    parts = (asked[i:i + len(ours)] for i in range(len(asked) - len(ours) + 1))
    return ours[:len(asked)] == asked or ours in parts


def error_of(row):
    """The first of ERRORS that fits a row (evaluate.Row), None where it is correct."""
    if row.correct:
        return None
    if not row.response.strip():
        return 'empty'
    if loops(row.tokens):
        return 'loops'
    if not row.stopped:
        return 'never stops'
    if row.called is None:
        return 'malformed call'
    if row.wanted or row.called:
        same_tools = compare_calls(row.called, row.wanted)['right_tool']
        return 'wrong argument' if same_tools else 'wrong tool'
    if echoes(row.response, row.question):
        return 'echo'
    words, expected = len(row.response.split()), len(row.reference.split())
    if expected > 5 and 3 * words < expected:
        return 'too short'
    return 'partly right' if f1(row.response, row.reference) >= 0.5 else 'wrong answer'


# ---- a whole set ------------------------------------------------------------------------------------------

def about_calls(row):
    """Whether calls are what counts: some are wanted, were made, or cannot be read."""
    return bool(row.wanted) or row.called != []


def is_correct(row, task=None):
    """By the task's reward, else all calls the same, else the same words (SQuAD's exact match)."""
    if task:
        return task.reward(row.problem, row.response) >= 1
    if about_calls(row):
        return compare_calls(row.called, row.wanted)['exact_call']
    return squad_match(row.response, row.reference)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def scores_of(rows, task=None, read=True):
    """{score: value} of judged rows: shares and F-measures in 0..1, BLEU in 0..100, loss in nats a token.
    read: whether a model has read the right answers."""
    pairs = [(row.response, row.reference) for row in rows]
    scores = {'accuracy': mean(row.correct for row in rows)}
    if task:
        scores['reward'] = mean(task.reward(row.problem, row.response) for row in rows)
    if any(row.wanted for row in rows):
        compared = [compare_calls(row.called, row.wanted) for row in rows if about_calls(row)]
        for name in compared[0]:
            scores[name] = mean(comparison[name] for comparison in compared)
    if read:
        tokens = sum(len(row.answer) for row in rows)
        scores['loss'] = sum(row.loss for row in rows) / tokens
        scores['perplexity'] = math.exp(min(scores['loss'], 700))       # e^710 is no float
        scores['token_accuracy'] = sum(row.hits for row in rows) / tokens
        scores['stopped'] = mean(row.stopped for row in rows)
        scores['mean_tokens'] = mean(len(row.tokens) for row in rows)
    scores['exact_match'] = mean(exact_match(*pair) for pair in pairs)
    scores['f1'] = mean(f1(*pair) for pair in pairs)
    return {**scores, **rouge(pairs), **bleu(pairs)}


def result_of(name, rows, task=None, read=True, **facts):
    """Judges the rows (evaluate.Row) and sums up one model or baseline for the report."""
    for row in rows:
        row.correct = is_correct(row, task)
        row.error = error_of(row)
    return {
        'name': name,
        **facts,
        'scores': scores_of(rows, task, read),
        'errors': {kind: sum(row.error == kind for row in rows) for kind in ERRORS},
        'tools': per_tool([(row.called, row.wanted) for row in rows if row.wanted]),
        'rows': [row_of_report(row, read) for row in rows],
    }


def row_of_report(row, read):
    names = ('where', 'question', 'reference', 'response', 'correct', 'error', 'stopped')
    return {
        **{name: getattr(row, name) for name in names},
        'f1': f1(row.response, row.reference),
        'loss': row.loss / len(row.answer) if read else None,       # nats a token
        'num_tokens': len(row.tokens) if read else None,
        'answer_tokens': len(row.answer),
    }


def models_in(results):
    """The results of models: a baseline has no loss."""
    return [result for result in results if 'loss' in result['scores']]


def count_of(kind, result):
    """How many responses of a result have this error, or are 'correct'."""
    return result['errors'].get(kind, sum(row['correct'] for row in result['rows']))


# ---- baselines --------------------------------------------------------------------------------------------

def majority(questions, training):
    """The most frequent answer of training, whatever is asked. training: [(question, answer)], texts."""
    answers = Counter(answer for _, answer in training)
    return [answers.most_common(1)[0][0]] * len(questions)


def nearest(questions, training):
    """For each question the answer to the most similar one of training, the first of equals: by the cosine of
    their words, each weighted by how rare it is there (tf-idf). training: [(question, answer)], texts."""
    known = [word_counts(question) for question, _ in training]
    questions_with = Counter(word for counts in known for word in counts)
    rarity = {word: math.log(1 + len(known) / count) for word, count in questions_with.items()}
    index = defaultdict(list)       # word: [(number of the training question, its weight there)]
    for i, counts in enumerate(known):
        weights = {word: count * rarity[word] for word, count in counts.items()}
        length = math.sqrt(sum(weight ** 2 for weight in weights.values()))
        for word, weight in weights.items():
            index[word].append((i, weight / length))

    answers = []
    for question in questions:
        similarity = [0.0] * len(training)
        for word, count in word_counts(question).items():
            for i, weight in index.get(word, ()):
                similarity[i] += count * rarity[word] * weight
        answers.append(training[similarity.index(max(similarity))][1])
    return answers


def word_counts(text):
    return Counter(UnicodeWords().tokenize(text))
