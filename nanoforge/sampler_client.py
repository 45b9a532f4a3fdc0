"""Completions drawn by servers of SGLang or vLLM, in place of this process: --sampler_url.

    run.sampler = Sampler(cfg, run)                             # asks each server what it is (Run.open)
    run.sampler.update(step, [policy], tokenizer)               # on every rank: the weights, or the adapters
    samples = run.sampler.generate(policy, prompts, ...)        # as generate() in sample.py
    run.sampler.check(stats)                                    # whether they have drawn with these weights

Nothing of theirs is imported: SGLang and VLLM below hold all calls, over the standard library's HTTP. Prompts
go as token ids, one request for each completion, many in flight side by side; time-outs and lost connections
are tried again. The main rank writes a Hugging Face directory that the servers read; every rank asks for its
own prompts, the completions of one prompt at one server. Each version of the weights has a label of its own,
which is checked in every answer.

A label says what a server was told, not what it computes: so its log-probabilities are compared with those of
training, which main logs as sampling/logp_gap_mean and _max, and a mean above MAX_GAP ends the run. What
rounding leaves (a few hundredths in bfloat16) train_rl.py weighs by importance_cap, on by default with
servers; in train_agents.py the ratio is to the server's probabilities, and clipped.

The distribution is generate's: this temperature, no top_k, top_p or penalty, these stop tokens. Its draws are
not, as a server turns a seed into tokens in its own way (SGLang only with --enable-deterministic-inference,
vLLM in an order that depends on the batch): two runs differ, and one that is resumed is not the same byte for
byte. The request's id names seed, prompt and sample, with which a server that draws as generate() does draws
the same tokens: tests/sampler_server.py.
"""
import atexit
import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import math
import os
import secrets
import shutil
import socket
import threading
import time
from urllib.parse import urlsplit

import torch

from configurator import UserError
from model import save_model
from nanoforge.checkpoint import writing
from nanoforge.decode import Samples
from nanoforge.lora import save_adapter

IN_FLIGHT = 256     # requests at a server at a time, of all ranks
ATTEMPTS = 3        # of a request that gets no answer
PAUSE = 0.5         # seconds before the second attempt, twice as many before the third
MAX_GAP = 0.1       # mean |log-probability of a server - ours| above which it has other weights
MEMORY_FOLDER = '/dev/shm'


class SGLang:
    """The calls of SGLang 0.5.23 (python/sglang/srt/entrypoints/http_server.py, managers/io_struct.py there).

    Log-probabilities are those after the temperature, unless the server is started with
    SGLANG_RETURN_ORIGINAL_LOGPROB=1. Adapters need --enable-lora, --max-lora-rank and --lora-target-modules.
    """
    name, known_by, version_path = 'SGLang', '/model_info', '/server_info'
    needs = '--enable-lora, where adapters are trained'

    @staticmethod
    def load_weights(directory, label):
        return [('/update_weights_from_disk', {'model_path': directory, 'weight_version': label,
                                               'abort_all_requests': True, 'flush_cache': True})]

    @staticmethod
    def load_adapter(name, directory, label):
        return [('/load_lora_adapter', {'lora_name': name, 'lora_path': directory}),
                ('/update_weight_version', {'new_version': label})]

    @staticmethod
    def unload_adapter(name):
        return '/unload_lora_adapter', {'lora_name': name}

    @staticmethod
    def request(prompt, max_new_tokens, temperature, stop_ids, seed, request_id, adapter):
        sampling = {'max_new_tokens': max_new_tokens, 'temperature': temperature, 'top_p': 1.0, 'top_k': -1,
                    'min_p': 0.0, 'frequency_penalty': 0.0, 'presence_penalty': 0.0,
                    'repetition_penalty': 1.0, 'stop_token_ids': stop_ids, 'sampling_seed': seed}
        return '/generate', {'input_ids': prompt, 'sampling_params': sampling, 'return_logprob': True,
                             'rid': request_id, 'lora_path': adapter}

    @staticmethod
    def read(answer):
        """(token ids, their log-probabilities, why it ended, labels of the weights that drew them)."""
        meta = answer['meta_info']
        logp, tokens = zip(*(entry[:2] for entry in meta['output_token_logprobs']))
        spans = meta.get('weight_versions') or [{'version': meta['weight_version']}]
        return tokens, logp, meta['finish_reason']['type'], {span['version'] for span in spans}


