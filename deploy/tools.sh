#!/usr/bin/env bash
# Builds the programs of a module of tools under integration/ (containerd or crictl), once for each state of its go.mod and
# go.sum, and prints the folder that they are in. It takes minutes the first time.
set -euo pipefail
cd "$(dirname "$0")/../integration/$1"

cache=${LAZULI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lazuli}
mkdir -p "$cache"
dir=$cache/$1-$(cat go.mod go.sum | sha256sum | cut -c1-16)
exec 9>"$dir.lock"
flock 9
if [[ ! -d $dir ]]; then
	echo "building the programs of integration/$1, which takes minutes" >&2
	rm -rf "$dir.new"
	go build -ldflags '-s -w' -o "$dir.new/" tool >&2
	mv "$dir.new" "$dir"
fi
echo "$dir"
