#!/usr/bin/env bash
# Downloads a released model, for --model_path.
#
#     bash get-model.sh -m nq_reader_base            into pretrained_models/nq_reader_base
#     bash get-model.sh -m nq_retriever -o DIR       into DIR/nq_retriever; --keep: keeps the archive
#
# Models: nq_reader_base, nq_reader_large, nq_retriever, tqa_reader_base, tqa_reader_large,
# tqa_retriever. Resumes when it is started again. Needs curl or wget. For a mirror of the source, set
# FID_MODELS_URL.
set -euo pipefail

source "$(dirname "$0")/download.sh"
: "${FID_MODELS_URL:=https://dl.fbaipublicfiles.com/FiD/pretrained_models}"
models="nq_reader_base nq_reader_large nq_retriever tqa_reader_base tqa_reader_large tqa_retriever"

folder=pretrained_models
model=""
keep=no
while [ $# -gt 0 ]; do
    case "$1" in
        --keep) keep=yes ;;
        -m | --model) model="${2:-}"; shift ;;
        -o | --output) folder="${2:-}"; shift ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail 2 "$1: no such option (bash get-model.sh --help)" ;;
    esac
    shift || fail 2 "an option's value is missing (bash get-model.sh --help)"
done
case " $models " in
    *" ${model:-?} "*) ;;
    *) fail 2 "-m '$model': no such model; the models are ${models// /, }" ;;
esac
open_folder "$folder"
if [ -e "$out/$model" ]; then echo "done already: $out/$model"; exit 0; fi

archive=$out/$model.tar.gz
if [ ! -e "$archive" ]; then
    ask "$FID_MODELS_URL/$model.tar.gz" FID_MODELS_URL
    # Weights are hardly compressible.
    require_room $((2 * length - $(size "$archive.part"))) "$model, with its archive,"
fi
fetch "$FID_MODELS_URL/$model.tar.gz" "$archive" FID_MODELS_URL
unpack "$archive" "$out/$model"
if [ $keep = no ]; then rm "$archive"; fi
echo "done: $out/$model"
