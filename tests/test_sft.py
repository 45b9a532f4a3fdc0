"""train_sft.py: its loss is transformers', its step does not depend on how the batch is cut,
a killed run ends as if it had not been."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_sft
from configurator import UserError, as_dict, parse
from conftest import ROOT
from data.batches import pack_documents
from data.formats import SIZES as EMBEDDED_SIZES, Source, read_rows, text_record, to_record
from data.splits import is_held_out, legacy_sft
from data.tokenized import TokenizedRows, encode_records, truncate
from data.tasks import facts
from data.tasks.world import NAMES, ROOMS
from nanoforge.data_checks import DataIssues, TrainingAlerts
from model import load_model
from nanoforge.checkpoint import write_json
from nanoforge.lora import add_lora
from nanoforge.quantize import quantize
from train_sft import Config, State, make_epochs, noisy_embeddings

TINY = os.path.join(ROOT, 'data', 'tiny')
FAST = ['--sample_rows=0', '--report_to=none', '--matmul=float32', '--device=cpu', '--logging_steps=1', '--eval_on_start=false']


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def questions(count=24, held_out=4, path='qa.jsonl'):
    rows = [{'messages': [{'role': 'user', 'content': p['question']}, {'role': 'assistant', 'content': p['answer']}], 'metadata': split}
            for split, n in (('train', count), ('eval', held_out)) for p in facts.problems('train', n, split)]
    Path(path).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def sft(*args):
    """train_sft.py in this process: its metrics."""
    return train_sft.main(parse(Config, [*FAST, *map(str, args)]))


def script(*args, **more):
    return subprocess.run([sys.executable, os.path.join(ROOT, 'train_sft.py'), *FAST, *map(str, args)], capture_output=True, text=True,
                          timeout=120, **more)


def weights(directory):
    return load_file(os.path.join(directory, 'model.safetensors'))


def log_lines(directory):
    return [json.loads(line) for line in Path(directory, 'log.jsonl').read_text().splitlines()]


def some_questions(count=6):
    return [{'question': p['question'], 'answer': p['answer']} for p in facts.problems('train', count, 3)]


def encoded(tokenizer, count=6, **settings):
    rows, findings = TokenizedRows(), DataIssues()
    records = [(0, to_record(row, f'row {i}')) for i, row in enumerate(some_questions(count))]
    encode_records(records, tokenizer, rows, findings, **settings)
    return rows.close()


# ---- loss --------------------------------------------------------------------------------------------------

PLAIN_DESCENT = ['--optimizer=sgd', '--learning_rate=1', '--lr_scheduler=constant', '--warmup_steps=0', '--weight_decay=0', '--max_grad_norm=0',
                 '--eval_fraction=0', '--eval_strategy=no', '--max_steps=1', '--output_dir=o']


def one_step(*args):
    """(the log line of a single step of plain gradient descent on six questions, {name: gradient})."""
    Path('six.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in some_questions()))
    sft(*PLAIN_DESCENT, '--dataset_path=six.jsonl', *args)
    start, end = weights(TINY), weights('o')
    return next(line for line in log_lines('o') if 'grad_norm' in line), {name: start[name].float() - end[name] for name in end}


def padded(rows):
    """x, y (6, T) of the six questions, a row each, y -1 where nothing is learned."""
    T = int(rows.lengths.max()) - 1
    x, y = torch.zeros(6, T, dtype=torch.int64), torch.full((6, T), -1)
    for b in range(6):
        ids, targets = (torch.tensor(part.tolist()) for part in rows[b])
        x[b, :len(ids) - 1], y[b, :len(ids) - 1] = ids[:-1], torch.where(targets[1:] > 0, ids[1:], -1)
    return x, y


@pytest.mark.parametrize('how', [['--batch-size=6', '--grad-accum=1'], ['--batch-size=2', '--grad-accum=3']])
def test_loss_and_gradient_are_those_of_transformers(how):
    from transformers import AutoModelForCausalLM
    line, gradient = one_step(*how)
    theirs, rows = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), encoded(load_model('tiny')[1])
    x, y = padded(rows)
    # their labels are shifted inside, and padding is masked
    ids = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    labels = torch.cat([torch.full_like(y[:, :1], -100), torch.where(y >= 0, y, -100)], 1)
    for b in range(6):
        ids[b, int(rows.lengths[b]) - 1] = int(rows[b][0][-1])
    mask = torch.arange(ids.size(1)) < torch.tensor(rows.lengths)[:, None]
    reference = theirs(input_ids=ids, attention_mask=mask.long(), labels=labels)
    reference.loss.backward()
    assert abs(line['loss'] - reference.loss.item()) < 1e-5
    assert line['mean_token_accuracy'] == pytest.approx((reference.logits[:, :-1].argmax(-1) == y)[y >= 0].float().mean().item())
    for name, p in theirs.named_parameters():
        if name in gradient:                            # a tied head has no weights of its own
            assert torch.allclose(gradient[name], p.grad, atol=1e-5, rtol=1e-4), name
    norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm().item()
    assert torch.stack([grad.norm() for grad in gradient.values()]).norm().item() == pytest.approx(norm, rel=1e-5)
    assert line['grad_norm'] == pytest.approx(norm, rel=1e-4)       # one float32 sum of a million squares


def test_packed_rows_give_the_same_loss_and_gradient():
    model, tokenizer = load_model('tiny')
    rows, results = encoded(tokenizer), []
    for items, packed in (([[i] for i in range(6)], False), ([[0, 3, 5], [1, 2], [4]], True)):
        model.zero_grad()
        batch = pack_documents([[rows[i] for i in item] for item in items], torch.device('cpu'), one_row=False, packed=packed)
        assert (batch.positions is None) != packed
        stats = model.token_stats(model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions), batch.targets)
        loss = -stats['logp'].sum()
        loss.backward()
        results.append((loss.item(), int(stats['correct'].sum()), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, correct, gradient), (packed_loss, packed_correct, packed_gradient) = results
    assert loss == pytest.approx(packed_loss, rel=1e-5) and correct == packed_correct
    assert torch.allclose(gradient, packed_gradient, atol=1e-4 * gradient.abs().max())
    # and the script packs them so
    plain, packed = one_step('--batch-size=6', '--grad-accum=1'), one_step('--batch-size=6', '--grad-accum=1', '--packing', '--max_length=256')
    assert plain[0]['loss'] == pytest.approx(packed[0]['loss'], rel=1e-5) == pytest.approx(loss / rows.targets.sum(), rel=1e-5)
    assert plain[0]['num_tokens'] == packed[0]['num_tokens'] and all(torch.allclose(plain[1][name], packed[1][name], atol=1e-5) for name in plain[1])


def test_label_smoothing_is_that_of_cross_entropy():
    line, gradient = one_step('--batch-size=6', '--grad-accum=1', '--label_smoothing=0.1')
    model, tokenizer = load_model('tiny')
    x, y = padded(encoded(tokenizer))
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1, label_smoothing=0.1)
    expected.backward()
    assert line['loss'] == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(gradient['model.' + name], p.grad, atol=1e-5, rtol=1e-4), name


def test_neftune_noise_is_bounded_and_only_in_training():
    model, tokenizer = load_model('tiny')
    rows, cfg = encoded(tokenizer, 40), parse(Config, ['--neftune_noise_alpha=5'])
    short, long = int(rows.lengths.argmin()), int(rows.lengths.argmax())
    batch = pack_documents([[rows[short]], [rows[long]]], torch.device('cpu'))
    noises = (noisy_embeddings(cfg, model, batch) - model.embed_tokens(batch.idx))[0].abs()
    lengths = [int(rows.lengths[i]) - 1 for i in (short, long)]
    for noise, n in zip(noises.split(lengths), lengths, strict=True):
        limit = 5 / (n * model.config.n_embd) ** 0.5
        assert 0.98 * limit < noise.max() <= 1.001 * limit
    logs = []
    for alpha in (0, 50):
        sft('--dataset_path', questions(8), '--max_steps=1', '--learning_rate=1e-12', '--output_dir', f'o{alpha}', f'--neftune_noise_alpha={alpha}')
        logs.append({key: line[key] for line in log_lines(f'o{alpha}') for key in ('loss', 'eval_loss') if key in line})
    assert logs[0]['eval_loss'] == pytest.approx(logs[1]['eval_loss'], rel=1e-6) and abs(logs[0]['loss'] - logs[1]['loss']) > 1e-3


# ---- batches -----------------------------------------------------------------------------------------------

def test_the_step_does_not_depend_on_how_the_batch_is_cut():
    data = questions()
    # plain descent, so that weights differ as gradients do: Adam blows rounding up to a step
    # where a gradient is nearly 0
    common = ['--dataset_path', data, '--max_steps=3', '--optimizer=sgd', '--learning_rate=0.1', '--eval_strategy=no']
    sft(*common, '--output_dir=a', '--per_device_train_batch_size=8', '--gradient_accumulation_steps=1')
    sft(*common, '--output_dir=b', '--per_device_train_batch_size=1', '--gradient_accumulation_steps=8')
    done = script(*common, '--output_dir=c', '--per_device_train_batch_size=4', '--gradient_accumulation_steps=1', '--num-gpus=2')
    assert done.returncode == 0, done.stderr
    start, a, b, c = (weights(directory) for directory in (TINY, 'a', 'b', 'c'))
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-5 and (a[name] - c[name]).abs().max() < 1e-5, name
    assert max((a[name] - start[name].float()).abs().max() for name in a) > 1e-3
    losses = [[line['loss'] for line in log_lines(directory) if 'grad_norm' in line] for directory in 'abc']
    assert np.allclose(losses[0], losses[1], atol=1e-5) and np.allclose(losses[0], losses[2], atol=1e-5)


def epochs_of(*args, weights=(1.0,), ranks=1, count=50):
    rows = encoded(load_model('tiny')[1], count)
    cfg = parse(Config, ['--max_length=384', *args])
    return cfg, make_epochs(cfg, rows, [Source(name='x', weight=weight) for weight in weights], SimpleNamespace(world_size=ranks))


def rows_of(epochs, epoch):
    steps = [epochs.of_step(step) for step in range(epoch * epochs.per_epoch, (epoch + 1) * epochs.per_epoch)]
    return [i for step in steps for item in step for i in (item if isinstance(item, list) else [item])]


@pytest.mark.parametrize('args', [[], ['--group_by_length'], ['--packing']])
def test_an_epoch_sees_every_row_once(args):
    cfg, epochs = epochs_of('--batch-size=4', '--grad-accum=2', *args)
    for epoch in range(2):
        assert sorted(rows_of(epochs, epoch)) == list(range(50))
    assert epochs.of_step(0) != epochs.of_step(epochs.per_epoch)


def test_packing_and_grouping_lower_padding():
    ways = ([], ['--group_by_length'], ['--packing'])
    waste = [train_sft.padding(*epochs_of('--batch-size=8', '--grad-accum=1', *args, count=1000)) for args in ways]
    assert waste[0] > waste[1] and waste[0] > waste[2]
    epochs = epochs_of('--packing')[1]
    assert all(epochs.length(item) <= 384 for item in epochs.items) and len(epochs.items) < 50


def test_a_step_counts_its_targets_and_tokens_over_ranks():
    rows = encoded(load_model('tiny')[1], 50)
    for args in ([], ['--packing']):
        cfg = parse(Config, ['--max_length=384', '--batch-size=2', '--grad-accum=2', *args])
        runs = [SimpleNamespace(rank=rank, world_size=2, device=torch.device('cpu')) for rank in range(2)]
        epochs = make_epochs(cfg, rows, [Source(name='rows.jsonl')], runs[0])
        parts = [train_sft.get_batch(cfg, rows, epochs, run, 0) for run in runs]
        assert epochs.size == 8 and parts[0][1:] == parts[1][1:]
        batches = [batch for part in parts for batch in part[0]]
        assert sum(batch.targets.numel() for batch in batches) == parts[0][1] and sum(batch.idx.numel() for batch in batches) == parts[0][2]


def test_weights_of_data_sets_and_drop_last():
    epochs = epochs_of(weights=[2.5])[1]
    first, second = np.bincount(rows_of(epochs, 0)), np.bincount(rows_of(epochs, 1))
    assert first.sum() == 125 and set(first) == {2, 3} and not np.array_equal(first, second)
    assert epochs_of('--batch-size=8', '--grad-accum=1')[1].per_epoch == 7
    assert epochs_of('--batch-size=8', '--grad-accum=1', '--dataloader_drop_last')[1].per_epoch == 6
    with pytest.raises(UserError, match='50 rows are fewer than the 256 of one optimizer step'):
        epochs_of('--batch-size=64', '--dataloader_drop_last')


# ---- the hold-out ------------------------------------------------------------------------------------------

def held_out_by(*args):
    """The held-out ones among 200 questions and 200 plain texts, by a run that learns them."""
    cfg = parse(Config, ['--dataset_path=rows.jsonl', *args])
    found = []
    for number, record in train_sft.read_records(cfg, cfg.sources(), DataIssues(), Ear()):
        found += [record.completion if isinstance(record.completion, str) else record.prompt[-1]['content']] * (record.split == 'eval')
    return found


def test_rows_are_held_out_by_their_prompt_and_texts_by_what_they_say():
    asked, texts = [f'Who is {i}?' for i in range(200)], [f'This is text {i}.' for i in range(200)]
    Path('rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in [{'question': ask, 'answer': 'Tom.'} for ask in asked] +
                                                                           [{'text': text} for text in texts]))
    found = held_out_by()
    assert found == [ask for ask in asked if is_held_out([{'role': 'user', 'content': ask}], 0.1)] + [
        text for text in texts if is_held_out(text, 0.1)]
    assert 8 < len(set(found) & set(asked)) < 35 and 8 < len(set(found) & set(texts)) < 35 and held_out_by('--seed=7') == found
    assert held_out_by('--eval_fraction=0') == []


def test_a_run_of_an_earlier_version_keeps_its_split():
    asked = [f'Who is {i}?' for i in range(60)]
    Path('rows.jsonl').write_text(''.join(json.dumps({'question': ask, 'answer': 'Tom.'}) + '\n' for ask in asked))
    sft('--dataset_path=rows.jsonl', '--max_steps=1', '--output_dir=o')
    saved = json.loads(Path('o/run_config.json').read_text())
    assert saved['config']['data']['split_rule'] == 'prompt'
    del saved['version'], saved['config']['data']['split_rule']
    saved['config']['data']['eval_fraction'] = None     # as these runs said that nothing was chosen
    write_json('o/run_config.json', saved)
    sft('--resume', '--output_dir=o', '--max_steps=2')
    held_out = sum(legacy_sft([{'role': 'user', 'content': ask}], 0.1, 42) for ask in asked)
    assert held_out != sum(is_held_out([{'role': 'user', 'content': ask}]) for ask in asked)
    lines = log_lines('o')
    assert [line['run']['rows'] for line in lines if 'run' in line][-1] == 60 - held_out


# ---- rows --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mask, max_length, max_prompt, kept, targets, lost', [
    ('0011', 9, None, 'abcd', '0011', ''), ('00110', 9, None, 'abcd', '0011', ''), ('0000', 9, None, '', '', 'fully masked rows'),
    ('1000', 9, None, '', '', 'fully masked rows'), ('00011', 4, None, 'bcde', '0011', 'prompts trimmed from the left'),
    ('00011', 3, None, 'cde', '011', 'prompts trimmed from the left'), ('00011', 2, None, '', '', 'completions that do not fit'),
    ('00011', 9, 1, 'cde', '011', 'prompts trimmed from the left'), ('0110011', 5, None, 'cdefg', '00011', 'earlier turns not learned'),
    ('0110011', 4, None, 'defg', '0011', 'earlier turns not learned'), ('111', 9, None, 'abc', '111', '')])
def test_rows_that_are_too_long(mask, max_length, max_prompt, kept, targets, lost):
    ids, left, what = truncate(list('abcdefg'[:len(mask)]), [c == '1' for c in mask], max_length, max_prompt)
    assert (''.join(ids), ''.join('01'[t] for t in left), what) == (kept, targets, lost)


def test_what_is_lost_is_counted_and_said(capsys):
    long = {'question': 'Where is Oslo? ' * 40, 'answer': 'Here.'}
    Path('qa.json').write_text(json.dumps([long, {'question': 'Why?', 'answer': 'Because. ' * 60}, {'question': 'Who?', 'answer': 'Tom.'}]))
    sft('--dataset_path=qa.json', '--max_length=64', '--max_steps=1', '--output_dir=o', '--eval_fraction=0')
    said = capsys.readouterr().out
    assert re.search(r'1 prompts trimmed from the left: --max_length=\d+ would keep', said)
    assert re.search(r'1 completions that do not fit: dropped: max_length=64 is too short, --max_length=\d+ would hold every row', said)
    assert 'eval_loss nan' in said and '"metadata": "eval"' in said
    assert [line['eval_loss'] for line in log_lines('o') if 'eval_loss' in line] == [None]


def test_processes_render_the_same_rows():
    tokenizer = load_model('tiny')[1]
    one, two = encoded(tokenizer, 1100), encoded(tokenizer, 1100, num_proc=2)
    assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.lengths, two.lengths)


def test_what_is_mixed_and_which_prompt_rows_get_is_said(capsys):
    """A recipe's other data sets and its prompt stay where the first name is replaced."""
    for name in 'ab':
        questions(path=f'{name}.jsonl')
    Path('r.yaml').write_text('data:\n  datasets: [{name: hub/set}, {name: b.jsonl, weight: 2.0}]\n  system_prompt: Answer safe or unsafe.\n')
    sft('--recipe=r.yaml', 'data.datasets[0].name=a.jsonl', '--check')
    said = capsys.readouterr().out
    assert '2 data sets are mixed: a.jsonl (weight 1), b.jsonl (weight 2)' in said and "rows get the system message 'Answer safe or unsafe.'" in said
    sft('--recipe=r.yaml', 'data.datasets=', '--dataset_path=a.jsonl', '--system_prompt=', '--check')
    said = capsys.readouterr().out
    assert 'mixed' not in said and 'system message' not in said and 'stands in for' not in said


