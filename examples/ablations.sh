#!/usr/bin/env bash
# Every target and every loss of distillation, compared on equal terms, from one reading.
#
#     bash examples/ablations.sh    # after quickstart.sh, in its environment (source .venv/bin/activate)
#     JOBS=1 START=bert-base-uncased READER=... TRAIN=... TEST=... PASSAGES=... bash examples/ablations.sh
#
# Why: reading is the expensive part, so passages are scored once, by every target. Then a retriever
# learns by each loss from attention (emdr2 from the answer's likelihood, contrastive from has_answer),
# and by KL from each target, at a temperature that makes targets comparable (target_temperatures.py);
# it retrieves for the test questions; and one reader, always the same, answers from what was found.
# All start from the same weights and make the same number of updates.
# How long: about 20 minutes on two cores for 18 comparisons with 3 seeds on the quickstart's corpus.
# Started again, it skips what is finished, also after Ctrl-C.
# In:  READER; TRAIN, a .jsonl of questions with passages, whose first QUESTIONS are read; TEST,
#      questions with answers; PASSAGES; START, the retriever to start from. Without START, it is
#      trained from fresh weights (MODEL_CONFIG, with its tokenizer) for START_STEPS updates, to find
#      passages with an answer among those of a batch: too short to be good at it.
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
QUESTIONS=${QUESTIONS:-3200} N=${N:-8}                  # questions to distil from, passages of each
START_STEPS=${START_STEPS:-60} STEPS=${STEPS:-100}      # updates
BATCH=${BATCH:-32} LR=${LR:-1e-3} SEEDS=${SEEDS:-0 1 2} # questions per update
READ=${READ:-1}                                         # passages that the reader answers from
TEXT_MAXLENGTH=${TEXT_MAXLENGTH:-40} PASSAGE_MAXLENGTH=${PASSAGE_MAXLENGTH:-60} # tokens
SPREAD=${SPREAD:-2.5}                                   # of each target, divided by its temperature
JOBS=${JOBS:-2}                                         # comparisons at a time
LOSSES=${LOSSES:-kl mse margin emdr2 emdr2_sequence contrastive}
TARGETS=${TARGETS:-attention attention_all attention_max_heads attention_max_layers attention_max_tokens
    attention_first_layer attention_last_layer attention_mass attention_mass_all attention_norm
    perplexity leave_one_out has_answer}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}

reading=(test_reader.py --model_path "$READER" --text_maxlength "$TEXT_MAXLENGTH"
    --per_gpu_batch_size 32)
scored=$OUT/scored/dataset_wscores.json
temperatures=$OUT/temperatures # of targets

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

# evaluate FOLDER RETRIEVER: embed the passages, find some for the test questions, and answer from them.
evaluate() {
    local common=(--model_path "$2" --passages "$PASSAGES")
    step "$1/read/final_output.txt" "${run[@]}" -m examples.one_process \
        generate_passage_embeddings.py "${common[@]}" --output_path "$1/embeddings/wiki" \
        --per_gpu_batch_size 128 \
        then passage_retrieval.py "${common[@]}" --passages_embeddings "$1/embeddings/wiki_*" \
        --data "$TEST" --n-docs 20 --output_path "$1/test.jsonl" \
        then "${reading[@]}" --eval_data "$1/test.jsonl" --n_context "$READ" --write_results \
        --name read --checkpoint_dir "$1"
    rm -rf "$1/embeddings"
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

# temperature TARGET: at which it is comparable with the others.
temperature() { awk -v target="$1" '$1 == target { print $2 }' "$temperatures"; }
write_temperatures() {
    python -m examples.target_temperatures "$scored" "$SPREAD" > "$temperatures.partial"
    mv "$temperatures.partial" "$temperatures"
}

# compare LOSS TARGET SEED: train from there, and evaluate.
compare() {
    local folder=$OUT/cells/$1.$2.$3
    local options=(--loss "$1" --n_context "$N" --model_path "$(start "$3")" --per_gpu_batch_size "$BATCH")
    case $1 in
        contrastive) ;; # its target is has_answer
        emdr2*) options+=(--target perplexity) ;;
        kl) options+=(--target "$2" --target_temperature "$(temperature "$2")") ;;
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
    local name="$*" log="$OUT/logs/$*.log"
    {
        set +m # its commands stay in its process group, to be stopped with it
        trap "$on_stop" TERM
        trap 'case $? in 0 | 143) ;; *) echo "error: $name: $(tail -n 1 "$log") (see $log)" >&2 ;; esac' EXIT
        "$@" > "$log" 2>&1
    } &
    running=$((running + 1))
}
finish_one() { wait -n; running=$((running - 1)); }
finish_all() { while [ "$running" -gt 0 ]; do finish_one; done; }

if [ ! -r "$TRAIN" ]; then
    echo "error: $TRAIN: cannot be read; run quickstart.sh, or set READER, TRAIN, TEST and PASSAGES" >&2
    exit 2
fi
mkdir -p "$OUT/logs"
settings="$READER $TRAIN $TEST $PASSAGES ${START:-$MODEL_CONFIG $START_STEPS} $QUESTIONS $N $STEPS"
settings+=" $BATCH $LR $SPREAD $READ $TEXT_MAXLENGTH $PASSAGE_MAXLENGTH"
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
step "$scored" "${run[@]}" "${reading[@]}" --eval_data "$OUT/train.jsonl" --n_context "$N" \
    --write_crossattention_scores --token_log_probs \
    --targets "$(echo $TARGETS attention perplexity has_answer | tr ' ' ,)" \
    --name scored --checkpoint_dir "$OUT"
step "$temperatures" write_temperatures

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
