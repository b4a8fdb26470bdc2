#!/usr/bin/env bash
# Reproduce published figures: download, run, compare. Prints one line per figure.
#
#     bash examples/reproduce/run.sh                       lists the figures
#     bash examples/reproduce/run.sh nq_reader_base        one of them; or several, or `all`
#     bash examples/reproduce/run.sh --fetch dpr_base      only downloads
#     GPUS=8 bash examples/reproduce/run.sh dpr_base       on eight GPUs
#     sbatch examples/reproduce/job.sbatch dpr_base        under SLURM
#
# Why, and how long: README.md in this folder. Started again, it resumes; finished figures are
# only compared. EXPECTED=50.1 (or 70/80/90) replaces the value in figures.tsv.
# In:  what get-data.sh, get-model.sh and examples/dpr_passages.sh download into DATA and MODELS.
# Out: OUT/FIGURE. The lines are on standard output, everything else on standard error. Status 0: all
#      figures were reproduced; 3: some were not.
set -euo pipefail
cd "$(dirname "$0")/../.." # paths are relative to the repository
source examples/common.sh # GPUS (1), ACCUMULATE (64 / GPUS), RUN

DATA=${DATA:-open_domain_data} MODELS=${MODELS:-pretrained_models}
OUT=${OUT:-checkpoint/reproduced}
T5_BASE=${T5_BASE:-t5-base} T5_LARGE=${T5_LARGE:-t5-large} # to train from
BATCH=${BATCH:-4} PRECISION=${PRECISION:-auto} # when answering: questions per GPU; fp32, for one
N=${N:-100} # passages read per question
BASE_STEPS=${BASE_STEPS:-10000} LARGE_STEPS=${LARGE_STEPS:-15000}

# fetch_for FIGURE: download its data and model, unless they are here.
fetch_for() {
    case $1 in
        dpr_*) stoppable bash examples/dpr_passages.sh -o "$DATA/DPR" ;;
        *)
            stoppable bash get-data.sh --only "${1%%_*}" -o "$DATA"
            stoppable bash get-model.sh --model "${1%_dev}" --output "$MODELS"
            ;;
    esac
}

# answer FIGURE MODEL QUESTIONS: answer the questions with a reader.
answer() {
    step "$OUT/$1/final_output.txt" \
        "${run[@]}" test_reader.py --model_path "$2" --eval_data "$3" --n_context "$N" \
        --text_maxlength 250 --per_gpu_batch_size "$BATCH" --precision "$PRECISION" \
        --write_results --name "$1" --checkpoint_dir "$OUT"
}

# retrieve FIGURE MODEL QUESTIONS: embed Wikipedia with a retriever, and find 100 passages.
retrieve() {
    step "$OUT/$1/wiki_00" \
        "${run[@]}" generate_passage_embeddings.py --model_path "$2" \
        --passages "$DATA/psgs_w100.tsv" --output_path "$OUT/$1/wiki" --per_gpu_batch_size 500
    step "$OUT/$1/retrieved.jsonl" \
        "${run[@]}" passage_retrieval.py --model_path "$2" --passages "$DATA/psgs_w100.tsv" \
        --passages_embeddings "$OUT/$1/wiki_*" --data "$3" --n-docs 100 \
        --output_path "$OUT/$1/retrieved.jsonl"
}

# train FIGURE STEPS OPTIONS...: train a reader on DPR's passages, for OUT/FIGURE/reader.
train() {
    step "$OUT/$1/reader/checkpoint/step-$2" \
        "${run[@]}" train_reader.py --train_data "$DATA/DPR/train.json" \
        --eval_data "$DATA/DPR/dev.json" --n_context "$N" --text_maxlength 250 \
        --per_gpu_batch_size 1 --accumulation_steps "$ACCUMULATE" --use_checkpoint \
        --total_steps "$2" --name reader --checkpoint_dir "$OUT/$1" "${@:3}"
}

# reproduce FIGURE: everything up to its result.
reproduce() {
    local model=$MODELS/${1%_dev} best=$OUT/$1/reader/checkpoint/best_dev
    case $1 in
        *_retriever) retrieve "$1" "$model" "$questions" ;;
        *_reader_*) answer "$1" "$model" "$questions" ;;
        dpr_base) # the 2020 paper's settings; the others are defaults
            train "$1" "$BASE_STEPS" --model_path "$T5_BASE"
            answer "$1" "$best" "$questions"
            ;;
        dpr_large) # the settings that the original's README gives for large readers
            train "$1" "$LARGE_STEPS" --model_path "$T5_LARGE" --lr 0.00005 --optim adamw \
                --scheduler linear --weight_decay 0.01 --warmup_steps 1000 \
                --save_freq 1000 --keep_checkpoints 2
            answer "$1" "$best" "$questions"
            ;;
        dpr_25_then_100_dev)
            stoppable env TRAIN="$DATA/DPR/train.json" DEV="$DATA/DPR/dev.json" MODEL="$T5_BASE" \
                OUT="$OUT/$1" MANY="$N" bash examples/read_25_then_100.sh
            answer "$1" "$OUT/$1/read_$N/checkpoint/best_dev" "$questions"
            ;;
    esac
}

fail() { echo "error: $*" >&2; exit 2; }
known=$(tail -n +2 examples/reproduce/figures.tsv | cut -f 1)
only_fetch=no
if [ "${1:-}" = --fetch ]; then only_fetch=yes; shift; fi
if [ $# = 0 ]; then cat examples/reproduce/figures.tsv; exit 0; fi
if [ "$*" = all ]; then set -- $known; fi
for figure in "$@"; do
    grep -qxF -- "$figure" <<< "$known" ||
        fail "$figure: no such figure; the figures are" $known
done
if [ -n "${EXPECTED:-}" ] && [ $# -gt 1 ]; then fail "EXPECTED is the value of one figure; name one"; fi

exec 3>&1 1>&2 # only verdicts are for standard output
status=0
for figure in "$@"; do
    result=$OUT/$figure/final_output.txt dataset=${figure%%_*}
    case $figure in *_retriever) result=$OUT/$figure/retrieved.jsonl ;; esac
    questions=$DATA/${dataset^^}/test.json
    case $figure in *_dev) questions=$DATA/${dataset^^}/dev.json ;; esac
    if [ $only_fetch = yes ] || [ ! -e "$result" ]; then fetch_for "$figure"; fi
    if [ $only_fetch = yes ]; then continue; fi
    if [ ! -e "$result" ]; then reproduce "$figure"; fi
    judged=0
    python -m examples.reproduce.verdict "$figure" "$result" --questions "$questions" \
        ${EXPECTED:+--expected "$EXPECTED"} >&3 || judged=$?
    case $judged in 0) ;; 3) status=3 ;; *) exit $judged ;; esac
done
exit $status
