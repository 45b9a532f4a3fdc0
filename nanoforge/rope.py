"""Frequencies of rotary positions (Su et al. 2021) and their stretching to contexts longer than a model was
trained on: linear, Llama 3's, YaRN and dynamic NTK.

`rope` is a layer type's rope_parameters of config.json. Dynamic scaling turns by the length of the text, so
that a sampler's cached keys, turned when the text was shorter, are not those of a pass over the whole text:
beyond the original context the two differ, here as in transformers.
"""
import math

import torch

# kind of scaling -> the settings that it needs, those that it may have
ROPE_TYPES = {
    'default': ((), ()),
    'linear': (('factor',), ()),
    'dynamic': (('factor', 'original_max_position_embeddings'), ()),
    'llama3': (('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'), ()),
    'yarn': (('factor', 'original_max_position_embeddings'),
             ('attention_factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'truncate'))}


def frequencies(rope, head_size):
    """Inverse frequencies (D/2,) float32 of documents that are no longer than the original context."""
    inv = 1.0 / wavelengths(rope['rope_theta'], head_size)
    if rope['rope_type'] == 'linear':
        return inv / rope['factor']
    if rope['rope_type'] == 'yarn':
        return yarn(rope, head_size)
    # long waves are stretched by `factor`, short ones kept, others blended
    if rope['rope_type'] == 'llama3':
        low, high = rope['low_freq_factor'], rope['high_freq_factor']
        turns = rope['original_max_position_embeddings'] * inv / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return inv * blend + inv / rope['factor'] * (1 - blend)
    return inv


def wavelengths(theta, head_size):
    """theta, a number or (..., 1) -> (..., D/2): positions in which a pair turns by one radian."""
    return theta ** (torch.arange(0, head_size, 2).float() / head_size)


def yarn(rope, head_size):
    """YaRN (Peng et al. 2023, section 3.2): a pair of channels that turns more than beta_fast times in the
    original context keeps its frequency, one of fewer than beta_slow turns gets a factor-th of it, between
    the two a ramp over the channels blends."""
    theta, original = rope['rope_theta'], rope['original_max_position_embeddings']

    def pair_of(turns):
        """The pair of channels, counted as a real number, that turns so often."""
        return head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(rope.get('beta_fast') or 32), pair_of(rope.get('beta_slow') or 1)
    if rope.get('truncate', True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    width = last - first or 0.001
    slow = ((torch.arange(head_size // 2).float() - first) / width).clamp(0, 1)
    kept = 1 - slow             # as two numbers: so the sum rounds as in transformers
    waves = wavelengths(theta, head_size)
    return 1.0 / (rope['factor'] * waves) * (1 - kept) + 1.0 / waves * kept


def attention_factor(rope):
    """What YaRN multiplies queries and keys by (Peng et al. 2023, eq. 22); 1.0 of every other kind."""
    if rope['rope_type'] != 'yarn':
        return 1.0
    if rope.get('attention_factor') is not None:
        return float(rope['attention_factor'])

    def sharpness(weight):
        return 0.1 * weight * math.log(rope['factor']) + 1.0 if rope['factor'] > 1 else 1.0

    if rope.get('mscale') and rope.get('mscale_all_dim'):           # DeepSeek's
        return sharpness(rope['mscale']) / sharpness(rope['mscale_all_dim'])
    return sharpness(1)


def is_dynamic(rope):
    return rope['rope_type'] == 'dynamic'


def angles(rope, inv_freq, positions, lengths):
    """positions (...) -> angles (..., D/2) float32. lengths (...): how many positions the document of each
    one has; only dynamic scaling, whose base grows with the document beyond the original context, reads it.
    """
    if is_dynamic(rope):
        original, factor = rope['original_max_position_embeddings'], rope['factor']
        head_size = 2 * len(inv_freq)
        stretch = factor * lengths.cpu().clamp(min=original) / original - (factor - 1)
        theta = rope['rope_theta'] * stretch ** (head_size / (head_size - 2))
        inv_freq = 1.0 / wavelengths(theta[..., None], head_size)
    return positions[..., None].float() * inv_freq.to(positions.device)


def context_of(rope, max_position_embeddings):
    """The longest context that config.json stands for: files with YaRN or dynamic scaling often leave
    max_position_embeddings as it was before."""
    if rope['rope_type'] in ('yarn', 'dynamic'):
        return max(max_position_embeddings, int(rope['factor'] * rope['original_max_position_embeddings']))
    return max_position_embeddings
