#!/usr/bin/env bash
# Lazuli with containerd from convert to uninstall, each command printed before it runs: see usage below.
set -euo pipefail
IMAGE=${IMAGE:-}
[[ $IMAGE != oci:[!/]* ]] || IMAGE=oci:$PWD/${IMAGE#oci:}
cd "$(dirname "$0")/.."
source deploy/image.sh

usage() {
	cat <<'END'
Lazuli with containerd, from convert to uninstall, in a temporary folder: its own registry, daemon and containerd, which the node's
own do not notice. Each command is printed before it runs. At the end it shows that nothing is left; if something is, the exit code is 1.

    sudo deploy/containerd.sh

In the environment:
    IMAGE            an image of a registry, or oci:DIR[:TAG]; it has sh, cat and sleep. Otherwise one of Debian, Python and NumPy is made
    JOB              'cmd arg…', the first thing that runs in it
    CONTAINERD_BIN   a folder with containerd 2.x, ctr and containerd-shim-runc-v2. Otherwise those in PATH
    LAZULI           a lazuli to use instead of building one
END
}
case $#${1:-} in
0) ;;
1-h | 1--help) usage; exit ;;
*) usage >&2; exit 2 ;;
esac

job=(sh -c 'echo hello from a lazy image')
[[ -n $IMAGE ]] || job=("${small_job[@]}")
[[ -z ${JOB:-} ]] || read -ra job <<<"$JOB"

[[ $(uname -s) == Linux ]] || die 'lazy starts need Linux'
[[ $EUID == 0 ]] || die "mounting needs root: sudo $0"

bin=${CONTAINERD_BIN:-}
[[ -n $bin ]] || bin=$(dirname "$(command -v containerd || echo /nowhere/containerd)")
found="there is none in ${CONTAINERD_BIN:-PATH}"
[[ ! -x $bin/containerd ]] || found="$bin/containerd is $("$bin/containerd" --version | awk '{ print $3 }')"
if ! [[ $found =~ \ v?2\.[^/]*$ && -x $bin/ctr && -x $bin/containerd-shim-runc-v2 ]]; then
	die "this needs containerd 2.x with its ctr and shim, and $found.
Either take a release from https://github.com/containerd/containerd/releases and say CONTAINERD_BIN=its bin folder, or build it,
which takes Go and some minutes:
    sudo CONTAINERD_BIN=\$(deploy/tools.sh containerd) $0"
fi
bin=$(cd "$bin" && pwd)
need runc runc
[[ -n $IMAGE ]] || need_small_image
install_missing

if [[ -z ${LAZULI:-} ]]; then
	command -v go >/dev/null || die 'building needs Go 1.26: see https://go.dev/dl'
	make --no-print-directory build
	LAZULI=$PWD/bin/lazuli
fi
"$LAZULI" doctor || exit 1

work=$(mktemp -d "${TMPDIR:-/tmp}/lazuli.XXXXXX")
work=$(cd "$work" && pwd -P) # as the kernel's list of mounts has it
namespace=${work##*/}        # of containerd, and so the cgroups' folder
root=$work/root
step= # the process of what runs now

# processes prints the ids of those that belong to this: their arguments name the folder, or they are in a container.
processes() {
	grep -lsFf - /proc/[0-9]*/cmdline <<<"$work/" | cut -d/ -f3 || true
	cat /sys/fs/cgroup/{,*/}"$namespace"/*/cgroup.procs 2>/dev/null || true
}
mounts() { awk -v dir="$work/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo; }
loops() { grep -sF "$work/" /sys/block/loop*/loop/backing_file || true; }

# clean ends all of it, in whatever state it is.
clean() {
	local status=$? pids list
	trap '' INT TERM
	set +e
	if ((status != 0 && status < 128)); then
		tail -n 15 "$work"/*.log >&2
	fi
	exec 2>/dev/null # the shell would tell of each that is killed
	[[ -z $step ]] || kill -KILL "$step"
	for ((i = 0; i < 500; i++)); do
		pids=$(processes)
		[[ -n $pids ]] || break
		kill -KILL $pids
		sleep 0.02
	done
	for ((i = 0; i < 10; i++)); do
		list=$(mounts | tac)
		[[ -n $list ]] || break
		while read -r dir; do umount --lazy "$dir"; done <<<"$list"
	done
	find /sys/fs/cgroup -depth -type d -path "*/$namespace*" -exec rmdir {} +
	for ((i = 0; i < 500; i++)); do # the kernel lets go of loop devices a little later
		list=$(processes; mounts; loops)
		[[ -n $list ]] || break
		sleep 0.02
	done
	if [[ -n $list ]]; then
		printf '%s: %s is not removed, since this is left of it:\n%s\n' "$0" "$work" "$list"
		exit 1
	fi
	rm -rf --one-file-system -- "$work"
	exit "$status"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The programs, pointed at the folder. ctr run would otherwise have files below /run/containerd.
lazuli() (XDG_CACHE_HOME=$work/cache exec "$work/lazuli" --config "$work/lazuli.toml" "$@")
ctr() (
	case "$1 ${2:-}" in
	run\ *) set -- run --runc-root "$work/runc" --fifo-dir "$work/fifo" "${@:2}" ;;
	task\ exec) set -- task exec --fifo-dir "$work/fifo" "${@:3}" ;;
	esac
	CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 exec "$bin/ctr" --address "$work/c.sock" --namespace "$namespace" "$@"
)

