"""Scores any checkpoint: what it gives to the right answers, and what it answers itself.

    python evaluate.py --model-path models/theta_checkpoint_epoch_26
    python evaluate.py models/theta_checkpoint_epoch_1 models/theta_checkpoint_epoch_2 --data qa.json --output-dir compared
    python evaluate.py tiny --task arithmetic

Perplexity and token accuracy are of the right answers, read with the prompt before them; everything else compares what the model
writes after the prompt with the right answer. Without --data and --task the held-out rows are those of the data that the checkpoint
was trained on (its run_config.json), or of the embedded tool-calling set. Leaves evaluation.json, .md and .html, pictures inside.
"""
import importlib
import os
import time
import types
from dataclasses import dataclass, field, replace
from pathlib import Path

from configurator import UserError, as_dict, closest, from_dict, parse, run_script, setting

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = ('evaluation.json', 'evaluation.md', 'evaluation.html')


@dataclass
class Config:
    # models
    model_path: str = setting('', also=('model', 'base_model_name'))  # directory, adapter, hub name, or `tiny`, the default
    models: list[str] = setting([], positional=True)  # more of them, to be set side by side
    load_in_4bit: bool = False  # quantise the linear layers to NF4 as they are read
    load_in_8bit: bool = False  # quantise them to 8 bits
    # data
    data: str = setting('', also=('dataset_path', 'test_data'))  # file, directory, embedded set (devices, toolcalls, questions) or hub data set
    subset: str | None = None  # the configuration of a hub data set
    split: str = 'eval'  # rows marked so in their metadata; where a file marks none, all. Or train, all, or a split of a hub data set
    prompt_column: str | None = None  # column of the question; found out if not set
    answer_column: str | None = None  # column of the answer; found out if not set
    system_prompt: str | None = None  # system message of every row, a template over its columns
    skip_bad_rows: bool = False  # leave out rows that cannot be read
    task: str | None = None  # in place of data: problems of data/tasks, each judged by the task's own reward
    num_samples: int | None = setting(None, also=('limit', 'max_samples'))  # at most so many rows, the first; of a task 200 if not set
    baselines: bool = False  # beside the models: the most frequent answer of the training rows, and that to the nearest question
    # generation
    batch_size: int = setting(32, also=('per_device_eval_batch_size',))  # rows at a time; lower it when memory runs out
    max_new_tokens: int | None = None  # of a response; twice the longest right answer, at least 32, if not set
    temperature: float = 0.0  # 0 = always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability; 1 = all
    repetition_penalty: float = 1.0  # above 1: tokens that were there already become less likely; 1 = off
    seed: int = 42  # of what is drawn
    # output
    output_dir: str | None = setting(None, also=('output',))  # folder of the results; evaluation/<name of the first model> if not set
    num_examples: int = 5  # best, worst, and of each kind of error, in the report
    # machine
    device: str = 'auto'  # auto = cuda, mps or cpu; or cuda:1, ...
    dtype: str = setting('auto', choices=('auto', 'float32', 'bfloat16', 'float16'))  # on a GPU; float32 on a CPU
    matmul: str = setting('auto', choices=('auto', 'float32', 'bf16'))  # products on a CPU; auto = bf16 where the processor has it

    def check(self):
        for name, least in (('num_samples', 1), ('batch_size', 1), ('max_new_tokens', 1), ('num_examples', 0), ('temperature', 0),
                            ('top_k', 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f'{name} must be {least} or more, not {getattr(self, name)}')
        if not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise UserError(f'top_p={self.top_p} must be above 0 and at most 1, repetition_penalty={self.repetition_penalty} above 0')
        if self.task and self.data:
            raise UserError(f'--task={self.task} brings its own problems, and --data={self.data} others: leave one out')
        for name in ('subset', 'prompt_column', 'answer_column', 'system_prompt'):
            if getattr(self, name) is not None and not self.data:
                raise UserError(f'{name} says how to read --data, which is not given')
        if self.task and self.split != 'eval':
            raise UserError(f'--task={self.task} has held-out problems only: leave out --split={self.split}')
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported

import torch
from tqdm import tqdm

from nanoforge import metrics
from nanoforge import scorecard
from nanoforge.checkpoint import read_manifest, move_aside, write_json, write_text
from data.chat import encode, parse_tool_calls
from data.tokenized import pieces_of
from data.formats import Record, Source
from nanoforge.data_checks import DataIssues
from model import load_model
from nanoforge.run import describe_device, explain_out_of_memory, seed_for, setup
from sample import generate
from train_sft import Config as Training, records_of, sources_of


@dataclass
class Row:
    """One question, what is right, and what became of it. prompt and answer are token ids, the stop token of the answer included."""
    where: str
    question: str
    reference: str
    prompt: list
    answer: list
    wanted: list                # the right tool calls, [{'name', 'arguments'}]
    problem: dict | None = None # of a task
    loss: float = 0.0           # nats over all tokens of the answer
    hits: int = 0               # tokens of the answer that are the likeliest after the right ones before them
    response: str = ''
    tokens: list = field(default_factory=list)
    stopped: bool = True
    called: list | None = field(default_factory=list)   # the tool calls in the response; None where they cannot be read
    correct: bool = False
    error: str | None = None    # a key of metrics.ERRORS


# ---- data -------------------------------------------------------------------------------------------------------------------

@dataclass
class Data:
    """What is evaluated. training: the other rows of the same data, for trivial solvers; task and problems: of a task, one a record."""
    name: str
    records: list
    training: list
    task: types.ModuleType | None = None
    problems: list | None = None


def read_data(cfg, model_path, run):
    """What the command names, else what the run that wrote the checkpoint held out, else the embedded tool calls -> Data."""
    saved = {} if cfg.data or cfg.task else saved_run(model_path)
    if name := cfg.task or task_trained_on(saved):
        return read_task(name, cfg.num_samples or 200)
    settings, findings = data_settings(cfg, saved, model_path), DataIssues()
    sources = sources_of(settings, run)
    if cfg.split not in ('train', 'eval', 'all'):
        sources = [replace(source, split=cfg.split) for source in sources]
    records = [record for _, record in records_of(settings, sources, findings, run)]
    name = ', '.join(source.name for source in sources)
    for line in findings.lines():
        print(f'{name}: {line}')
    if not cfg.skip_bad_rows:
        findings.stop()
    training, held_out = ([record for record in records if record.split == split] for split in ('train', 'eval'))
    chosen = {'train': training, 'all': records}.get(cfg.split, held_out or records)
    if not chosen:
        raise UserError(f'{name}: no row of the split {cfg.split!r} among {len(records)}')
    if not held_out and cfg.split == 'eval':
        print(f'{name}: no row is marked as held out (metadata "eval"), so all {len(records):,} are evaluated')
    return Data(name, chosen[:cfg.num_samples], training if held_out else [])


def read_task(name, count):
    """data/tasks/<name>.py, which must have what an evaluation needs, and its problems -> Data."""
    folder = os.path.join(HERE, 'data', 'tasks')
    known = sorted(file[:-3] for file in os.listdir(folder) if file.endswith('.py') and '\ndef reward(' in Path(folder, file).read_text())
    if name not in known:
        raise UserError(f"there is no task '{name}'{closest(name, known)} (tasks: {', '.join(known)})")
    task = importlib.import_module(f'data.tasks.{name}')
    parts = [(split, task.problems(split, size, 0)) for split, size in (('eval', count), ('train', 1000))]
    records = [[Record(task.prompt(problem), [{'role': 'assistant', 'content': task.solution(problem)}], problem.get('tools'), split,
                       f'{name} problem {i}') for i, problem in enumerate(problems)] for split, problems in parts]
    return Data(f'the task {name}', *records, task, parts[0][1])


def saved_run(model_path):
    """The run_config.json of the run that wrote a checkpoint, {} where there is none."""
    folder = Path(model_path).absolute()
    return next(filter(None, (read_manifest(place / 'run_config.json') for place in (folder, *folder.parents[:2]))), {})


def task_trained_on(saved):
    """The task that a run of train_rl.py drew its problems from, None where it had other data."""
    data = saved['config']['data'] if saved.get('script') == 'train_rl.py' else {}
    return None if data.get('datasets') else data.get('task')


def data_settings(cfg, saved, model_path):
    """Which rows there are, and which of them are held out, as settings of train_sft.py: those of the run that wrote the checkpoint, where
    no data is named."""
    if cfg.data:
        source = Source(cfg.data, cfg.subset, prompt_column=cfg.prompt_column, answer_column=cfg.answer_column)
        return Training(datasets=[source], eval_fraction=0.0, system_prompt=cfg.system_prompt)
    if saved.get('script') == 'train_sft.py':
        return from_dict(Training, saved['config'])
    print(f'{model_path}: no run_config.json of train_sft.py says what to evaluate on, so the embedded tool calls are '
          'taken; --data and --task name something else')
    return Training(dataset_path='devices')


def text_of(tokenizer, ids):
    """Token ids without their stop token -> text."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.stop_ids else ids).strip()


def encode_records(tokenizer, records, problems=None):
    """Records -> Rows with the ids that training uses and the sampler sees."""
    rows, chats = [], encode(tokenizer, [pieces(tokenizer, record) for record in records])
    for record, chat, problem in zip(records, chats, problems or [None] * len(records), strict=True):
        start = chat.mask.index(True) or 1              # a text that follows no prompt is asked for by its first token
        answer = [token for token, target in zip(chat.ids[start:], chat.mask[start:]) if target]
        messages = record.prompt if isinstance(record.prompt, list) else [{'role': 'user', 'content': record.prompt}]
        question = next((message['content'] for message in reversed(messages) if message['role'] == 'user'), '')
        calls = record.completion[-1].get('tool_calls') or [] if isinstance(record.completion, list) else []
        reference = text_of(tokenizer, answer)
        wanted = [call['function'] for call in calls] or read_calls(reference) or []
        rows.append(Row(record.where, question, reference, chat.ids[:start], answer, wanted, problem))
    return rows


def pieces(tokenizer, record):
    try:
        return pieces_of(tokenizer, record, 'completion')
    except UserError as error:
        raise UserError(f'{record.where}: {error}') from None


def read_calls(text):
    """The tool calls in a text, None where they cannot be read."""
    try:
        return parse_tool_calls(text)
    except ValueError:
        return None


# ---- the model --------------------------------------------------------------------------------------------------------------

def read_answers(model, rows, batch_size, run):
    """Sets loss and hits of each row: the model reads prompt and right answer. Prompts that are too long lose their beginning."""
    context, order = model.config.block_size, sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))
    with tqdm(total=len(rows), desc='reading answers', unit=' rows', disable=None) as bar, torch.inference_mode(), run.autocast():
        for at in range(0, len(order), batch_size):
            batch = order[at:at + batch_size]
            idx = torch.zeros(len(batch), max(min(len(row.prompt) + len(row.answer), context + 1) for row in batch), dtype=torch.long)
            targets = torch.full_like(idx, -1)
            for r, row in enumerate(batch):
                ids = (row.prompt + row.answer)[-context - 1:]
                idx[r, :len(ids)] = torch.tensor(ids)
                targets[r, len(ids) - len(row.answer):len(ids)] = idx[r, len(ids) - len(row.answer):len(ids)]
            idx, targets = idx[:, :-1].to(model.device), targets[:, 1:].to(model.device)
            stats = model.token_stats(model.hidden(idx), targets)
            for row, loss, hits in zip(batch, (-stats['logp'].sum(-1)).tolist(), stats['correct'].sum(-1).tolist()):
                row.loss, row.hits = loss, hits
            bar.update(len(batch))


def answer_questions(model, tokenizer, rows, cfg, run, max_new_tokens, room):
    """Sets response, tokens, stopped and called of each row: the model writes what follows the prompt, of which the end is kept that
    leaves `room` tokens of its context."""
    order = sorted(rows, key=lambda row: len(row.prompt))
    with tqdm(total=len(rows), desc='answering', unit=' rows', disable=None) as bar, run.autocast():
        for at in range(0, len(order), cfg.batch_size):
            batch = order[at:at + cfg.batch_size]
            prompts = [row.prompt[-(model.config.block_size - room):] for row in batch]
            samples = generate(model, prompts, max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty, tokenizer.stop_ids,
                               seed=seed_for(cfg.seed, 'evaluate', at))
            columns = (tensor.tolist() for tensor in (samples.tokens, samples.lengths, samples.stopped))
            for row, tokens, length, stopped in zip(batch, *columns):
                row.tokens, row.stopped = tokens[:length - stopped], stopped
                row.response = text_of(tokenizer, tokens[:length])
                row.called = read_calls(row.response)
            bar.update(len(batch))


def checked_rows(rows, context, room):
    """Rows whose answer fits into the context, the others counted and said; UserError where none does."""
    fitting = [row for row in rows if len(row.answer) < context]
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    if not fitting:
        raise UserError(f'every right answer is longer than the model\'s context of {context} tokens: nothing can be evaluated')
    if len(fitting) < len(rows):
        print(f'{len(rows) - len(fitting):,} of {len(rows):,} rows are left out: their answer alone does not fit the context of '
              f'{context} tokens')
    cut = sum(len(row.prompt) + max(len(row.answer), room) > context for row in fitting)
    if cut:
        print(f'{cut:,} of {len(fitting):,} prompts lose their beginning where they do not fit the context of {context} tokens together '
              f'with the answer or {room} tokens for a response (longest prompt and answer: {longest})')
    return fitting


# ---- the command ------------------------------------------------------------------------------------------------------------

def trivial(solver, name, rows, training, task):
    """The result of a solver that only looks at the training rows."""
    responses = solver([row.question for row in rows], [(row.question, row.reference) for row in training])
    rows = [Row(row.where, row.question, row.reference, row.prompt, row.answer, row.wanted, row.problem, response=response,
                called=read_calls(response)) for row, response in zip(rows, responses)]
    return metrics.result_of(name, rows, task, read=False)


def evaluate(cfg, name, data, run):
    """One model on the data -> (its result, its Rows, its tokenizer)."""
    begun = time.perf_counter()
    model, tokenizer = load_model(name, run.device, run.dtype, cfg.load_in_4bit, cfg.load_in_8bit)
    if tokenizer is None:
        raise UserError(f'{name} has no tokenizer beside its weights: copy tokenizer.json there')
    model.set_matmul(run.matmul)
    rows = encode_records(tokenizer, data.records, data.problems)
    longest = max(len(row.answer) for row in rows)
    allowed = cfg.max_new_tokens or max(32, 2 * longest)
    room = min(allowed, longest, max(1, model.config.block_size // 2))
    rows = checked_rows(rows, model.config.block_size, room)
    print(f'{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters; {len(rows):,} rows, at most {allowed} new tokens '
          'each')
    with explain_out_of_memory('--batch_size'):
        read_answers(model, rows, cfg.batch_size, run)
        answer_questions(model, tokenizer, rows, cfg, run, allowed, room)
    result = metrics.result_of(name, rows, data.task, max_new_tokens=allowed, seconds=time.perf_counter() - begun)
    return result, rows, tokenizer


def main(cfg):
    names = [name for name in (cfg.model_path, *cfg.models) if name] or ['tiny']
    run = setup(cfg.device, cfg.dtype, cfg.matmul)
    if run.world_size > 1:
        raise UserError('evaluate.py runs in one process: start it without torchrun')
    print(describe_device(run))
    out_dir = Path(cfg.output_dir or os.path.join('evaluation', os.path.basename(os.path.normpath(names[0]))))
    earlier_results(out_dir)
    data, results = read_data(cfg, names[0], run), []
    if cfg.baselines and not data.training:
        raise UserError(f'--baselines look at training rows, and {data.name} has none: mark them with metadata "train", others with "eval"')
    for name in names:
        result, rows, tokenizer = evaluate(cfg, name, data, run)
        results.append(result)
    if cfg.baselines:
        training = encode_records(tokenizer, data.training)
        results += [trivial(metrics.majority, 'most frequent answer', rows, training, data.task),
                    trivial(metrics.nearest, 'answer to the nearest question', rows, training, data.task)]
    if len(counts := {len(result['rows']) for result in results}) > 1:
        print(f'WARNING: from {min(counts):,} to {max(counts):,} rows fitted the contexts of these models: their scores are not of the same rows')
    print(scorecard.text_table(*scorecard.score_rows(results)))
    print(scorecard.text_table(*scorecard.error_rows(results)))
    evaluation = {'written_by': 'nanoforge', 'data': data.name, 'num_rows': len(rows), 'settings': as_dict(cfg), 'results': results}
    write_results(out_dir, evaluation, cfg.num_examples)
    print(f'report: {out_dir / "evaluation.html"} (also .md and .json)')
    return results[0]['scores']


def earlier_results(out_dir):
    """What an earlier evaluation left in a folder; UserError where something else has these names."""
    there = [out_dir / name for name in RESULTS if (out_dir / name).exists()]
    if there and not read_manifest(out_dir / 'evaluation.json'):
        raise UserError(f'{there[0]} was not written by evaluate.py: choose another --output_dir')
    return there


def write_results(out_dir, evaluation, num_examples):
    """The JSON, Markdown and HTML files; those of an earlier evaluation move to earlier-1/ in the folder."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if there := earlier_results(out_dir):
        print(f'{out_dir} held an earlier evaluation: it is now in {move_aside(out_dir, there)}')
    markdown, html = scorecard.pages_of(evaluation, num_examples)
    write_json(out_dir / 'evaluation.json', evaluation)
    write_text(out_dir / 'evaluation.md', markdown)
    write_text(out_dir / 'evaluation.html', html)


if __name__ == '__main__':
    run_script(main, cfg)
