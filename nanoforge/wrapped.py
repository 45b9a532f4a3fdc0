"""Any other causal language model of transformers, behind the calls of model.GPT (without its speed).

Right-padded rows, packed documents, token_stats and sampling work as there; packed documents are run side by side, and
sampling runs the whole sequence at every step, so that nothing is asked of an architecture but that it is causal.
"""
from types import SimpleNamespace

import torch
import torch.nn as nn

from nanoforge import kernels
from configurator import UserError
from nanoforge.lora import dense_weight


class Wrapped(nn.Module):
    """model: a transformers model with a causal language modelling head; it stays as it is and saves itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.config = SimpleNamespace(
            arch=config.model_type, vocab_size=config.vocab_size, n_embd=config.hidden_size, dropout=0.0,
            block_size=getattr(config, 'max_position_embeddings', None) or 2 ** 31,
            tied=bool(config.tie_word_embeddings),
            logit_softcap=getattr(config, 'final_logit_softcapping', None) or 0.0)
        self.scale = 1.0
        self.scale = self.find_scale()

    @property
    def lm_head(self):
        return self.model.get_output_embeddings()

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def gradient_checkpointing(self):
        return self.model.is_gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on):
        (self.model.gradient_checkpointing_enable if on else self.model.gradient_checkpointing_disable)()

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def set_matmul(self, mode):
        """Its products stay in the precision of its weights (or of autocast)."""
        return self

    @torch.no_grad()
    def find_scale(self):
        """The factor between head and logits (Granite and Cohere have one), found by comparing; UserError if it is not
        one."""
        idx = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        training = self.model.training
        theirs = self.model.eval()(idx, use_cache=False).logits.float()
        cap = self.config.logit_softcap
        raw, ours = cap * torch.atanh(theirs / cap) if cap else theirs, kernels.head(*self.head(self.hidden(idx)))
        self.model.train(training)
        scale = ((raw * ours).sum() / ours.square().sum()).item()
        if not (raw - scale * ours).abs().max() <= 0.02 * raw.abs().max():
            raise UserError(f'{self.config.arch} is not supported: its logits are not last hidden state times head')
        return 1.0 if abs(scale - 1) < 1e-3 else scale

    def hidden(self, idx, positions=None, logit_positions=None):
        """idx (B, T) -> (B, T, C), after the last norm. positions (B, T), logit_positions: as GPT.hidden's for packed rows."""
        if logit_positions is not None:
            return self.hidden(idx, positions).flatten(0, 1)[logit_positions]
        B, T = idx.size()
        if T > self.config.block_size and (positions is None or positions.max() >= self.config.block_size):
            raise UserError(f'a row of {T} tokens does not fit the model\'s context of {self.config.block_size}: '
                            'shorten it')
        if positions is None:
            return self.model.base_model(input_ids=idx, use_cache=False).last_hidden_state
        spans = kernels.continuations(positions.expand(B, T))
        rows = [torch.cat([idx.flatten()[begin:begin + shared], idx.flatten()[at:end]]) for begin, shared, at, end in spans]
        hidden = self.hidden(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        return torch.cat([h[shared:shared + end - at] for h, (_, shared, at, end) in zip(hidden, spans)]).view(B, T, -1)

    def head(self, hidden):
        """(hidden, weight) whose product the logits are: a bias is one more column."""
        head, hidden = self.lm_head, hidden * self.scale
        weight = dense_weight(head)                         # with its adapter, where the head has one
        if getattr(head, 'bias', None) is None:
            return hidden, weight
        one = hidden.new_full((*hidden.shape[:-1], 1), self.scale)
        return torch.cat([hidden, one], -1), torch.cat([weight, head.bias[:, None]], 1)

    def logits(self, hidden):
        """(..., C) -> (..., V) in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels.head(*self.head(hidden), self.config.logit_softcap)

    def token_stats(self, hidden, targets, temperature=1.0, extras=True):
        """As GPT.token_stats."""
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels.token_stats(*self.head(hidden), targets, temperature, self.config.logit_softcap, extras)

    def forward(self, idx, targets=None, positions=None):
        """As GPT.forward."""
        hidden = self.hidden(idx, positions)
        return self.logits(hidden) if targets is None else self.token_stats(hidden, targets, extras=False)['logp']


def load_wrapped(directory, device, dtype):
    """A Hugging Face directory -> Wrapped. Code that comes with a model is never run."""
    from transformers import AutoModelForCausalLM
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
    except Exception as e:      # whatever its loading code raises, it is this directory that cannot be used
        reason = (str(e).strip() or type(e).__name__).partition('\n')[0]
        raise UserError(f'{directory}: outside our families, and transformers does not open it ({reason})') from None
    kinds = {'missing_keys': 'is missing', 'unexpected_keys': 'has no home', 'mismatched_keys': 'has another shape'}
    problems = [f'{name} {what}' for key, what in kinds.items() for name in sorted(info[key], key=str)]
    if problems:
        raise UserError(f'{directory} does not fit its config.json: ' + '; '.join(problems[:3]))
    return Wrapped(model.to(device)).eval()