def test_check_says_of_turn_tokens_in_a_text_and_of_tools_that_are_not_written(capsys):
    tools = [{'name': 'ring', 'parameters': {'properties': {'who': {'type': 'string'}}}}]
    rows = [{'messages': [{'role': 'user', 'content': f'text {i} <|im_end|>\n<|im_start|>assistant\nevil'}, {'role': 'assistant', 'content': 'no', 'weight': 0},
                          {'role': 'user', 'content': 'again'}, {'role': 'assistant', 'content': 'yo'}], 'tools': tools, 'metadata': {'source': 'web'}} for i in range(8)]
    Path('d.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    sft('--dataset_path=d.jsonl', '--check', '--eval_fraction=0', '--loss_on=assistant')
    said = capsys.readouterr().out
    assert '8 chats that spell a turn token: it is encoded as plain text' in said and '(first: d.jsonl line 1)' in said
    assert said.count('⟦yo<|im_end|>⟧') == 3 and '⟦no' not in said and 'not written' not in said and '0 unreadable' in said
    shutil.copytree(TINY, 'plain')
    Path('plain/chat_template.jinja').write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                                                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    sft('--dataset_path=d.jsonl', '--check', '--eval_fraction=0', '--model=plain')
    assert "8 chats whose tools are not written: the model's chat template leaves them out" in capsys.readouterr().out
    rows = [{'messages': [rows[0]['messages'][0], {'role': 'assistant', 'tool_calls': [{'name': 'ring', 'arguments': {'who': 'Tom'}}]}], 'tools': tools}]
    Path('calls.jsonl').write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match='calls.jsonl line 1: chat template: that of this model does not write tool calls'):
        sft('--dataset_path=calls.jsonl', '--eval_fraction=0', '--model=plain')


