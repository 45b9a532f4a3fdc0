"""The tasks and corpus of the embedded model: answers by other means, faults at their stated rates,
honest splits."""
import collections
import itertools
import json
import random
import re

import pytest
from transformers import AutoTokenizer

from data.chat import prompt_ids, render
from data.corpus import Corpus
from data.formats import SIZES
from data.tasks import arithmetic, facts, plan_path, toolcalls
from data.tasks.world import NAMES, part, split_of
from data.tiny import build
from data.tiny.corpus import documents

TASKS = [arithmetic, plan_path, toolcalls, facts]


@pytest.fixture(scope='module')
def texts():
    return list(itertools.islice(documents('tokenizer'), 8000))


@pytest.fixture(scope='module')
def tokenizer(texts):
    return build.train_tokenizer(texts)


def test_split_of_is_fixed_and_near_its_share():
    share = sum(split_of(f'{a}+{b}') == 'eval' for a in range(100) for b in range(100)) / 10_000
    assert abs(share - 0.1) < 0.01
    assert [split_of(key) for key in ('1+1', 'Oslo', '17')] == [split_of(key) for key in ('1+1', 'Oslo', '17')]
    for values in (list('ab'), NAMES, list(range(8))):
        assert part(values, 'eval') and sorted(part(values, 'eval') + part(values, 'train')) == sorted(values)


@pytest.mark.parametrize('task', TASKS)
def test_problems_are_fixed_survive_json_and_are_solved(task):
    for split in ('train', 'eval'):
        problems = task.problems(split, 200, 7)
        assert problems == task.problems(split, 200, 7) != task.problems(split, 200, 8)
        problems = json.loads(json.dumps(problems))
        assert problems == task.problems(split, 200, 7)
        assert all(task.reward(problem, task.solution(problem)) == 1.0 for problem in problems)
        assert not any(task.reward(problem, text) for problem in problems for text in ('', '<answer></answer>', 'ok'))
        assert all(message['role'] in ('developer', 'user') for problem in problems for message in task.prompt(problem))


def test_arithmetic():
    train, held = (arithmetic.problems(split, 3000, 0) for split in ('train', 'eval'))
    for problem in train + held:
        assert problem['answer'] == str(problem['a'] + problem['b'])
        assert sorted(map(int, re.findall(r'\d+', problem['question']))) == sorted((problem['a'], problem['b']))
    pairs = [{frozenset((p['a'], p['b'])) for p in problems} for problems in (train, held)]
    assert not pairs[0] & pairs[1]
    assert 0.77 < sum(p['a'] % 10 + p['b'] % 10 > 9 for p in held) / 3000 < 0.83
    assert max(collections.Counter(p['answer'] for p in held).values()) < 0.1 * 3000    # the commonest answer
    assert arithmetic.work(37, 48) == '7+8=15;3+4+1=8;<answer>85</answer>'
    assert arithmetic.work(37, 48, carry=0) == '7+8=15;3+4=7;<answer>75</answer>'
    assert arithmetic.work(99, 9) == '9+9=18;9+0+1=10;<answer>108</answer>'
    assert arithmetic.reward({'answer': '85'}, 'x<answer> 85\n</answer><answer>1</answer>') == 1.0
    assert not any(arithmetic.reward({'answer': '85'}, text) for text in ('85', '<answer>85', '<answer>185</answer>'))


def test_careless_rates():
    """Sampled success of the pupils: right without a carry, else in 0.3 x 0.7; unblocked, else in 0.2;
    and so on."""
    draw = random.Random(0)

    def rate(task):
        problems = task.problems('train', 4000, 1)
        return sum(task.reward(problem, task.demonstration(problem, draw)) for problem in problems) / 4000
    assert abs(rate(arithmetic) - (0.2 + 0.8 * 0.3 * 0.7)) < 0.03
    assert abs(rate(plan_path) - (0.15 + 0.85 * 0.2)) < 0.03
    assert abs(rate(toolcalls) - 0.15) < 0.02
    assert abs(rate(facts) - 0.5) < 0.03


