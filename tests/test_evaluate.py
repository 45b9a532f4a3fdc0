"""evaluate.py and metrics.py against independent answers: scores by hand and by the libraries called
directly, perplexity by transformers; what the command leaves behind, and what it says to mistakes."""
import base64
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import evaluate
from configurator import UserError, as_dict, parse
from conftest import ROOT
from data.splits import is_held_out
from data.formats import Record
from data.tasks import arithmetic, devices, questions, toolcalls
from data.tokenized import digest
from evaluate import Config, Row, encode_records, main, read_answers
from model import add_lora, load_model, save_model
from nanoforge import eval_report, metrics
from nanoforge.checkpoint import write_json
from nanoforge.run import seed_for, setup
from sample import generate
from train_sft import Config as Training

TINY = os.path.join(ROOT, 'data', 'tiny')
PAIRS = [('The cat sat on the mat.', 'A cat sat on a mat'), ('Oslo', 'Tom lives in Oslo.'),
         ('', 'nothing was said'), ('it is it is it', 'it is'),
         ('wholly other words here', 'nothing in common')]


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='module')
def tiny():
    return load_model('tiny')


def config(*words):
    return parse(Config, [*words, '--device=cpu'])


def results_in(folder):
    with open(os.path.join(folder, 'evaluation.json')) as file:
        return json.load(file)


def rows_in(folder, model=0):
    return results_in(folder)['results'][model]['rows']


def questions_in(folder):
    return [row['question'] for row in rows_in(folder)]


def records_of(task, count):
    """The first held-out problems of a task, as records with the right answers."""
    return [Record(task.prompt(problem), [{'role': 'assistant', 'content': task.solution(problem)}],
                   problem.get('tools'), 'eval', '') for problem in task.problems('eval', count, 0)]


def mistake(*words):
    """The message of a UserError that main raises."""
    with pytest.raises(UserError) as caught:
        main(config(*words))
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ---- scores of texts ------------------------------------------------------------------------------------

def test_f1_counts_words_as_squad_does():
    """Articles and punctuation do not count."""
    assert metrics.f1('The cat sat on the mat.', 'A cat sat on a mat') == 1.0
    assert metrics.f1('Oslo', 'Tom lives in Oslo.') == pytest.approx(2 * 1 * 0.25 / 1.25)
    assert metrics.f1('it is it is it', 'it is') == pytest.approx(2 * (2 / 5) * 1 / (2 / 5 + 1))
    assert metrics.f1('', 'nothing') == 0 and metrics.f1('the', 'a') == 1
    assert not metrics.exact_match('cat', 'Cat') and metrics.exact_match(' a  cat\n', 'a cat')
    assert metrics.squad_match('The Cat!', 'cat') and not metrics.squad_match('cats', 'cat')


def test_rouge_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(['rouge1', 'rouge2', 'rougeL'])
    for response, reference in PAIRS:
        theirs = {name: score.fmeasure for name, score in scorer.score(reference, response).items()}
        assert metrics.rouge([(response, reference)]) == theirs
    each = [metrics.rouge([pair])['rougeL'] for pair in PAIRS]
    assert 0 < metrics.rouge(PAIRS)['rougeL'] == sum(each) / len(each)
    assert metrics.rouge([('кот сидит', 'кот сидит')])['rougeL'] == 1   # rouge_score's own tokenizer: 0


@pytest.mark.parametrize('module, scores, left', [
    ('rouge_score.rouge_scorer', 'ROUGE', 'bleu'), ('sacrebleu.metrics', 'BLEU', 'rougeL')])
def test_scores_of_a_missing_package_are_left_out(monkeypatch, capsys, module, scores, left):
    """A machine without rouge-score is told so once, and gets all other scores."""
    metrics.optional.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)          # importing it is an ImportError
    for _ in range(2):
        row = Row('', 'Who?', 'Tom', [1], [2], [], loss=1.0, response='Tom', tokens=[3])
        found = metrics.scores_of([row])
        assert left in found and not [name for name in found if name.startswith(scores.lower())]
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and said.startswith(f'{scores} is left out') and 'pip install' in said
    assert found['accuracy'] == 0 and found['exact_match'] == 1
    metrics.optional.cache_clear()


