"""Value and reward models: PPO's critic (a value for every token) and the reward model (a score for a whole
text).

Both are a language model's backbone with a scalar head; on disk they are what transformers calls a sequence
classifier with one label: its AutoModelForSequenceClassification opens what is written here, and what it
writes is opened here.
"""
import json
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from data.batches import cut, pack
from data.completions import by_prompt
from data.problems import prompt
from data.tokenizer import load_tokenizer, read_json
from model import GPT
from nanoforge.hf import (
    config_from_hf, config_to_hf, find_model, from_hf_weights, hf_layout, load_weights, read_safetensors)
from nanoforge.lora import merge_lora
from nanoforge.optim import learning_rate, make_optimizer
from nanoforge.run import seed_for
from nanoforge.tensors import save_tensors


class ValueModel(nn.Module):
    """A scalar head on a backbone: a GPT, whose language modelling head is not used. The head starts at 0, so
    every value does.

    own: the backbone belongs to this model; False where it is shared with the policy, and only the head is
    its own.
    """

    def __init__(self, backbone, own=True):
        super().__init__()
        self.backbone, self.owns_backbone = backbone, own
        self.score = nn.Linear(backbone.config.n_embd, 1, bias=False, device=backbone.device)
        nn.init.zeros_(self.score.weight)
        # an unused head would only take memory
        if own and isinstance(backbone, GPT) and not backbone.config.tied:
            backbone.lm_head.weight, backbone.config.tied = backbone.embed_tokens.weight, True

    @property
    def own(self):
        """The module whose parameters are this model's alone."""
        return self if self.owns_backbone else self.score

    def read(self, hidden):
        """The head: (..., C) -> (...) float32 (float64 of a float64 model)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)

    def values(self, batch):
        """A PackedBatch with keep_last -> (values (B, T) before each token, values (B,) after the last)."""
        values = self.read(batch.hidden_states(self.backbone))
        return values[:, :-1], values[:, -1]

    def rewards(self, groups):
        """[(prompt ids, [completion ids, ...])] -> (n,): the score of each completion."""
        batch = pack(groups, self.score.weight.device, keep_last=True)
        return self.read(self.backbone.hidden(batch.idx, batch.positions, logit_positions=batch.last))


class HFRewardModel:
    """A sequence classifier of transformers with one label, of any architecture and with its own tokenizer:
    it scores texts."""

    def __init__(self, directory, device):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        try:
            self.model = AutoModelForSequenceClassification.from_pretrained(
                directory, trust_remote_code=False, use_safetensors=True)
            self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        # whatever its loading code raises, it is this directory that cannot be used
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).partition('\n')[0]
            raise UserError(f'{directory}: transformers does not open it as a sequence classifier '
                            f'({reason})') from None
        self.model.to(device).eval()

    def texts(self, chats):
        """[messages, the last one the assistant's] -> (n,)."""
        if self.tokenizer.chat_template:
            texts = [self.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        else:
            texts = ['\n\n'.join(message['content'] for message in chat) for chat in chats]
        scores = []
        with torch.no_grad():           # one at a time: not every tokenizer has a padding token
            for text in texts:
                encoded = self.tokenizer(text, return_tensors='pt', truncation=True).to(self.model.device)
                scores.append(self.model(**encoded).logits[0, 0].float())
        return torch.stack(scores)


@torch.no_grad()
def score_completions(model, completions, batch_size):
    """[data.completions.Completion] -> numbers, None where nothing was sampled. A ValueModel reads the tokens
    that were sampled, an HFRewardModel, whose tokenizer is another, the text."""
    scores = []
    for part in cut([c for c in completions if c.completion_ids], batch_size):
        if isinstance(model, ValueModel):
            scores += model.rewards(by_prompt(part)).tolist()
        else:
            chats = [[*prompt(c.problem), {'role': 'assistant', 'content': c.text}] for c in part]
            scores += model.texts(chats).tolist()
    scores = iter(scores)
    return [next(scores) if c.completion_ids else None for c in completions]


def load_reward_model(name_or_path, device, tokenizer):
    """A directory or hub name of a sequence classifier with one label -> ValueModel, or HFRewardModel where
    the architecture or the tokenizer is another; frozen, in eval mode."""
    directory = find_model(name_or_path)
    hf = read_json(os.path.join(directory, 'config.json'))
    classes = hf.get('architectures') or ['']
    if not classes[0].endswith('ForSequenceClassification'):
        what = classes[0] or 'model of no known class'
        raise UserError(f'reward_model_path={name_or_path}: a {what}, not a sequence classifier '
                        '(...ForSequenceClassification with one label)')
    labels = len(hf.get('id2label') or {0: '', 1: ''})
    if labels != 1:
        raise UserError(f'reward_model_path={name_or_path} has {labels} labels; a reward model has one')
    shape = config_from_hf({**hf, 'tie_word_embeddings': True})
    if shape is None or load_tokenizer(directory).sha256 != tokenizer.sha256:
        return HFRewardModel(directory, device)
    weights = read_safetensors(directory)
    score = weights.pop('score.weight')
    with torch.device('meta'):
        backbone = GPT(shape)
    state = from_hf_weights(shape, weights)
    state.pop('lm_head.weight', None)           # a language model's, left over
    load_weights(backbone, state, directory, torch.float32, device)
    model = ValueModel(backbone)
    model.score.weight.data.copy_(score)
    return model.requires_grad_(False).eval()


def save_reward_model(model, tokenizer, directory):
    """Writes a ValueModel as a sequence classifier of transformers."""
    os.makedirs(directory, exist_ok=True)
    if getattr(model.backbone, 'adapters', None):
        merge_lora(model.backbone, keep=False)
    if not isinstance(model.backbone, GPT):
        raise UserError(f'a reward model on {model.backbone.config.arch} cannot be saved: use one of the '
                        'families of model.py')
    hf = config_to_hf(model.backbone.config)
    name = re.sub('LMHeadModel$|ForCausalLM$', '', hf['architectures'][0])
    hf.update(architectures=[name + 'ForSequenceClassification'],
              id2label={'0': 'LABEL_0'}, label2id={'LABEL_0': 0},
              pad_token_id=tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id)
    layout = {**hf_layout(model.backbone, hf['model_type']), 'score.weight': ([model.score.weight], False)}
    save_tensors(os.path.join(directory, 'model.safetensors'), layout, metadata={'format': 'pt'})
    tokenizer.save(directory)
    with open(os.path.join(directory, 'config.json'), 'w', encoding='utf-8') as file:
        json.dump(hf, file, indent=2)


# ---- Bradley-Terry -----------------------------------------------------------------------------------------

def train_reward_model(model, pairs, run, epochs=1, batch_size=32, lr=1e-4, seed=0):
    """Fits a ValueModel to preference pairs by -log sigmoid(r_chosen - r_rejected) (Bradley and Terry 1952),
    averaged over the pairs of a step.

    pairs: [data.preferences.TokenPair]; the two completions of one lie behind one prompt, which is computed
    once.
    """
    optimizer = make_optimizer('adamw', model, lr, weight_decay=0.01, betas=(0.9, 0.99))
    steps, loss, step = max(1, epochs * len(pairs) // batch_size), torch.zeros(()), 0
    model.train()
    for batch in batches(pairs, epochs, batch_size, seed):
        torch.manual_seed(seed_for(seed, 'reward dropout', step, run.rank))
        mine, loss = batch[run.rank::run.world_size], torch.zeros((), device=run.device)
        for part in run.even([mine] if mine else [], model):
            with run.autocast():
                margin = margins(model, part)
            of_part = -F.logsigmoid(margin).sum() / len(batch)
            run.backward(of_part)
            loss += of_part.detach()
        run.sum(loss)
        run.step(optimizer, learning_rate(step, 'linear', lr, 0.0, steps // 20, steps), max_norm=1.0)
        step += 1
        if step % max(1, steps // 5) == 0:
            run.print0(f'reward model: step {step}/{steps}  loss {loss.item():.4f}')


def batches(pairs, epochs, batch_size, seed):
    """Shuffled anew in every epoch; the last, smaller batch of an epoch is left out unless it is the only
    one."""
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed_for(seed, 'pairs', epoch))
        order = torch.randperm(len(pairs), generator=generator).tolist()
        stop = len(order) - batch_size + 1 if len(order) >= batch_size else 1
        for start in range(0, stop, batch_size):
            yield [pairs[i] for i in order[start:start + batch_size]]


def margins(model, pairs):
    """(n,): the chosen side's score less the rejected one's."""
    scores = model.rewards([(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs])
    return scores[0::2] - scores[1::2]


@torch.no_grad()
def pair_accuracy(model, pairs, run, batch_size=32):
    """The share of pairs whose chosen side scores higher."""
    model.eval()
    correct = torch.zeros((), device=run.device)
    with run.unsharded():
        for start in range(run.rank * batch_size, len(pairs), run.world_size * batch_size):
            correct += (margins(model, pairs[start:start + batch_size]) > 0).sum()
    return run.sum(correct).item() / max(len(pairs), 1)
