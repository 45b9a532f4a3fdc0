"""Scores of what a model wrote: pure functions of texts, tool calls and token ids. evaluate.py applies them to a model.

A response is compared as text (exact match, F1, ROUGE, BLEU) and, where tools are called, as calls: these are never compared
as strings, as neither the order of keys nor white space means anything.
"""
import math
import re
import string
from collections import Counter, defaultdict

# What can be wrong with a response; the first that fits counts.
ERRORS = {'empty': 'nothing was written', 'loops': 'the end repeats itself over and over',
          'never stops': 'no stop token within the tokens allowed', 'malformed call': 'a call that cannot be read',
          'wrong tool': 'other tools called, or in another order, or none', 'wrong argument': 'the right tools with other arguments',
          'echo': 'the question is repeated', 'too short': 'less than a third of the words of the answer',
          'partly right': 'F1 of 0.5 or more, but not the answer', 'wrong answer': 'none of the above'}


def normal_words(text):
    """The words of a text as SQuAD's scorer compares them (Rajpurkar et al. 2016): lower case, without punctuation and articles."""
    text = ''.join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r'\b(a|an|the)\b', ' ', text).split()


def exact_match(response, reference):
    """Whether both are the same text but for white space."""
    return response.split() == reference.split()


def squad_match(response, reference):
    """Whether both have the same normal_words: SQuAD's exact match, for which -5 equals 5."""
    return normal_words(response) == normal_words(reference)