def test_bleu_is_that_of_sacrebleu():
    import sacrebleu
    responses, references = map(list, zip(*PAIRS))
    ours = metrics.bleu(PAIRS)
    assert ours['bleu'] == sacrebleu.corpus_bleu(responses, [references]).score
    assert ours['bleu1'] > ours['bleu2'] > ours['bleu3'] > ours['bleu'] > 0
    assert metrics.bleu([('a b c d e', 'a b c d e')])['bleu'] == pytest.approx(100)


# ---- scores of calls ------------------------------------------------------------------------------------

def call(name, **arguments):
    return {'name': name, 'arguments': arguments}


@pytest.mark.parametrize('called, exact, tool, arguments', [
    ([call('a', x=1), call('b', y='z')], True, True, True),
    ([call('a', x=1.0, unset=None), call('b', y='z')], True, True, True),       # one kind of number, no null
    ([call('a', x=True), call('b', y='z')], False, True, False),                # but true is no number
    ([call('b', y='z'), call('a', x=1)], False, False, False),                  # another order
    ([call('b', x=1), call('a', y='z')], False, False, True),
    ([call('a', x=1)], False, False, False),
    ([], False, False, False), (None, False, False, False)])
def test_calls_are_compared_as_values(called, exact, tool, arguments):
    found = metrics.compare_calls(called, [call('a', x=1), call('b', y='z')])
    assert found == {'exact_call': exact, 'right_tool': tool, 'right_arguments': arguments}


def test_nested_values():
    assert metrics.same_value({'a': [1, {'b': 'c'}]}, {'a': [1.0, {'b': 'c', 'd': None}]})
    for a, b in (([1, 2], [2, 1]), ([1], [1, 2]), ('1', 1)):
        assert not metrics.same_value(a, b)


def test_table_by_tool():
    pairs = [([call('a', x=1)], [call('a', x=1)]),
             ([call('a', x=2)], [call('a', x=1)]),
             ([call('b')], [call('a', x=1)]),
             ([call('b')], [call('a', x=1)]),
             ([], [call('b')]),
             (None, [call('b')]),
             (None, [call('b'), call('a')])]
    assert metrics.per_tool(pairs) == {
        'a': {'wanted': 5, 'right_tool': 2, 'exact_call': 1, 'instead': 'b'},
        'b': {'wanted': 3, 'right_tool': 0, 'exact_call': 0, 'instead': '(malformed)'}}


# ---- what is wrong --------------------------------------------------------------------------------------

def test_loops():
    assert metrics.loops([5] * 8) and metrics.loops([9, 9, 1, 2, 3] * 2 + [1, 2, 3] * 4)
    for tokens in ([5] * 7, [1, 2, 3] * 3, list(range(40)), [], [5] * 8 + [6]):     # the last one ended
        assert not metrics.loops(tokens)


QUESTION = 'Where does Tom live now, in which city?'
CASES = {
    'empty': dict(response=' \n'), 'loops': dict(response='so ' * 20, tokens=[7] * 20, stopped=False),
    'never stops': dict(stopped=False), 'malformed call': dict(response='<tool_call>{', called=None),
    'wrong tool': dict(called=[call('b')], wanted=[call('a', x=1)]),
    'wrong argument': dict(called=[call('a', x=2)], wanted=[call('a', x=1)]),
    'echo': dict(response='Where does Tom live now, in which city? I say'),
    'too short': dict(response='Oslo', reference='a b c d e f Oslo'),
    'partly right': dict(response='Tom lives in Rome.'), 'wrong answer': dict(response='No.')}


@pytest.mark.parametrize('kind', metrics.ERRORS)
def test_each_kind_of_error(kind):
    row = Row('', QUESTION, 'Tom lives in Oslo.', [], [], [], response='words', tokens=[1, 2])
    assert metrics.error_of(replace(row, **CASES[kind])) == kind
    assert metrics.error_of(replace(row, **CASES[kind], correct=True)) is None


def test_no_call_where_one_is_wanted_and_a_call_where_none_is():
    row = Row('', 'q', 'r', [], [], [], response='words', tokens=[1])
    assert metrics.error_of(replace(row, called=[], wanted=[call('a')])) == 'wrong tool'
    assert metrics.error_of(replace(row, called=[call('a')], wanted=[])) == 'wrong tool'


