"""The whole way on one machine: a model from nothing, pretrained, fine-tuned, preferred, rewarded, in a team.

    bash scripts/tour.sh                            # two CPU cores, no network, under 20 minutes
    bash scripts/tour.sh --out_dir=out/mine --seed=2

Every stage is a command of one of the five scripts and begins with the checkpoint that the one before it
left; after each the same prompts are answered and the same held-out problems solved. out/tour/report.html
shows what every stage changed. What is stopped (Ctrl-C) or killed goes on by the same command: a stage that
has ended is not run again, one that was interrupted resumes.
"""
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import UserError, parse, run_script, setting
from data.tokenizer import read_json


@dataclass
class Config:
    out_dir: str = 'out/tour'       # all that the tour writes
    seed: int = setting(1337, min=0)        # of the data, new weights, data order and sampling
    quick: bool = False             # a few steps of each stage, which teach nothing: for tests of the tour

    def check(self):
        """UserError where out_dir holds another tour, or no tour."""
        os.chdir(ROOT)
        folder = Path(self.out_dir)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / 'tour.json').exists():
            raise UserError(f'{folder} holds something else than a tour: name another folder with --out_dir')
        saved, settings = self.saved()['settings'], self.settings()
        if saved != settings:
            raise UserError(f'{folder} holds a tour with {saved}, not {settings}: name another folder with '
                            '--out_dir, or type the same settings')

    def settings(self):
        return {'seed': self.seed, 'quick': self.quick}

    def saved(self):
        """What tour.json says, or that nothing has been done."""
        saved = read_json(os.path.join(self.out_dir, 'tour.json'))
        return saved or {'settings': self.settings(), 'stages': {}}


@dataclass
class Stage:
    name: str           # of its folder in out_dir
    title: str
    command: list       # script and flags
    seconds: int        # that it takes on two cores, about: its share of the bar
    folder: Path = None         # of its model; the data have none
    written: Path = None        # where its log.jsonl and pages are


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help answers at once

import torch
from tqdm import tqdm

from data.chat import prompt_ids
from data.corpus import Corpus, windows
from data.tasks import arithmetic, facts, plan_path
from data.tour import GRID, MAX_TURNS
from model import load_model
from nanoforge.checkpoint import write_json
from nanoforge.tour_page import tour_page
from sample import generate

BLOCK = 192             # tokens of a row, and of the model's context
MAX_NEW_TOKENS = 56     # of an answer
STEP = re.compile(r'^step +([\d,]+)/([\d,]+)')     # of a line that a script prints
HELD_OUT = 100          # problems of each kind that are solved after every stage