# run prints a command and runs it, beside the shell, so that Ctrl-C need not wait for it.
run() {
	printf '$ %s\n' "$*"
	eval "$*" </dev/null &
	step=$!
	wait "$step" || die "that ended with exit code $?"
	step=
}
# await waits until a command succeeds.
await() {
	for ((i = 0; i < 600; i++)); do
		! "$@" || return 0
		sleep 0.05
	done
	return 1
}
# start runs a program beside the others. In a session of its own Ctrl-C does not reach it before its time has come.
start() {
	local log=$work/$1.log
	shift
	setsid "$@" >>"$log" 2>&1 </dev/null &
}

say "lazuli and ctr are here $LAZULI and $bin/ctr, for what follows in $work only."
cp "$LAZULI" "$work/lazuli"
cat >"$work/lazuli.toml" <<END
root = "$root"
socket = "$work/lazuli.sock"
containerd = "$work/c.sock"
hosts_dir = "$work/hosts"
END
cat >"$work/containerd.toml" <<END
version = 3
root = "$work/containerd"
state = "$work/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
imports = ["$work/snapshotter.toml"]
[grpc]
address = "$work/c.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "$work/opt"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.shim.v1.manager"]
socket_dir = "$work/s"
END
cat >"$work/snapshotter.toml" <<END
version = 3
[proxy_plugins.lazuli]
type = "snapshot"
address = "$work/lazuli.sock"
[proxy_plugins.lazuli.exports]
root = "$root"
enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux"
snapshotter = "lazuli"
END
[[ -n $IMAGE ]] || make_small_image "$work"

say 'A registry, the daemon, and a containerd. On a node that has those, lazuli install starts the daemon, and adds this to containerd:'
run cat "$work/snapshotter.toml"
printf '$ %s\n' "lazuli registry --dir $work/registry &" 'lazuli daemon &' "containerd --config $work/containerd.toml &"
start registry "$work/lazuli" registry --dir "$work/registry" --addr 127.0.0.1:0
registry=$!
await grep -q ' ' "$work/registry.log" || die 'the registry did not start'
host=$(awk '{ print $NF; exit }' "$work/registry.log")
start daemon "$work/lazuli" --config "$work/lazuli.toml" daemon
PATH=$bin:$PATH start containerd "$bin/containerd" --config "$work/containerd.toml"
containerd=$!
status() { lazuli status 2>/dev/null | sed -n "s/.* $1 \([0-9]*\).*/\1/p"; }
await eval '[[ -n $(status server) ]]' || die 'the daemon did not start'
await eval 'ctr version >/dev/null 2>&1' || die 'containerd did not start'

# state is all that there is of images and containers, but what the daemon keeps.
state() {
	echo "containers: $(ctr container ls -q)"
	echo "images: $(ctr image ls -q)"
	echo "blobs: $(ctr content ls -q)"
	echo "snapshots: $(ctr snapshot --snapshotter lazuli ls | sed 1d)"
	echo "mounts: $(mounts | sort)"
	echo "loop devices: $(loops)"
	echo "processes: $(processes | sort -u | while read -r pid; do tr '\0' ' ' <"/proc/$pid/cmdline"; echo; done 2>/dev/null | sort)"
}
# kept is what the daemon has on disk: the files of its store, and all that there is in its other folders.
kept() { find "$root" -xdev -mindepth 2 ! -name lock ! \( -path "$root/store/*" -type d \) | sort; }
before=$(state) kept=$(kept)
[[ $before == *" daemon --serve"* ]] || die 'a check that does not see the daemon shows nothing'

