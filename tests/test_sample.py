"""sample.py against transformers' greedy decoding and logits processors, the softmax it draws from,
and the training forward."""
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import sample
from configurator import UserError
from data.build_tokenizer import char_encoder
from data.tokenizer import Tokenizer
from nanoforge.decode import GraphDecoder
from nanoforge.lora import adapters_off, add_lora
from model import FAMILIES, GPT, GPTConfig, save_model
from sample import draw, generate, generate_long, logp_gap, truncate, uniform_numbers

V = 61
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13]]
# prompts and samples go beyond the window
MIXED = dict(layer_types=['sliding_attention', 'full_attention'], sliding_window=5)
GEMMA = dict(attn_scale=0.25, extra={'query_pre_attn_scalar': 16}, **MIXED)
VARIANTS = {
    'gpt2': {}, 'llama': dict(n_kv_head=2), 'mistral': dict(n_kv_head=1, **MIXED | dict(layer_types=['sliding_attention'] * 2)),
    'qwen2': dict(n_kv_head=2), 'qwen3': dict(head_size=16), 'gemma2': dict(n_kv_head=2, **GEMMA), 'gemma3_text': dict(n_kv_head=1, **GEMMA)}


def small(arch='qwen3', seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = dict(arch=arch, vocab_size=V, block_size=48, n_layer=2, n_head=4, n_embd=32, **VARIANTS[arch]) | sizes
    model = GPT(GPTConfig(**FAMILIES[arch] | sizes)).init_weights(0.3).eval()
    for p in model.parameters():
        if p.dim() == 1:                                # norms and biases that differ from one and zero
            p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope='module')
def models():
    return {arch: small(arch) for arch in FAMILIES}


class NoCaches:
    """A model with the calls of the wrapper around transformers' classes: no layers of ours."""

    def __init__(self, model):
        self.model, self.config, self.device, self.training = model, model.config, model.device, False
        self.hidden, self.logits, self.parameters = model.hidden, model.logits, model.parameters

    def eval(self):
        return self

    train = lambda self, mode: self


# ---- against transformers ----------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', FAMILIES)
def test_greedy_equals_transformers(arch, models, tmp_path):
    save_model(models[arch], None, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation='eager').eval()
    samples = generate(models[arch], PROMPTS, 20, temperature=0)
    for prompt, tokens in zip(PROMPTS, samples.tokens.tolist()):
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                   do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
        assert tokens == expected[0, len(prompt):].tolist()


def test_top_k_and_top_p_equal_transformers_warpers():
    torch.manual_seed(0)
    scores = 3 * torch.randn(50, V)
    for k, p in ((5, None), (1, None), (500, None), (None, 0.9), (None, 0.3), (None, 1e-6), (20, 0.8)):
        expected = scores
        if k:
            expected = TopKLogitsWarper(k)(None, expected)
        if p:
            expected = TopPLogitsWarper(p)(None, expected)
        assert torch.equal(truncate(scores, k, p), expected), (k, p)


def test_repetition_penalty_equals_transformers_processor():
    torch.manual_seed(0)
    scores, ids = torch.randn(40, V), torch.randint(0, V, (40, 7))
    seen = torch.zeros(40, V, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, scores.clone()).div(0.7).log_softmax(-1)
    token, logp = draw(scores, torch.rand(40), temperature=0.7, repetition_penalty=1.7, seen=seen)
    torch.testing.assert_close(logp, expected.gather(1, token[:, None])[:, 0], atol=1e-5, rtol=0)


def test_repetition_penalty_counts_prompt_and_samples(models, tmp_path):
    save_model(models['llama'], None, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    samples = generate(models['llama'], PROMPTS, 15, temperature=0, repetition_penalty=1.5)
    for prompt, tokens in zip(PROMPTS, samples.tokens.tolist()):
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                                   max_new_tokens=15, repetition_penalty=1.5, eos_token_id=None, pad_token_id=0)
        assert tokens == expected[0, len(prompt):].tolist()