class VLLM:
    """The calls of vLLM 0.33 (vllm/entrypoints/openai/completion, serve/dev/rpc, rl/online, serve/lora
    there).

    Weights need VLLM_SERVER_DEV_MODE=1, adapters VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora; both
    --logprobs-mode=processed_logprobs, without which log-probabilities are those before the temperature.
    """
    name, known_by, version_path = 'vLLM', '/version', '/version'
    needs = ('VLLM_SERVER_DEV_MODE=1, where adapters are trained VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and '
             '--enable-lora')

    @staticmethod
    def load_weights(directory, label):
        # prompts that were computed with the weights before must go, too
        return [('/collective_rpc', {'method': 'reload_weights', 'kwargs': {'weights_path': directory}}),
                ('/reset_prefix_cache', {}), ('/update_weight_version', {'new_version': label})]

    @staticmethod
    def load_adapter(name, directory, label):
        return [('/v1/load_lora_adapter', {'lora_name': name, 'lora_path': directory, 'load_inplace': True})]

    @staticmethod
    def unload_adapter(name):
        return '/v1/unload_lora_adapter', {'lora_name': name}

    @staticmethod
    def request(prompt, max_new_tokens, temperature, stop_ids, seed, request_id, adapter):
        # ignore_eos: the stop tokens are ours, not those of the model that the server was started with
        # where an adapter is named, which has its label in its name, the answer names it, too
        named = {'model': adapter} if adapter else {'return_weight_versions': True}
        return '/v1/completions', {
            'prompt': prompt, 'max_tokens': max_new_tokens, 'temperature': temperature, 'top_p': 1.0,
            'top_k': 0, 'min_p': 0.0, 'frequency_penalty': 0.0, 'presence_penalty': 0.0,
            'repetition_penalty': 1.0, 'stop_token_ids': stop_ids, 'ignore_eos': True, 'seed': seed,
            'logprobs': 0, 'return_token_ids': True, 'request_id': request_id, **named}

    @staticmethod
    def read(answer):
        choice = answer['choices'][0]
        spans = choice.get('weight_versions') or [{'version': answer['model']}]
        return (choice['token_ids'], choice['logprobs']['token_logprobs'], choice['finish_reason'],
                {span['version'] for span in spans})


