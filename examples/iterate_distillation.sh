#!/usr/bin/env bash
# The full loop, several times: score passages, train the retriever, embed, retrieve, train the reader.
#
#     bash examples/iterate_distillation.sh
#     GPUS=8 ROUNDS=3 OUT=my_rounds bash examples/iterate_distillation.sh
#     START=bert EACH_ROUND=restart OUT=from_bert bash examples/iterate_distillation.sh
#
# Why: a better retriever finds passages that a better reader can be trained on, whose attention
# teaches the next retriever. The original's README: "iterating the four steps here can improve
# performances, depending on the initial set of documents". Round 0 is a reader trained on those.
# START: the initial passages, as in the 2021 paper:
#   bm25  BM25's (default)
#   bert  those of an untrained retriever: RETRIEVER as it is, the mean of its last hidden states
#   dpr   the ones already in TRAIN, DEV and TEST: by default DPR's (bash examples/dpr_passages.sh)
# EACH_ROUND: the weights that a round's models start from:
#   continue  those of the round before (default; round 1's retriever starts from RETRIEVER)
#   restart   READER and RETRIEVER, so that a round inherits nothing but its passages
# How long: on NaturalQuestions and Wikipedia, days of GPU time per round, mostly for reading 100
# passages per question and embedding 21 million passages, which take 32 GB of disk per round.
# Started again, it skips finished steps and resumes unfinished ones.
# In:  TRAIN, DEV, TEST: questions with answers (and passages, for START=dpr); PASSAGES.
# Out: OUT/round-N/{train,dev,test}.jsonl, embeddings/, runs/{reader,retriever,test}; a table at the end.
set -euo pipefail
cd "$(dirname "$0")/.." # paths are relative to the repository
source examples/common.sh # GPUS (1), ACCUMULATE (64 / GPUS), RUN

START=${START:-bm25} EACH_ROUND=${EACH_ROUND:-continue}
data=open_domain_data/NQ
if [ "$START" = dpr ]; then data=open_domain_data/DPR; fi
TRAIN=${TRAIN:-$data/train.json} DEV=${DEV:-$data/dev.json} TEST=${TEST:-$data/test.json}
PASSAGES=${PASSAGES:-open_domain_data/psgs_w100.tsv}
READER=${READER:-t5-base} RETRIEVER=${RETRIEVER:-bert-base-uncased} # to start from
ROUNDS=${ROUNDS:-2}
OUT=${OUT:-iterated}
N=${N:-100} # passages retrieved and read per question
READER_STEPS=${READER_STEPS:-10000} RETRIEVER_STEPS=${RETRIEVER_STEPS:-20000} # updates per round
declare -A questions=([train]=$TRAIN [dev]=$DEV [test]=$TEST)

fail() { echo "error: $*" >&2; exit 2; }
case $START in bm25 | bert | dpr) ;; *) fail "START=$START: must be bm25, bert or dpr" ;; esac
case $EACH_ROUND in
    continue | restart) ;;
    *) fail "EACH_ROUND=$EACH_ROUND: must be continue or restart" ;;
esac
mkdir -p "$OUT"
settings="START=$START EACH_ROUND=$EACH_ROUND"
made_with=$(cat "$OUT/settings" 2> /dev/null || echo "$settings")
[ "$made_with" = "$settings" ] || fail "$OUT was made with $made_with; name another OUT for $settings"
echo "$settings" > "$OUT/settings"

# data ROUND PART: the file with that round's passages.
data() {
    if [ "$START-$1" = dpr-0 ]; then echo "${questions[$2]}"; else echo "$OUT/round-$1/$2.jsonl"; fi
}

