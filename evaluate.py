"""Scores any checkpoint: what it gives to the right answers, and what it answers itself.

    python evaluate.py --model-path models/theta_checkpoint_epoch_26
    python evaluate.py models/theta_checkpoint_epoch_1 models/theta_checkpoint_epoch_2 --data qa.json --output-dir compared
    python evaluate.py tiny --task arithmetic

Perplexity and token accuracy are of the right answers, read with the prompt before them; everything else compares what the model
writes after the prompt with the right answer. Without --data and --task the held-out rows are those of the data that the checkpoint
was trained on (its run_config.json), or of the embedded tool-calling set. Leaves evaluation.json, .md and .html, pictures inside.
"""
import importlib
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configurator import UserError, as_dict, closest, from_dict, parse, run, setting

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = ('evaluation.json', 'evaluation.md', 'evaluation.html')


@dataclass
class Config:
    # models
    model_path: str = setting('', also=('model', 'model_name', 'base_model_name'))  # directory, adapter, hub name, or `tiny`, which is the default
    models: list[str] = setting([], positional=True)  # more of them, to be set side by side
    load_in_4bit: bool = False  # quantise the linear layers to NF4 as they are read
    load_in_8bit: bool = False  # quantise them to 8 bits
    # data
    data: str = setting('', also=('dataset_path', 'test_data'))  # file, directory, embedded set (toolcalls, questions) or hub data set
    subset: str | None = None  # the configuration of a hub data set
    split: str = 'eval'  # rows marked so in their metadata; where a file marks none, all. Or train, all, or a split of a hub data set
    prompt_column: str | None = None  # column of the question; found out if not set
    answer_column: str | None = None  # column of the answer; found out if not set
    system_prompt: str | None = None  # system message of every row, a template over its columns
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
        for name, least in (('num_samples', 1), ('batch_size', 1), ('max_new_tokens', 1), ('num_examples', 0), ('temperature', 0), ('top_k', 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f'{name} must be {least} or more, not {getattr(self, name)}')
        if not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise UserError(f'top_p={self.top_p} must be above 0 and at most 1, repetition_penalty={self.repetition_penalty} above 0')
        if self.task and self.data:
            raise UserError(f'--task={self.task} brings its own problems, and --data={self.data} others: leave one out')
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported

import torch
from tqdm import tqdm

import metrics
import report
from checkpoint import read_own, set_aside, write_json, write_text
from data.chat import encode, parse_tool_calls, segments
from data.records import EMBEDDED, Record, Source, read_rows, to_record
from model import load_model
from runtime import describe_device, explain_out_of_memory, seed_for, setup
from sample import generate


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

def read_data(cfg, model_path):
    """What is to be evaluated -> (its name, Records held out, Records for training, task or None). The problem of a task's Record is
    its `where`."""
    if cfg.task:
        task = task_module(cfg.task)
        parts = {split: task.problems(split, count, cfg.seed) for split, count in (('eval', cfg.num_samples or 200), ('train', 1000))}
        records = {split: [Record(task.prompt(problem), [{'role': 'assistant', 'content': task.solution(problem)}],
                                  problem.get('tools'), split, problem) for problem in problems] for split, problems in parts.items()}
        return f'the task {cfg.task}', records['eval'], records['train'], task
    if cfg.data:
        sources, system_prompt = [Source(cfg.data, cfg.subset, prompt_column=cfg.prompt_column, answer_column=cfg.answer_column)], cfg.system_prompt
    else:
        sources, system_prompt = trained_on(model_path)
    records = [record for source in sources for record in read_source(source, cfg.split, system_prompt)]
    name = ', '.join(source.name for source in sources)
    held_out = [record for record in records if record.split == 'eval']
    training = [record for record in records if record.split != 'eval']
    chosen = {'train': training, 'all': records}.get(cfg.split, held_out or records)
    if not held_out and cfg.split == 'eval':
        print(f'{name}: no row is marked as held out (metadata "eval"), so all {len(records):,} are evaluated')
        training = []
    if not chosen:
        raise UserError(f'{name}: no row of the split {cfg.split!r} among {len(records)}')
    return name, chosen[:cfg.num_samples], training, None


def task_module(name):
    """data/tasks/<name>.py, which must have what an evaluation needs."""
    folder = os.path.join(HERE, 'data', 'tasks')
    known = sorted(file[:-3] for file in os.listdir(folder) if file.endswith('.py') and '\ndef reward(' in Path(folder, file).read_text())
    if name not in known:
        raise UserError(f"there is no task '{name}'{closest(name, known)} (tasks: {', '.join(known)})")
    return importlib.import_module(f'data.tasks.{name}')


def texts_of(tokenizer, ids):
    """Token ids without their stop token -> text."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.stop_ids else ids).strip()


def encode_records(tokenizer, records):
    """Records -> Rows with the ids that training uses and the sampler sees."""
    chats = [segments(tokenizer, record.prompt + record.completion, record.tools) if isinstance(record.prompt, list)
             else ([(record.prompt, False), (record.completion, True)], 0) for record in records]
    rows = []
    for record, chat in zip(records, encode(tokenizer, chats), strict=True):
        start = chat.mask.index(True)
        answer = [token for token, target in zip(chat.ids[start:], chat.mask[start:]) if target]
        messages = record.prompt if isinstance(record.prompt, list) else [{'role': 'user', 'content': record.prompt}]
        question = next((message['content'] for message in reversed(messages) if message['role'] == 'user'), '')
        reference = texts_of(tokenizer, answer)
        calls = record.completion[-1].get('tool_calls') or [] if isinstance(record.completion, list) else []
        is_problem = isinstance(record.where, dict)
        rows.append(Row('' if is_problem else record.where, question, reference, chat.ids[:start], answer,
                        [call['function'] for call in calls] or read_calls(reference) or [], record.where if is_problem else None))
    return rows


def read_calls(text):
    """The tool calls in a text, None where they cannot be read."""
    try:
        return parse_tool_calls(text)
    except ValueError:
        return None
