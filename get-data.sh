#!/usr/bin/env bash
# Downloads NaturalQuestions (NQ), TriviaQA (TQA) and Wikipedia's passages, and turns them into data:
# NQ/ and TQA/{train,dev,test}.json, with the passages that the released models read, and psgs_w100.tsv.
#
#     bash get-data.sh                    everything, into open_domain_data
#     bash get-data.sh --only nq          NQ and the passages; tqa: likewise; wiki: only the passages
#     bash get-data.sh -o DIR --keep      into DIR; keeps the downloads, in DIR/download
#
# The passages are about 13 GB; NQ and TQA with theirs take about half of that each. Reports the size
# of the downloads first, and stops if the disk is too small. Resumes when it is started again, and
# skips finished files. Needs curl or wget. For mirrors of the sources, set FID_DPR_URL, FID_NQ_URL,
# FID_TRIVIAQA_URL, FID_DATA_URL.
set -euo pipefail

fid_root=$(cd "$(dirname "$0")" && pwd)
source "$fid_root/download.sh"
: "${FID_DPR_URL:=https://dl.fbaipublicfiles.com/dpr/wikipedia_split}"
: "${FID_NQ_URL:=https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open}"
: "${FID_TRIVIAQA_URL:=http://nlp.cs.washington.edu/triviaqa/data}"
: "${FID_DATA_URL:=https://dl.fbaipublicfiles.com/FiD/data}"

folder=open_domain_data
only=all
keep=no
while [ $# -gt 0 ]; do
    case "$1" in
        --keep) keep=yes ;;
        --only) only="${2:-}"; shift ;;
        -o | --output) folder="${2:-}"; shift ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail 2 "$1: no such option (bash get-data.sh --help)" ;;
    esac
    shift || fail 2 "an option's value is missing (bash get-data.sh --help)"
done
case "$only" in
    all | nq | tqa | wiki) ;;
    *) fail 2 "--only '$only': must be nq, tqa or wiki" ;;
esac
open_folder "$folder"
downloads=$out/download
passages=$out/psgs_w100.tsv

# wants DATASET: whether it is asked for and incomplete.
wants() {
    local lower split
    lower=$(tr '[:upper:]' '[:lower:]' <<< "$1")
    if [ "$only" != all ] && [ "$only" != "$lower" ]; then return 1; fi
    for split in train dev test; do
        if [ ! -e "$out/$1/$split.json" ]; then return 0; fi
    done
    return 1
}

# plan BASE NAME RESULT: fetch NAME from the URL in the variable BASE, unless its result exists: the
# unpacked content, or the file itself. Results in the folder of downloads are removed at the end.
urls=() bases=() results=() sources=()
plan() {
    if [ ! -e "$3" ]; then urls+=("${!1}/$2") bases+=("$1") results+=("$3"); fi
    case "$3" in
        "$downloads"/*) sources+=("$3") ;;
    esac
}
plan FID_DPR_URL psgs_w100.tsv.gz "$passages"
if wants NQ; then
    plan FID_NQ_URL NQ-open.train.jsonl "$downloads/NQ-open.train.jsonl"
    plan FID_NQ_URL NQ-open.dev.jsonl "$downloads/NQ-open.dev.jsonl"
    plan FID_DATA_URL nq_passages.tar.gz "$downloads/nq_passages"
fi
if wants TQA; then
    plan FID_TRIVIAQA_URL triviaqa-unfiltered.tar.gz "$downloads/triviaqa-unfiltered"
    plan FID_DATA_URL tqa_passages.tar.gz "$downloads/tqa_passages"
fi
if wants NQ || wants TQA; then
    plan FID_DATA_URL dataindex.tar.gz "$downloads/dataindex"
elif [ ${#urls[@]} = 0 ]; then
    echo "done already: $out"
    exit 0
fi

# Archives of text unpack to about three times their size and are then removed. The 91,535 questions
# of NQ are written with 100 of the 21,015,324 passages each, which is 0.44 times the collection, and
# TQA's 98,935 questions with 0.47 times; JSON adds a tenth.
collection=$(size "$passages") to_fetch=0 room=0 largest=0
for ((i = 0; i < ${#urls[@]}; i++)); do
    file=$downloads/${urls[i]##*/}
    if [ -e "$file" ]; then length=$(size "$file"); else ask "${urls[i]}" "${bases[i]}"; fi
    missing=$((length - $(size "$file") - $(size "$file.part")))
    if [ $missing -lt 0 ]; then missing=0; fi
    to_fetch=$((to_fetch + missing))
    case "$file" in
        */psgs_w100.tsv.gz) collection=$((3 * length)) ;;
    esac
    if [ "${file%.gz}" = "$file" ]; then
        room=$((room + missing))
        continue
    fi
    room=$((room + 3 * length))
    if [ $keep = yes ]; then
        room=$((room + missing))
    elif [ $missing -gt $largest ]; then
        largest=$missing
    fi
done
if wants NQ; then room=$((room + collection * 48 / 100)); fi
if wants TQA; then room=$((room + collection * 52 / 100)); fi
room=$((room + largest))
echo "into $out: $(readable $to_fetch) to fetch, up to about $(readable $room) on disk"
require_room $room "what remains to fetch and unpack"

if wants NQ || wants TQA; then source "$fid_root/environment.sh"; fi
mkdir -p "$downloads"
for ((i = 0; i < ${#urls[@]}; i++)); do
    file=$downloads/${urls[i]##*/}
    fetch "${urls[i]}" "$file" "${bases[i]}"
    case "$file" in
        *.tar.gz) unpack "$file" "${results[i]}" ;;
        *.gz) unzip_whole "$file" "${results[i]}" ;;
        *) [ "$(head -c 1 "$file")" = "{" ] || damaged "$file" ;;
    esac
    if [ $keep = no ] && [ "$file" != "${results[i]}" ]; then rm "$file"; fi
done

if wants NQ || wants TQA; then
    cd "$fid_root"
    if [ "$only" = all ]; then
        python -m src.tools.preprocess "$out"
    else
        python -m src.tools.preprocess "$out" --only "$only"
    fi
fi
if [ $keep = no ]; then
    for ((i = 0; i < ${#sources[@]}; i++)); do rm -rf "${sources[i]}"; done
    rmdir "$downloads" 2> /dev/null || true
fi
echo "done: $out"