def test_trivial_solvers():
    training = [('where is the red cat', 'here'), ('where is the blue dog', 'there'),
                ('what is the time', 'there'), ('how old is the cat', 'nine')]
    assert metrics.majority(['anything'] * 2, training) == ['there'] * 2
    questions = ['is the blue dog home', 'old cat', 'unheard', 'What TIME is it?']
    assert metrics.nearest(questions, training) == ['there', 'nine', 'here', 'there']


# ---- the model ------------------------------------------------------------------------------------------

def test_loss_and_hits_are_those_of_transformers(tiny):
    from transformers import AutoModelForCausalLM
    model, tokenizer = tiny
    theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    records = records_of(arithmetic, 4)
    records += [Record('Tom lives in', ' Oslo, near the river.', None, 'eval', ''),
                Record('', 'Tom has a dog.', None, 'eval', '')]
    rows = encode_records(tokenizer, records)
    assert rows[0].answer[-1] in tokenizer.stop_ids
    assert tokenizer.decode(rows[0].prompt).endswith('<|im_start|>assistant\n')
    read_answers(model, rows, 3, setup('cpu'))
    for row in rows:
        ids = torch.tensor([row.prompt + row.answer])
        labels = ids.clone()
        labels[0, :len(row.prompt)] = -100
        with torch.no_grad():
            found = theirs(ids, labels=labels)
        assert row.loss == pytest.approx(found.loss.item() * len(row.answer), abs=1e-4)
        likeliest = found.logits[0, len(row.prompt) - 1:-1].argmax(-1)
        assert row.hits == (likeliest == torch.tensor(row.answer)).sum()


def test_a_long_prompt_loses_its_beginning(tiny):
    model, tokenizer = tiny
    rows = [Row('', 'q', 'r', [400] * 500 + tokenizer.encode('Tom lives in'), tokenizer.encode(' Oslo.'), [])]
    read_answers(model, rows, 1, setup('cpu'))
    ids = torch.tensor([(rows[0].prompt + rows[0].answer)[-model.config.block_size - 1:]])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids[:, :-1]), -1)[0].gather(1, ids[0, 1:, None])      # (T, 1)
    assert rows[0].loss == pytest.approx(-logp[-len(rows[0].answer):].sum().item(), abs=1e-4)


def test_a_prompt_is_cut_only_where_the_answer_needs_the_room(tiny, capsys):
    """As many tokens as allowed would not fit behind the prompt, but the answer does: nothing is lost."""
    model, tokenizer = tiny
    question, context = 'Repeat: Tom, Mia, Ben. ' * 40, model.config.block_size
    record = Record(question, ' So be it.', None, 'eval', '')
    (row,) = encode_records(tokenizer, [record])
    row.prompt = row.prompt[-(context - len(row.answer)):]
    assert evaluate.rows_that_fit([row], context, len(row.answer)) == [row] and capsys.readouterr().out == ''
    evaluate.answer_questions(Config(), model, tokenizer, [row], setup('cpu'), 100, len(row.answer))
    whole = generate(model, [row.prompt], 100, temperature=0, stop_ids=tokenizer.stop_ids)
    assert row.tokens == whole.tokens[0, :whole.lengths[0] - int(whole.stopped[0])].tolist()
    assert len(row.tokens) <= len(row.answer)


def test_scores_do_not_depend_on_the_batch():
    words = ['--data', 'toolcalls', '--num_samples=9', '--matmul=float32']
    one, nine = (main(config(*words, f'--batch_size={size}', f'--output-dir=out-{size}')) for size in (1, 9))
    assert one == pytest.approx(nine, rel=1e-5)


def test_a_task_is_judged_by_its_own_reward():
    scores = main(config('--task=arithmetic', '--num_samples=20', '--baselines', '--output-dir=out'))
    result, majority, nearest = results_in('out')['results']
    problems = {problem['question']: problem for problem in arithmetic.problems('eval', 20, 0)}
    rewards = [arithmetic.reward(problems[row['question']], row['response']) for row in result['rows']]
    assert scores['reward'] == scores['accuracy'] == sum(rewards) / 20 and 0 < scores['reward'] < 0.6
    assert majority['scores']['accuracy'] < 0.1 and nearest['scores']['accuracy'] < 0.1
    assert 'perplexity' not in majority['scores'] and len({row['response'] for row in majority['rows']}) == 1


