# What demo.sh and containerd.sh begin with; they source it at the top of the repository.

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# need notes a program and its package; install_missing has apt install what is not there.
missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
install_missing() {
	((${#missing[@]})) || return 0
	command -v apt-get >/dev/null || die "install these first: ${missing[*]}"
	say "Installing ${missing[*]}"
	{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"; } >/dev/null ||
		die "apt-get could not: install these first: ${missing[*]}"
}

# The image that is taken if there is no IMAGE, a docker archive, and what runs in it.
small_image=$PWD/.cache/demo/image.tar
small_job=(python3 -c 'import json, numpy as np; a = np.arange(250000.0).reshape(500, 500); print(json.dumps({"job": "done", "trace": float(np.trace(a @ a.T))}))')
need_small_image() {
	[[ ! -e $small_image ]] || return 0
	need mmdebstrap mmdebstrap; need jq jq
}

# make_small_image DIR makes it, once, with DIR for what lies there meanwhile.
make_small_image() {
	[[ ! -e $small_image ]] || return 0
	local dir=$1 diff
	say 'Making an image of Debian, Python and NumPy (once)'
	mmdebstrap --quiet --variant=minbase --include=python3,python3-numpy \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' bookworm "$dir/layer.tar"
	diff=$(sha256sum "$dir/layer.tar" | cut -d' ' -f1)
	jq -n --arg diff "sha256:$diff" --arg arch "$(dpkg --print-architecture)" '{
		architecture: $arch, os: "linux", created: "1970-01-01T00:00:00Z",
		config: {Cmd: ["python3"], Env: ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
		rootfs: {type: "layers", diff_ids: [$diff]}, history: [{created_by: "mmdebstrap"}]}' >"$dir/config.json"
	jq -n '[{Config: "config.json", RepoTags: ["demo:original"], Layers: ["layer.tar"]}]' >"$dir/manifest.json"
	mkdir -p "${small_image%/*}"
	tar -C "$dir" -cf "$small_image.new" manifest.json config.json layer.tar
	mv "$small_image.new" "$small_image"
	rm "$dir/layer.tar" "$dir/config.json" "$dir/manifest.json"
}
