#!/usr/bin/env bash
# Sourced by get-data.sh and get-model.sh: downloads and unpacks files atomically.
#
# A download is FILE.part until it is complete. Interrupted downloads resume, in this run or the next.
# Before an archive is unpacked, all of it is read and its names are checked; it is unpacked under
# another name, then renamed. (Tested only against a server on the same machine.)

# fail STATUS MESSAGE: 2 for bad usage or input, 1 for the network or a server.
fail() { local status=$1; shift; echo "error: $*" >&2; exit "$status"; }

trap 'echo >&2; fail 130 "stopped; the same command resumes from here"' INT

if command -v curl > /dev/null; then
    fetcher=curl
elif command -v wget > /dev/null; then
    fetcher=wget
else
    fail 2 "neither curl nor wget is installed; install one of them"
fi

size() { if [ -e "$1" ]; then wc -c < "$1" | tr -d ' '; else echo 0; fi; }
readable() {
    awk -v n="$1" 'BEGIN { if (n < 1e9) printf "%.3g MB", n / 1e6; else printf "%.3g GB", n / 1e9 }'
}

# open_folder DIR: create the folder that -o names, and put its full path into $out.
open_folder() {
    if ! { mkdir -p -- "$1" && [ -w "$1" ] && out=$(cd -- "$1" && pwd); } 2> /dev/null; then
        fail 2 "-o '$1': this folder cannot be created or written; name another"
    fi
}

# require_room BYTES WHAT: stop now if $out has no room for it.
require_room() {
    local free
    free=$(df -Pk "$out" | awk 'NR == 2 { printf "%.0f", $4 * 1024 }')
    if [ "$1" -gt "$free" ]; then
        fail 2 "$out: $2 takes about $(readable "$1"), and $(readable "$free") are free;" \
            "make room, or name another folder with -o"
    fi
}

# ask URL BASE: stop if the file cannot be had; put its size into $length, or 0 if the server does not
# report it. BASE is the variable with the beginning of the URL, for people with a mirror.
ask() {
    local headers status
    case $fetcher in
        curl) headers=$(curl -sIL --connect-timeout 30 -- "$1") || true ;;
        wget) headers=$(wget -S --spider --tries=1 --timeout=30 -- "$1" 2>&1) || true ;;
    esac
    # (Of several responses, the last one counts, after all redirections.)
    read -r status length < <(tr -d '\r' <<< "$headers" | awk '
        $1 ~ /^HTTP\// { status = $2; bytes = 0 }
        tolower($1) == "content-length:" { bytes = $2 }
        END { print status + 0, bytes + 0 }')
    case $status in
        0) fail 1 "$1: the server cannot be reached; check the network, or name a mirror with $2" ;;
        405 | 501) length=0 ;;  # it reports the size only with the file
        4?? | 5??) fail 1 "$1: the server responds with HTTP $status; try later, or name a mirror with $2" ;;
    esac
}

# bring URL FILE: fetch the rest of a file, trying once. (A minute without a byte ends it.)
bring() {
    local shown=-s
    case $fetcher in
        curl)
            if [ -t 2 ]; then shown=--progress-bar; fi
            # (-N: when it is stopped, the file holds all bytes received.)
            curl -fNL "$shown" -C - --connect-timeout 30 --speed-time 60 --speed-limit 1 \
                -o "$2" -- "$1" ;;
        wget)
            if [ -t 2 ]; then shown=--show-progress; else shown=--no-verbose; fi
            wget -q "$shown" -c --tries=1 --timeout=60 -O "$2" -- "$1" ;;
    esac
}