def test_a_right_model_would_get_full_marks():
    """What the rows count as right is right: the reference itself, as response."""
    for task in (devices, toolcalls, questions):
        rows = encode_records(load_model('tiny')[1], records_of(task, 30))
        for row in rows:
            row.response, row.called = row.reference, evaluate.read_calls(row.reference)
            row.tokens = row.answer
        result = metrics.result_of('right', rows)
        for name in ('accuracy', 'exact_match', 'f1', 'rougeL', 'stopped'):
            assert result['scores'][name] == pytest.approx(1)
        assert result['scores']['bleu'] == pytest.approx(100) and sum(result['errors'].values()) == 0
        assert all(row['exact_call'] == row['wanted'] for row in result['tools'].values())
        assert bool(result['tools']) == (task is not questions)


# ---- data -----------------------------------------------------------------------------------------------

def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


def test_only_rows_held_out_count(tmp_path, capsys):
    rows = [{'question': f'Question {i}?', 'answer': f'Answer {i}.', 'metadata': 'eval' if i < 3 else 'train'}
            for i in range(8)]
    data = write_rows(tmp_path / 'rows.jsonl', rows)
    main(config('--data', data, '--output-dir=out'))
    assert questions_in('out') == ['Question 0?', 'Question 1?', 'Question 2?']
    main(config('--data', data, '--output-dir=train', '--split=train', '--num_samples=2'))
    assert questions_in('train') == ['Question 3?', 'Question 4?']
    for row in rows:
        del row['metadata']
    (tmp_path / 'all.json').write_text(json.dumps({'qa_pairs': rows}))
    main(config('--data', 'all.json', '--output-dir=all'))
    assert results_in('all')['num_rows'] == 8 and 'all 8 are evaluated' in capsys.readouterr().out


def test_a_checkpoint_is_evaluated_on_what_its_run_held_out(tmp_path, capsys):
    model, tokenizer = load_model('tiny')
    save_model(model, tokenizer, str(tmp_path / 'run' / 'checkpoint-2'))
    asked = [f'Question {i}?' for i in range(60)]
    rows = [{'question': question, 'answer': 'So.'} for question in asked]
    data = write_rows(tmp_path / 'rows.jsonl', rows)
    saved = {'written_by': 'nanoforge', 'run': '1', 'script': 'train_sft.py',
             'config': as_dict(Training(dataset_path=data))}
    write_json(tmp_path / 'run' / 'run_config.json', saved)
    main(config('run/checkpoint-2', '--output-dir=sft', '--max_new_tokens=4'))
    draws = [seed_for(42, 'held out', digest([{'role': 'user', 'content': question}])) for question in asked]
    held_out = [question for question, draw in zip(asked, draws) if draw < 0.1 * 2 ** 63]
    assert questions_in('sft') == held_out and 1 < len(held_out) < 15       # as before it had a version
    write_json(tmp_path / 'run' / 'run_config.json', {**saved, 'version': 2})
    main(config('run/checkpoint-2', '--output-dir=sft2', '--max_new_tokens=4'))
    held_out = [question for question in asked if is_held_out([{'role': 'user', 'content': question}])]
    assert questions_in('sft2') == held_out and 1 < len(held_out) < 15
    saved['config']['data'].update(dataset_path=None, datasets=[{'name': data}], eval_fraction=0.3)
    saved['config']['training']['seed'] = 7
    write_json(tmp_path / 'run' / 'run_config.json', saved)         # other settings of the run, another split
    records = evaluate.read_data(config('run/checkpoint-2'), 'run/checkpoint-2').records
    assert len(held_out) < len(records) < 35 and {record.split for record in records} == {'eval'}
    saved.update(script='train_rl.py', config={'data': {'task': 'facts', 'datasets': []}})
    write_json(tmp_path / 'run' / 'run_config.json', saved)
    main(config('run/checkpoint-2', '--output-dir=rl', '--num_samples=3'))
    assert results_in('rl')['data'] == 'the task facts'
    (tmp_path / 'run' / 'run_config.json').unlink()
    main(config('run/checkpoint-2', '--output-dir=embedded', '--num_samples=3', '--max_new_tokens=4'))
    assert results_in('embedded')['data'] == 'devices'
    assert 'the embedded tool calls are taken' in capsys.readouterr().out


