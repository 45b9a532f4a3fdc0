"""A server that answers the calls of SGLang and vLLM with our own generate(), on a CPU and without either.

    python tests/sampler_server.py sglang tiny 30000
    python train_rl.py --sampler_url=http://127.0.0.1:30000

It draws what generate() would draw in the run itself: the id of a request names seed, prompt and sample. In
tests it can be made to misbehave: see FAULTS.
"""
import json
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from model import load_model
from nanoforge.lora import load_adapter, remove_adapter, set_adapter
from sample import generate

FAULTS = {'keeps': 'says that it has loaded the weights, and has others', 'forgets': 'loads, and keeps its old label',
          'lies': 'log-probabilities are `shift` nats too high', 'hangs': 'a completion never comes',
          'dies': 'closes the connection', 'busy': 'answers with 503 twice, then as it should',
          'slow': 'its first answer comes too late', 'silent': 'gives no log-probabilities',
          'nan': 'log-probabilities are not finite', 'stops': 'ends at a token of its own',
          'short': 'has a shorter context', 'raw': 'log-probabilities before the temperature',
          'full': 'cannot load: no room', 'other': 'is no server of either vendor'}


class SamplerServer(ThreadingHTTPServer):
    """vendor: 'sglang' or 'vllm'; fault: a key of FAULTS; calls: [(path, body)] that came."""
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, vendor, name_or_path, port=0, fault=None, shift=-0.5):
        super().__init__(('127.0.0.1', port), Handler)
        self.vendor, self.fault, self.shift, self.base = vendor, fault, shift, name_or_path
        self.model, self.tokenizer = load_model(name_or_path)
        self.label, self.calls, self.lock, self.waiting = 'default', [], threading.Lock(), []
        self.closed = threading.Event()
        self.in_flight = self.most_in_flight = self.waited = 0
        self.url = f'http://127.0.0.1:{self.server_address[1]}'

    def start(self):
        for work in (self.serve_forever, self.keep_drawing):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.closed.set()
        self.shutdown()
        self.server_close()

    def load(self, path):
        if self.fault != 'keeps':
            self.model, _ = load_model(path)

    def set_label(self, label):
        if self.fault != 'forgets':
            self.label = label

    def load_adapter(self, name, path):
        load_adapter(self.model, path, word(name), any_base=True)
        if self.fault == 'keeps':
            for key, p in self.model.named_parameters():
                if f'.lora.{word(name)}.lora_B' in key:
                    torch.nn.init.normal_(p)

    def draw(self, prompt, limit, temperature, stop_ids, request_id, adapter):
        """(tokens, log-probabilities, whether it stopped), once the completion has been drawn with others."""
        seed, number, k = map(int, re.match(r'(\d+)-(\d+)-(\d+)', request_id).groups())
        if self.fault == 'stops':
            stop_ids = range(self.model.config.vocab_size)
        if self.fault == 'short':
            limit = min(limit, 3)
        asked = Asked((adapter, limit, temperature, tuple(stop_ids), seed), number, prompt, k)
        with self.lock:
            self.waiting.append(asked)
        asked.done.wait()
        tokens, logp, stopped = asked.drawn
        if self.fault == 'lies':
            logp = (logp + self.shift).clamp(max=0)
        if self.fault == 'nan':
            logp = logp * float('nan')
        if self.fault == 'raw' and temperature:
            row = torch.tensor([prompt + tokens.tolist()])
            targets = row[:, 1:].clone()
            targets[:, :len(prompt) - 1] = -1
            with torch.no_grad():
                logp = self.model(row[:, :-1], targets)[0, len(prompt) - 1:]
        return tokens.tolist(), logp.tolist(), stopped

    def keep_drawing(self):
        """Draws what waits, requests of the same settings together."""
        while not self.closed.wait(0.02):           # the others of a rollout come, too
            with self.lock:
                taken, self.waiting = self.waiting, []
            for settings in {asked.settings for asked in taken}:
                group = [asked for asked in taken if asked.settings == settings]
                prompts = {asked.number: asked.prompt for asked in group}
                adapter, limit, temperature, stop_ids, seed = settings
                if adapter:
                    set_adapter(self.model, word(adapter))
                K = 1 + max(asked.k for asked in group)
                samples = generate(self.model, list(prompts.values()), limit, temperature, stop_ids=stop_ids,
                                   num_samples=K, seed=seed, numbers=list(prompts))
                for asked in group:
                    row = list(prompts).index(asked.number) * K + asked.k
                    n = int(samples.lengths[row])
                    asked.drawn = samples.tokens[row, :n], samples.logp[row, :n], bool(samples.stopped[row])
                    asked.done.set()


@dataclass
class Asked:
    """A completion that is asked for; `drawn` once it is done."""
    settings: tuple
    number: int
    prompt: list
    k: int
    drawn: tuple = ()
    done: threading.Event = field(default_factory=threading.Event)