def test_plan_path_against_another_solver():
    """Distances by relaxation over all cells until nothing changes, instead of a search from the start."""
    for problem in plan_path.problems('eval', 300, 0) + plan_path.problems('train', 100, 0, map_size=6):
        size, walls = problem['size'], {tuple(cell) for cell in problem['walls']}
        distance = {(r, c): 99 for r in range(size) for c in range(size) if (r, c) not in walls}
        distance[tuple(problem['start'])] = 0
        for _ in range(size * size):
            for (r, c) in distance:
                near = [distance.get(cell, 99) + 1 for cell in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))]
                distance[r, c] = min(distance[r, c], *near)
        assert len(problem['answer']) == distance[tuple(problem['goal'])] > 0


def test_plan_path_reward():
    problem = {'size': 4, 'start': [0, 0], 'goal': [0, 2], 'walls': [[0, 1]], 'answer': 'DRRU'}
    assert plan_path.solution(problem) == 'D b1 R b2 R b3 U a3'
    assert plan_path.reward(problem, 'D R R U') == plan_path.reward(problem, 'D L R R R U'.replace('L R', 'D U')) == 1.0
    for text in ('R a2 R a3', 'U L D R R U', 'D R R', 'D R R U U', '', 'D R R U D', 'down right'):
        assert plan_path.reward(problem, text) == 0.0


def argument_values(problems):
    return {str(value) for problem in problems for call in problem['calls'] for value in call['arguments'].values()}


def wordings_seen(task, split, slots):
    """The wordings of many questions, found by matching each against all that there are."""
    patterns = {wording: re.compile(re.sub(r'\\{(\w+)\\}', r'[\\w ]+', re.escape(wording)))
                for wording in task.WORDINGS}
    assert all(slot in slots for wording in task.WORDINGS for slot in re.findall(r'\{(\w+)\}', wording))
    return {max((wording for wording in patterns if patterns[wording].fullmatch(problem['question'])), key=len)
            for problem in task.problems(split, 300, 0)}


def test_splits_share_nothing():
    grids = [{(tuple(p['start']), tuple(p['goal']), frozenset(map(tuple, p['walls'])))
              for p in plan_path.problems(split, 2000, 0)} for split in ('train', 'eval')]
    assert not grids[0] & grids[1]
    train, held = (toolcalls.problems(split, 2000, 0) for split in ('train', 'eval'))
    values = [argument_values(problems) for problems in (train, held)]
    assert not values[0] & values[1] and min(map(len, values)) > 50
    wordings = [{wording for _, _, *both in toolcalls.TOOLS.values() for wording in both[i]} for i in (0, 1)]
    assert not wordings[0] & wordings[1]
    known = [{(p['name'], p['attribute']) for p in facts.problems(split, 2000, 0)} for split in ('train', 'eval')]
    assert not known[0] & known[1] and len(known[1]) >= 12
    for task, names in ((arithmetic, 'name friend items a b'), (plan_path, 'start goal walls')):
        seen = [wordings_seen(task, split, names.split()) for split in ('train', 'eval')]
        assert not seen[0] & seen[1] and min(map(len, seen)) > 5
    questions = [{p['question'] for p in facts.problems(split, 2000, 0)} for split in ('train', 'eval')]
    assert not questions[0] & questions[1]


def test_corpus_holds_no_eval_problem():
    stream = list(itertools.islice(documents(3), 6000))
    assert stream == list(itertools.islice(documents(3), 6000)) != list(itertools.islice(documents(4), 6000))
    seen = ' '.join(stream)
    for a, b in re.findall(r'What is (\d+) plus (\d+)', seen):
        assert split_of(f'{min(int(a), int(b))}+{max(int(a), int(b))}') == 'train'
    called = {str(v) for call in re.findall(r'<tool_call>\{"tool": .*?, "args": (.*?)\}</tool_call>', seen)
              for v in json.loads(call).values()}
    assert len(called) > 200 and not called & argument_values(toolcalls.problems('eval', 2000, 0))
    asked = set(re.findall(r'user\n(.*?)<\|im_end\|>', seen))
    for task in TASKS:
        assert not asked & {problem['question'] for problem in task.problems('eval', 1000, 0)}