def test_columns_and_system_prompt(tmp_path):
    data = write_rows(tmp_path / 'rows.jsonl', [{'ask': 'Who?', 'say': 'Tom.', 'tone': 'kind'}])
    cfg = config('--data', data, '--prompt_column=ask', '--answer_column=say', '--system_prompt=Be {tone}.')
    record = evaluate.read_data(cfg, 'tiny').records[0]
    assert record.prompt == [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Who?'}]


def test_the_embedded_questions_share_nothing():
    rows = {split: questions.rows(split, count, 0) for split, count in (('train', 800), ('eval', 200))}
    names, asked = ({split: {form(row['question']) for row in rows[split]} for split in rows} for form in (
        lambda text: re.search(r'\b(?:[A-Z][a-z]+)\b', text.split('. ')[-1].split(' ', 1)[1])[0],
        lambda text: re.sub(r' [A-Z]\w+', '', text.rsplit('. ', 1)[1])))
    assert not names['train'] & names['eval'] and not asked['train'] & asked['eval']
    training = [(row['question'], row['answer']) for row in rows['train']]
    for solver in (metrics.nearest, metrics.majority):
        answers = solver([row['question'] for row in rows['eval']], training)
        assert sum(answer == row['answer'] for answer, row in zip(answers, rows['eval'])) < 10
    assert rows['eval'] == questions.rows('eval', 200, 0)
    assert len({row['question'] for row in rows['train']}) == 800


def test_the_file_of_the_embedded_questions():
    words = [sys.executable, '-m', 'data.tasks.questions', 'train=3', 'eval=2']
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)['qa_pairs']
    assert [row['metadata'] for row in rows] == ['train'] * 3 + ['eval'] * 2
    assert rows[0].keys() == {'question', 'answer', 'metadata'}


# ---- the command ----------------------------------------------------------------------------------------

def test_the_command_and_what_it_leaves(tmp_path, capsys):
    model, tokenizer = load_model('tiny')
    add_lora(model, 4, 8)
    save_model(model, tokenizer, str(tmp_path / 'adapter'))             # an adapter that changes nothing yet
    hostile = {'question': 'Say <script>alert(1)</script> & ```code```', 'answer': 'Tom | Mia',
               'metadata': 'eval'}
    data = write_rows(tmp_path / 'rows.jsonl', [hostile, *questions.rows('eval', 3, 1)])
    words = [sys.executable, os.path.join(ROOT, 'evaluate.py'), '--model-path', 'tiny', 'adapter',
             '--data', data, '--output-dir', 'out', '--max_new_tokens=24']
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    for word in ('rouge', 'bleu', 'accuracy', 'perplexity', 'wrong answer'):
        assert word in done.stdout.lower()
    ours, adapter = results_in('out')['results']
    assert ours['name'] == 'tiny' and adapter['name'] == 'adapter'
    assert ours['scores'] == pytest.approx(adapter['scores'], rel=1e-4)
    page = (tmp_path / 'out' / 'evaluation.html').read_text()
    assert '<script' not in page and '&lt;script&gt;' in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(pictures) >= 3 and all(picture[:8] == b'\x89PNG\r\n\x1a\n' for picture in pictures)
    markdown = (tmp_path / 'out' / 'evaluation.md').read_text()
    assert '| accuracy |' in markdown and '````' in markdown and 'tiny: worst responses' in markdown
    main(config('--data', data, '--output-dir=out', '--max_new_tokens=8'))
    assert 'earlier-1' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'earlier-1' / 'evaluation.json').exists()


def test_tables():
    rows = [{'correct': i == 0, 'error': None if i == 0 else 'echo', 'question': f'q{i % 2}', 'f1': i / 4,
             'loss': 1.0, 'where': ''} for i in range(4)]
    result = {'name': 'm', 'rows': rows, 'errors': {**dict.fromkeys(metrics.ERRORS, 0), 'echo': 3},
              'scores': {'accuracy': 0.25, 'loss': 1.0, 'perplexity': 2.718281828, 'bleu': 12.345}}
    scores = [['accuracy', '25.0%'], ['perplexity', '2.718'], ['BLEU', '12.3']]
    assert eval_report.score_table([result]) == (['', 'm'], scores)
    assert eval_report.error_table([result]) == (['', 'm'], [['correct', '1 (25.0%)'], ['echo', '3 (75.0%)']])
    assert eval_report.text_table(['', 'm'], [['BLEU', '12.3']]) == '         m\nBLEU  12.3\n'
    groups = dict(eval_report.examples_of(rows, 5))
    assert [row['question'] for row in groups['best responses']] == ['q0', 'q1']
    assert 'echo' not in groups                                             # each question once


