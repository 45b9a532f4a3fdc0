"""Scores any checkpoint: what it gives to the right answers, and what it answers itself.

    python evaluate.py --model-path models/theta_checkpoint_epoch_26
    python evaluate.py models/epoch_1 models/epoch_2 --data qa.json --output-dir compared
    python evaluate.py tiny --task arithmetic

Perplexity and token accuracy are of the right answers, read with the prompt before them; everything else
compares what the model writes after the prompt with the right answer. Without --data and --task the held-out
rows are those of the data that the checkpoint was trained on, which it remembers, or of the embedded
tool-calling set. Leaves evaluation.json, .md and .html, pictures inside.
"""
import importlib
import tempfile
import time
import types
from dataclasses import dataclass, field, replace
from pathlib import Path

from configurator import UserError, as_dict, closest, parse, run_script, setting

TASKS = Path(__file__).resolve().parent / 'data' / 'tasks'
RESULTS = ('evaluation.json', 'evaluation.md', 'evaluation.html')
EVAL_FRACTION = 0.1         # train_sft.py's, where its configuration sets none
DEFAULT_DATA = 'google/mobile-actions'      # train_sft.py's, where its configuration names none


@dataclass
class Config:
    # models
    model_path: str = setting('', also=('model', 'base_model_name'))  # directory, adapter, hub name, or tiny
    models: list[str] = setting([], positional=True)  # more of them, to be set side by side
    load_in_4bit: bool = False  # quantise the linear layers to NF4 as they are read
    load_in_8bit: bool = False  # quantise them to 8 bits
    # data
    data: str = setting('', also=('dataset_path', 'test_data'))  # file, directory, embedded or hub data set
    subset: str | None = None  # the configuration of a hub data set
    split: str = 'eval'  # rows marked so in their metadata; where a file marks none, all. Or train, all, or
                         # a split of a hub data set
    prompt_column: str | None = None  # column of the question; found out if not set
    answer_column: str | None = None  # column of the answer; found out if not set
    system_prompt: str | None = None  # system message of every row, a template over its columns
    skip_bad_rows: bool = False  # leave out rows that cannot be read
    task: str | None = None  # in place of data: problems of data/tasks, each judged by the task's own reward
    num_samples: int | None = setting(None, also=('limit', 'max_samples'))  # at most so many rows, the first;
                                                                            # of a task 200 if not set
    baselines: bool = False  # beside the models: the most frequent answer of the training rows, and that to
                             # the nearest question
    # generation
    batch_size: int = setting(32, also=('per_device_eval_batch_size',))  # rows at a time; lower it when
                                                                         # memory runs out
    max_new_tokens: int | None = None  # of a response; twice the longest right answer, at least 32, if unset
    temperature: float = 0.0  # 0 = always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability; 1 = all
    repetition_penalty: float = 1.0  # above 1: tokens that were there already become less likely; 1 = off
    seed: int = 42  # of what is drawn
    # output
    output_dir: str | None = setting(None, also=('output',))  # folder of the results;
                                                              # evaluation/NAME_OF_THE_FIRST_MODEL if not set
    num_examples: int = 5  # best, worst, and of each kind of error, in the report
    # device
    device: str = 'auto'  # auto = cuda, mps or cpu; or cuda:1, ...
    dtype: str = setting('auto', choices=('auto', 'float32', 'bfloat16', 'float16'))  # on a GPU; a CPU has
                                                                                      # float32
    matmul: str = setting('auto', choices=('auto', 'float32', 'bf16'))  # products on a CPU; auto = bf16 where
                                                                        # the processor has it

    def check(self):
        least = {'num_samples': 1, 'batch_size': 1, 'max_new_tokens': 1, 'num_examples': 0, 'temperature': 0,
                 'top_k': 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UserError(f'{name} must be {bound} or more, not {value}')
        if not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise UserError(f'top_p={self.top_p} must be above 0 and at most 1, '
                            f'repetition_penalty={self.repetition_penalty} above 0')
        if self.task and self.data:
            raise UserError(f'--task={self.task} brings its own problems, and --data={self.data} others: '
                            'leave one out')
        for name in ('subset', 'prompt_column', 'answer_column', 'system_prompt'):
            if getattr(self, name) is not None and not self.data:
                raise UserError(f'{name} says how to read --data, which is not given')
        if self.task and self.split != 'eval':
            raise UserError(f'--task={self.task} has held-out problems only: leave out --split={self.split}')
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')


def main(cfg):
    """Every model on the same rows, the report of all -> the scores of the first."""
    names = [name for name in (cfg.model_path, *cfg.models) if name] or ['tiny']
    run = setup(cfg.device, cfg.dtype, cfg.matmul)
    if run.world_size > 1:
        raise UserError('evaluate.py runs in one process: start it without torchrun')
    print(describe_device(run))
    out_dir = Path(cfg.output_dir or Path('evaluation', Path(names[0]).name))
    earlier_results(out_dir)            # files of something else are found before the work, not after
    data = read_data(cfg, names[0])
    make_folder(out_dir)
    if cfg.baselines and not data.training:
        raise UserError(f'--baselines look at training rows, and {data.name} has none: mark them with '
                        'metadata "train", others with "eval"')

    results = []
    for name in names:
        result, rows, tokenizer = evaluate(cfg, name, data, run)
        results.append(result)
    if cfg.baselines:
        training = encode_records(tokenizer, data.training)
        for name, solver in (('most frequent answer', metrics.majority),
                             ('answer to the nearest question', metrics.nearest)):
            answered = answer_by(solver, rows, training)
            results.append(metrics.result_of(name, answered, data.task, read=False))
    counts = [len(result['rows']) for result in results]
    if min(counts) < max(counts):
        print(f'WARNING: from {min(counts):,} to {max(counts):,} rows fitted the contexts of these models: '
              'their scores are not of the same rows')

    print(eval_report.text_table(*eval_report.score_table(results)))
    print(eval_report.text_table(*eval_report.error_table(results)))
    evaluation = {'written_by': 'nanoforge', 'data': data.name, 'num_rows': len(rows),
                  'settings': as_dict(cfg), 'results': results}
    write_results(out_dir, evaluation, cfg.num_examples)
    print(f'report: {out_dir / "evaluation.html"} (also .md and .json)')
    return results[0]['scores']


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.chat import encode, parse_tool_calls
from data.formats import Record, Source, read_rows, split_of_row, to_record
from data.splits import is_held_out, legacy_sft
from data.tokenized import pieces_of, remarks_on
from model import load_model
from nanoforge import eval_report, metrics
from nanoforge.checkpoint import move_aside, read_manifest, run_of, write_json, write_text
from nanoforge.data_checks import DataIssues
from nanoforge.run import describe_device, explain_out_of_memory, seed_for, setup
from sample import generate


def evaluate(cfg, name, data, run):
    """One model on the data -> (its result, its Rows, its tokenizer)."""
    started = time.perf_counter()
    model, tokenizer = load_model(name, run.device, run.dtype, cfg.load_in_4bit, cfg.load_in_8bit)
    if tokenizer is None:
        raise UserError(f'{name} has no tokenizer beside its weights: copy tokenizer.json there')
    model.set_matmul(run.matmul)
    rows = encode_records(tokenizer, data.records, data.problems)
    context, longest = model.config.block_size, max(len(row.answer) for row in rows)
    max_new_tokens = cfg.max_new_tokens or max(32, 2 * longest)
    # A prompt that is too long is cut to make room for the longest right answer, not for all tokens that are
    # allowed: these are more than a right answer needs, and the prompt would lose its beginning for nothing.
    room = min(max_new_tokens, longest, max(1, context // 2))
    rows = rows_that_fit(rows, context, room)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f'{name}: {parameters / 1e6:.2f}M parameters; {len(rows):,} rows, '
          f'at most {max_new_tokens} new tokens each')
    with explain_out_of_memory('--batch_size'):
        read_answers(model, rows, cfg.batch_size, run)
        answer_questions(cfg, model, tokenizer, rows, run, max_new_tokens, room)
    result = metrics.result_of(name, rows, data.task, max_new_tokens=max_new_tokens,
                               seconds=time.perf_counter() - started)
    return result, rows, tokenizer


# ---- data -------------------------------------------------------------------------------------------------

@dataclass
class Data:
    """What is evaluated: records, or the problems of a task, one a record."""
    name: str
    records: list
    training: list              # the other rows of the same data, for baselines
    task: types.ModuleType | None = None
    problems: list | None = None


def read_data(cfg, model_path):
    """What the command names, else what the run that wrote the checkpoint held out, else the embedded tool
    calls -> Data."""
    saved = {} if cfg.data or cfg.task else run_of(model_path)
    task = cfg.task or task_trained_on(saved)
    if task:
        return read_task(task, cfg.num_samples or 200)
    config, issues = data_config(cfg, saved, model_path), DataIssues()
    sources = sources_of(config)
    if cfg.split not in ('train', 'eval', 'all'):
        sources = [replace(source, split=cfg.split) for source in sources]
    records = read_records(sources, config, issues)
    name = ', '.join(source.name for source in sources)
    for line in issues.lines():
        print(f'{name}: {line}')
    if not cfg.skip_bad_rows:
        issues.stop()

    training = [record for record in records if record.split == 'train']
    held_out = [record for record in records if record.split == 'eval']
    chosen = {'train': training, 'all': records}.get(cfg.split, held_out or records)
    if not chosen:
        raise UserError(f'{name}: no row of the split {cfg.split!r} among {len(records)}')
    if not held_out and cfg.split == 'eval':
        print(f'{name}: no row is marked as held out (metadata "eval"), so all {len(records):,} are '
              'evaluated')
    return Data(name, chosen[:cfg.num_samples], training if held_out else [])


def read_task(name, count):
    """data/tasks/<name>.py, which must have what an evaluation needs, and its problems -> Data."""
    known = sorted(path.stem for path in TASKS.glob('*.py') if '\ndef reward(' in path.read_text('utf-8'))
    if name not in known:
        raise UserError(f"there is no task '{name}'{closest(name, known)} (tasks: {', '.join(known)})")
    task = importlib.import_module(f'data.tasks.{name}')

    def records_of(problems, split):
        return [Record(task.prompt(problem), [{'role': 'assistant', 'content': task.solution(problem)}],
                       problem.get('tools'), split, f'{name} problem {i}')
                for i, problem in enumerate(problems)]

    problems = task.problems('eval', count, 0)
    training = records_of(task.problems('train', 1000, 0), 'train')
    return Data(f'the task {name}', records_of(problems, 'eval'), training, task, problems)


def task_trained_on(saved):
    """The task that a run of train_rl.py drew its problems from, None where it had other data."""
    data = saved['config']['data'] if saved.get('script') == 'train_rl.py' else {}
    if data.get('datasets') or data.get('dataset_path'):
        return None
    return data.get('task')


def data_config(cfg, saved, model_path):
    """What is read, as the configuration that train_sft.py saves: that of the run, where no data is named."""
    if cfg.data:
        source = {'name': cfg.data, 'subset': cfg.subset, 'prompt_column': cfg.prompt_column,
                  'answer_column': cfg.answer_column}
        return {'data': {'datasets': [source], 'eval_fraction': 0.0, 'system_prompt': cfg.system_prompt},
                'training': {'seed': cfg.seed}}
    if saved.get('script') == 'train_sft.py':
        config = saved['config']
        if saved.get('version', 1) < 2:         # it held rows out by another rule
            config = {**config, 'data': {**config['data'], 'split_rule': 'legacy'}}
        return config
    print(f'{model_path}: no run_config.json of train_sft.py says what to evaluate on, so the embedded tool '
          'calls are taken; --data and --task name something else')
    return {'data': {'dataset_path': 'devices', 'eval_fraction': 0.0}, 'training': {'seed': cfg.seed}}


def sources_of(config):
    """The data sets that a configuration names, else those that train_sft.py takes by itself -> [Source]."""
    data, path = config['data'], config['data'].get('dataset_path')
    if path:
        names = [path] if Path(path).exists() else path.split(',')
        columns = {name: data.get(name) for name in ('prompt_column', 'answer_column')}
        return [Source(name.strip(), **columns) for name in names]
    if data.get('datasets'):
        return [Source(**source) for source in data['datasets']]
    if config['model']['base_model_name'] == 'tiny':
        return [Source('devices')]
    try:
        next(read_rows(DEFAULT_DATA))
        return [Source(DEFAULT_DATA)]
    except UserError as error:
        print(f'WARNING   {error}\nWARNING   evaluated on the EMBEDDED STAND-IN devices; --data names yours')
        return [Source('devices')]


def read_records(sources, config, issues):
    """Every row that can be read, on the side where the run had it -> [Record]; the others are issues."""
    data, seed = config['data'], config['training']['seed']
    fraction = EVAL_FRACTION if data.get('eval_fraction') is None else data['eval_fraction']
    records, held_out = [], 0
    for source in sources:
        for where, row in read_rows(source.name, source.split, source.subset):
            try:
                record = to_record(row, where, source, data.get('system_prompt'))
            except UserError as error:
                issues.add('unreadable rows', str(error))
                continue
            if split_of_row(row) is None:
                record.split = saved_split(record, fraction, seed, data.get('split_rule'))
                held_out += record.split == 'eval'
            records.append(record)
    if held_out:
        print(f'data      {held_out:,} rows without "metadata" are held out (--eval_fraction={fraction:g})')
    return records


def saved_split(record, fraction, seed, rule):
    """'train' or 'eval': the side on which train_sft.py had a row that does not say it. By the prompt, so
    that the same question is never on both sides; a plain text has none, and stands for itself."""
    if rule == 'legacy':
        held_out = legacy_sft(record.prompt, fraction, seed)
    else:
        held_out = is_held_out(record.prompt or record.completion, fraction)
    return 'eval' if held_out else 'train'


# ---- rows -------------------------------------------------------------------------------------------------

@dataclass
class Row:
    """One question, what is right, and what became of it. Token ids include the stop token of an answer."""
    where: str
    question: str
    reference: str
    prompt: list                # token ids
    answer: list                # token ids
    wanted: list                # the right tool calls, [{'name', 'arguments'}]
    problem: dict | None = None # of a task
    loss: float = 0.0           # nats over all tokens of the answer
    hits: int = 0               # tokens of the answer that are the likeliest after the right ones before them
    response: str = ''
    tokens: list = field(default_factory=list)          # of the response, without a stop token
    stopped: bool = True
    called: list | None = field(default_factory=list)   # its tool calls; None where they cannot be read
    correct: bool = False
    error: str | None = None    # a key of metrics.ERRORS


def encode_records(tokenizer, records, problems=None):
    """Records -> Rows with the ids that training uses and the sampler sees."""
    chats = encode(tokenizer, [render(tokenizer, record) for record in records])
    problems = problems or [None] * len(records)
    rows, issues = [], DataIssues()
    for record, chat, problem in zip(records, chats, problems, strict=True):
        for remark in remarks_on(tokenizer, record):
            issues.add(remark, record.where)
        if True not in chat.mask:
            issues.add('fully masked rows', record.where)
            continue
        start = chat.mask.index(True) or 1      # a text that follows no prompt: its first token asks for it
        answer = [token for token, is_target in zip(chat.ids[start:], chat.mask[start:]) if is_target]
        reference = text_of(tokenizer, answer)
        wanted = calls_of(record) or read_calls(reference) or []
        rows.append(Row(record.where, question_of(record), reference, chat.ids[:start], answer, wanted,
                        problem))
    for line in issues.lines():
        print(line)
    if not rows:
        raise UserError('no row has an answer to evaluate')
    return rows


def render(tokenizer, record):
    """The pieces of text of a record; a mistake in it is named with its place."""
    try:
        return pieces_of(tokenizer, record, 'completion')
    except UserError as error:
        raise UserError(f'{record.where}: {error}') from None


def question_of(record):
    """What the user said last."""
    if isinstance(record.prompt, str):
        return record.prompt
    questions = [message['content'] for message in record.prompt if message['role'] == 'user']
    return questions[-1] if questions else ''


def calls_of(record):
    """The tool calls of the right answer, [{'name', 'arguments'}]."""
    if isinstance(record.completion, str):
        return []
    return [call['function'] for call in record.completion[-1].get('tool_calls') or []]


def read_calls(text):
    """The tool calls in a text, None where they cannot be read."""
    try:
        return parse_tool_calls(text)
    except ValueError:
        return None


def text_of(tokenizer, ids):
    """Token ids without their stop token -> text."""
    if ids and ids[-1] in tokenizer.stop_ids:
        ids = ids[:-1]
    return tokenizer.decode(ids).strip()


def rows_that_fit(rows, context, room):
    """Rows whose answer fits into the context, the others counted and said; UserError where none does."""
    fitting = [row for row in rows if len(row.answer) < context]
    if not fitting:
        raise UserError(f'every right answer is longer than the model\'s context of {context} tokens: '
                        'nothing can be evaluated')
    if len(fitting) < len(rows):
        print(f'{len(rows) - len(fitting):,} of {len(rows):,} rows are left out: their answer alone does '
              f'not fit the context of {context} tokens')
    cut = sum(len(row.prompt) + max(len(row.answer), room) > context for row in fitting)
    if cut:
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
        print(f'{cut:,} of {len(fitting):,} prompts lose their beginning where they do not fit the context '
              f'of {context} tokens together with the answer or {room} tokens for a response '
              f'(longest prompt and answer: {longest})')
    return fitting


# ---- the model --------------------------------------------------------------------------------------------

def batches(rows, size, label):
    """Yields (number of its first row, rows), behind a progress bar."""
    with tqdm(total=len(rows), desc=label, unit=' rows', disable=None) as bar:
        for first in range(0, len(rows), size):
            batch = rows[first:first + size]
            yield first, batch
            bar.update(len(batch))


def read_answers(model, rows, batch_size, run):
    """Sets loss and hits of each row: the model reads prompt and right answer. Prompts that are too long lose
    their beginning."""
    rows = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))
    with torch.inference_mode(), run.autocast():
        for _, batch in batches(rows, batch_size, 'reading answers'):
            texts = [(row.prompt + row.answer)[-model.config.block_size - 1:] for row in batch]
            learned = [[-1] * (len(ids) - len(row.answer)) + row.answer for row, ids in zip(batch, texts)]
            idx, targets = padded(texts, 0), padded(learned, -1)        # (B, T + 1)
            hidden = model.hidden(idx[:, :-1].to(model.device))         # (B, T, C)
            stats = model.token_stats(hidden, targets[:, 1:].to(model.device))
            for row, logp, correct in zip(batch, stats['logp'], stats['correct']):     # (T,) each
                row.loss, row.hits = -logp.sum().item(), correct.sum().item()


