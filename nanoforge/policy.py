"""The models of a fine-tuning run as its flags ask for them: policy, reference, critic, reward model."""
import os

import torch

from configurator import UserError
from data.tokenizer import read_json
from model import load_model
from nanoforge.flags import SMALL_MODEL
from nanoforge.hf import find_model
from nanoforge.lora import add_lora, stacked_weights
from nanoforge.quantize import check_trainable
from nanoforge.run import seed_for

RATES = {'full': 1e-5, 'LoRA': 1e-4, 'QLoRA': 2e-4}     # learning rates where none is given


def is_adapter(name_or_path):
    """Whether it is a PEFT adapter, not a whole model."""
    return os.path.exists(os.path.join(find_model(name_or_path, weights=False), 'adapter_config.json'))


def is_small(model):
    return model.num_params() < SMALL_MODEL


def load_policy(cfg, run, name, checkpoint=None, trainable=True):
    """(model, tokenizer) of `name`, or of a `checkpoint` of this run, with the adapter that the flags ask
    for.

    What trains is float32; what is frozen (the base under LoRA, a reference with trainable=False) is
    cfg.torch_dtype on a GPU. With use_lora a model without an adapter gets a new one, seeded by cfg.seed.
    UserError where there is no tokenizer, or nothing would train.
    """
    dtype = torch.float32
    if run.device.type == 'cuda' and (cfg.use_lora or not trainable):
        dtype = getattr(torch, cfg.torch_dtype)
    path = str(checkpoint or name)
    base = None
    if is_adapter(path) and not is_adapter(cfg.base_model_name):
        if checkpoint or 'base_model_name' in cfg.typed:
            base = cfg.base_model_name                  # wherever it lies now, whatever the adapter calls it
    model, tokenizer = load_model(
        path, run.device, dtype, cfg.load_in_4bit, cfg.load_in_8bit, cfg.bnb_4bit_quant_type,
        cfg.bnb_4bit_use_double_quant, cfg.bnb_4bit_compute_dtype, base=base, trainable_adapter=trainable)
    if tokenizer is None:
        raise UserError(f'{path} has no tokenizer beside its weights: copy tokenizer.json there')
    if trainable and cfg.use_lora and not getattr(model, 'adapters', None):
        torch.manual_seed(seed_for(cfg.seed, 'adapter'))
        targets = cfg.lora_target_modules or 'all-linear'
        if run.resumed and is_adapter(run.resumed):     # a critic has adapters where the policy has them
            targets = read_json(os.path.join(run.resumed, 'adapter_config.json'))['target_modules']
        add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, targets, cfg.lora_bias, cfg.use_rslora,
                 cfg.use_dora)
    stacked = stacked_weights(model) if trainable and cfg.use_lora else {}
    if stacked:
        matrices, numbers = map(sum, zip(*stacked.values()))
        share = numbers / model.num_params()
        run.print0(f'note      LoRA is for linear layers: the {matrices} matrices in '
                   f'{", ".join(sorted(stacked))} ({share:.0%} of the parameters) get no adapter, stay as '
                   'they are, and are never in 4 or 8 bits')
    if trainable:
        check_trainable(model)
    else:
        model.requires_grad_(False)
    if cfg.use_flash_attention and run.device.type == 'cuda':
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return model.set_matmul(run.matmul).train(trainable), tokenizer


def default_learning_rate(cfg, model, small):
    """By mode; `small` is that of a small model that trains in full."""
    return small if cfg.mode == 'full' and is_small(model) else RATES[cfg.mode]
