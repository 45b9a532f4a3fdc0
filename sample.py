"""Talk to a model: the one sampler of the project, and the command around it.

    python sample.py out --prompt='Once upon a time' --num_samples=3
    python sample.py gpt2 --prompt=FILE:story.txt --top_p=0.9
    python sample.py tiny --chat

The model is any model directory (what the training scripts wrote, a checkpoint in it such as out/best,
anything in Hugging Face's format), a name on the hub, or `tiny`. In Python: generate(model, prompts,
max_new_tokens, ...).
"""
import contextlib
import signal
import sys
import time
from dataclasses import dataclass

from configurator import UserError, parse, run_script, setting


@dataclass
class Config:
    model: str = setting('tiny', positional=True)   # directory, hub name, or `tiny` (the embedded model)
    prompt: str = ''           # text, FILE:path, or - for standard input; empty: the token that begins a text
    num_samples: int = 1            # continuations of the prompt
    max_new_tokens: int = 500       # of each sample; where the context is full, its last half is carried on
    temperature: float = 0.8        # 0: always the likeliest token
    top_k: int = 200                # only the k likeliest tokens; 0 = all
    top_p: float = 1.0              # only the likeliest tokens that together have this probability; 1 = all
    repetition_penalty: float = 1.0     # above 1: tokens that were there already become less likely; 1 = off
    seed: int = 1337                # the same seed draws the same samples
    device: str = 'auto'            # cpu, cuda, cuda:1, mps; auto: cuda, else mps, else cpu
    dtype: str = 'auto'            # float32, bfloat16, float16 on a GPU; auto: bfloat16 on cuda, else float32
    stream: bool = True             # print tokens as they are drawn
    chat: bool = False              # a conversation, for models with a chat template

    def check(self):
        check_settings(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.repetition_penalty,
                       self.num_samples)
        if self.chat and (self.prompt or self.num_samples != 1):
            raise UserError('--chat asks for its prompts itself and draws one answer: leave out --prompt and '
                            '--num_samples')


def check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_samples):
    """UserError where a setting of generate has no meaning."""
    for name, value, fits, meant in (
            ('max_new_tokens', max_new_tokens, max_new_tokens >= 1, 'at least 1'),
            ('temperature', temperature, temperature >= 0, '0 (the likeliest token) or above'),
            ('top_k', top_k, not top_k or top_k > 0, 'at least 1, or 0 for all tokens'),
            ('top_p', top_p, top_p is None or 0 < top_p <= 1, 'above 0 and at most 1'),
            ('repetition_penalty', repetition_penalty, repetition_penalty > 0, 'above 0 (1 = off)'),
            ('num_samples', num_samples, num_samples >= 1, 'at least 1')):
        if not fits:
            raise UserError(f'{name}={value}: must be {meant}')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported

import numpy as np
import torch

from model import load_model
from nanoforge.decode import Samples, make_decoder
from nanoforge.run import setup

# rows * parameters below which a second thread gains nothing, and costs where others compute too
ONE_THREAD = 2 ** 23