# ---- the distribution --------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings', [{}, dict(temperature=0.7), dict(top_k=4), dict(top_p=0.6, temperature=1.3)])
def test_samples_follow_the_distribution(settings):
    model, n = small(vocab_size=9, n_layer=1), 20000
    logits = model(torch.tensor([[1, 2]]))[0, -1].detach() / settings.get('temperature', 1.0)
    p = truncate(logits[None], settings.get('top_k'), settings.get('top_p'))[0].softmax(-1)
    samples = generate(model, [[1, 2]], 1, num_samples=n, seed=5, **settings)
    counts = torch.bincount(samples.tokens[:, 0], minlength=9).float()
    assert counts[p == 0].sum() == 0
    kept = p > 0
    chi_square = ((counts - n * p)[kept].square() / (n * p[kept])).sum().item()
    assert chi_square < 27  # 8 degrees of freedom at most: exceeded with probability 1e-3; the seed is fixed
    torch.testing.assert_close(samples.logp[:, 0], p.log()[samples.tokens[:, 0]], atol=1e-5, rtol=0)


def test_inverse_cdf_never_draws_what_has_no_probability():
    logits = torch.tensor([[float('-inf'), 0.0, float('-inf'), 0.0, float('-inf')]]).expand(3, 5)
    token, logp = draw(logits, torch.tensor([0.0, 0.5, 1 - 2 ** -24]))
    assert token.tolist() == [1, 3, 3]
    torch.testing.assert_close(logp, torch.full((3,), 0.5).log())


def test_uniforms_are_uniform_and_depend_on_their_own_place_only():
    u = uniform_numbers(7, range(3), 4, 1000)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and len(set(u[0].tolist())) == 12
    assert torch.equal(uniform_numbers(7, range(1), 2, 10), u[:10, :2]) and torch.equal(uniform_numbers(7, range(3), 2, 10)[:, 2], u[:10, 4])
    assert not torch.equal(uniform_numbers(8, range(1), 1, 10), u[:10, :1])
    assert not torch.allclose(uniform_numbers(7, range(1), 1, 1000)[1:], uniform_numbers(7, range(1), 2, 999)[:, 1:])
    # whatever the batch
    assert torch.equal(uniform_numbers(7, [2, 0], 4, 1000), u[:, [8, 9, 10, 11, 0, 1, 2, 3]])


# ---- batches, stops, lengths -------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', FAMILIES)
def test_logp_is_that_of_the_training_forward(arch, models):
    samples = generate(models[arch], PROMPTS, 30, num_samples=6, stop_ids=(7, 8), seed=1)
    assert logp_gap(models[arch], PROMPTS, samples)[0] < 1e-4
    warm = generate(models[arch], PROMPTS, 8, temperature=1.7)
    assert logp_gap(models[arch], PROMPTS, warm, temperature=1.7)[0] < 1e-4 < logp_gap(models[arch], PROMPTS, warm)[0]