image=$host/manual:lazy
say 'Convert the image. Ordinary clients can go on pulling it.'
run "lazuli convert ${IMAGE:-docker-archive:$small_image} $image"
run "lazuli inspect $image"

say 'Pull it. containerd asks for no layer, so this takes as long as the tables of contents do.'
run "ctr image pull --plain-http --snapshotter lazuli $image"
run 'ctr content ls'
run 'ctr snapshot --snapshotter lazuli ls'
run 'lazuli images'

say 'Run something in it. It fetches what it reads.'
run "ctr run --rm --snapshotter lazuli $image first ${job[*]@Q}"
run 'lazuli images'

say 'A container that runs on, and a look into it.'
run "ctr run --detach --snapshotter lazuli $image service sleep 1000000"
run "ctr task exec --exec-id write service sh -c 'echo of the service >/note; cat /note'"
run 'lazuli status'

say 'A second container of the image. It has the same files, and not what the other one wrote.'
run "ctr run --detach --snapshotter lazuli $image other sleep 1000000"
run "ctr task exec --exec-id look other sh -c 'if [ -e /note ]; then cat /note; exit 1; else echo there is no note; fi'"

# Reading files that are not here yet, by what any sh can do.
read_files() { printf "sh -c 'for f in %s; do [ ! -f \"\$f\" ] || cat \"\$f\" >/dev/null || exit 1; done; echo all read'" "$1"; }
server=$(status server)
say 'The server dies. The keeper starts another one; what a container reads meanwhile waits for that.'
run "kill -9 $server"
run "ctr task exec --exec-id killed service $(read_files '/bin/* /usr/bin/*')"
await eval '[[ -n $(status server) && $(status server) != "$server" ]]' || die 'no server was started again'

server=$(status server)
say 'An upgrade: systemctl reload lazuli sends SIGHUP, and both processes become the program that lies there now.'
cp "$LAZULI" "$work/new" && mv "$work/new" "$work/lazuli"
run "kill -HUP $(status keeper)"
run "ctr task exec --exec-id upgraded service $(read_files '/lib/* /usr/lib/* /usr/lib/*/*')"
await eval '[[ -n $(status server) && $(status server) != "$server" ]]' || die 'no server was started after SIGHUP'
run 'lazuli status'

say 'Commit what the service wrote. Its snapshot, which has its name, becomes one that others can build on.'
run 'ctr task delete --force service'
run 'ctr snapshot --snapshotter lazuli commit noted service'
run 'ctr container delete --keep-snapshot service'
run 'ctr snapshot --snapshotter lazuli ls'

say 'A container of that.'
run "mkdir $work/heir"
run "ctr snapshot --snapshotter lazuli prepare --target $work/heir heir noted | sh -ex"
run "ctr run --rm --env PATH=/bin:/usr/bin --rootfs $work/heir heir cat /note"
run "umount $work/heir"
run 'ctr snapshot --snapshotter lazuli delete heir'

say 'Remove everything.'
run 'ctr task delete --force other'
run 'ctr container delete other'
run 'ctr snapshot --snapshotter lazuli delete noted'
run "ctr image delete --sync $image"

bad=0
# check says whether something is as it should be: nothing is left.
check() {
	if [[ -z $2 ]]; then
		printf '  ok: %s\n' "$1"
	else
		printf '  NOT: %s. There is:\n%s\n' "$1" "$2"
		bad=1
	fi
}
say 'Is everything as it was before?'
same() { after=$(state); [[ $after == "$before" ]]; }
await same || true # the daemon cleans up behind
check 'containers, images, blobs, snapshots, mounts, loop devices and processes are as before' \
	"$(diff <(echo "$before") <(echo "$after") || true)"
check 'the daemon has kept nothing outside its store' "$(diff <(echo "$kept") <(kept | grep -v "^$root/store/") | grep '^>' || true)"
run 'lazuli images'
say 'What was fetched stays for the next pull, up to max_size. prune does not wait until there is too much.'
run 'lazuli prune'
check 'nor has it kept anything in there' "$(diff <(echo "$kept") <(kept) || true)"

say 'Stop the daemon and unmount everything, as lazuli uninstall does, and stop containerd.'
run 'lazuli daemon --teardown'
run "kill $containerd"
kill "$registry"
nothing() { left=$(mounts; loops; processes); [[ -z $left ]]; }
await nothing || true
check 'no mount, loop device or process is left' "$left"
exit $bad
