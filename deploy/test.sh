#!/usr/bin/env bash
# go test with the given arguments. With CI=true a skipped test is a failure: CI has all that tests need.
set -euo pipefail
[[ ${CI:-} == true ]] || exec go test "$@"

export LAZULI_CI=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The JSON has a line per event; what people read are the failures, the packages, and the skips.
status=0
go test -json "$@" >"$log" || status=$?
jq -rj 'select(.Action == "build-output" or (.Action == "output" and .Test == null)) | .Output' "$log"
jq -rsj '(map(select(.Action == "fail" and .Test != null) | .Package + .Test)) as $failed |
	.[] | select(.Action == "output" and (.Package + (.Test // "")) as $t | $failed | index($t)) | .Output' "$log"
# A package without tests is skipped too; that is no test.
skips=$(jq -r 'select(.Action == "skip" and .Test != null) | .Package + " " + .Test' "$log")
if [[ -n $skips ]]; then
	printf 'skipped, which is a failure in CI:\n%s\n' "$skips" >&2
	jq -rsj '(map(select(.Action == "skip") | .Package + (.Test // ""))) as $skipped |
		.[] | select(.Action == "output" and (.Package + (.Test // "")) as $t | $skipped | index($t)) | .Output' "$log" >&2
	status=1
fi
exit "$status"