# find_passages ROUND RETRIEVER: embed the collection, and retrieve the round's passages.
find_passages() {
    local here=$OUT/round-$1 part
    # (On a cluster: examples/slurm/embed_array.sbatch)
    step "$here/embeddings/wiki_00" \
        "${run[@]}" generate_passage_embeddings.py --model_path "$2" --passages "$PASSAGES" \
        --output_path "$here/embeddings/wiki" --per_gpu_batch_size 500
    for part in train dev test; do
        step "$here/$part.jsonl" \
            "${run[@]}" passage_retrieval.py --model_path "$2" --passages "$PASSAGES" \
            --passages_embeddings "$here/embeddings/wiki_*" --data "${questions[$part]}" \
            --n-docs "$N" --output_path "$here/$part.jsonl"
    done
}

# read_and_test ROUND MODEL: train a model on the round's passages; answer the test questions.
read_and_test() {
    local runs=$OUT/round-$1/runs
    step "$runs/reader/checkpoint/step-$READER_STEPS" \
        "${run[@]}" train_reader.py --train_data "$(data "$1" train)" --eval_data "$(data "$1" dev)" \
        --model_path "$2" --n_context "$N" --text_maxlength 250 --per_gpu_batch_size 1 \
        --accumulation_steps "$ACCUMULATE" --total_steps "$READER_STEPS" --use_checkpoint \
        --name reader --checkpoint_dir "$runs"
    step "$runs/test/final_output.txt" \
        "${run[@]}" test_reader.py --model_path "$runs/reader/checkpoint/best_dev" \
        --eval_data "$(data "$1" test)" --n_context "$N" --text_maxlength 250 --write_results \
        --name test --checkpoint_dir "$runs"
}

case $START in
    bm25)
        for part in train dev test; do
            step "$OUT/round-0/$part.jsonl" python passage_retrieval.py --bm25 \
                --save_or_load_index --passages "$PASSAGES" --data "${questions[$part]}" \
                --n-docs "$N" --output_path "$OUT/round-0/$part.jsonl"
        done
        ;;
    bert) find_passages 0 "$RETRIEVER" ;;
esac
read_and_test 0 "$READER"

for ((round = 1; round <= ROUNDS; round++)); do
    before=$OUT/round-$((round - 1)) here=$OUT/round-$round
    reader=$before/runs/reader/checkpoint/best_dev retriever=$here/runs/retriever/checkpoint/best_dev

    # 1. Score passages by the reader's attention
    for part in train dev; do
        step "$here/runs/scores_$part/dataset_wscores.json" \
            "${run[@]}" test_reader.py --model_path "$reader" \
            --eval_data "$(data $((round - 1)) $part)" --n_context "$N" --text_maxlength 250 \
            --write_crossattention_scores --name "scores_$part" --checkpoint_dir "$here/runs"
    done

    # 2. Train a retriever to rank like the reader
    start=(--retriever_model "$RETRIEVER")
    if [ "$EACH_ROUND" = continue ] && [ "$round" -gt 1 ]; then
        start=(--model_path "$before/runs/retriever/checkpoint/best_dev")
    fi
    step "$here/runs/retriever/checkpoint/step-$RETRIEVER_STEPS" \
        "${run[@]}" train_retriever.py --train_data "$here/runs/scores_train/dataset_wscores.json" \
        --eval_data "$here/runs/scores_dev/dataset_wscores.json" "${start[@]}" --n_context "$N" \
        --per_gpu_batch_size 1 --accumulation_steps "$ACCUMULATE" --lr 1e-4 --optim adamw \
        --scheduler linear --total_steps "$RETRIEVER_STEPS" \
        --scheduler_steps $((RETRIEVER_STEPS * 3 / 2)) --name retriever --checkpoint_dir "$here/runs"

    # 3. and 4. Embed the collection, retrieve passages, and train a reader on them
    find_passages "$round" "$retriever"
    if [ "$EACH_ROUND" = restart ]; then reader=$READER; fi
    read_and_test "$round" "$reader"
done

tests=() answers=()
for ((round = 0; round <= ROUNDS; round++)); do
    tests+=("$(data "$round" test)") answers+=("$OUT/round-$round/runs/test/final_output.txt")
done
python -m src.tools.evaluate "${tests[@]}"
python -m src.tools.evaluate --data "$TEST" "${answers[@]}"