def stages(cfg):
    """[Stage] in their order."""
    out = shlex.quote(cfg.out_dir)

    def stage(name, title, seconds, flags, quick, folder=None):
        folder = folder or Path(cfg.out_dir, name)
        words = shlex.split(flags)
        if cfg.quick:
            words += shlex.split(quick)         # what is typed last counts
        written = folder.parent if folder.name == 'checkpoints' else folder
        return Stage(name, title, [*words, f'--seed={cfg.seed}', '--resume=auto'], seconds, folder, written)

    return [
        Stage('data', 'data and tokenizer', shlex.split(f'data/tour.py {out}/data --seed={cfg.seed}')
              + (['--num_texts=2000', '--num_chats=1000'] if cfg.quick else []), 30),
        stage('1-pretrain', 'pretraining', 180, f"""
            train_gpt.py --dataset={out}/data --out_dir={out}/1-pretrain
            --n_layer=4 --n_embd=128 --n_inner=384 --block_size={BLOCK} --batch_size=42
            --max_iters=300 --warmup_iters=20 --optimizer=muon --learning_rate=4e-3
            --lr_scheduler=linear --lr_decay_iters=300 --min_lr=0 --eval_interval=50 --eval_iters=5""", """
            --n_layer=1 --n_embd=32 --n_inner=32 --batch_size=4 --max_iters=4 --eval_interval=2
            --eval_iters=1 --log_interval=1 --sample_tokens=0 --no-tensorboard"""),
        stage('2-sft', 'fine-tuning', 170, f"""
            train_sft.py --model={out}/1-pretrain --dataset_path={out}/data/chats.jsonl
            --output_dir={out}/2-sft --packing --max_length={BLOCK} --per_device_train_batch_size=42
            --gradient_accumulation_steps=1 --max_steps=300 --optimizer=muon --learning_rate=3e-3
            --lr_scheduler_type=linear --eval_steps=50 --save_steps=50""", """
            --per_device_train_batch_size=2 --max_steps=40 --eval_steps=40 --logging_steps=1
            --sample_rows=0 --no-tensorboard"""),
        stage('3-dpo', 'preferences', 60, f"""
            train_dpo.py --model={out}/2-sft --output_dir={out}/3-dpo""", """
            --per_device_train_batch_size=2 --gradient_accumulation_steps=1 --max_steps=2
            --eval_samples=2 --max_eval_pairs=8 --logging_steps=1 --no-tensorboard"""),
        stage('4-grpo', 'reinforcement learning', 90, f"""
            train_rl.py --model={out}/3-dpo --output_dir={out}/4-grpo --max_steps=60 --save_steps=20""", """
            --per_device_train_batch_size=8 --gradient_accumulation_steps=1 --max_steps=2
            --eval_problems=4 --num_problems=16 --logging_steps=1 --no-tensorboard"""),
        stage('5-team', 'a team', 200, f"""
            train_agents.py recipes/training/agents/plan_path.yaml --model={out}/4-grpo env.rules=false
            training.output_dir={out}/5-team training.total_training_steps=40 training.val_freq=10
            training.validate_episodes={HELD_OUT}""", """
            training.total_training_steps=2 training.val_freq=2 training.validate_episodes=4
            training.epoch_size=2 training.train_sample_num=4 training.max_response_length=8
            --no-tensorboard""", Path(cfg.out_dir, '5-team', 'latest', 'checkpoints')),
    ]


def main(cfg):
    tour = Tour(cfg, stages(cfg))
    for stage in tour.stages:
        if not tour.ended(stage):
            tour.run(stage)
            results = examine(cfg, stage.folder) if stage.folder else {}
            tour.note(stage, **results, ended=True)
        if stage.folder:
            write_page(cfg, tour)       # the page so far
    tour.bar.close()
    minutes, cpu = (sum(tour.notes[stage.name][key] for stage in tour.stages) / 60
                    for key in ('seconds', 'cpu_seconds'))
    print(f'the tour has ended after {minutes:.1f} minutes ({cpu:.1f} of processor time): open '
          f'{cfg.out_dir}/report.html, or talk to the team: '
          f'python sample.py {shlex.quote(str(tour.stages[-1].folder))} --chat')


# ---- running the stages ------------------------------------------------------------------------------------

