#!/usr/bin/env bash
# Download NaturalQuestions with the 100 passages that DPR retrieved for each question, as DPR publishes them.
#
#     bash examples/dpr_passages.sh             into open_domain_data/DPR/{train,dev,test}.json
#     bash examples/dpr_passages.sh -o DIR      into DIR
#
# Why: they are the passages of the 2020 paper's readers, and a starting point of distillation in the
# 2021 paper. (get-data.sh downloads those of the distilled retriever.)
# How long: a few gigabytes. Started again, it resumes. For a mirror, set FID_DPR_PASSAGES_URL.
set -euo pipefail

source "$(dirname "$0")/../download.sh"
: "${FID_DPR_PASSAGES_URL:=https://dl.fbaipublicfiles.com/dpr/data/retriever_results/single}"
folder=open_domain_data/DPR
case "${1:-}" in
    "") ;;
    -o) folder=${2:-} ;;
    *) fail 2 "$1: no such option; the only one is -o DIR" ;;
esac
open_folder "$folder"
for part in test dev train; do
    file=$out/$part.json archive=$out/nq-$part.json.gz
    if [ -e "$file" ]; then echo "done already: $file"; continue; fi
    if [ ! -e "$archive" ]; then
        ask "$FID_DPR_PASSAGES_URL/nq-$part.json.gz" FID_DPR_PASSAGES_URL
        # Text unpacks to about three times its size.
        require_room $((4 * length - $(size "$archive.part"))) "nq-$part.json, with its archive,"
    fi
    fetch "$FID_DPR_PASSAGES_URL/nq-$part.json.gz" "$archive" FID_DPR_PASSAGES_URL
    unzip_whole "$archive" "$file"
    rm "$archive"
done
echo "done: $out"