def test_logp_against_the_plain_forward(models):
    """Without logp_gap's own indexing: one row at a time through model(idx, targets)."""
    samples = generate(models['gemma2'], PROMPTS, 30, num_samples=2, stop_ids=(7,), seed=1)
    for row, n in enumerate(samples.lengths.tolist()):
        ids = torch.tensor([PROMPTS[row // 2] + samples.tokens[row, :n].tolist()])
        logp = models['gemma2'](ids[:, :-1], ids[:, 1:])[0, -n:]
        torch.testing.assert_close(samples.logp[row, :n], logp.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize('arch', ['gpt2', 'gemma2'])
def test_a_sample_does_not_depend_on_its_batch(arch, models):
    alone = generate(models[arch], PROMPTS[:1], 25, num_samples=1, stop_ids=(7,), seed=3)
    among = generate(models[arch], PROMPTS, 25, num_samples=7, stop_ids=(7,), seed=3)
    n = alone.lengths[0]
    assert among.lengths[0] == n and torch.equal(among.tokens[0, :n], alone.tokens[0, :n])
    torch.testing.assert_close(among.logp[0, :n], alone.logp[0, :n], atol=1e-5, rtol=0)
    shorter = generate(models[arch], PROMPTS, 4, num_samples=7, stop_ids=(7,), seed=3)
    assert torch.equal(shorter.tokens, among.tokens[:, :4] * (torch.arange(4) < shorter.lengths[:, None]))


def test_rows_that_leave_do_not_disturb_the_others(models):
    """With many stop ids rows leave at almost every step, and each ends
    as the same draws without stops do."""
    model, stops = models['qwen3'], set(range(0, V, 9))
    free = generate(model, PROMPTS, 30, num_samples=10, seed=2, repetition_penalty=1.1)
    cut = generate(model, PROMPTS, 30, num_samples=10, seed=2, repetition_penalty=1.1, stop_ids=stops)
    for row, tokens in enumerate(free.tokens.tolist()):
        n = next((t + 1 for t, token in enumerate(tokens) if token in stops), 30)
        assert cut.lengths[row] == n and cut.stopped[row] == (tokens[n - 1] in stops)
        assert cut.tokens[row].tolist() == tokens[:n] + [0] * (cut.tokens.size(1) - n)
        torch.testing.assert_close(cut.logp[row, :n], free.logp[row, :n], atol=1e-5, rtol=0)
        assert (cut.logp[row, n:] == 0).all()
    assert len(set(cut.lengths.tolist())) > 5 and cut.tokens.size(1) == cut.lengths.max()


def test_samples_of_a_prompt_equal_those_of_the_repeated_prompt(models):
    """num_samples shares the prompt: draws differ by their uniforms alone,
    so greedy rows are all the same."""
    shared = generate(models['llama'], PROMPTS, 12, num_samples=3, temperature=0)
    once = generate(models['llama'], PROMPTS, 12, temperature=0)
    assert torch.equal(shared.tokens, once.tokens.repeat_interleave(3, 0))
    drawn = generate(models['llama'], PROMPTS, 12, num_samples=3)
    assert len(set(map(tuple, drawn.tokens.tolist()))) == 9


def test_every_row_ends_where_its_own_context_is_full(models):
    model = models['gpt2']                          # learned positions: one beyond the context would raise
    samples = generate(model, PROMPTS, 100)
    assert samples.lengths.tolist() == [48 - len(prompt) for prompt in PROMPTS] and not samples.stopped.any()
    with pytest.raises(UserError, match='prompt 1 has 48 tokens .* context of 48'):
        generate(model, [[1], [2] * 48], 5)
    assert generate(model, [[2] * 47], 5).lengths.tolist() == [1]


def test_wrong_arguments_are_user_errors(models):
    for prompts, settings, message in (([[]], {}, 'prompt 0 is empty'), ([[V]], {}, 'ids from 61 to 61'), ([[1]], dict(top_p=0.0), 'top_p'),
                                       ([[1]], dict(temperature=-1.0), 'temperature'), ([[1]], dict(top_k=-1), 'top_k'),
                                       ([[1]], dict(num_samples=0), 'num_samples'), ([[1]], dict(repetition_penalty=0.0), 'penalty')):
        with pytest.raises(UserError, match=message):
            generate(models['gpt2'], prompts, 5, **settings)
    assert generate(models['gpt2'], [], 5).tokens.shape == (0, 0)
    broken = small()
    broken.norm.weight.data[0] = float('nan')
    with pytest.raises(UserError, match='not finite'):
        generate(broken, [[1]], 5)


def test_a_model_without_caches_draws_the_same(models):
    cached = generate(models['qwen2'], PROMPTS, 10, num_samples=2, stop_ids=(7, 8, 9), seed=4)
    again = generate(NoCaches(models['qwen2']), PROMPTS, 10, num_samples=2, stop_ids=(7, 8, 9), seed=4)
    assert torch.equal(cached.tokens, again.tokens) and torch.equal(cached.stopped, again.stopped)
    torch.testing.assert_close(cached.logp, again.logp, atol=1e-5, rtol=0)


def test_training_goes_on_after_sampling():
    """The mode is restored, dropout is off while sampling, and what comes back may enter a loss."""
    model = small(dropout=0.5).train()
    samples = generate(model, PROMPTS, 5, seed=1)
    assert model.training and torch.equal(samples.tokens, generate(model, PROMPTS, 5, seed=1).tokens)
    targets = samples.tokens.roll(-1, 1)
    (model(samples.tokens, targets) * samples.logp.exp()).sum().backward()
    assert model.embed_tokens.weight.grad.abs().sum() > 0


def test_modules_that_are_no_plain_linear_are_called(models):
    """An adapter in the place of a linear layer takes part."""
    model = small('llama')

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.a = base, base.weight, torch.nn.Parameter(0.1 * torch.randn_like(base.weight))

        def forward(self, x):
            return self.base(x) + x @ self.a.t()

    attention = model.layers[0].self_attn
    attention.q_proj, attention.o_proj = Adapted(attention.q_proj), Adapted(attention.o_proj)
    samples = generate(model, PROMPTS, 10)
    assert logp_gap(model, PROMPTS, samples)[0] < 1e-4 and not torch.equal(samples.tokens, generate(models['llama'], PROMPTS, 10).tokens)


@pytest.mark.parametrize('arch', ['llama', 'qwen2'])
def test_an_adapter_on_the_head_takes_part(arch):
    """Also where the head is tied (qwen2), and for so many rows that its weight is packed."""
    model = small(arch)
    add_lora(model, 4, 8, 0.0, ['lm_head'])
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            p.data.normal_(0, 0.3)
    for num_samples in (1, 10):
        samples = generate(model, PROMPTS, 10, num_samples=num_samples)
        assert logp_gap(model, PROMPTS, samples)[0] < 1e-4
    with adapters_off(model):
        assert logp_gap(model, PROMPTS, samples)[0] > 0.01


def test_bf16_products_stay_near_the_training_forward():
    model = small('llama').set_matmul('bf16')
    samples = generate(model, PROMPTS, 20, num_samples=4)
    assert 1e-6 < logp_gap(model.set_matmul('float32'), PROMPTS, samples)[1]        # they did run in bf16
    assert logp_gap(model.set_matmul('bf16'), PROMPTS, samples)[1] < 0.01


def test_bf16_products_of_the_head_are_those_of_its_gradients(monkeypatch):
    """Log-probabilities are float32's to the bit; a sampler's and a trainer's head are one."""
    monkeypatch.setattr('nanoforge.kernels.DIRECT', 0)
    model = small('llama')
    hidden, found = torch.randn(2, 5, model.config.n_embd, generator=torch.Generator().manual_seed(1)), []
    for mode in ('bf16', 'float32'):
        logp = model.set_matmul(mode).token_stats(hidden, torch.arange(10).view(2, 5), extras=False)['logp']
        found.append((logp, *torch.autograd.grad(logp.sum(), model.lm_head.weight)))
    (logp, grad), (plain, exact) = found
    assert torch.equal(logp, plain) and 0 < ((grad - exact).norm() / exact.norm()).item() < 2 ** -7


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3', 'gemma2'])
def test_a_graph_is_the_steps_that_it_records(arch, monkeypatch):
    """GraphDecoder with a record that runs: what only a GPU does is to start its kernels together. Rows end at
    different times, the cache grows, and rows that have ended reach the end of the context."""
    recorded = []

    class Recorded(GraphDecoder):
        def record(self):
            def replay():
                self.output = self.next_logits(self.token[:self.rows])
            recorded.append((self.rows, self.slots))
            self.graph = SimpleNamespace(replay=replay)

    model = small(arch)
    prompts, settings = [*PROMPTS, [5] * 9], dict(num_samples=4, stop_ids=(3, 4, 5))
    limit = model.config.block_size
    want = generate(model, prompts, limit, **settings)
    monkeypatch.setattr('nanoforge.decode.GROW', {'cpu': 8})
    monkeypatch.setattr('sample.make_decoder', Recorded)
    got = generate(model, prompts, limit, **settings)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.stopped, want.stopped)
    torch.testing.assert_close(got.logp, want.logp, rtol=0, atol=1e-5)
    assert len({rows for rows, _ in recorded}) > 2 and len({slots for _, slots in recorded}) > 2
    assert not want.stopped.all() and want.stopped.any()


def test_on_token_hears_every_token_in_order(models):
    heard = []
    samples = generate(models['qwen3'], PROMPTS, 20, num_samples=2, stop_ids=(7, 8, 9, 10), on_token=lambda *pair: heard.append(pair))
    for row, n in enumerate(samples.lengths.tolist()):
        assert [token for r, token in heard if r == row] == samples.tokens[row, :n].tolist()
    assert [row for row, _ in heard[:6]] == list(range(6)) and len(heard) == samples.lengths.sum()


def test_generate_long_goes_on_beyond_the_context(models):
    model, heard = models['qwen3'], {0: [], 1: []}
    rows = generate_long(model, [1, 2, 3], 130, num_samples=2, seed=1, on_token=lambda row, token: heard[row].append(token))
    assert [len(row) for row in rows] == [130, 130] and [heard[0], heard[1]] == rows
    first = generate(model, [[1, 2, 3]], 130, num_samples=2, seed=1)
    assert [row[:45] for row in rows] == first.tokens.tolist()
    greedy = generate_long(model, [1, 2, 3], 50, temperature=0)[0]
    assert greedy[45:] == generate(model, [([1, 2, 3] + greedy[:45])[-24:]], 5, temperature=0).tokens[0].tolist()


# ---- the command -------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    """A character model of the letters a to z, newline and e with an acute accent."""
    path = tmp_path_factory.mktemp('char')
    tokenizer = Tokenizer(char_encoder('\nabcdefghijklmnopqrstuvwxyzé').tokenizer.to_str())
    save_model(small(vocab_size=28), tokenizer, path)
    return str(path)


def command(monkeypatch, capsys, *argv, stdin=''):
    monkeypatch.setattr(sys, 'argv', ['sample.py', *argv])
    monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
    code = 0
    try:
        sample.run_script(sample.main, sample.parse(sample.Config))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_its_samples(directory, monkeypatch, capsys, tmp_path):
    (tmp_path / 'prompt.txt').write_text('café', encoding='utf-8')
    base = (directory, '--max_new_tokens=60', '--num_samples=3', '--device=cpu')
    code, out, err = command(monkeypatch, capsys, *base, '--prompt=café')
    assert code == 0 and out.count('café') == 3 and '--- sample 2 of 3 ---\n' in out and '180 tokens' in err
    texts = [part.split('---\n')[-1].strip('\n') for part in out.split('\n--- sample')]
    assert len(set(texts)) == 3
    assert command(monkeypatch, capsys, *base, '--prompt=-', stdin='café')[1] == out
    assert command(monkeypatch, capsys, *base, f'--prompt=FILE:{tmp_path / "prompt.txt"}', '--no-stream')[1] == out
    code, out, _ = command(monkeypatch, capsys, directory, '--temperature=0', '--max_new_tokens=4')
    assert code == 0 and len(out) == 4 + 1


@pytest.mark.parametrize('argv, message', [
    (['nowhere/at/all'], 'no model directory nowhere/at/all'), (['--prompt=X'], "no token for 'X'"), (['--chat'], 'no chat template'),
    (['--prompt=' + 'a' * 48], 'the prompt has 48 tokens'), (['--prompt=FILE:no.txt'], 'No such file'), (['--top_p=2'], 'top_p=2.0'),
    (['--chat', '--prompt=a'], '--chat asks'), (['--device=tpu'], "'tpu'")])
def test_a_mistake_is_one_line(argv, message, directory, monkeypatch, capsys):
    argv = argv if argv[0].startswith('nowhere') else [directory, *argv]
    code, out, err = command(monkeypatch, capsys, *argv)
    assert code == 2 and message in err and err.count('\n') == 1 and out == ''


def test_a_multicontext_model_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'nanoforge', 'nanoforge': {'multicontext': ['a', 'b']}}))
    code, _, err = command(monkeypatch, capsys, str(tmp_path))
    assert code == 2 and 'multicontext' in err and err.count('\n') == 1


