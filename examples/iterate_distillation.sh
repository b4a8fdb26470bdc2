#!/usr/bin/env bash
# The full loop, several times: score passages, train the retriever, embed, retrieve, train the reader.
#
#     bash examples/iterate_distillation.sh
#     GPUS=8 ROUNDS=3 OUT=my_rounds bash examples/iterate_distillation.sh
#
# Why: a better retriever finds passages that a better reader can be trained on, whose attention
# teaches the next retriever. The original's README: "iterating the four steps here can improve
# performances, depending on the initial set of documents". Round 0 is BM25 and a reader trained on
# its passages. (A round's models start from those of the round before: our choice, not the paper's.)
# How long: on NaturalQuestions and Wikipedia, days of GPU time per round, mostly for reading 100
# passages per question and embedding 21 million passages, which take 32 GB of disk per round.
# Started again, it skips finished steps and resumes unfinished ones.
# In:  TRAIN, DEV, TEST: questions with answers (their own passages are not used); PASSAGES.
# Out: OUT/round-N/{train,dev,test}.jsonl, embeddings/, runs/{reader,retriever,test}; a table at the end.
set -euo pipefail
cd "$(dirname "$0")/.." # paths are relative to the repository

TRAIN=${TRAIN:-open_domain_data/NQ/train.json}
DEV=${DEV:-open_domain_data/NQ/dev.json}
TEST=${TEST:-open_domain_data/NQ/test.json}
PASSAGES=${PASSAGES:-open_domain_data/psgs_w100.tsv}
READER=${READER:-t5-base} RETRIEVER=${RETRIEVER:-bert-base-uncased} # to start from
ROUNDS=${ROUNDS:-2}
OUT=${OUT:-iterated}
GPUS=${GPUS:-1}
N=${N:-100} # passages retrieved and read per question
READER_STEPS=${READER_STEPS:-10000} RETRIEVER_STEPS=${RETRIEVER_STEPS:-20000} # updates per round
ACCUMULATE=${ACCUMULATE:-$((64 / GPUS))} # GPUS x ACCUMULATE questions per update

run=(python)
if [ "$GPUS" -gt 1 ]; then run=(torchrun --nproc_per_node="$GPUS"); fi
declare -A questions=([train]=$TRAIN [dev]=$DEV [test]=$TEST)

# step RESULT COMMAND...: run a command unless its result exists (results are written atomically).
step() {
    local result=$1
    shift
    if [ -e "$result" ]; then echo "done already: $result"; return; fi
    echo "+ $*"
    "$@"
}

# read_and_test ROUND MODEL: train a model on the round's passages; answer the test questions.
read_and_test() {
    local here=$OUT/round-$1
    step "$here/runs/reader/checkpoint/step-$READER_STEPS" \
        "${run[@]}" train_reader.py --train_data "$here/train.jsonl" --eval_data "$here/dev.jsonl" \
        --model_path "$2" --n_context "$N" --text_maxlength 250 --per_gpu_batch_size 1 \
        --accumulation_steps "$ACCUMULATE" --total_steps "$READER_STEPS" --use_checkpoint \
        --name reader --checkpoint_dir "$here/runs"
    step "$here/runs/test/final_output.txt" \
        "${run[@]}" test_reader.py --model_path "$here/runs/reader/checkpoint/best_dev" \
        --eval_data "$here/test.jsonl" --n_context "$N" --text_maxlength 250 --write_results \
        --name test --checkpoint_dir "$here/runs"
}

for part in train dev test; do
    step "$OUT/round-0/$part.jsonl" python passage_retrieval.py --bm25 --save_or_load_index \
        --passages "$PASSAGES" --data "${questions[$part]}" --n-docs "$N" \
        --output_path "$OUT/round-0/$part.jsonl"
done
read_and_test 0 "$READER"

for ((round = 1; round <= ROUNDS; round++)); do
    before=$OUT/round-$((round - 1)) here=$OUT/round-$round

    # 1. Score passages by the reader's attention
    for part in train dev; do
        step "$here/runs/scores_$part/dataset_wscores.json" \
            "${run[@]}" test_reader.py --model_path "$before/runs/reader/checkpoint/best_dev" \
            --eval_data "$before/$part.jsonl" --n_context "$N" --text_maxlength 250 \
            --write_crossattention_scores --name "scores_$part" --checkpoint_dir "$here/runs"
    done

    # 2. Train a retriever to rank like the reader
    start=(--retriever_model "$RETRIEVER")
    if [ "$round" -gt 1 ]; then start=(--model_path "$before/runs/retriever/checkpoint/best_dev"); fi
    step "$here/runs/retriever/checkpoint/step-$RETRIEVER_STEPS" \
        "${run[@]}" train_retriever.py --train_data "$here/runs/scores_train/dataset_wscores.json" \
        --eval_data "$here/runs/scores_dev/dataset_wscores.json" "${start[@]}" --n_context "$N" \
        --per_gpu_batch_size 1 --accumulation_steps "$ACCUMULATE" --lr 1e-4 --optim adamw \
        --scheduler linear --total_steps "$RETRIEVER_STEPS" \
        --scheduler_steps $((RETRIEVER_STEPS * 3 / 2)) --name retriever --checkpoint_dir "$here/runs"
    retriever=$here/runs/retriever/checkpoint/best_dev

    # 3. Embed the collection (on a cluster: examples/slurm/embed_array.sbatch)
    step "$here/embeddings/wiki_00" \
        "${run[@]}" generate_passage_embeddings.py --model_path "$retriever" --passages "$PASSAGES" \
        --output_path "$here/embeddings/wiki" --per_gpu_batch_size 500

    # 4. Retrieve passages, and train a reader on them
    for part in train dev test; do
        step "$here/$part.jsonl" \
            "${run[@]}" passage_retrieval.py --model_path "$retriever" --passages "$PASSAGES" \
            --passages_embeddings "$here/embeddings/wiki_*" --data "${questions[$part]}" \
            --n-docs "$N" --output_path "$here/$part.jsonl"
    done
    read_and_test "$round" "$before/runs/reader/checkpoint/best_dev"
done

tests=() answers=()
for ((round = 0; round <= ROUNDS; round++)); do
    tests+=("$OUT/round-$round/test.jsonl") answers+=("$OUT/round-$round/runs/test/final_output.txt")
done
python -m src.tools.evaluate "${tests[@]}"
python -m src.tools.evaluate --data "$TEST" "${answers[@]}"