def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
             stop_ids=(), num_samples=1, seed=0, on_token=None, numbers=None):
    """Draws `num_samples` continuations of each prompt (a list of id lists of any lengths) -> Samples.

    Token t of sample s of prompt i is the inverse CDF at a uniform number that depends on (seed, i, s, t)
    alone, so a sample does not depend on its neighbours in the batch beyond rounding. temperature 0 takes the
    likeliest token. numbers: what stands for i, one number a prompt, for prompts that are to draw the same
    whatever the batch (and rank) they come in.

    logp is that of the distribution the token was drawn from: logits with the repetition penalty, divided by
    the temperature, and, where top_k or top_p is on, of the tokens these leave, renormalised. With both off
    it is the full softmax's, as model.token_stats(..., temperature) gives in training. At temperature 0 it is
    the softmax's at temperature 1.

    repetition_penalty (Keskar et al. 2019, section 4.1) counts the prompt's tokens too. A row ends with a
    token of stop_ids, after max_new_tokens, or where the model's context is full. on_token(row, token) is
    called for every token as it is drawn. UserError: an empty prompt, one that fills the context, ids outside
    the vocabulary, a setting without meaning.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_samples)
    prompts, stop_ids, device = [list(prompt) for prompt in prompts], frozenset(stop_ids), model.device
    check_prompts(prompts, model.config)
    context = model.config.block_size
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts for _ in range(num_samples)]
    R, T = len(limits), max(limits, default=0)
    result = Samples(torch.zeros(R, T, dtype=torch.long, device=device),
                     torch.zeros(R, dtype=torch.long, device=device),
                     torch.zeros(R, T, device=device),
                     torch.zeros(R, dtype=torch.bool, device=device))
    if not prompts:
        return result
    with torch.inference_mode(), evaluating(model):
        decoder = make_decoder(model, prompts, num_samples, T)
        logits = decoder.start()                                                                # (R, V)
        if device.type == 'cpu' and R * sum(p.numel() for p in model.parameters()) < ONE_THREAD:
            torch.set_num_threads(1)
        # Row b of the batch draws row rows[b] of the result. A row that ends leaves the batch, and the
        # batch's last row takes its place, in every tensor that has a row for each.
        rows = list(range(R))
        uniforms = uniform_numbers(seed, numbers or range(len(prompts)), num_samples, T).to(device)   # (T, R)
        tokens, logp = torch.zeros_like(uniforms, dtype=torch.long), torch.zeros_like(uniforms)       # (T, R)
        state, seen = [uniforms.t(), tokens.t(), logp.t()], None
        if repetition_penalty != 1.0:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for b in rows:
                seen[b, prompts[b // num_samples]] = True
            state.append(seen)
        for t in range(T):
            n = len(rows)
            tokens[t, :n], logp[t, :n] = draw(logits, uniforms[t, :n], temperature, top_k, top_p,
                                              repetition_penalty, seen)
            if seen is not None:
                seen[:n].scatter_(1, tokens[t, :n, None], True)
            drawn = tokens[t, :n].tolist()
            if on_token:
                for row, token in sorted(zip(rows, drawn)):
                    on_token(row, token)
            ended = [b for b in range(n) if drawn[b] in stop_ids or t + 1 == limits[rows[b]]]
            for b in reversed(ended):
                row, last = rows[b], rows.pop()
                result.tokens[row, :t + 1], result.logp[row, :t + 1] = tokens[:t + 1, b], logp[:t + 1, b]
                result.lengths[row], result.stopped[row] = t + 1, drawn[b] in stop_ids
                if row != last:
                    rows[b] = last
                    for tensor in state + decoder.state:
                        tensor[b] = tensor[len(rows)]
            if not rows:
                break
            logits = decoder.step(tokens[t, :len(rows)])
    if not torch.isfinite(result.logp).all():
        raise UserError('the model\'s logits are not finite: its weights hold NaN or infinity, or its dtype '
                        'overflows')
    return result._replace(tokens=result.tokens[:, :t + 1], logp=result.logp[:, :t + 1])


def check_prompts(prompts, cfg):
    """UserError where a prompt cannot be continued."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f'prompt {i} is empty: a model needs at least one token to go on from')
        if len(prompt) >= cfg.block_size:
            raise UserError(f'prompt {i} has {len(prompt)} tokens and leaves no room in the model\'s context '
                            f'of {cfg.block_size}')
        if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
            raise UserError(f'prompt {i} has ids from {min(prompt)} to {max(prompt)}, but the model knows 0 '
                            f'to {cfg.vocab_size - 1}: they come from another tokenizer')


@contextlib.contextmanager
def evaluating(model):
    """Inside, the model is in eval mode; afterwards that and the number of threads are as they were."""
    training, threads = model.training, torch.get_num_threads()
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        torch.set_num_threads(threads)


def uniform_numbers(seed, numbers, num_samples, length):
    """(length, prompts * num_samples) float32 in [0, 1): Philox (Salmon et al. 2011) keyed by the seed, whose
    counter begins at (number of the prompt, sample), so that it depends on seed, prompt, sample and position
    alone."""
    uniforms = np.empty((length, len(numbers) * num_samples), dtype=np.float32)
    for row in range(uniforms.shape[1]):
        prompt, sample = divmod(row, num_samples)
        philox = np.random.Philox(key=seed % 2 ** 64, counter=[0, 0, sample, numbers[prompt]])
        uniforms[:, row] = np.random.Generator(philox).random(length, dtype=np.float32)
    return torch.from_numpy(uniforms)


def draw(logits, uniform, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, seen=None):
    """logits (n, V) float32, uniform (n,), seen (n or more, V) bool -> token (n,), logp (n,), both as
    described in generate."""
    if repetition_penalty != 1.0:
        penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen[:len(logits)], penalised, logits)
    if temperature == 0:
        top, token = logits.max(-1)
        return token, top - logits.logsumexp(-1)
    if temperature != 1.0:
        logits = logits / temperature
    p = truncate(logits, top_k, top_p).softmax(-1)
    cdf = p.cumsum(-1)
    # the first token whose cdf exceeds u * total: never one of probability 0
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp_(max=p.size(1) - 1)
    return token[:, 0], p.gather(1, token)[:, 0].log_()


