#!/usr/bin/env bash
# Runs the full loop on a small corpus of invented text, without downloading anything:
# BM25 -> train the reader -> score passages -> train the retriever -> embed -> retrieve -> read again.
#
#     bash quickstart.sh                   resumes if it was stopped
#     bash quickstart.sh --fresh           starts again
#     bash quickstart.sh --seed 1 -o DIR   another corpus and other random numbers; another folder
set -euo pipefail

fid_root=$(cd "$(dirname "$0")" && pwd)
seed=0
out=""
fresh=no
while [ $# -gt 0 ]; do
    case "$1" in
        --fresh) fresh=yes ;;
        --seed) seed="${2:-}"; shift ;;
        -o) out="${2:-}"; shift ;;
        -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: $1: no such option (bash quickstart.sh --help)" >&2; exit 2 ;;
    esac
    shift || { echo "error: an option's value is missing (bash quickstart.sh --help)" >&2; exit 2; }
done
if ! [[ "$seed" =~ ^[0-9]{1,18}$ ]]; then
    echo "error: --seed '$seed': must be a whole number from 0, of 18 digits at most" >&2; exit 2
fi
cd "$fid_root"
out=${out:-quickstart/seed-$seed}
if [ "${out#-}" != "$out" ]; then out=./$out; fi  # or it would be taken for an option
if [ -e "$out" ] && [ ! -d "$out" ]; then
    echo "error: -o $out: this is a file; name a folder" >&2; exit 2
fi
source ./environment.sh
source examples/stoppable.sh
if [ "$fresh" = yes ]; then rm -rf "$out"; fi
mkdir -p "$out"

# quoted COMMAND...: print a command so that it can be pasted into a shell.
quoted() { printf '%q ' "$@"; echo; }

# step TITLE RESULT COMMAND...: run a command unless its result exists.
# (Results are written atomically, and training resumes from its checkpoints.)
number=0
step() {
    local title=$1 result=$2
    shift 2
    number=$((number + 1))
    echo
    echo "== $number. $title"
    if [ -e "$result" ]; then echo "   done: $result"; return; fi
    quoted "$@"
    stoppable "$@"
}

data=$out/data
passages=$data/passages.tsv
runs=$out/runs
embeddings=${out//\[/[[]}/embeddings/wiki_*  # a glob: a bracket in the folder's name stands for itself
# The texts of this corpus are short, and its answers have a word or two.
reading=(--text_maxlength 40 --generation_max_length 8 --checkpoint_dir "$runs")
training=(--seed "$seed" --scheduler linear --optim adamw --weight_decay 0 --dropout 0)
finding=(python passage_retrieval.py --passages "$passages")

step "Make the corpus: passages, questions, models to start from" "$data" \
    python examples/make_quickstart.py --seed "$seed" -o "$data"

for part in train dev test; do
    step "Find passages for the $part questions by BM25" "$out/bm25_$part.jsonl" \
        "${finding[@]}" --bm25 --save_or_load_index --data "$data/$part.json" --n-docs 20 \
        --output_path "$out/bm25_$part.jsonl"
done

# read_more NAME PASSAGES BATCH UPDATES LR WARMUP END MODEL TRAIN_DATA: continue training a model with
# more passages per question. The learning rate falls towards 0 at update END.
# (The papers, too, train with growing numbers of passages: few are cheaper, and easier to start with.)
read_more() {
    step "Train the reader: $2 passages per question" "$runs/$1/checkpoint/step-$4" \
        python train_reader.py --train_data "$9" --eval_data none --model_path "$8" --n_context "$2" \
        --per_gpu_batch_size "$3" --total_steps "$4" --lr "$5" --warmup_steps "$6" \
        --scheduler_steps "$7" --name "$1" "${reading[@]}" "${training[@]}"
}
read_more reader_pairs 2 32 600 2e-3 80 2400 "$data/reader_start" "$data/train_pairs.json"
found=$out/bm25_train.jsonl
read_more reader_4 4 16 400 1.3e-3 20 1200 "$runs/reader_pairs/checkpoint/latest" "$found"
read_more reader_8 8 8 300 8e-4 20 300 "$runs/reader_4/checkpoint/latest" "$found"
reader=$runs/reader_8/checkpoint/latest

# answer NAME QUESTIONS PASSAGES RESULT OPTIONS...: let the reader answer, into runs/NAME.
answer() {
    local name=$1 questions=$2 passages_read=$3 result=$4
    shift 4
    step "Let the reader answer $(basename "$questions"), reading $passages_read" "$runs/$name/$result" \
        python test_reader.py --model_path "$reader" --eval_data "$questions" \
        --n_context "$passages_read" --per_gpu_batch_size 32 --name "$name" "${reading[@]}" "$@"
}
# answer_test HOW: answer the test questions from one and from eight passages found by HOW.
# (The report shows the scores of the eight.)
answer_test() {
    answer "test_$1_1" "$out/$1_test.jsonl" 1 final_output.txt --write_results
    answer "test_$1_8" "$out/$1_test.jsonl" 8 dataset_wscores.json --write_results \
        --write_crossattention_scores
}
answer_test bm25

# A fifth of the training questions is enough for distillation. (Each subject has four questions in
# the same order, so every fifth question covers all four kinds.)
awk 'NR % 5 == 1' < "$out/bm25_train.jsonl" > "$out/to_score_train.jsonl"
for part in to_score_train bm25_dev; do
    answer "scores_$part" "$out/$part.jsonl" 8 dataset_wscores.json --write_crossattention_scores
done

# The reader's 4 highest-scoring passages per question: the right one and near misses. Passages of
# the batch's other questions (--in_batch_negatives) teach what is far off.
step "Train the retriever on the reader's scores" "$runs/retriever/checkpoint/step-600" \
    python train_retriever.py --train_data "$runs/scores_to_score_train/dataset_wscores.json" \
    --eval_data "$runs/scores_bm25_dev/dataset_wscores.json" --n_context 4 \
    --model_config "$data/retriever_start/config.json" --tokenizer "$data/retriever_start" \
    --indexing_dimension 128 --question_maxlength 40 --passage_maxlength 60 --in_batch_negatives \
    --per_gpu_batch_size 64 --total_steps 600 --eval_freq 200 --lr 1e-3 --warmup_steps 30 \
    --name retriever --checkpoint_dir "$runs" "${training[@]}"
retriever=$runs/retriever/checkpoint/latest

step "Embed the passages" "$out/embeddings/wiki_00" \
    python generate_passage_embeddings.py --model_path "$retriever" --passages "$passages" \
    --output_path "$out/embeddings/wiki" --per_gpu_batch_size 128

step "Find passages for the test questions by the retriever" "$out/distilled_test.jsonl" \
    "${finding[@]}" --model_path "$retriever" --passages_embeddings "$embeddings" \
    --data "$data/test.json" --n-docs 20 --output_path "$out/distilled_test.jsonl"
answer_test distilled

echo
python -m examples.quickstart_table "$out"
echo
echo "The last run as a page for a browser, with its passages and mistakes:"
python -m src.tools.report "$runs/test_distilled_8" --retrieved "$out/bm25_test.jsonl" "$out/distilled_test.jsonl"
echo
echo "Everything is in $out; the README explains each step on your own data. To ask the models"
echo "questions (such as those in $data/test.json):"
quoted python test_reader.py --interactive --model_path "$reader" --n_context 8 \
    --text_maxlength 40 --generation_max_length 8 --retriever_path "$retriever" \
    --passages "$passages" --passages_embeddings "$embeddings"