class Sampler:
    """What draws the completions of a run: the servers of cfg.sampler_url, or none.

    servers     [(URL, SGLang or VLLM)]; empty: generate() draws in this process
    """

    def __init__(self, cfg, run):
        self.cfg, self.run, self.label, self.loaded = cfg, run, None, []
        self.folder, self.failed = None, threading.Event()
        urls = [] if cfg.plan else [url.rstrip('/') for url in cfg.sampler_url]
        self.servers = [(url, self.identify(url)) for url in urls]
        if self.servers:
            self.token = f'{run.max(secrets.randbits(40)):x}'       # no other run's, nor an earlier start's
            run.print0("note      tokens are drawn by the servers' own random numbers: not byte for byte the "
                       'same where the run is repeated or resumed')

    def identify(self, url):
        """The vendor of a server, by what it answers."""
        for vendor in (SGLang, VLLM):
            status, info = self.ask(url, vendor.known_by, timeout=10)
            if status == 200 and isinstance(info, dict) and {'weight_version', 'version'} & info.keys():
                version = self.ask(url, vendor.version_path, timeout=10)[1]
                version = version.get('version', '?') if isinstance(version, dict) else '?'
                self.run.print0(f'sampler   {url}: {vendor.name} {version}')
                return vendor
        raise UserError(f'sampler_url: what answers at {url} is neither SGLang nor vLLM')

    # ---- weights

    def update(self, step, models, tokenizer):
        """Gives the servers the weights of `step`, or of models with adapters these alone. Every rank calls
        it, with its models as they are between steps (under --shard: sharded)."""
        if not self.servers:
            return
        if len({id(model) for model in models}) > 1:
            raise UserError(f'sampler_url: a server holds one model, and this run trains {len(models)}; give '
                            'the agents one (specialization=prompt or lora), or leave it out')
        model, self.label = models[0], f'{self.token}-{step}'
        adapters = list(getattr(model, 'adapters', None) or ())
        with self.run.log.timed('weights'):
            with self.run.gathering():
                self.run.on_main(lambda: self.publish(model, tokenizer, adapters, step))

    def publish(self, model, tokenizer, adapters, step):
        """On the main rank: writes, and tells every server to read."""
        self.folder = self.folder or self.choose_folder(model, adapters)
        shutil.rmtree(self.folder, ignore_errors=True)      # what they have read already
        path = os.path.join(self.folder, str(step))         # a new one: a server may know what it has read
        with writing(path):
            for name in adapters:
                save_adapter(model, os.path.join(path, name), name=name)
            if not adapters:
                half = self.run.dtype if self.run.dtype != torch.float32 else None
                save_model(model, tokenizer, path, half)    # as training multiplies them
        for url, vendor in self.servers:
            for name in self.loaded:
                with contextlib.suppress(UserError):        # one that was started anew has none
                    self.call(url, vendor, *vendor.unload_adapter(name))
            calls = [] if adapters else vendor.load_weights(path, self.label)
            for name in adapters:
                calls += vendor.load_adapter(self.adapter_name(name), os.path.join(path, name), self.label)
            for place, body in calls:
                answer = self.call(url, vendor, place, body)
                if isinstance(answer, dict) and answer.get('success') is False:
                    raise UserError(f'sampler_url: {url}{place} did not succeed: {said(answer)}')
        self.loaded = list(map(self.adapter_name, adapters))

    def adapter_name(self, name):
        return f'{self.label}-{name}'

    def choose_folder(self, model, adapters):
        """Where the servers get the weights from: in memory, if they run here and it has room."""
        out_dir = os.path.abspath(self.run.checkpoints.out_dir)
        name = 'nanoforge-' + hashlib.sha256(out_dir.encode()).hexdigest()[:12]     # the next start's, too
        size = sum(p.numel() * p.dtype.itemsize for p in model.parameters()
                   if p.requires_grad or not adapters)
        hosts = {urlsplit(url).hostname for url, _ in self.servers}
        are_here = hosts <= {'localhost', '127.0.0.1', '::1', socket.gethostname()}
        folder = os.path.join(out_dir, 'sampler')
        if self.cfg.sampler_dir:
            folder = os.path.join(os.path.abspath(self.cfg.sampler_dir), name)
        elif are_here and os.path.isdir(MEMORY_FOLDER):
            if shutil.disk_usage(MEMORY_FOLDER).free > 1.2 * size:
                folder = os.path.join(MEMORY_FOLDER, name)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        what = f'{len(adapters)} adapter{"s" * (len(adapters) > 1)}' if adapters else 'the weights'
        self.run.print0(f'sampler   {what} by {folder}, {size / 2 ** 20:,.0f} MiB')
        return folder

    # ---- completions

    def generate(self, model, prompts, max_new_tokens, temperature=1.0, stop_ids=(), num_samples=1, seed=0,
                 numbers=None):
        """As sample.generate, of which it takes these arguments, by the servers -> Samples. UserError where a
        server does not answer, or not as asked."""
        stop_ids, context = sorted(stop_ids), model.config.block_size
        adapter = self.adapter_name(model.active_adapter) if getattr(model, 'adapters', None) else None
        numbers = numbers or range(len(prompts))
        asked = [(list(prompt), number, k) for prompt, number in zip(prompts, numbers)
                 for k in range(num_samples)]

        def draw(prompt, number, k):
            url, vendor = self.servers[number % len(self.servers)]
            limit = min(max_new_tokens, context - len(prompt))
            name = f'{seed}-{number}-{k}'
            own_seed = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)      # of 60 bits
            answer = self.call(url, vendor, *vendor.request(prompt, limit, temperature, stop_ids, own_seed,
                                                            name, adapter))
            return self.checked(url, vendor, answer, adapter, limit, stop_ids, model.config.vocab_size)

        self.failed.clear()
        threads = max(1, IN_FLIGHT * len(self.servers) // self.run.world_size)
        with concurrent.futures.ThreadPoolExecutor(min(threads, max(1, len(asked)))) as pool:
            futures = [pool.submit(draw, *row) for row in asked]
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            if error := next((f.exception() for f in futures if f.done() and f.exception()), None):
                self.failed.set()                           # the others are not tried again
                pool.shutdown(cancel_futures=True)
                raise error
        return as_samples([future.result() for future in futures], model.device)

    def checked(self, url, vendor, answer, adapter, limit, stop_ids, vocab_size):
        """(tokens, log-probabilities, whether the last one is a stop token) of an answer; UserError where it
        is not what was asked for."""
        where = f'sampler_url: {url} ({vendor.name})'
        try:
            tokens, logp, reason, labels = vendor.read(answer)
            sound = (len(tokens) == len(logp) > 0 and all(0 <= token < vocab_size for token in tokens)
                     and all(math.isfinite(x) and x <= 1e-3 for x in logp))
        except (LookupError, TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise UserError(f'{where} gave no token ids with a log-probability each, but {said(answer)}')
        label = self.label if adapter is None or vendor is SGLang else adapter
        if labels != {label}:
            theirs = ', '.join(sorted(map(str, labels)))
            raise UserError(f'{where} answers with weights {theirs}, not {label} that it was given: it was '
                            'started anew, serves another run, or is of an older version than this one needs')
        stopped = tokens[-1] in stop_ids
        if reason == 'stop' and not stopped:
            raise UserError(f'{where} ended a completion with token {tokens[-1]}, which ends none here '
                            f'({", ".join(map(str, stop_ids))}): start it with the model of this run')
        if reason not in ('stop', 'length') or len(tokens) > limit:
            raise UserError(f'{where} ended a completion after {len(tokens)} tokens of {limit}: {reason}')
        if reason == 'length' and not stopped and len(tokens) < limit:
            raise UserError(f'{where} cut a completion off after {len(tokens)} tokens of {limit}: its '
                            "context is shorter than the model's")
        return tokens, logp, stopped

    def check(self, stats):
        """UserError where the log-probabilities of the servers are not those of training."""
        gap = stats.get('sampling/logp_gap_mean', 0.0)
        if self.servers and not gap <= MAX_GAP:
            raise UserError(f"sampler_url: the servers' log-probabilities differ from ours by {gap:.3f} on "
                            f'average, above {MAX_GAP:g}: they draw from other weights than they were given, '
                            'or give probabilities before the temperature (vLLM needs '
                            '--logprobs-mode=processed_logprobs)')

    # ---- HTTP

    def call(self, url, vendor, path, body):
        """What a server answers to a POST; UserError where it refuses or cannot."""
        status, answer = self.ask(url, path, body, self.cfg.sampler_timeout)
        if status != 200:
            hint = f'; {vendor.name} needs {vendor.needs}' if status == 404 else ''
            raise UserError(f'sampler_url: {url}{path} answers with status {status}: {said(answer)}{hint}')
        return answer

    def ask(self, url, path, body=None, timeout=10.0):
        """(status, answer) to a POST of `body`, a GET without one. UserError after ATTEMPTS in vain."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * attempt)
                for key in {'rid', 'request_id'} & (body or {}).keys():     # the first may still be at work
                    body = {**body, key: f'{body[key]}-{attempt}'}
            try:
                status, answer = exchange(url, path, body, timeout)
            except TimeoutError:
                problem = f'does not answer within {timeout:g} s (--sampler_timeout)'
            except (OSError, http.client.HTTPException) as error:
                problem = f'cannot be reached ({error or type(error).__name__})'
            else:
                if status < 500 and status != 429:
                    return status, answer
                problem = f'answers with status {status}: {said(answer)}'
            if self.failed.is_set():
                break
        raise UserError(f'sampler_url: {url}{path} {problem}, tried {attempt + 1} times')


def exchange(url, path, body, timeout):
    """(status, answer) of one request; the answer is what the JSON holds, or text."""
    parts = urlsplit(url)
    # not urllib: it would ask the proxies of the environment, which know no servers of a cluster
    kind = http.client.HTTPSConnection if parts.scheme == 'https' else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body)
        connection.request('GET' if body is None else 'POST', parts.path + path, data,
                           {'Content-Type': 'application/json'})
        response = connection.getresponse()
        text = response.read().decode('utf-8', 'replace')
    finally:
        connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, text


def said(answer):
    """The beginning of an answer, for a message."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return text if len(text) <= 200 else text[:200] + ' ...'


def as_samples(rows, device):
    """[(tokens, log-probabilities, stopped)] -> Samples."""
    lengths = [len(tokens) for tokens, _, _ in rows]
    tokens = torch.zeros(len(rows), max(lengths, default=0), dtype=torch.long)
    logp = torch.zeros(tokens.shape)
    for row, (ids, values, _) in enumerate(rows):
        tokens[row, :len(ids)], logp[row, :len(ids)] = torch.tensor(ids), torch.tensor(values)
    samples = Samples(tokens, torch.tensor(lengths), logp, torch.tensor([stopped for *_, stopped in rows]))
    return Samples(*(column.to(device) for column in samples))