def test_half_characters_wait_and_rows_take_turns(capsys):
    from data.build_tokenizer import byte_encoder
    encoder = byte_encoder()
    tokenizer = Tokenizer(encoder.tokenizer.to_str())
    printer, shown = sample.Printer(tokenizer, tokenizer.encode('é'), {0}), []
    first, second = tokenizer.encode('aé漢'), tokenizer.encode('xé')
    for t in range(6):
        printer.add(0, first[t])
        if t < 3:
            printer.add(1, second[t])
        shown.append(capsys.readouterr().out)
    assert shown == ['a', '', 'é', '', '', '漢']
    printer.next_row()
    printer.next_row()
    assert capsys.readouterr().out == 'xé'


def test_chat_answers_in_turns(monkeypatch, capsys, tmp_path):
    words = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    from tokenizers import Tokenizer as Backend, models, pre_tokenizers, decoders
    from data.chat import CHAT_TEMPLATE
    letters = [*'\nabcdefghijklmnopqrstuvwxyz <|>_']
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(letters)}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
    backend.add_special_tokens(words)
    tokenizer = Tokenizer(backend.to_str(), {'eos_token': '<|im_end|>'}, chat_template=CHAT_TEMPLATE)
    model = small(vocab_size=tokenizer.vocab_size, block_size=120)
    save_model(model, tokenizer, tmp_path)
    code, out, err = command(monkeypatch, capsys, str(tmp_path), '--chat', '--max_new_tokens=20', stdin='hello\nagain\nand more\n')
    assert code == 0 and len(out.splitlines()) >= 3
    assert 'no longer fit' in err