class Tour:
    """What has been done, in out_dir/tour.json, and the bar of the whole."""

    def __init__(self, cfg, stages):
        self.cfg, self.stages, self.path = cfg, stages, Path(cfg.out_dir, 'tour.json')
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'cannot make {cfg.out_dir}: {error.strerror}') from None
        self.notes = cfg.saved()['stages']
        self.child, self.signum = None, 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.stop)
        self.whole = sum(stage.seconds for stage in stages)
        self.began, self.shown = time.monotonic(), -1
        self.done = self.first = sum(stage.seconds for stage in stages if self.ended(stage))
        self.bar = tqdm(total=self.whole, initial=self.done, dynamic_ncols=True, leave=False,
                        bar_format='{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} to go',
                        disable=not (sys.stdout.isatty() and sys.stderr.isatty()))

    def ended(self, stage):
        return self.notes.get(stage.name, {}).get('ended', False)

    def note(self, stage, **facts):
        self.notes.setdefault(stage.name, {}).update(facts)
        write_json(self.path, {'settings': self.cfg.settings(), 'stages': self.notes})

    def run(self, stage):
        """Runs a stage's command; what it prints goes to a file. UserError where it fails."""
        known = self.notes.get(stage.name, {})
        began, used = time.monotonic(), os.times()
        path = Path(self.cfg.out_dir, f'{stage.name}.txt')
        self.show(stage, 0.0, 'starts')
        with open(path, 'a', encoding='utf-8') as file:
            self.child = subprocess.Popen([sys.executable, *stage.command], stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT, encoding='utf-8', errors='replace')
            last = ''
            for line in self.child.stdout:
                file.write(line)
                file.flush()
                last = line.strip() or last
                if match := STEP.match(line):
                    step, total = (int(number.replace(',', '')) for number in match.groups())
                    self.show(stage, step / total, f'step {step}/{total}')
            status, self.child = self.child.wait(), None
        now = os.times()
        cpu = now.children_user + now.children_system - used.children_user - used.children_system
        self.note(stage, command=shlex.join(['python', *stage.command]),
                  seconds=known.get('seconds', 0) + time.monotonic() - began,
                  cpu_seconds=known.get('cpu_seconds', 0) + cpu)
        if self.signum:
            self.leave()
        if status:
            raise UserError(f'{stage.title} ended with status {status}: {last} (all of it: {path})')
        self.done += stage.seconds

    def show(self, stage, share, text):
        """Moves the bar; where there is none, a line at each twentieth of the whole."""
        number = [known.name for known in self.stages].index(stage.name)
        done = self.done + share * stage.seconds
        name = f'{number}/{len(self.stages) - 1} {stage.title}'
        if not self.bar.disable:
            self.bar.set_description_str(f'{name}, {text}', refresh=False)
            self.bar.update(done - self.bar.n)
            self.bar.refresh()
        elif share == 0 or int(20 * done / self.whole) > self.shown:
            self.shown = int(20 * done / self.whole)
            left = ''
            if done > self.first:
                seconds = (time.monotonic() - self.began) / (done - self.first) * (self.whole - done)
                left = f'  ETA {tqdm.format_interval(seconds)}'
            print(f'tour {done / self.whole:4.0%}  {name}, {text}{left}', flush=True)

    def stop(self, signum, frame):
        """SIGINT and SIGTERM: the stage saves and ends, then the tour."""
        self.signum = signum
        if self.child:
            self.child.send_signal(signum)      # a second one from a terminal, which counts as one
        else:
            self.leave()

    def leave(self):
        self.bar.close()
        again = shlex.join(['bash', 'scripts/tour.sh', *sys.argv[1:]])
        print(f'\nstopped, all is saved; go on with: {again}', flush=True)
        raise SystemExit(128 + self.signum)


# ---- what a model can do -----------------------------------------------------------------------------------

def examine(cfg, folder):
    """{'scores': {name: number}, 'answers': {name: {'text', 'right'}}, 'parameters'} of a folder's model."""
    model, tokenizer = load_model(folder)
    count = 8 if cfg.quick else HELD_OUT

    def answer(chats, temperature):
        prompts = [prompt_ids(tokenizer, chat) for chat in chats]
        samples = generate(model, prompts, MAX_NEW_TOKENS, temperature, stop_ids=tokenizer.stop_ids,
                           seed=cfg.seed)
        return decode(tokenizer, samples)

    questions, sums = (task.problems('eval', count, 'tour') for task in (facts, arithmetic))
    told = answer(map(facts.prompt, questions), 1.0)
    worked = answer(map(arithmetic.prompt, sums), 1.0)
    known = [text in (question['answer'], facts.other_form(question))
             for question, text in zip(questions, told)]
    scores = {
        'text': text_loss(model, Path(cfg.out_dir, 'data')),
        'facts': sum(known) / count,
        'form': sum(map(facts.in_form, [question['question'] for question in questions], told)) / count,
        'sums': sum(map(arithmetic.reward, sums, worked)) / count,
        'grids': play(plan_path.problems('eval', count, 'tour', **GRID), answer),
    }
    shown = examples()
    texts = answer([example['chat'] for example in shown if 'chat' in example], 0.0)
    answers = {}
    for example in shown:
        text = texts.pop(0) if 'chat' in example else go_on(model, tokenizer, example['text'])
        answers[example['name']] = {'text': text, 'right': example['right'](text)}
    return {'scores': scores, 'answers': answers, 'parameters': model.num_params()}


def decode(tokenizer, samples):
    return [tokenizer.decode(row[:length], skip_special_tokens=True).strip()
            for row, length in zip(samples.tokens.tolist(), samples.lengths.tolist())]


