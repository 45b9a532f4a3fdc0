#!/bin/bash
# Mathematics, L3: a model per agent. Edit the lines below; what is typed wins over them:
#   bash scripts/train/math/math_L3_model.sh base_models.policy_0.path=Qwen/Qwen3-1.7B training.val_freq=5
# Data: python scripts/dataprocess/load_math.py (without it generated problems stand in, and the run says so)
export CUDA_VISIBLE_DEVICES=0
GPU_num=1  # GPUs that share each model

team=(
    GPU_num=$GPU_num
    base_models.policy_0.path=tiny                      # Hugging Face name or directory; tiny: the embedded model
    # base_models.policy_1.path=...                     # the second agent's; as policy_0 if not set
    specialization=full
    training.experiment_name=math_L3_model              # logs/math_L3_model/
    env.dataset=polaris                                 # training problems
    env.benchmark=AIME24                                # held-out problems
)
# tiny trains with its recipe, in minutes on two cores
toy=(recipes/training/agents/math.yaml)
# any other model with these
real=(
    training.total_training_steps=200                   # iterations: a rollout and its updates each
    training.epoch_size=20                              # problems that are rolled out per iteration
    training.train_batch_size=32                        # sequences per optimizer step
    training.max_prompt_length=8192                     # tokens
    training.max_response_length=8192                   # tokens of an answer
    training.val_freq=10                                # iterations between validations
)
source "$(dirname "$0")/../run.sh"