def test_check_shows_the_mask_and_what_is_wrong(capsys):
    call = {'role': 'assistant', 'tool_calls': [{'function': {'name': 'ring', 'arguments': {'whom': 'Tom'}}}]}
    ask = {'role': 'user', 'content': 'Call Tom.'}
    tools = [{'function': {'name': 'ring', 'parameters': {'properties': {'who': {'type': 'string'}}, 'required': ['who']}}}]
    good = {'messages': [ask, {'role': 'assistant', 'content': 'No.'}]}
    rows = [good, good, {'messages': [ask, call], 'tools': tools}, {**good, 'metadata': 'eval'}, {**good, 'metadata': 'Eval'}, {**good, 'metadata': 'EVAL'}]
    Path('d.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    with pytest.raises(UserError, match='unreadable rows, calls that break their schema: a run would stop here'):
        sft('--dataset_path=d.jsonl', '--check', '--eval_fraction=0')
    said = capsys.readouterr().out
    assert '<|im_start|>assistant\n⟦No.<|im_end|>⟧' in said
    assert "2 unreadable rows" in said and "(first: d.jsonl line 5: metadata: 'Eval' must be exactly 'eval'" in said
    assert "\n  unreadable rows: d.jsonl line 6: metadata: 'EVAL' must be" in said
    assert 'd.jsonl line 3: ring is called without who' in said and '1 rows repeated in training' in said
    assert 'd.jsonl line 4 is d.jsonl line 1' in said
    with pytest.raises(UserError, match="line 5: metadata: 'Eval' must be"):
        sft('--dataset_path=d.jsonl')
    assert sft('--dataset_path=d.jsonl', '--skip_bad_rows', '--max_steps=1', '--output_dir=o')['step'] == 1


def test_check_names_twenty_rows_and_counts_the_rest(capsys):
    Path('d.jsonl').write_text('{"question": "Who?", "answer": "Tom."}\n' + '{"messages": []}\n' * 25)
    with pytest.raises(UserError, match='a run would stop here'):
        sft('--dataset_path=d.jsonl', '--check', '--eval_fraction=0')
    said = capsys.readouterr().out
    assert 'd.jsonl line 21:' in said and 'd.jsonl line 22:' not in said and '  unreadable rows: 5 more\n' in said


def test_a_mistake_is_one_line_and_exit_status_2():
    Path('bad.jsonl').write_text('{"messages": []}\n')
    done = script('--dataset_path=bad.jsonl')
    assert done.returncode == 2
    assert done.stderr == 'train_sft.py: error: bad.jsonl line 1: messages: an empty list; --skip_bad_rows leaves such rows out\n'
    assert not os.path.exists('models')


# ---- runs --------------------------------------------------------------------------------------------------

def wait_for(path, words, process):
    deadline = time.monotonic() + 60
    while not (os.path.exists(path) and words in Path(path).read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize('number, how', [(signal.SIGKILL, []), (signal.SIGTERM, ['--ema=0.9', '--dropout=0.1', '--packing'])])
def test_a_killed_run_ends_as_if_it_had_not_been(number, how):
    common = ['--dataset_path', questions(40), '--epochs=3', '--batch-size=4', '--grad-accum=2', '--learning_rate=1e-3', '--save_steps=4',
              '--eval_steps=9', '--max_length=128', *how]
    sft(*common, '--output_dir=whole')
    command = [sys.executable, os.path.join(ROOT, 'train_sft.py'), *FAST, *common, '--output_dir=cut']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for('cut/log.jsonl', '"step": 9,', process)
    process.send_signal(number)
    out = process.communicate()[0]
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    assert number == signal.SIGKILL or '--output_dir=cut --resume' in out
    sft('--resume', '--output_dir=cut')
    assert Path('cut/model.safetensors').read_bytes() == Path('whole/model.safetensors').read_bytes()
    last = [max(Path(name).glob('checkpoint-*'), key=lambda path: int(path.name[11:])) for name in ('cut', 'whole')]
    for file in ('model.safetensors', 'optimizer.safetensors'):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes()
    steps = [[(line['step'], line['loss']) for line in log_lines(name) if 'grad_norm' in line] for name in ('cut', 'whole')]
    assert steps[0] == steps[1]


def test_theta_checkpoints_are_numbered_on(capsys):
    data = questions(12)
    theta = ['--recipe', os.path.join(ROOT, 'recipes/training/sft/theta.yaml'), '--dataset_path', data, '--batch-size=4', '--grad-accum=1']
    sft(*theta, '--epochs=2', '--warmup-steps=500', '--checkpoint-dir=models')
    assert 'warm-up of 500 steps in a run of 6' in capsys.readouterr().out
    first = Path('models/theta_checkpoint_epoch_2/model.safetensors').read_bytes()
    assert {'model.safetensors', 'optimizer.safetensors', 'trainer_state.json'} <= set(os.listdir('models/theta_checkpoint_epoch_1'))
    state = json.loads(Path('models/theta_checkpoint_epoch_1/trainer_state.json').read_text())
    assert state['epoch'] == 1 and state['metrics']['eval_loss'] > 0
    sft(*theta, '--epochs=1', '--load-checkpoint=models/theta_checkpoint_epoch_2', '--checkpoint-dir=models')
    assert Path('models/theta_checkpoint_epoch_2/model.safetensors').read_bytes() == first
    assert os.path.exists('models/theta_checkpoint_epoch_3/model.safetensors') and os.path.exists('models/best')
    assert {line['epoch'] for line in log_lines('models') if 'eval_loss' in line} == {3.0}
    sft(*theta, '--epochs=1', '--load-checkpoint=models/theta_checkpoint_epoch_3', '--checkpoint-dir=more', '--eval_on_start')
    assert {line['epoch'] for line in log_lines('more') if 'eval_loss' in line} == {3.0, 4.0}
    assert 'theta_checkpoint_epoch_4' in os.listdir('more')


def test_a_limit_of_prompts_above_the_longest_row_can_be_resumed():
    limits = '--max_length=300', '--max_prompt_length=200'
    sft('--dataset_path', questions(8), *limits, '--max_steps=1', '--output_dir=o')
    assert sft('--resume', '--output_dir=o', '--max_steps=2')['step'] == 2


def test_texts_without_a_prompt_are_shown_from_their_first_token(capsys):
    rows = [{'text': f'There were {i} cats.', 'metadata': 'train' if i else 'eval'} for i in range(8)]
    with open('texts.jsonl', 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    sft('--dataset_path=texts.jsonl', '--max_steps=1', '--sample_rows=1', '--output_dir=o')
    assert '--- examples at step 1' in capsys.readouterr().out


@pytest.mark.parametrize('how', [['--use_lora'], ['--use_lora', '--load_in_4bit'], ['--use_lora', '--load_in_8bit']])
def test_lora(how):
    sft('--dataset_path', questions(8), *how, '--max_steps=2', '--learning_rate=1e-2', '--output_dir=o', '--save_merged',
        '--save_only_model')
    assert os.path.exists('o/adapter_model.safetensors') and not os.path.exists('o/model.safetensors')
    adapted, merged, base = load_model('o')[0], load_model('o/merged')[0], load_model('tiny')[0]
    idx = torch.arange(1, 40)[None]
    assert torch.allclose(adapted(idx), merged(idx), atol=1e-4) and not torch.allclose(adapted(idx), base(idx), atol=1e-2)
    assert sft('--resume', '--output_dir=o', '--max_steps=3')['step'] == 3
    assert sft('--dataset_path', 'qa.jsonl', '--use_lora', '--load-checkpoint=o', '--max_steps=1', '--output_dir=p')['step'] == 1


@pytest.mark.parametrize('bits', [4, 8])
def test_an_adapter_over_a_quantised_layer_counts_once(bits):
    layer = add_lora(quantize(load_model('tiny')[0], bits), r=4, alpha=8).layers[0].self_attn.q_proj
    [adapter] = layer.lora.values()
    torch.nn.init.normal_(adapter.lora_B, std=0.1)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    expected = x @ (layer.base_weight() + 2 * adapter.lora_B @ adapter.lora_A).T
    assert torch.allclose(layer(x), expected, atol=1e-4) and not torch.allclose(layer(x), x @ layer.base_weight().T, atol=1e-2)


def test_full_fine_tuning_learns_and_the_best_model_is_in_the_root():
    rows = [{'question': f'Is {name} in the {room}?', 'answer': 'I do not know.', 'metadata': 'eval' if name in NAMES[:4] else 'train'}
            for name in NAMES for room in ROOMS[:4]]
    Path('here.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    result = sft('--dataset_path=here.jsonl', '--epochs=4', '--batch-size=8', '--grad-accum=1', '--eval_steps=8', '--eval_on_start',
                 '--gradient_checkpointing', '--dataloader_num_workers=2', '--output_dir=o', '--learning_rate=2e-4')
    lines = log_lines('o')
    losses = [line['eval_loss'] for line in lines if 'eval_loss' in line]
    assert min(losses) < 0.2 * losses[0] and result['best_eval_loss'] == pytest.approx(min(losses))
    logged = [line for line in lines if 'grad_norm' in line]
    assert list(logged[0]) == ['step', 'loss', 'grad_norm', 'tokens_per_second', 'learning_rate', 'epoch', 'mean_token_accuracy', 'num_tokens']
    assert {'train_loss', 'train_runtime', 'train_steps_per_second'} <= lines[-1].keys()
    assert lines[-1]['train_loss'] == pytest.approx(np.mean([line['loss'] for line in logged]))
    again = sft('--dataset_path=here.jsonl', '--model=o', '--max_steps=1', '--learning_rate=1e-9', '--output_dir=p')
    assert again['eval_loss'] == pytest.approx(min(losses), abs=1e-4)


def test_early_stopping_freeze_and_nothing_overwritten(capsys):
    common = ['--dataset_path', questions(), '--output_dir=o', '--batch-size=8', '--grad-accum=1']
    result = sft(*common, '--epochs=50', '--eval_steps=1', '--patience=2', '--learning_rate=0.05', '--freeze', 'embed_tokens', 'layers.0',
                 '--lr_scheduler_type=plateau')
    assert result['step'] < 50 and 'no better evaluation in 2' in capsys.readouterr().out
    start, now = weights(TINY), weights('o/last')
    changed = {name for name in now if not torch.equal(now[name], start[name].float())}
    assert changed and not any('embed_tokens' in name or 'layers.0.' in name for name in changed)
    assert any('layers.1.' in name for name in changed)
    before = Path('o/log.jsonl').read_bytes()
    sft(*common, '--max_steps=1')
    assert Path('o/earlier-1/log.jsonl').read_bytes() == before


def test_the_start_is_evaluated_and_is_no_result():
    """Training that only spoils: the best is of what was trained, and patience counts from there."""
    result = sft('--dataset_path', questions(), '--output_dir=o', '--batch-size=8', '--grad-accum=1', '--epochs=50', '--eval_steps=1',
                 '--patience=2', '--learning_rate=0.5', '--warmup_steps=0', '--eval_on_start')
    evaluated = [line for line in log_lines('o') if 'eval_loss' in line]
    start, *after = (line['eval_loss'] for line in evaluated)
    assert evaluated[0]['step'] == 0 and start < min(after) == result['best_eval_loss']
    assert result['step'] == len(after) == 1 + after.index(min(after)) + 2


def test_without_held_out_rows_nothing_is_judged(capsys):
    """Patience does not stop the run, and the plateau does not lower its rate,
    for evaluations that see no row."""
    result = sft('--dataset_path', questions(8, 0), '--eval_fraction=0', '--output_dir=o', '--batch-size=4', '--grad-accum=1', '--max_steps=8',
                 '--eval_steps=1', '--patience=2', '--lr_scheduler_type=plateau', '--warmup_steps=0', '--learning_rate=1e-4')
    assert result['step'] == 8 and 'have nothing to judge by' in capsys.readouterr().out
    assert {line['learning_rate'] for line in log_lines('o') if 'grad_norm' in line} == {1e-4}


def test_augmentation_is_of_training_rows_only(capsys):
    pytest.importorskip('data.augment')
    sft('--dataset_path', questions(), '--augment', '--max_steps=1', '--output_dir=o')
    said = capsys.readouterr().out
    assert '4 held-out rows as they were' in said
    assert int(re.search(r'(\d+) rows to train on, 4 held out', said)[1]) > 30


def test_tensorboard_has_what_the_guide_promises():
    sft('--dataset_path', questions(), '--max_steps=2', '--output_dir=models/x', '--report_to=tensorboard', '--sample_rows=1',
        '--eval_steps=2')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [folder] = Path('logs').iterdir()
    tags = EventAccumulator(str(folder)).Reload().Tags()
    assert {'loss', 'eval_loss', 'learning_rate', 'grad_norm', 'num_tokens'} <= set(tags['scalars'])
    assert 'examples/text_summary' in tags['tensors'] and 'gradients/layers.0.mlp.up_proj.weight' in tags['histograms']


def test_nohup_keeps_the_exit_status():
    done = script('--dataset_path=none.jsonl', '--nohup')
    assert done.returncode == 0 and re.search(r'PID \d+; follow it: tail -f logs/training_\d{8}_\d{6}\.log', done.stdout)
    log = Path(done.stdout.split()[-1])
    deadline = time.monotonic() + 60
    while 'exit status' not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert 'none.jsonl: no such file' in log.read_text() and log.read_text().endswith('exit status 2\n')


def test_older_launchers():
    questions()
    launch = [sys.executable, '-m', 'torch.distributed.launch', '--nproc_per_node=2', os.path.join(ROOT, 'train_sft.py'), '--distributed']
    done = subprocess.run([*launch, *FAST, '--dataset_path=qa.jsonl', '--max_steps=1', '--output_dir=o'], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert '2 processes' in done.stdout and os.path.exists('o/model.safetensors')


# ---- what is said ------------------------------------------------------------------------------------------

class Ear:
    def __init__(self):
        self.heard = []

    def print0(self, text):
        self.heard.append(text)


def test_red_flags_are_named_once():
    ear = Ear()
    flags, state = TrainingAlerts(ear), State()
    flags.train(0.0, 0.0), flags.train(0.0, 0.0), flags.train(float('nan'), 1.0), flags.train(0.5, 1.0)
    for step, (train, held_out) in enumerate([(1.0, 2.0), (0.8, 2.1), (0.6, 2.2), (0.5, float('nan'))], 1):
        state.step, state.loss_sum = step, state.loss_sum + train
        flags.evaluation(state, held_out)
    assert [re.search('nothing is learned|not finite|overfitting|no held-out', text)[0] for text in ear.heard] == [
        'nothing is learned', 'not finite', 'overfitting', 'no held-out']


@pytest.mark.parametrize('args, words', [
    ('--bf16 --fp16', 'exclude each other'), ('--load_in_4bit', 'needs use_lora=true'), ('--load_in_4bit --load_in_8bit', 'choose one'),
    ('training.deepspeed_config=ds.json', '--num_gpus=N is data parallel'), ('--epochs=0', 'above 0'), ('--max_steps=0', 'max_steps'),
    ('--max_length=10 --max_prompt_length=10', 'no room'), ('--checkpoint_name=last', '{step} or {epoch}'), ('--lora_dropout=1', 'below 1'),
    ('--patience=2 --eval_strategy=no', 'eval_strategy=no'), ('--lr_scheduler=plateau --eval_strategy=no', 'eval_strategy=no'), ('--freeze norm --use_lora', 'frozen anyway'),
    ('data.datasets[0].weight=2', 'needs a name'),
    ('--eval_strategy=sometimes', 'steps, epoch, no'), ('--lerning_rate=1', 'learning_rate')])
def test_contradictions_are_refused(args, words, capsys):
    with pytest.raises(SystemExit, match='2'):
        parse(Config, args.split())
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


def test_a_typed_precision_beats_the_recipe(capsys):
    recipe = os.path.join(ROOT, 'recipes/training/sft/llama3_3B_lora.yaml')
    cfg = parse(Config, ['--recipe', recipe, '--fp16'])
    assert (cfg.bf16, cfg.fp16, cfg.autocast_dtype()) == (False, True, 'float16')
    assert parse(Config, ['--recipe', recipe]).autocast_dtype() == 'bfloat16'
    assert parse(Config, ['--no-bf16']).autocast_dtype() == 'float32' and parse(Config, []).autocast_dtype() == 'auto'
    sft('--dataset_path', questions(8), '--bf16', '--max_steps=1', '--output_dir=o')
    assert 'bfloat16 on a CPU means float32' in capsys.readouterr().out


def test_learning_rates_by_mode():
    tiny, large = (SimpleNamespace(num_params=lambda count=count: count) for count in (1_400_000, 3_000_000_000))
    for args, model, rate in (([], tiny, 1.5e-3), ([], large, 1e-5), (['--use_lora'], large, 1e-4),
                              (['--use_lora', '--load_in_4bit'], large, 2e-4),
                              (['--learning_rate=3e-6'], large, 3e-6)):
        cfg = parse(Config, args)
        train_sft.resolve_defaults(cfg, model, [], Ear())
        assert (cfg.learning_rate, cfg.num_train_epochs, cfg.group_by_length) == (rate, 3, False)


def test_both_spellings_are_one_setting():
    for args, name, value in (('--batch-size 2', 'per_device_train_batch_size', 2), ('--grad-accum=3', 'gradient_accumulation_steps', 3),
                              ('--max-seq-length 5', 'max_length', 5), ('--epochs 2', 'num_train_epochs', 2),
                              ('--checkpoint-dir x', 'output_dir', 'x'),
                              ('training.save_steps=7', 'save_steps', 7), ('data.datasets[0].name=y', 'datasets', None)):
        assert value is None or getattr(parse(Config, args.split()), name) == value
        assert name in parse(Config, args.split()).typed


@pytest.mark.parametrize('name', sorted(path.name for path in Path(ROOT, 'recipes/training/sft').glob('*.yaml')))
def test_shipped_recipes_explain_every_parameter(name):
    path = os.path.join(ROOT, 'recipes/training/sft', name)
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        explained = re.search(r':\s.*  # \w|:  # \w', line)
        assert not line or line.startswith('#') or re.fullmatch(r'\w+:', line) or explained, f'{path} line {number}'
    assert as_dict(parse(Config, ['--recipe', path]))['training']['algorithm'] == 'sft'


def test_a_rate_that_would_rise_is_refused():
    cfg = Config(min_lr=0.1, learning_rate=0.01, num_train_epochs=1.0)
    with pytest.raises(UserError, match='min_lr=0.1 is above learning_rate=0.01'):
        train_sft.resolve_defaults(cfg, SimpleNamespace(num_params=lambda: 1), [Source(name='x')], SimpleNamespace(print0=print))


def test_continued_pretraining_learns_every_token_of_its_texts_once():
    """Packed, without a template; a text longer than a row goes on in the next one, which begins with its last token."""
    texts = ['The lamp is on. ' * n + 'Kai is at home.' for n in (1, 3, 40, 2, 5, 1)]
    Path('texts.jsonl').write_text(''.join(json.dumps({'body': text, 'metadata': 'eval' if n == 5 else 'train'}) + '\n'
                                           for n, text in enumerate(texts)))
    tokenizer = load_model('tiny')[1]
    cfg = parse(Config, [*FAST, '--algorithm=cpt', '--text_column=body', '--dataset_path=texts.jsonl', '--max_length=48'])
    assert cfg.packing and cfg.loss_on == 'all'
    rows, issues = TokenizedRows(), DataIssues()
    records = [(0, text_record({'body': text}, 'row', 'body')) for text in texts]
    encode_records(records, tokenizer, rows, issues, 'all', 48, cut_texts=True)
    rows.close()
    encoded = [tokenizer.encode(text) for text in texts]
    learned = [ids[mask.astype(bool)][1:] for ids, mask in (rows[i] for i in range(len(rows)))]
    assert sum(map(len, learned)) >= sum(len(ids) - 1 for ids in encoded) and len(rows) > len(texts)
    pieces = [rows[i][0].tolist() for i in range(len(rows)) if i >= 2][:-(len(texts) - 3)]
    joined = pieces[0] + [token for piece in pieces[1:] for token in piece[1:]]
    assert joined[:len(encoded[2])] == encoded[2] and all(len(piece) <= 48 for piece in pieces)

    metrics = sft('--algorithm=cpt', '--text_column=body', '--dataset_path=texts.jsonl', '--max_length=48', '--max_steps=12',
                  '--eval_steps=6', '--eval_on_start', '--learning_rate=1e-3', '--output_dir=out', '--batch_size=2',
                  '--gradient_accumulation_steps=1')
    losses = [line['eval_loss'] for line in log_lines('out') if 'eval_loss' in line]
    assert losses[-1] < losses[0] - 0.5 and metrics['eval_loss'] == losses[-1]
    with pytest.raises(UserError, match="no column 'text' of the text to learn, but body"):
        text_record({'body': 'a'}, 'row 1', 'text')
    for wrong in (['--system_prompt=Be brief.'], ['--dataset_path=texts.jsonl', '--augment']):
        with pytest.raises(SystemExit):
            parse(Config, [*FAST, '--algorithm=cpt', *wrong])


def test_continued_pretraining_without_data_reads_the_embedded_plays(capsys, monkeypatch):
    texts = [row for _, row in read_rows('plays')]
    assert [row['metadata'] for row in texts] == ['train'] * 200 + ['eval'] * 20 and len({row['text'] for row in texts}) == 220
    assert re.match(r'SCENE 1\. .*\nEnter .* and .*\.\n\n', texts[0]['text']) and texts[0]['text'] != texts[200]['text']
    monkeypatch.setitem(EMBEDDED_SIZES, 'plays', (12, 1))
    metrics = sft('--algorithm=cpt', '--max_steps=8', '--learning_rate=1e-3', '--batch_size=4', '--gradient_accumulation_steps=1', '--eval_on_start',
                  '--warmup_ratio=0', '--max_length=96', '--output_dir=out')
    said = capsys.readouterr().out
    assert 'the embedded plays' in said and re.search(r'plays: .* rows to train on, .* held out', said)
    before, after = (line['eval_loss'] for line in log_lines('out') if 'eval_loss' in line)
    assert after < before - 0.1 and metrics['eval_loss'] == after
