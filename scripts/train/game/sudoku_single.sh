#!/bin/bash
# Sudoku with a single policy that both agents share. Edit the lines below; what is typed wins over them:
#   bash scripts/train/game/sudoku_single.sh base_models.policy_0.path=Qwen/Qwen3-1.7B training.val_freq=5
# Data: python scripts/dataprocess/load_sokoban.py (without it the project makes puzzles of its own)
export CUDA_VISIBLE_DEVICES=0
GPU_num=1  # GPUs that share each model

team=(
    GPU_num=$GPU_num
    base_models.policy_0.path=tiny                      # Hugging Face name or directory; tiny: the embedded model
    specialization=prompt
    training.experiment_name=sudoku_single              # logs/sudoku_single/
    env.dataset=sudoku                                  # training problems
    env.benchmark=sudoku                                # held-out problems
)
# tiny trains with its recipe, in minutes on two cores
toy=(recipes/training/agents/sudoku.yaml)
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