def f1(response, reference):
    """Harmonic mean of precision and recall over normal_words, each counted as often as it occurs (SQuAD); 1 if both have none."""
    ours, theirs = normal_words(response), normal_words(reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0


class Words:
    """The tokenizer that rouge_score is given. Its own, of a-z and 0-9, leaves nothing of other scripts; on ASCII both agree."""

    def tokenize(self, text):
        return re.findall(r'[^\W_]+', text.lower())


def rouge(pairs):
    """[(response, reference)] -> for each {'rouge1', 'rouge2', 'rougeL'}: F-measures in 0..1 (Lin 2004), by rouge_score, no stemming."""
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(['rouge1', 'rouge2', 'rougeL'], tokenizer=Words())
    return [{name: score.fmeasure for name, score in scorer.score(reference, response).items()} for response, reference in pairs]


def bleu(pairs):
    """[(response, reference)] -> {'bleu', 'bleu1', 'bleu2', 'bleu3'}: corpus BLEU in 0..100 up to 4-, 1-, 2- and 3-grams (Papineni
    et al. 2002), by sacrebleu with its defaults (13a tokens, exponential smoothing)."""
    from sacrebleu.metrics import BLEU
    responses, references = map(list, zip(*pairs))
    return {name: BLEU(max_ngram_order=order).corpus_score(responses, [references]).score
            for name, order in (('bleu', 4), ('bleu1', 1), ('bleu2', 2), ('bleu3', 3))}


# ---- tool calls -------------------------------------------------------------------------------------------------------------

def same_value(a, b):
    """Equality of JSON values: 1 is 1.0 but not true; what is null is not there."""
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = ({key: value for key, value in side.items() if value is not None} for side in (a, b))
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def compare_calls(called, wanted):
    """Two lists of {'name', 'arguments'}, in order -> {'exact_call', 'right_tool', 'right_arguments'}: whether all agree in both,
    in their names, in their arguments. called None: what was written could not be read."""
    aligned = called is not None and len(called) == len(wanted)
    names = aligned and all(ours['name'] == theirs['name'] for ours, theirs in zip(called, wanted))
    arguments = aligned and all(same_value(ours['arguments'], theirs['arguments']) for ours, theirs in zip(called, wanted))
    return {'exact_call': names and arguments, 'right_tool': names, 'right_arguments': arguments}


def per_tool(pairs):
    """[(called, wanted)] -> {tool: {'wanted', 'right_tool', 'exact_call', 'instead'}}, counts of calls, each compared with the call
    at its place in the response; instead: what most often stood there when it was another tool. Most wanted first."""
    table, instead = defaultdict(Counter), defaultdict(Counter)
    for called, wanted in pairs:
        for i, call in enumerate(wanted):
            got, row = called[i] if called and i < len(called) else None, table[call['name']]
            row['wanted'] += 1
            right = got is not None and got['name'] == call['name']
            row['right_tool'] += right
            row['exact_call'] += right and same_value(got['arguments'], call['arguments'])
            if not right:
                instead[call['name']][got['name'] if got else '(no call)' if called is not None else '(malformed)'] += 1
    return {name: {**{key: row[key] for key in ('wanted', 'right_tool', 'exact_call')},
                   'instead': instead[name].most_common(1)[0][0] if instead[name] else ''}
            for name, row in sorted(table.items(), key=lambda item: (-item[1]['wanted'], item[0]))}


# ---- what is wrong ----------------------------------------------------------------------------------------------------------

def loops(tokens, times=4, least=8):
    """Whether a sequence ends in the same tokens `times` times or more, and these make up at least `least` tokens."""
    for period in range(1, len(tokens) // times + 1):
        span = max(times * period, least)
        if span <= len(tokens) and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return True
    return False


def echoes(response, question):
    """Whether a response of three words or more is a part of the question, or begins with all of it."""
    ours, asked = normal_words(response), normal_words(question)
    if len(ours) < 3 or len(asked) < 3:
        return False
    return ours[:len(asked)] == asked or any(asked[i:i + len(ours)] == ours for i in range(len(asked) - len(ours) + 1))


def error_of(row):
    """The key of ERRORS that fits a row first, None where it is correct. row: {'correct', 'response', 'tokens', 'stopped', 'called',
    'wanted', 'question', 'reference'}; called is None where the calls cannot be read, [] where there are none."""
    words = len(row['reference'].split())
    calls = row['wanted'] or row['called'] != []
    found = {'empty': not row['response'].strip(), 'loops': loops(row['tokens']), 'never stops': not row['stopped'],
             'malformed call': row['called'] is None, 'wrong tool': calls and not compare_calls(row['called'], row['wanted'])['right_tool'],
             'wrong argument': bool(calls), 'echo': echoes(row['response'], row['question']),
             'too short': words > 5 and 3 * len(row['response'].split()) < words,
             'partly right': f1(row['response'], row['reference']) >= 0.5, 'wrong answer': True}
    return None if row['correct'] else next(name for name in ERRORS if found[name])


# ---- of a whole set ---------------------------------------------------------------------------------------------------------

def judge(rows, task=None):
    """Sets correct and error of each row (evaluate.Row): by the task's reward, else all calls the same, else the same
    words (SQuAD's exact match)."""
    for row in rows:
        if task:
            row.correct = task.reward(row.problem, row.response) >= 1
        elif row.wanted or row.called != []:
            row.correct = compare_calls(row.called, row.wanted)['exact_call']
        else:
            row.correct = squad_match(row.response, row.reference)
        row.error = error_of(vars(row))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def scores_of(rows, task=None, read=True):
    """{measure: value} of judged rows. Shares and F-measures in 0..1, BLEU in 0..100; read: whether a model has read the answers."""
    pairs = [(row.response, row.reference) for row in rows]
    scores = {'accuracy': mean(row.correct for row in rows)}
    if task:
        scores['reward'] = mean(task.reward(row.problem, row.response) for row in rows)
    with_calls = [row for row in rows if row.wanted or row.called != []]
    if any(row.wanted for row in rows):
        compared = [compare_calls(row.called, row.wanted) for row in with_calls]
        scores.update({name: mean(row[name] for row in compared) for name in compared[0]})
    if read:
        tokens = sum(len(row.answer) for row in rows)
        loss = sum(row.loss for row in rows) / tokens
        scores.update(loss=loss, perplexity=math.exp(min(loss, 700)), token_accuracy=sum(row.hits for row in rows) / tokens)
    scores.update(exact_match=mean(exact_match(*pair) for pair in pairs), f1=mean(f1(*pair) for pair in pairs))
    overlaps = rouge(pairs)
    scores.update({name: mean(row[name] for row in overlaps) for name in overlaps[0]})
    scores.update(bleu(pairs))
    if read:
        scores.update(stopped=mean(row.stopped for row in rows), mean_tokens=mean(len(row.tokens) for row in rows))
    return scores


def result_of(name, rows, task=None, read=True, **facts):
    """What the report says of one model or trivial solver: scores, errors by kind, calls by tool, every row."""
    judge(rows, task)
    errors = {kind: sum(row.error == kind for row in rows) for kind in ERRORS}
    return {'name': name, **facts, 'scores': scores_of(rows, task, read), 'errors': errors,
            'tools': per_tool([(row.called, row.wanted) for row in rows if row.wanted]),
            'rows': [{'where': row.where, 'question': row.question, 'reference': row.reference, 'response': row.response,
                      'correct': row.correct, 'error': row.error, 'stopped': row.stopped, 'f1': f1(row.response, row.reference),
                      'loss': row.loss / len(row.answer) if read else None, 'num_tokens': len(row.tokens) if read else None,
                      'answer_tokens': len(row.answer)} for row in rows]}


# ---- trivial solvers --------------------------------------------------------------------------------------------------------

def majority(questions, training):
    """The answer that is most frequent in training, whatever is asked. training: [(question, answer)], texts."""
    answer = Counter(answer for _, answer in training).most_common(1)[0][0]
    return [answer] * len(questions)


def nearest(questions, training):
    """For each question the answer to the most similar one of training: cosine of words weighted by rarity; the first of equals."""
    bags = [Counter(Words().tokenize(question)) for question, _ in training]
    spread = Counter(word for bag in bags for word in bag)
    rarity = {word: math.log(1 + len(bags) / count) for word, count in spread.items()}
    places = defaultdict(list)
    for i, bag in enumerate(bags):
        length = math.sqrt(sum((count * rarity[word]) ** 2 for word, count in bag.items())) or 1.0
        for word, count in bag.items():
            places[word].append((i, count * rarity[word] / length))
    answers = []
    for question in questions:
        similarity = Counter()
        for word, count in Counter(Words().tokenize(question)).items():
            for i, weight in places.get(word, ()):
                similarity[i] += count * rarity[word] * weight
        best = max(similarity.values(), default=0)
        answers.append(training[min((i for i in similarity if similarity[i] == best), default=0)][1])
    return answers
