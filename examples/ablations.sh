#!/usr/bin/env bash
# Every target and every loss of distillation, compared on equal terms, from one reading.
#
#     bash examples/ablations.sh    # after quickstart.sh, in its environment (source .venv/bin/activate)
#     JOBS=1 START=bert-base-uncased READER=... TRAIN=... TEST=... PASSAGES=... bash examples/ablations.sh
#
# Why: reading is the expensive part, so passages are scored once, by every target. Then a retriever
# learns by each loss from attention (emdr2 from the answer's likelihood, contrastive from has_answer),
# and by KL from each target; it retrieves for the test questions; and one reader, always the same,
# answers from what was found. All start from the same weights and make the same number of updates.
# How long: about 15 minutes on two cores for 18 comparisons with 3 seeds on the quickstart's corpus.
# Started again, it skips what is finished.
# In:  READER; TRAIN, a .jsonl of questions with passages, whose first QUESTIONS are read; TEST,
#      questions with answers; PASSAGES; START, the retriever to start from. Without START, it is
#      trained from fresh weights (MODEL_CONFIG, with its tokenizer) for START_STEPS updates, to find
#      passages with an answer among those of a batch: it has seen no hard negative yet.
# Out: OUT/cells/LOSS.TARGET.SEED/{retriever,test.jsonl,read}; the table at the end, as Markdown.
set -euo pipefail
cd "$(dirname "$0")/.." # paths are relative to the repository
source examples/common.sh # RUN; GPUS (1)

QUICKSTART=${QUICKSTART:-quickstart/seed-0}
READER=${READER:-$QUICKSTART/runs/reader_8/checkpoint/latest}
TRAIN=${TRAIN:-$QUICKSTART/bm25_train.jsonl} TEST=${TEST:-$QUICKSTART/data/test.json}
PASSAGES=${PASSAGES:-$QUICKSTART/data/passages.tsv}
START=${START:-} MODEL_CONFIG=${MODEL_CONFIG:-$QUICKSTART/data/retriever_start/config.json}
OUT=${OUT:-ablations}
QUESTIONS=${QUESTIONS:-1600} N=${N:-8}                  # questions to distil from, passages of each
START_STEPS=${START_STEPS:-200} STEPS=${STEPS:-50}      # updates
BATCH=${BATCH:-16} LR=${LR:-1e-4} SEEDS=${SEEDS:-0 1 2} # questions per update
READ=${READ:-1}                                         # passages that the reader answers from
TEXT_MAXLENGTH=${TEXT_MAXLENGTH:-40} PASSAGE_MAXLENGTH=${PASSAGE_MAXLENGTH:-60} # tokens
JOBS=${JOBS:-2}                                         # comparisons at a time
LOSSES=${LOSSES:-kl mse margin emdr2 emdr2_sequence contrastive}
TARGETS=${TARGETS:-attention attention_all attention_max_heads attention_max_layers attention_max_tokens
    attention_first_layer attention_last_layer attention_mass attention_mass_all attention_norm
    perplexity leave_one_out has_answer}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}

reading=("${run[@]}" test_reader.py --model_path "$READER" --text_maxlength "$TEXT_MAXLENGTH"
    --per_gpu_batch_size 32)
scored=$OUT/scored/dataset_wscores.json

# train FOLDER UPDATES SEED OPTIONS...: train the retriever FOLDER/retriever.
train() {
    local folder=$1 updates=$2 seed=$3
    shift 3
    step "$folder/retriever/checkpoint/step-$updates" \
        "${run[@]}" train_retriever.py --train_data "$scored" --eval_data none --seed "$seed" \
        --total_steps "$updates" --warmup_steps $((updates / 10)) --lr "$LR" --optim adamw \
        --weight_decay 0 --scheduler linear --dropout 0 --num_workers 0 --name retriever \
        --checkpoint_dir "$folder" "$@"
}

# evaluate FOLDER RETRIEVER: find passages for the test questions, and answer from them.
evaluate() {
    step "$1/test.jsonl.recall.json" find_passages "$1" "$2"
    step "$1/read/final_output.txt" "${reading[@]}" --eval_data "$1/test.jsonl" \
        --n_context "$READ" --write_results --name read --checkpoint_dir "$1"
}
find_passages() {
    step "$1/embeddings/wiki_00" \
        "${run[@]}" generate_passage_embeddings.py --model_path "$2" --passages "$PASSAGES" \
        --output_path "$1/embeddings/wiki" --per_gpu_batch_size 128
    "${run[@]}" passage_retrieval.py --model_path "$2" --passages "$PASSAGES" \
        --passages_embeddings "$1/embeddings/wiki_*" --data "$TEST" --n-docs 20 \
        --output_path "$1/test.jsonl"
    rm -r "$1/embeddings"
}