def truncate(logits, top_k=None, top_p=None):
    """logits (n, V) with -inf for all but the top_k largest, and of these for all but the fewest that hold at
    least top_p of the probability (Holtzman et al. 2020, section 3.1). Ties at the edge stay."""
    V = logits.size(1)
    k, nucleus = min(top_k or V, V), top_p is not None and top_p < 1
    if k == V and not nucleus:
        return logits
    largest = logits.topk(k).values                                                       # (n, k), descending
    edge = largest[:, -1:]
    if nucleus:
        last = (largest.softmax(-1).cumsum(-1) < top_p).sum(-1, keepdim=True).clamp_(max=k - 1)
        edge = largest.gather(1, last)
    return logits.masked_fill(logits < edge, float('-inf'))


def logp_gap(model, prompts, samples, temperature=1.0):
    """(max, mean) of |log-probability as sampled - that of the training forward| over all tokens that
    generate(model, prompts, ...) drew at this temperature without top_k, top_p and penalty: rounding, if
    sampler and training compute the same model."""
    num_samples = len(samples.tokens) // len(prompts)
    lengths = samples.lengths.tolist()
    rows = [list(prompts[r // num_samples]) + samples.tokens[r, :n].tolist() for r, n in enumerate(lengths)]
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    targets = torch.full_like(idx, -1)
    for r, (row, n) in enumerate(zip(rows, lengths)):
        idx[r, :len(row)] = torch.tensor(row)
        targets[r, len(row) - n - 1:len(row) - 1] = idx[r, len(row) - n:len(row)]
    idx, targets = idx[:, :-1].to(model.device), targets[:, :-1].to(model.device)
    with torch.no_grad(), evaluating(model):
        trained = model.token_stats(model.hidden(idx), targets, temperature)['logp']
    drawn = torch.arange(samples.logp.size(1), device=model.device) < samples.lengths[:, None]
    gap = (trained[targets >= 0] - samples.logp[drawn]).abs()
    return gap.max().item(), gap.mean().item()


# ---- the command -------------------------------------------------------------------------------------------

def generate_long(model, prompt, max_new_tokens, num_samples=1, seed=0, on_token=None, **settings):
    """generate() for one prompt, past the end of the context: rows that it cuts off go on from the last half
    of their context. Returns a list of id lists; of a prompt longer than the context only the end is seen."""
    context = model.config.block_size
    half = max(1, context // 2)
    rows, unfinished = [[] for _ in range(num_samples)], list(range(num_samples))
    prompt = prompt if len(prompt) < context else prompt[-half:]
    samples = generate(model, [prompt], max_new_tokens, num_samples=num_samples, seed=seed, on_token=on_token,
                       **settings)
    while True:
        for b, row in enumerate(unfinished):
            rows[row] += samples.tokens[b, :samples.lengths[b]].tolist()
        stopped = samples.stopped.tolist()
        unfinished = [row for b, row in enumerate(unfinished)
                      if not stopped[b] and len(rows[row]) < max_new_tokens]
        if not unfinished:
            return rows
        done, seed = len(rows[unfinished[0]]), seed + 2 ** 32

        def on_row(b, token):
            on_token(unfinished[b], token)

        ends = [(prompt + rows[row])[-half:] for row in unfinished]
        samples = generate(model, ends, max_new_tokens - done, seed=seed, on_token=on_token and on_row,
                           **settings)


class Printer:
    """Prints rows of tokens one after the other although they are drawn together: later rows wait for their
    turn, and so do bytes that are not yet a whole character."""

    def __init__(self, tokenizer, prompt, stop_ids):
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.prompt, self.ids, self.current = list(prompt), {}, 0
        self.begin, self.end = 0, len(prompt)  # of the current row: decoding begins here; printed up to there

    def add(self, row, token):
        if token not in self.stop_ids:
            self.ids.setdefault(row, list(self.prompt)).append(token)
        if row == self.current:
            self.show()

    def show(self, final=False):
        # Decoded together with what was printed before it, as tokenizers may treat the first word of a text
        # differently.
        ids = self.ids.get(self.current, self.prompt)
        before, text = (self.tokenizer.decode(part, skip_special_tokens=True)
                        for part in (ids[self.begin:self.end], ids[self.begin:]))
        if final or not text.endswith('\ufffd'):
            print(text[len(before):], end='', flush=True)
            self.begin, self.end = self.end, len(ids)

    def next_row(self):
        self.show(final=True)
        self.current, self.begin, self.end = self.current + 1, 0, len(self.prompt)


def read_prompt(prompt):
    """--prompt: text, FILE:path, or - for standard input."""
    if prompt == '-':
        return sys.stdin.read()
    if not prompt.startswith('FILE:'):
        return prompt
    try:
        with open(prompt[5:], encoding='utf-8-sig', newline='') as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--prompt={prompt}: '
                        f'{getattr(error, "strerror", None) or "not UTF-8 text"}') from None


def encode_prompt(tokenizer, text):
    """text -> ids, with the token that begins a text in front where the tokenizer is made so, or where there
    is no text."""
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = tokenizer.encode(text)
    if start is None and not ids:
        return tokenizer.encode('\n')           # a character model: a line begins
    adds = start is not None and tokenizer.backend.encode('').ids[:1] == [start]
    return ids if ids and (not adds or ids[0] == start) else [start, *ids]


def chat(model, tokenizer, cfg, settings):
    """A conversation on standard input and output; its end is the end of the input."""
    from data.chat import prompt_ids
    if tokenizer.chat_template is None:
        raise UserError(f'{cfg.model} has no chat template: leave out --chat, or train it on chats first '
                        '(train_sft.py)')
    messages, context = [], model.config.block_size
    while True:
        try:
            text = input('> ' if sys.stdin.isatty() else '')
        except EOFError:
            return {'messages': messages}
        messages.append({'role': 'user', 'content': text})
        ids = prompt_ids(tokenizer, messages)
        while len(ids) > context // 2 and len(messages) > 1:
            messages = messages[2:]
            ids = prompt_ids(tokenizer, messages)
            print(f'(the first question and answer no longer fit the context of {context} '
                  'tokens)', file=sys.stderr)
        printer = Printer(tokenizer, ids, tokenizer.stop_ids)
        samples = generate(model, [ids], cfg.max_new_tokens, on_token=printer.add if cfg.stream else None,
                           seed=cfg.seed + len(messages), **settings)
        reply = tokenizer.decode(samples.tokens[0].tolist(), skip_special_tokens=True)
        messages.append({'role': 'assistant', 'content': reply})
        if cfg.stream:
            printer.next_row()
        else:
            print(reply, end='')
        print(flush=True)
        if not samples.stopped[0]:
            print(f'(cut off after {samples.lengths[0]} tokens)', file=sys.stderr)


def main(cfg):
    run = setup(cfg.device, cfg.dtype)
    model, tokenizer = load_model(cfg.model, run.device, run.dtype)
    if tokenizer is None:
        raise UserError(f'{cfg.model} has no tokenizer beside its weights: copy tokenizer.json there')
    settings = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                    repetition_penalty=cfg.repetition_penalty, stop_ids=tokenizer.stop_ids)
    if cfg.chat:
        return chat(model, tokenizer, cfg, settings)
    text = read_prompt(cfg.prompt)
    ids = encode_prompt(tokenizer, text)
    if len(ids) >= model.config.block_size:
        raise UserError(f'the prompt has {len(ids)} tokens and leaves no room in the model\'s context of '
                        f'{model.config.block_size}')
    begun = time.perf_counter()
    printer = Printer(tokenizer, ids, tokenizer.stop_ids)
    if cfg.stream:
        print(text, end='', flush=True)
    on_token = printer.add if cfg.stream else None
    rows = generate_long(model, ids, cfg.max_new_tokens, cfg.num_samples, cfg.seed, on_token, **settings)
    seconds = time.perf_counter() - begun
    for i, row in enumerate(rows):
        if i:
            print(f'\n--- sample {i + 1} of {len(rows)} ---\n', end='')
        if i or not cfg.stream:
            print(text, end='')
        if not cfg.stream:
            for token in row:
                printer.add(i, token)
        printer.next_row()
    print(flush=True)
    count = sum(map(len, rows))
    print(f'({count} tokens, {count / seconds:,.0f} tokens/s)', file=sys.stderr)
    return {'num_tokens': count, 'tokens_per_second': count / seconds}


if __name__ == '__main__':
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends the program, not with a traceback
    run_script(main, cfg)