def word(name):
    """What our own model takes as the name of an adapter."""
    return 'a' + re.sub(r'\W', '_', name)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        data = b'' if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        server, path = self.server, self.path
        if server.fault == 'other':
            return self.answer({'detail': 'Not Found'}, 404)
        if server.vendor == 'sglang' and path == '/model_info':
            return self.answer({'model_path': server.base, 'is_generation': True, 'weight_version': server.label})
        if server.vendor == 'sglang' and path == '/server_info':
            return self.answer({'version': '0.5.23 (a stand-in)', 'model_path': server.base})
        if server.vendor == 'vllm' and path == '/version':
            return self.answer({'version': '0.33.0 (a stand-in)'})
        self.answer({'detail': 'Not Found'}, 404)

    def do_POST(self):
        server, path = self.server, self.path
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with server.lock:
            server.calls.append((path, body))
        work = (SGLANG if server.vendor == 'sglang' else VLLM).get(path)
        if work is None:
            return self.answer({'detail': 'Not Found'}, 404)
        if path in ('/generate', '/v1/completions'):
            with server.lock:
                server.waited += 1
                nth = server.waited
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            try:
                if server.fault == 'dies':
                    return self.connection.shutdown(socket.SHUT_RDWR)
                if server.fault == 'busy' and nth <= 2:
                    return self.answer({'error': {'message': 'too many requests'}}, 503)
                if server.fault == 'hangs' or (server.fault == 'slow' and nth == 1):
                    return time.sleep(3)
                value = work(server, body)
            finally:
                with server.lock:
                    server.in_flight -= 1
            return self.answer(value)
        if server.fault == 'full':
            return self.answer({'success': False, 'message': 'CUDA out of memory'}, 400)
        with server.lock:
            value = work(server, body)
        self.answer(value)


# ---- SGLang: {path: what it answers}

def sglang_generate(server, body):
    sampling = body['sampling_params']
    assert (sampling['top_p'], sampling['top_k'], sampling['repetition_penalty']) == (1.0, -1, 1.0)
    tokens, logp, stopped = server.draw(body['input_ids'], sampling['max_new_tokens'], sampling['temperature'],
                                        sampling['stop_token_ids'], body['rid'], body['lora_path'])
    reason = {'type': 'stop', 'matched': tokens[-1]} if stopped else {'type': 'length', 'length': len(tokens)}
    meta = {'id': body['rid'], 'finish_reason': reason, 'weight_version': server.label,
            'output_token_logprobs': [[p, token, None] for p, token in zip(logp, tokens)]}
    if server.fault == 'silent' or not body['return_logprob']:
        del meta['output_token_logprobs']
    return {'text': server.tokenizer.decode(tokens), 'output_ids': tokens, 'meta_info': meta}


def sglang_load(server, body):
    server.load(body['model_path'])
    server.set_label(body['weight_version'])
    return {'success': True, 'message': 'Succeeded to update model weights.', 'num_paused_requests': 0}


def load_lora(server, body):
    server.load_adapter(body['lora_name'], body['lora_path'])
    return {'success': True}


def unload_lora(server, body):
    remove_adapter(server.model, word(body['lora_name']))
    return {'success': True}


def set_label(server, body):
    server.set_label(body['new_version'])
    return {'success': True, 'new_version': body['new_version']}


SGLANG = {'/generate': sglang_generate, '/update_weights_from_disk': sglang_load, '/load_lora_adapter': load_lora,
          '/unload_lora_adapter': unload_lora, '/update_weight_version': set_label}


# ---- vLLM

def vllm_complete(server, body):
    assert (body['top_p'], body['top_k'], body['repetition_penalty']) == (1.0, 0, 1.0) and body['ignore_eos']
    adapter = body.get('model')
    tokens, logp, stopped = server.draw(body['prompt'], body['max_tokens'], body['temperature'],
                                        body['stop_token_ids'], body['request_id'], adapter)
    choice = {'index': 0, 'text': server.tokenizer.decode(tokens), 'finish_reason': 'stop' if stopped else 'length',
              'token_ids': tokens, 'logprobs': {'token_logprobs': logp, 'tokens': [''] * len(tokens)}}
    if server.fault == 'silent' or body['logprobs'] is None:
        choice['logprobs'] = None
    if body.get('return_weight_versions'):
        choice['weight_versions'] = [{'version': server.label, 'start': 0, 'end': len(tokens)}]
    named = 'base' if server.fault == 'forgets' else adapter or server.base
    return {'id': body['request_id'], 'object': 'text_completion', 'model': named, 'choices': [choice]}


def vllm_rpc(server, body):
    assert body['method'] == 'reload_weights'
    server.load(body['kwargs']['weights_path'])
    return {'results': [None]}


def reset_cache(server, body):
    return {'success': True}


VLLM = {'/v1/completions': vllm_complete, '/collective_rpc': vllm_rpc, '/reset_prefix_cache': reset_cache,
        '/update_weight_version': set_label, '/v1/load_lora_adapter': load_lora,
        '/v1/unload_lora_adapter': unload_lora}


if __name__ == '__main__':
    vendor, name, port = sys.argv[1:]
    torch.set_num_threads(1)
    server = SamplerServer(vendor, name, int(port))
    threading.Thread(target=server.keep_drawing, daemon=True).start()
    print(f'{server.url}: {name}, as {vendor} would answer', flush=True)
    server.serve_forever()