def test_print_config_takes_the_documented_command():
    words = [sys.executable, 'evaluate.py', '--model-path', 'models/theta_checkpoint_epoch_26',
             '--print_config']
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)['model_path'] == 'models/theta_checkpoint_epoch_26'


# ---- mistakes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words, said', [
    (['--task=arithmetic', '--data=x.jsonl'], 'leave one out'),
    (['--batch_size=0'], 'batch_size must be 1 or more'),
    (['--temperature=-1'], 'temperature must be 0 or more'),
    (['--top_p=0'], 'top_p=0'),
    (['--load_in_4bit', '--load_in_8bit'], 'exclude each other'),
    (['--system_prompt=Be kind.'], 'system_prompt says how to read --data'),
    (['--task=arithmetic', '--answer_column=say'], 'how to read --data'),
    (['--task=arithmetic', '--split=train'], 'held-out problems only'),
    (['--num_examples=-1'], 'num_examples must be 0 or more'),
    (['--dtype=int3'], 'is none of'),
    (['--model-pth=x'], 'did you mean')])
def test_settings_without_meaning(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        config(*words)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_mistakes_are_named(tmp_path):
    assert 'not a local directory' in mistake('--model-path', 'models/theta_epoch_26', '--task=facts')
    (tmp_path / 'bare').mkdir()
    assert 'not a model directory' in mistake('--model-path', 'bare', '--task=facts')
    assert 'arithmetic' in mistake('--task=arithmetics')
    (tmp_path / 'empty.jsonl').write_text('')
    assert 'holds no row' in mistake('--data', 'empty.jsonl')
    assert 'no such file' in mistake('--data', 'absent.jsonl')
    write_rows(tmp_path / 'bad.jsonl', [{'question': 'Who?', 'answer': 'Tom'}, {'question': 'Who?'}])
    assert 'bad.jsonl line 2' in mistake('--data', 'bad.jsonl')
    write_rows(tmp_path / 'void.jsonl', [{'question': 'Who?', 'answer': ' '}])
    assert 'answer' in mistake('--data', 'void.jsonl')
    write_rows(tmp_path / 'train.jsonl', [{'question': 'Who?', 'answer': 'Tom', 'metadata': 'eval'}])
    assert "no row of the split 'train'" in mistake('--data', 'train.jsonl', '--split=train')
    assert 'training rows' in mistake('--data', 'train.jsonl', '--baselines')
    write_rows(tmp_path / 'long.jsonl', [{'question': 'Who?', 'answer': 'Tom and Mia ' * 200}])
    assert 'longer than the model\'s context' in mistake('--data', 'long.jsonl')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'evaluation.md').write_text('mine')
    assert 'not written by evaluate.py' in mistake('--task=facts', '--num_samples=1', '--output-dir=out')
    assert (tmp_path / 'out' / 'evaluation.md').read_text() == 'mine'
    model, _ = load_model('tiny')
    save_model(model, None, str(tmp_path / 'mute'))
    assert 'no tokenizer' in mistake('mute', '--task=facts')


def test_rows_too_long_are_left_out_and_counted(tmp_path, capsys):
    rows = [{'question': 'Who?', 'answer': 'Tom'}, {'question': 'Who?', 'answer': 'Tom and Mia ' * 200},
            {'question': 'Why? ' * 300, 'answer': 'So.'}]
    main(config('--data', write_rows(tmp_path / 'rows.jsonl', rows), '--output-dir=out'))
    said = capsys.readouterr().out
    assert '1 of 3 rows are left out' in said and '1 of 2 prompts lose their beginning' in said
    assert results_in('out')['num_rows'] == 2


def test_the_mistake_is_one_line_and_status_2():
    words = [sys.executable, 'evaluate.py', '--model-path', 'nowhere/at/all']
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert 'Traceback' not in done.stderr