# fetch URL FILE BASE: fetch a file, trying again while there is progress.
fetch() {
    local url=$1 file=$2 part=$2.part furthest now status tries=0 from=""
    if [ -e "$file" ]; then return; fi
    ask "$url" "$3"
    if [ "$length" -gt 0 ] && [ "$(size "$part")" -gt "$length" ]; then
        rm -f "$part"  # the beginning of some other file
    fi
    furthest=$(size "$part")
    if [ "$furthest" -gt 0 ]; then from=", from $(readable "$furthest")"; fi
    echo "fetching $url ($(readable "$length")$from)"
    until [ "$length" -gt 0 ] && [ "$(size "$part")" -eq "$length" ]; do
        : 2> /dev/null >> "$part" || fail 2 "$part: cannot be written; name another folder with -o"
        status=0
        bring "$url" "$part" || status=$?
        if [ $status = 0 ] && [ "$length" = 0 ]; then break; fi
        case $fetcher-$status in
            curl-23 | wget-3)
                fail 2 "$part: cannot be written (a full disk?); make room, and the same command" \
                    "resumes" ;;
            curl-33) rm -f "$part" ;;  # this server cannot resume
        esac
        now=$(size "$part")
        if [ "$now" -gt "$furthest" ]; then
            furthest=$now tries=0
        else
            tries=$((tries + 1))
            if [ $tries = 3 ]; then
                fail 1 "$url: stopped at $now of $length bytes ($fetcher's status is $status);" \
                    "the same command resumes from there"
            fi
            sleep "${FID_PAUSE:-5}"
        fi
    done
    mv "$part" "$file"
}

damaged() {
    rm -f "$1"
    fail 1 "$1: the download was truncated or damaged and has been removed; the same command fetches it again"
}

# unzip_whole ARCHIVE FILE: unpack a gzipped file.
unzip_whole() {
    local bytes
    bytes=$(gzip -dc "$1" 2> /dev/null | wc -c) || damaged "$1"
    require_room "$bytes" "the content of $1"
    echo "unpacking $1 ($(readable "$bytes"))"
    if ! gzip -dc "$1" 2> /dev/null > "$2.partial"; then
        rm -f "$2.partial"
        fail 2 "$2: cannot be written (a full disk?); make room, and the same command resumes"
    fi
    mv "$2.partial" "$2"
}

# unpack ARCHIVE FOLDER: unpack a gzipped tar archive. If its only entry is a folder, that becomes
# FOLDER.
unpack() {
    local listing outside bytes said inner entries
    # (tar stops before the end of its input, but the rest must be complete, too.)
    listing=$(gzip -dc "$1" 2> /dev/null | { tar -tvPf - 2> /dev/null && cat > /dev/null; }) ||
        damaged "$1"
    # Lines of the listing begin with a letter for the type (- d l h) and contain names and targets of
    # links. Other types, absolute paths and paths with .. are refused. (A link with .. that stays
    # inside would be harmless, but our downloads have none.)
    outside=$(grep -m 1 -E '^[^-dlh]| /|[ /]\.\.(/| |$)' <<< "$listing") || true
    if [ -n "$outside" ]; then
        fail 2 "$1: refused, because it contains '${outside:0:120}', which could lead out of its" \
            "folder; remove it, and fetch it from a source you trust"
    fi
    bytes=$(awk '{ n += $2 ~ /\// ? $3 : $5 } END { printf "%.0f", n }' <<< "$listing")
    require_room "$bytes" "the content of $1"
    echo "unpacking $1 ($(readable "$bytes"))"
    rm -rf "$2.partial"
    mkdir "$2.partial"
    if ! said=$(gzip -dc "$1" | tar -xf - --no-same-owner -C "$2.partial" 2>&1); then
        rm -rf "$2.partial"
        fail 2 "$2: cannot be unpacked ($(head -n 1 <<< "$said")); make room, and the same command" \
            "resumes"
    fi
    chmod -R ug-s -- "$2.partial"  # data needs no other user's rights
    inner=$2.partial
    while entries=("$inner"/*) && [ "${#entries[@]}" = 1 ] && [ -d "${entries[0]}" ]; do
        inner=${entries[0]}
    done
    mv "$inner" "$2"
    rm -rf "$2.partial"
}