# start SEED: the retriever that this seed's comparisons start from.
start() { if [ -n "$START" ]; then echo "$START"; else echo "$OUT/cells/start.-.$1/retriever/checkpoint/latest"; fi; }

# begin SEED: train it, and evaluate it.
begin() {
    local folder=$OUT/cells/start.-.$1
    if [ -z "$START" ]; then
        train "$folder" "$START_STEPS" "$1" --loss contrastive --in_batch_negatives --n_context 1 \
            --model_config "$MODEL_CONFIG" --tokenizer "$(dirname "$MODEL_CONFIG")" \
            --indexing_dimension 128 --passage_maxlength "$PASSAGE_MAXLENGTH" \
            --per_gpu_batch_size 64 --lr 1e-3
    fi
    evaluate "$folder" "$(start "$1")"
}

# compare LOSS TARGET SEED: train from there, and evaluate.
compare() {
    local folder=$OUT/cells/$1.$2.$3
    local options=(--loss "$1" --n_context "$N" --model_path "$(start "$3")" --per_gpu_batch_size "$BATCH")
    case $1 in
        contrastive) ;; # its target is has_answer
        emdr2*) options+=(--target perplexity) ;;
        *) options+=(--target "$2") ;;
    esac
    train "$folder" "$STEPS" "$3" "${options[@]}"
    evaluate "$folder" "$folder/retriever/checkpoint/latest"
}

# in_background COMMAND...: run it beside JOBS - 1 others, its output in a log.
# (Not as `COMMAND || ...`, where bash ignores `set -e`: a retriever whose training failed or was
# stopped would be evaluated.)
running=0
in_background() {
    if [ "$running" -ge "$JOBS" ]; then finish_one; fi
    local log="$OUT/logs/$*.log"
    {
        trap '[ $? = 0 ] || echo "error: $*: $(tail -n 1 "$log") (see $log)" >&2' EXIT
        "$@" > "$log" 2>&1
    } &
    running=$((running + 1))
}
finish_one() { wait -n; running=$((running - 1)); }
finish_all() { while [ "$running" -gt 0 ]; do finish_one; done; }
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

if [ ! -r "$TRAIN" ]; then
    echo "error: $TRAIN: cannot be read; run quickstart.sh, or set READER, TRAIN, TEST and PASSAGES" >&2
    exit 2
fi
mkdir -p "$OUT/logs"
settings="$READER $TRAIN $TEST $PASSAGES ${START:-$MODEL_CONFIG $START_STEPS} $QUESTIONS $N $STEPS"
settings+=" $BATCH $LR $READ $TEXT_MAXLENGTH $PASSAGE_MAXLENGTH"
if [ "$(cat "$OUT/settings" 2> /dev/null || echo "$settings")" != "$settings" ]; then
    echo "error: $OUT was made with $(cat "$OUT/settings"); name another OUT for $settings" >&2
    exit 2
fi
echo "$settings" > "$OUT/settings"
if [ ! -e "$OUT/train.jsonl" ]; then
    head -n "$QUESTIONS" "$TRAIN" > "$OUT/train.partial"
    mv "$OUT/train.partial" "$OUT/train.jsonl"
fi
# shellcheck disable=SC2086
step "$scored" "${reading[@]}" --eval_data "$OUT/train.jsonl" --n_context "$N" \
    --write_crossattention_scores --token_log_probs \
    --targets "$(echo $TARGETS attention perplexity has_answer | tr ' ' ,)" \
    --name scored --checkpoint_dir "$OUT"

for seed in $SEEDS; do in_background begin "$seed"; done
finish_all
for seed in $SEEDS; do
    for loss in $LOSSES; do
        case $loss in
            emdr2*) target=likelihood ;;
            contrastive) target=has_answer ;;
            *) target=attention ;;
        esac
        in_background compare "$loss" "$target" "$seed"
    done
    for target in $TARGETS; do
        if [ "$target" != attention ]; then in_background compare kl "$target" "$seed"; fi
    done
done
finish_all

python -m examples.ablations_table "$OUT"
