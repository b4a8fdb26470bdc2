#!/usr/bin/env bash
# Train a reader cheaply: on 25 passages per question, then for 1,000 updates on 100.
#
#     bash examples/read_25_then_100.sh
#     GPUS=8 TRAIN=my_train.json DEV=my_dev.json bash examples/read_25_then_100.sh
#
# Why: an update on 100 passages costs about as much as four on 25. Izacard and Grave (2020) report
# 46.0 exact match on NaturalQuestions for this schedule after 147 GPU hours, and 46.5 for 100 passages
# throughout, after 425 (base reader, DPR's passages, V100s; their section on fewer passages).
# How long: by these numbers, 18 hours on eight such GPUs. Started again, it resumes.
# In:  TRAIN and DEV, each question with up to 100 passages (bash get-data.sh, or passage_retrieval.py).
# Out: OUT/read_25 and OUT/read_100; the reader is OUT/read_100/checkpoint/best_dev.
set -euo pipefail
cd "$(dirname "$0")/.." # paths are relative to the repository
source examples/common.sh # GPUS (1), ACCUMULATE (64 / GPUS), RUN

TRAIN=${TRAIN:-open_domain_data/NQ/train.json}
DEV=${DEV:-open_domain_data/NQ/dev.json}
MODEL=${MODEL:-t5-base} # or another T5: a folder or hub name
OUT=${OUT:-checkpoint}
FEW=${FEW:-25} MANY=${MANY:-100}
FEW_STEPS=${FEW_STEPS:-10000} MANY_STEPS=${MANY_STEPS:-1000}

# As in the paper: Adam at a constant 1e-4, dropout 0.1 (both are defaults), 250 tokens per passage.
train=("${run[@]}" train_reader.py --train_data "$TRAIN" --eval_data "$DEV" --text_maxlength 250
    --per_gpu_batch_size 1 --accumulation_steps "$ACCUMULATE" --checkpoint_dir "$OUT")

"${train[@]}" --model_path "$MODEL" --n_context "$FEW" --total_steps "$FEW_STEPS" --name "read_$FEW"
# --use_checkpoint saves memory and takes a third more time (bench/RESULTS.md): omit it if you can.
"${train[@]}" --model_path "$OUT/read_$FEW/checkpoint/best_dev" --n_context "$MANY" \
    --total_steps "$MANY_STEPS" --use_checkpoint --name "read_$MANY"
