#!/usr/bin/env bash
# A retriever trained with BM25's hard negatives: mine, train, embed, retrieve, fuse, compare.
#
#     bash examples/contrastive.sh
#     RETRIEVER=sentence-transformers/all-MiniLM-L6-v2 bash examples/contrastive.sh --temperature 0.0026
#
# Why: needs no reader. BM25 finds passages for the training questions; those without an answer
# are hard negatives (as in DPR), and so are the other questions' passages of the batch.
# Options are passed on to train_retriever.py. A retriever with normalised embeddings needs a low
# --temperature: similarities are divided by the square root of the embedding's size, so the usual
# 0.05 for cosines is 0.05 / sqrt(384) = 0.0026 for a size of 384, or 0.0018 for 768.
# Started again, it skips finished steps and resumes unfinished ones.
# In:  TRAIN, DEV (may be none), TEST: questions with answers; PASSAGES; RETRIEVER to start from.
# Out: OUT/{bm25,before,after}/test.jsonl and fused.jsonl, OUT/runs/retriever; a table at the end.
set -euo pipefail
cd "$(dirname "$0")/.." # paths are relative to the repository
source examples/common.sh # GPUS (1), RUN

data=open_domain_data/NQ
TRAIN=${TRAIN:-$data/train.json} DEV=${DEV:-$data/dev.json} TEST=${TEST:-$data/test.json}
PASSAGES=${PASSAGES:-open_domain_data/psgs_w100.tsv}
RETRIEVER=${RETRIEVER:-bert-base-uncased}
OUT=${OUT:-contrastive}
N=${N:-100}          # passages retrieved for a test question
MINED=${MINED:-50}   # passages to draw a training question's positive and negatives from
NEGATIVES=${NEGATIVES:-1} BATCH=${BATCH:-64} # hard negatives a question; questions a process
STEPS=${STEPS:-10000} LR=${LR:-5e-5}         # updates; the learning rate
checkpoints=$OUT/runs/retriever/checkpoint

bm25() { # bm25 QUESTIONS N RESULT
    step "$3" python passage_retrieval.py --bm25 --save_or_load_index --passages "$PASSAGES" \
        --data "$1" --n-docs "$2" --output_path "$3"
}

# find_passages FOLDER MODEL: embed the collection, retrieve for the test questions, fuse with BM25.
find_passages() {
    step "$OUT/$1/embeddings/wiki_00" \
        "${run[@]}" generate_passage_embeddings.py --model_path "$2" --passages "$PASSAGES" \
        --output_path "$OUT/$1/embeddings/wiki" --per_gpu_batch_size 64
    step "$OUT/$1/test.jsonl" \
        "${run[@]}" passage_retrieval.py --model_path "$2" --passages "$PASSAGES" \
        --passages_embeddings "$OUT/$1/embeddings/wiki_*" --data "$TEST" --n-docs "$N" \
        --output_path "$OUT/$1/test.jsonl"
    step "$OUT/$1/fused.jsonl" \
        python -m src.tools.fuse "$OUT/bm25/test.jsonl" "$OUT/$1/test.jsonl" \
        -o "$OUT/$1/fused.jsonl" --n-docs "$N"
}

mkdir -p "$OUT"
bm25 "$TEST" "$N" "$OUT/bm25/test.jsonl"
bm25 "$TRAIN" "$MINED" "$OUT/bm25/train.jsonl"
eval_data=none weights=$checkpoints/step-$STEPS
if [ "$DEV" != none ]; then
    eval_data=$OUT/bm25/dev.jsonl weights=$checkpoints/best_dev
    bm25 "$DEV" "$MINED" "$eval_data"
fi
find_passages before "$RETRIEVER"
step "$checkpoints/step-$STEPS" \
    "${run[@]}" train_retriever.py --train_data "$OUT/bm25/train.jsonl" --eval_data "$eval_data" \
    --model_path "$RETRIEVER" --loss contrastive --negatives "$NEGATIVES" --in_batch_negatives \
    --per_gpu_batch_size "$BATCH" --total_steps "$STEPS" --lr "$LR" \
    --optim adamw --scheduler linear --warmup_steps $((STEPS / 10)) \
    --name retriever --checkpoint_dir "$OUT/runs" "$@"
find_passages after "$weights"
python -m src.tools.evaluate --k 1,5,20 "$OUT/bm25/test.jsonl" "$OUT"/{before,after}/{test,fused}.jsonl