def test_tool_calls_follow_their_schemas():
    for problem in toolcalls.problems('train', 300, 5) + toolcalls.problems('eval', 300, 5):
        offered = {tool['function']['name']: tool['function']['parameters'] for tool in problem['tools']}
        assert len(offered) in (3, 4) and 1 <= len(problem['calls']) <= 3
        for call in problem['calls']:
            assert set(call['arguments']) == set(offered[call['name']]['required'])
            for key, kind in offered[call['name']]['properties'].items():
                assert isinstance(call['arguments'][key], {'string': str, 'integer': int}[kind['type']])
                assert str(call['arguments'][key]) in problem['question']
    counts = collections.Counter(len(p['calls']) for p in toolcalls.problems('train', 2000, 0))
    assert abs(counts[1] - 1200) < 100 and abs(counts[2] - 600) < 100


def test_copying_the_nearest_training_call_fails():
    train, held = toolcalls.problems('train', 600, 0), toolcalls.problems('eval', 100, 0)
    words = [set(problem['question'].split()) for problem in train]
    hits = 0
    for problem in held:
        own = set(problem['question'].split())
        best = max(range(len(train)), key=lambda i: len(own & words[i]) / len(own | words[i]))
        hits += train[best]['calls'] == problem['calls']
    assert hits == 0


def test_preferences_need_the_prompt():
    """On the embedded preference set the length of the answers says nothing,
    nor does an answer without its prompt."""
    train, held = facts.rows('train', *SIZES['facts'][:1], 0), facts.rows('eval', SIZES['facts'][1], 0)
    assert (len(train), len(held)) == SIZES['facts']
    assert not {row['prompt'] for row in train} & {row['prompt'] for row in held}
    assert not {value for row in train for value in (row['chosen'], row['rejected'])} & {row['chosen'] for row in held if ' ' in row['chosen']}
    for pairs in (train, held):
        longer = sum(len(pair['chosen']) > len(pair['rejected']) for pair in pairs) / len(pairs)
        assert abs(longer - 0.5) < 0.05
        chosen, rejected = (collections.Counter(pair[side] for pair in pairs) for side in ('chosen', 'rejected'))
        # sees one side only
        best_guess = sum(max(chosen[text], rejected[text]) for text in chosen | rejected) / 2 / len(pairs)
        assert best_guess < 0.6
        assert all(facts.in_form(pair['prompt'], pair['chosen']) and not facts.in_form(pair['prompt'], pair['rejected']) for pair in pairs)


def test_tokenizer(texts, tokenizer, tmp_path):
    assert tokenizer.vocab_size == 1024 and build.train_tokenizer(texts).text == tokenizer.text
    for mark in build.CONTROL + build.MARKS:
        assert len(tokenizer.encode(mark)) == 1
    assert tokenizer.decode(tokenizer.encode('<|im_start|><tool_call>x'), skip_special_tokens=True) == '<tool_call>x'
    assert [tokenizer.decode([i]) for i in tokenizer.encode('12+345=b2')] == list('12+345=b2')
    strange = 'naïve 你好🙂\n\n  "x" \t— <answer>７</answer>'
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    words = collections.Counter(re.findall(r' ?[A-Za-z_]+', re.sub(r'<\|?/?\w+\|?>', '\n', ' '.join(texts))))
    single = sum(n for word, n in words.items() if len(tokenizer.encode(word)) == 1) / sum(words.values())
    assert single > 0.95
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode_batch(texts[:300]) == theirs(texts[:300], add_special_tokens=False)['input_ids']
    assert theirs.decode(tokenizer.encode(strange)) == strange
    assert tokenizer.stop_ids == {theirs.eos_token_id}