def padded(rows, value):
    """Lists of token ids -> (B, longest), the shorter ones filled up at the end."""
    return pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=value)


def answer_questions(cfg, model, tokenizer, rows, run, max_new_tokens, room):
    """Sets response, tokens, stopped and called of each row: the model writes what follows the prompt, of
    which the end is kept that leaves `room` tokens of its context."""
    rows = sorted(rows, key=lambda row: len(row.prompt))
    with run.autocast():
        for first, batch in batches(rows, cfg.batch_size, 'answering'):
            prompts = [row.prompt[-(model.config.block_size - room):] for row in batch]
            samples = generate(model, prompts, max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
                               cfg.repetition_penalty, tokenizer.stop_ids,
                               seed=seed_for(cfg.seed, 'evaluate', first))
            for i, row in enumerate(batch):
                tokens = samples.tokens[i, :samples.lengths[i]].tolist()
                row.stopped = bool(samples.stopped[i])
                row.tokens = tokens[:-1] if row.stopped else tokens
                row.response = text_of(tokenizer, tokens)
                row.called = read_calls(row.response)


def answer_by(solver, rows, training):
    """Rows with the responses of a baseline (metrics.majority, .nearest), which sees training rows alone."""
    responses = solver([row.question for row in rows], [(row.question, row.reference) for row in training])
    return [replace(row, response=response, called=read_calls(response), tokens=[], stopped=True)
            for row, response in zip(rows, responses)]


# ---- results ----------------------------------------------------------------------------------------------

def earlier_results(out_dir):
    """What an earlier evaluation left in a folder; UserError where something else has these names."""
    paths = [out_dir / name for name in RESULTS if (out_dir / name).exists()]
    if paths and not read_manifest(out_dir / 'evaluation.json'):
        raise UserError(f'{paths[0]} was not written by evaluate.py: choose another --output_dir')
    return paths


def make_folder(out_dir):
    """UserError where nothing can be written into it: before the work, not after."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as error:
        raise UserError(f'cannot write {out_dir}: {error.strerror}; --output-dir names another '
                        'folder') from None


def write_results(out_dir, evaluation, num_examples):
    """The JSON, Markdown and HTML files; those of an earlier evaluation move to earlier-1/ in the folder."""
    if paths := earlier_results(out_dir):
        print(f'{out_dir} held an earlier evaluation: it is now in {move_aside(out_dir, paths)}')
    markdown, html = eval_report.evaluation_pages(evaluation, num_examples)
    write_json(out_dir / 'evaluation.json', evaluation)
    write_text(out_dir / 'evaluation.md', markdown)
    write_text(out_dir / 'evaluation.html', html)


if __name__ == '__main__':
    run_script(main, cfg)
