#!/usr/bin/env bash
# Sourced by get-data.sh and get-model.sh: fetches files and unpacks them, whole or not at all.
#
# A download lies in FILE.part until all of it is there. What breaks off is gone on with, in this run
# or the next. Before an archive is unpacked it is read to its end, and its names are looked at; it
# is unpacked beside its place, and renamed. (Tested against a server on the same machine only.)

# fail STATUS MESSAGE: 2 is bad use or bad input, 1 the network or a server.
fail() { local status=$1; shift; echo "error: $*" >&2; exit "$status"; }

trap 'echo >&2; fail 130 "stopped; the same command goes on from here"' INT

if command -v curl > /dev/null; then
    fetcher=curl
elif command -v wget > /dev/null; then
    fetcher=wget
else
    fail 2 "neither curl nor wget is there; install one of them"
fi

size() { if [ -e "$1" ]; then wc -c < "$1" | tr -d ' '; else echo 0; fi; }
readable() {
    awk -v n="$1" 'BEGIN { if (n < 1e9) printf "%.3g MB", n / 1e6; else printf "%.3g GB", n / 1e9 }'
}

# open_folder DIR: make the folder that -o names, and put its full path into $out.
open_folder() {
    if ! { mkdir -p -- "$1" && [ -w "$1" ] && out=$(cd -- "$1" && pwd); } 2> /dev/null; then
        fail 2 "-o '$1': a folder of this name cannot be made or written; name another"
    fi
}

# require_room BYTES WHAT: stop now if that much does not fit into $out.
require_room() {
    local free
    free=$(df -Pk "$out" | awk 'NR == 2 { printf "%.0f", $4 * 1024 }')
    if [ "$1" -gt "$free" ]; then
        fail 2 "$out: $2 takes about $(readable "$1"), and $(readable "$free") are free;" \
            "make room, or name another folder by -o"
    fi
}

# ask URL BASE: stop if it is not there; put its bytes into $length, or 0 if the server won't say.
# BASE is the variable that holds the URL's beginning, for people with a mirror.
ask() {
    local headers status
    case $fetcher in
        curl) headers=$(curl -sIL --connect-timeout 30 -- "$1") || true ;;
        wget) headers=$(wget -S --spider --tries=1 --timeout=30 -- "$1" 2>&1) || true ;;
    esac
    # (Of several answers, the one after all redirections counts.)
    read -r status length < <(tr -d '\r' <<< "$headers" | awk '
        $1 ~ /^HTTP\// { status = $2; bytes = 0 }
        tolower($1) == "content-length:" { bytes = $2 }
        END { print status + 0, bytes + 0 }')
    case $status in
        0) fail 1 "$1: the server cannot be reached; check the network, or name a mirror by $2" ;;
        405 | 501) length=0 ;;  # it does not tell before it sends
        4?? | 5??) fail 1 "$1: the server says HTTP $status; try later, or name a mirror by $2" ;;
    esac
}

# bring URL FILE: fetch what is missing of a file, once. (A minute without a byte ends it.)
bring() {
    local shown=-s
    case $fetcher in
        curl)
            if [ -t 2 ]; then shown=--progress-bar; fi
            # (-N: all that has come is in the file when it is stopped.)
            curl -fNL "$shown" -C - --connect-timeout 30 --speed-time 60 --speed-limit 1 \
                -o "$2" -- "$1" ;;
        wget)
            if [ -t 2 ]; then shown=--show-progress; else shown=--no-verbose; fi
            wget -q "$shown" -c --tries=1 --timeout=60 -O "$2" -- "$1" ;;
    esac
}