@torch.no_grad()
def text_loss(model, directory):
    """Nats per token of the held-out text, in windows that do not overlap."""
    tokens, total, count = Corpus(str(directory)).tokens('val'), 0.0, 0
    offsets = range(0, len(tokens) - BLOCK, BLOCK)
    for start in range(0, len(offsets), 32):
        logp = model(*windows(tokens, list(offsets[start:start + 32]), BLOCK, model.device))
        total, count = total - logp.sum().item(), count + logp.numel()
    return total / count


def play(problems, answer):
    """The share of grids that the team solves in MAX_TURNS turns, one answer drawn at each."""
    envs = [plan_path.Env(problem) for problem in problems]
    for _ in range(MAX_TURNS):
        for role in plan_path.ROLES:
            playing = [env for env in envs if not env.done]
            for env, text in zip(playing, answer([env.prompt(role) for env in playing], 1.0)):
                env.step(role, env.score(role, text))
    return sum(env.success for env in envs) / len(envs)


def examples():
    """The prompts that are answered after every stage, all held out: name, what is asked, what is right."""
    questions = {problem['form']: problem for problem in reversed(facts.problems('eval', 50, 'tour'))}
    word, sentence = questions['word'], questions['sentence']
    total = next(problem for problem in arithmetic.problems('eval', 50, 'tour')
                 if arithmetic.needs_carry(problem['a'], problem['b']))
    env = plan_path.Env(plan_path.problems('eval', 1, 'tour', **GRID)[0])
    begun, _, value = facts.statements(word['name'], word['attribute'])[0].removesuffix('.').rpartition(' ')

    def fact(problem):
        return dict(chat=facts.prompt(problem), wanted=problem['answer'],
                    right=lambda text: bool(facts.reward(problem, text)))

    return [
        dict(name='a text, to go on with', text=begun, wanted=f'{value}.',
             right=lambda text: text.startswith(value)),
        dict(name='a fact, in a word', **fact(word)),
        dict(name='a fact, in a sentence', **fact(sentence)),
        dict(name='a sum', chat=arithmetic.prompt(total), wanted=arithmetic.solution(total),
             right=lambda text: bool(arithmetic.reward(total, text))),
        dict(name='a way', chat=env.prompt('plan_agent'), wanted=env.solution('plan_agent'), view=env.view(),
             right=lambda text: env.score('plan_agent', text).note == 'works'),
    ]


def go_on(model, tokenizer, text):
    """How the model goes on with a text, up to the end of its line or document."""
    ends = tokenizer.stop_ids | {tokenizer.pad_id}
    samples = generate(model, [tokenizer.encode(text)], 12, 0.0, stop_ids=ends)
    return decode(tokenizer, samples)[0].partition('\n')[0]


# ---- the page ----------------------------------------------------------------------------------------------

def write_page(cfg, tour):
    ended = []
    for stage in tour.stages:
        if stage.folder and tour.ended(stage):
            ended.append({**tour.notes[stage.name], 'name': stage.name, 'title': stage.title,
                          'log': stage.written / 'log.jsonl', 'output': f'{stage.name}.txt'})
    asked = [{**example, 'asked': example['text'] if 'text' in example else example['chat'][-1]['content']}
             for example in examples()]
    meta = json.loads(Path(cfg.out_dir, 'data', 'meta.json').read_text(encoding='utf-8'))
    seconds = sum(facts['seconds'] for facts in tour.notes.values())
    parameters = tour.notes['1-pretrain']['parameters'] / 1e6
    of_run = [time.strftime('%d %B %Y'), f'{platform.machine()}, {os.cpu_count()} cores',
              f'seed {cfg.seed}', f'{parameters:.2f}M parameters', f'{meta["train_tokens"]:,} tokens of text',
              f'{seconds / 60:.1f} minutes of training']
    if cfg.quick:
        of_run.append('--quick: a few steps of each stage, which teach nothing')
    tour_page(Path(cfg.out_dir, 'report.html'), of_run, ended, asked, 8 if cfg.quick else HELD_OUT,
              math.log(meta['vocab_size']))


if __name__ == '__main__':
    run_script(main, cfg)
