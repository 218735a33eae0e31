#!/usr/bin/env bash
# The demo: a job from a lazy image beside the same job after a full pull and
# unpack of the ordinary one, each from nothing. IMAGE=ref takes that image from
# its registry instead of making one of Debian, Python and NumPy; JOB='cmd arg…' is what runs in it.
set -euo pipefail
cd "$(dirname "$0")/.."

source deploy/image.sh

IMAGE=${IMAGE:-}
job=()
[[ -n $IMAGE ]] || job=("${small_job[@]}")
[[ -z ${JOB:-} ]] || read -ra job <<<"$JOB"

[[ $(uname -s) == Linux ]] || die 'lazy starts need Linux'
[[ $EUID == 0 ]] || die 'mounting needs root: sudo make demo'
command -v go >/dev/null || [[ -x bin/lazuli ]] || die 'building needs Go 1.26: see https://go.dev/dl'

# What it takes besides Lazuli: a runtime, and for the other side of the comparison an ordinary puller and unpacker.
need runc runc; need skopeo skopeo; need umoci umoci; need jq jq
[[ -n $IMAGE ]] || need_small_image
install_missing

[[ -n ${LAZULI_BUILT:-} ]] || make --no-print-directory build
lazuli=$PWD/bin/lazuli
"$lazuli" doctor || exit 1

mkdir -p .cache/demo
cache=$PWD/.cache/demo
work=$(mktemp -d "${TMPDIR:-/tmp}/lazuli-demo.XXXXXX")
registry=
container=lazuli-demo-$$
clean() {
	trap '' INT TERM
	runc --root "$work/runc" delete --force "$container" 2>/dev/null || true
	if [[ -n $registry ]]; then
		kill "$registry" 2>/dev/null || true
		wait "$registry" 2>/dev/null || true
	fi
	rm -rf -- "$work"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# 1. An ordinary image, made once.
[[ -n $IMAGE ]] || make_small_image "$work"

# 2. A registry that has it, and a lazy copy.
coproc registry_output { exec "$lazuli" registry --dir "$work/registry" --addr 127.0.0.1:0 --access-log "$work/access.log"; }
registry=$registry_output_PID
read -r -t 10 ready <&"${registry_output[0]}" || die 'the registry did not start'
host=${ready##* }
original=$host/demo:original lazy=$host/demo:lazy

say "Pushing the ordinary image to the registry at $host"
if [[ -z $IMAGE ]]; then
	skopeo copy --quiet --dest-tls-verify=false "docker-archive:$small_image" "docker://$original"
else
	tls=true # as docker has it: only this machine's own registries may do without
	[[ $IMAGE != localhost[:/]* && $IMAGE != 127.* ]] || tls=false
	skopeo copy --quiet --src-tls-verify=$tls --dest-tls-verify=false "docker://$IMAGE" "docker://$original" || die "$IMAGE: not to be had (skopeo's message is above)"
fi
say 'Converting it'
"$lazuli" convert --cache "$cache/converted" "$original" "$lazy"

now() { local t=${EPOCHREALTIME/[.,]/}; echo $((t / 1000)); }
sent() { awk '{ n += $(NF-1) } END { print n + 0 }' "$work/access.log"; }

# 3. The job, lazily, from an empty store. Its page cache is empty too, as on a machine that never saw the image.
say "The job, lazily: ${job[*]:-the command of the image}"
sync
echo 3 >/proc/sys/vm/drop_caches
"$lazuli" --root "$work/root" run --timeline=json:"$work/lazy.json" "$lazy" ${job[@]+"${job[@]}"} </dev/null

# 4. The same after everything was pulled and unpacked.
say 'The same after a full pull and unpack'
sync
echo 3 >/proc/sys/vm/drop_caches
before=$(sent) t0=$(now)
skopeo copy --quiet --src-tls-verify=false "docker://$original" "oci:$work/pulled:original"
pulled=$(($(now) - t0))
umoci --log=error unpack --image "$work/pulled:original" "$work/bundle" >/dev/null
unpacked=$(($(now) - t0))
if ((${#job[@]})); then
	# As lazuli run does: the job replaces the image's command, its entrypoint stays.
	skopeo inspect --config "oci:$work/pulled:original" >"$work/image.json"
	for arg in "${job[@]}"; do jq -n --arg arg "$arg" '$arg'; done |
		jq -s --slurpfile image "$work/image.json" '($image[0].config.Entrypoint // []) + .' >"$work/args.json"
	jq --slurpfile args "$work/args.json" '.process.args = $args[0]' "$work/bundle/config.json" >"$work/config.json"
	mv "$work/config.json" "$work/bundle/config.json"
fi
jq '.process.terminal = false' "$work/bundle/config.json" >"$work/config.json"
mv "$work/config.json" "$work/bundle/config.json"
runc --root "$work/runc" run --bundle "$work/bundle" "$container" </dev/null 2>&1 | {
	IFS= read -r line && now >"$work/first" && printf '%s\n' "$line"
	cat
} || die 'the job failed after the pull'
first=
[[ ! -s $work/first ]] || first=$(($(<"$work/first") - t0))
ended=$(($(now) - t0)) bytes=$(($(sent) - before))

# 5. Side by side.
say 'Milliseconds from "start this image" on an empty machine'
jq -r --argjson pulled "$pulled" --argjson unpacked "$unpacked" --arg first "${first:-}" --argjson ended "$ended" --argjson bytes "$bytes" '
	def ms: if . == null or . == "" then "-" else (tonumber | round | tostring) end;
	def mb: (. / 1e5 | round / 10 | tostring) + " MB";
	(.phases | map({(.phase): .ms}) | add) as $p |
	["", "lazy", "pull+unpack"],
	["metadata here / pulled", ($p.metadata | ms), ($pulled | ms)],
	["root usable", ($p.mount | ms), ($unpacked | ms)],
	["first output", ($p["first output"] | ms), ($first | ms)],
	["job done", ($p.exit | ms), ($ended | ms)],
	["from the registry", (.bytesFetched | mb), ($bytes | mb)],
	["requests", (.requests | tostring), ""] | @tsv' "$work/lazy.json" |
	awk -F'\t' '{ printf "%-24s %12s %14s\n", $1, $2, $3 }'
jq -r --argjson ended "$ended" '(.phases | map(select(.phase == "exit"))[0].ms) as $l |
	"\nThe job was done \($ended / $l * 10 | round / 10) times as soon, from a registry on this machine; a slower network makes it more."' "$work/lazy.json"