def test_corpus_chats_are_what_the_template_writes(tokenizer):
    """A row for fine-tuning begins with the very ids that pretraining saw, and fits the context."""
    problem = toolcalls.problems('train', 1, 0)[0]
    row = toolcalls.rows('train', 1, 0)[0]
    rendered = render(tokenizer, row['messages'], row['tools'])
    text = tokenizer.decode(rendered.ids)
    assert text.endswith(toolcalls.solution(problem) + '<|im_end|>\n')
    ids = prompt_ids(tokenizer, toolcalls.prompt(problem), problem['tools'])
    assert rendered.ids[:len(ids)] == ids and not any(rendered.mask[:len(ids)])
    longest = max(len(render(tokenizer, row['messages'], row['tools']).ids) for row in toolcalls.rows('eval', 200, 0))
    assert longest < 400
    chats = [text for text in itertools.islice(documents(5), 300) if text.startswith('<|im_start|>system')]
    assert chats and all(text.count('<|im_end|>') == text.count('<|im_start|>') for text in chats)


def test_write_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(build, 'documents', lambda seed: itertools.islice(documents(seed), 8000))
    tokenizer = build.write_corpus(tmp_path, train_tokens=50_000, val_tokens=5_000)
    corpus = Corpus(str(tmp_path))
    train, val = corpus.tokens('train'), corpus.tokens('val')
    assert 50_000 <= len(train) < 100_000 and 5_000 <= len(val) < 50_000
    assert len(tokenizer.decode(val.tolist()).encode()) == corpus.meta['val_bytes']
    assert corpus.meta['tokenizer_sha256'] == tokenizer.sha256
    text = tokenizer.decode(train[:4000].tolist())
    assert ''.join(itertools.islice(documents('train'), 200)).startswith(text)


def test_faults_are_recognised():
    problem = {'a': 37, 'b': 48, 'answer': '85'}
    assert build.carry_dropped(problem, arithmetic.work(37, 48, carry=0))
    assert not build.carry_dropped(problem, arithmetic.solution(problem))
    for task in TASKS:
        for problem in task.problems('eval', 50, 0):
            assert not build.FAULTS[task][1](problem, task.solution(problem))
        draw = random.Random(1)
        assert any(build.FAULTS[task][1](p, task.demonstration(p, draw)) for p in task.problems('eval', 50, 0))


def test_the_model_that_ships():
    """Small, opened by transformers with equal logits, and a careless pupil:
    it drops the carry, more often than it is right."""
    import os

    import torch
    from transformers import AutoModelForCausalLM

    from model import load_model
    from sample import generate
    directory = os.path.dirname(build.__file__)
    assert os.path.getsize(os.path.join(directory, 'model.safetensors')) <= 4 << 20
    model, tokenizer = load_model('tiny')
    assert model.num_params() <= 1_500_000 and model.config.arch == 'qwen3'
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    problems = arithmetic.problems('eval', 60, 'ships')
    prompts = [prompt_ids(tokenizer, arithmetic.prompt(problem)) for problem in problems]
    ids = torch.tensor([prompts[0]])
    assert AutoTokenizer.from_pretrained(directory).apply_chat_template(
        arithmetic.prompt(problems[0]), add_generation_prompt=True, return_dict=False) == prompts[0]
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    samples = generate(model, prompts, 60, temperature=0.0, stop_ids=tokenizer.stop_ids)
    texts = [tokenizer.decode(row[:length], skip_special_tokens=True)
             for row, length in zip(samples.tokens.reshape(60, -1).tolist(), samples.lengths.reshape(-1).tolist())]
    right = sum(map(arithmetic.reward, problems, texts)) / 60
    dropped = sum(map(build.carry_dropped, problems, texts)) / 60
    assert 0.05 < right < 0.5 < dropped