# fetch URL FILE BASE: fetch a file, as long as each try brings more of it.
fetch() {
    local url=$1 file=$2 part=$2.part furthest now status tries=0 from=""
    if [ -e "$file" ]; then return; fi
    ask "$url" "$3"
    if [ "$length" -gt 0 ] && [ "$(size "$part")" -gt "$length" ]; then
        rm -f "$part"  # the beginning of some other file
    fi
    furthest=$(size "$part")
    if [ "$furthest" -gt 0 ]; then from=", from $(readable "$furthest") on"; fi
    echo "fetching $url ($(readable "$length")$from)"
    until [ "$length" -gt 0 ] && [ "$(size "$part")" -eq "$length" ]; do
        : 2> /dev/null >> "$part" || fail 2 "$part: cannot be written; name another folder by -o"
        status=0
        bring "$url" "$part" || status=$?
        if [ $status = 0 ] && [ "$length" = 0 ]; then break; fi
        case $fetcher-$status in
            curl-23 | wget-3)
                fail 2 "$part: cannot be written (a full disk?); make room, and the same command" \
                    "goes on" ;;
            curl-33) rm -f "$part" ;;  # this server sends files from their beginning only
        esac
        now=$(size "$part")
        if [ "$now" -gt "$furthest" ]; then
            furthest=$now tries=0
        else
            tries=$((tries + 1))
            if [ $tries = 3 ]; then
                fail 1 "$url: broke off at $now of $length bytes ($fetcher ended with $status);" \
                    "the same command goes on from there"
            fi
            sleep "${FID_PAUSE:-5}"
        fi
    done
    mv "$part" "$file"
}

damaged() {
    rm -f "$1"
    fail 1 "$1: it came cut off or damaged, and is removed; the same command fetches it again"
}

# unzip_whole ARCHIVE FILE: from a gzipped file to the plain one.
unzip_whole() {
    local bytes
    bytes=$(gzip -dc "$1" 2> /dev/null | wc -c) || damaged "$1"
    require_room "$bytes" "what is in $1"
    echo "unpacking $1 ($(readable "$bytes"))"
    if ! gzip -dc "$1" 2> /dev/null > "$2.partial"; then
        rm -f "$2.partial"
        fail 2 "$2: cannot be written (a full disk?); make room, and the same command goes on"
    fi
    mv "$2.partial" "$2"
}

# unpack ARCHIVE FOLDER: from a gzipped tar archive to a folder. Where all that is in it lies in a
# folder of the archive's own, FOLDER is that one.
unpack() {
    local listing outside bytes said inner entries
    # (tar stops before the end of what it reads; the rest has to be whole, too.)
    listing=$(gzip -dc "$1" 2> /dev/null | { tar -tvPf - 2> /dev/null && cat > /dev/null; }) ||
        damaged "$1"
    # Lines of the listing begin with a letter for the kind (- d l h), and hold names and the targets
    # of links. None may be another kind, begin with a slash, or go up. (A link that goes up and stays
    # inside would do no harm, but there is none in what we fetch.)
    outside=$(grep -m 1 -E '^[^-dlh]| /|[ /]\.\.(/| |$)' <<< "$listing") || true
    if [ -n "$outside" ]; then
        fail 2 "$1: refused, because it holds '${outside:0:120}', which could lead out of its" \
            "folder; remove it, and fetch it from people whom you trust"
    fi
    bytes=$(awk '{ n += $2 ~ /\// ? $3 : $5 } END { printf "%.0f", n }' <<< "$listing")
    require_room "$bytes" "what is in $1"
    echo "unpacking $1 ($(readable "$bytes"))"
    rm -rf "$2.partial"
    mkdir "$2.partial"
    if ! said=$(gzip -dc "$1" | tar -xf - --no-same-owner -C "$2.partial" 2>&1); then
        rm -rf "$2.partial"
        fail 2 "$2: cannot be unpacked ($(head -n 1 <<< "$said")); make room, and the same command" \
            "goes on"
    fi
    inner=$2.partial
    while entries=("$inner"/*) && [ "${#entries[@]}" = 1 ] && [ -d "${entries[0]}" ]; do
        inner=${entries[0]}
    done
    mv "$inner" "$2"
    rm -rf "$2.partial"
}
