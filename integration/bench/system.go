package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A system starts images.
type system struct {
	Name, What string
	form       *form
	// snapshotter is containerd's; "" is no containerd, but lazuli run, and "floor" no system at all.
	snapshotter string
	// whole says that it fetches all of the image before it starts.
	whole bool
}

var systems = append([]*system{
	{"floor", "one GET of the startup pack, and then the job, with all that it reads in memory and without a container: what cannot be beaten", packed, "floor", false},
	{"lazuli-pack", "Lazuli, the image has a startup pack", packed, "lazuli", false},
	{"lazuli-rebuilt", "Lazuli, the next build of an image that has a pack: 2 % of the files are others, and it has not been profiled", rebuilt, "lazuli", false},
	{"lazuli-run-pack", "lazuli run, without daemon and containerd; the image has a startup pack", packed, "", false},
	{"lazuli", "Lazuli, the image has been converted and never profiled", lazy, "lazuli", false},
	{"lazuli-run", "lazuli run, without daemon and containerd", lazy, "", false},
	{"lazuli-plain", "Lazuli, nothing of Lazuli's is beside the image: somebody else has converted it, or another command runs", plain, "lazuli", false},
	{"stargz-opt", "stargz-snapshotter, what the job opens comes first in the image and is prefetched", stargzOptimized, "stargz", false},
	{"stargz", "stargz-snapshotter, as its converter makes images", stargz, "stargz", false},
	{"overlayfs", "containerd fetches and unpacks all of the ordinary image", ordinary, "overlayfs", true},
}, wrongSystems()...)

func systemOf(name string) *system {
	for _, s := range systems {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// fits says whether a mode makes sense for the system.
func (s *system) fits(mode string) bool {
	switch {
	case s.form.wrong != nil || mode == wrong:
		return mode == wrong && s.form.wrong != nil
	case mode == cold:
		return true
	case s.snapshotter == "" || s.snapshotter == "floor" || s.form == rebuilt:
		return false
	case share(mode) > 0: // what is known of a start is known of another job
		return s.form != packed && s.form != stargzOptimized
	}
	return true
}

// missing says why a system cannot be measured with what has been built, "" if it can.
func (s *system) missing(ctx context.Context, w *world) string {
	if s.form != packed && s.form != rebuilt && s.form.wrong == nil {
		return ""
	}
	verbs, err := output(ctx, w.Lazuli, "--help")
	if err != nil {
		return err.Error()
	}
	if !strings.Contains(verbs, "\n  profile ") {
		return "this lazuli has no verb profile"
	}
	return ""
}

// A node is a machine that has nothing yet: a folder, and the processes of a system.
type node struct {
	w                  *world
	s                  *system
	dir                string
	list               string   // of files that the job reads; "" if it is the image's own
	daemon, containerd *process // nil if the system has none
}

// startNode makes one in a new folder.
func (w *world) startNode(s *system, dir string) (*node, error) {
	n := &node{w: w, s: s, dir: dir}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o755); err != nil { // one that is there is not cold
		return nil, err
	}
	if err := n.configure(); err != nil {
		return nil, err
	}
	var err error
	switch s.snapshotter {
	case "":
		return n, nil
	case "lazuli":
		n.daemon, err = startProcess(w.own.command(w.Lazuli, n.lazuli("daemon")...), dir+"/daemon.log")
		if err == nil {
			err = n.daemon.await(func() error { _, err := n.ask("/healthz"); return err })
		}
	case "stargz":
		n.daemon, err = startProcess(w.own.command(w.Peers, "stargz-snapshotter", "-plain-http", registryHost, dir+"/root", dir+"/s.sock"), dir+"/daemon.log")
		if err == nil {
			err = n.daemon.await(func() error { _, err := os.Stat(dir + "/s.sock"); return err })
		}
	}
	if err != nil {
		return n, err
	}
	cmd := w.own.command(w.Containerd, "--config", dir+"/containerd.toml")
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(w.Containerd)+":"+os.Getenv("PATH")) // its shim lies beside it
	if n.containerd, err = startProcess(cmd, dir+"/containerd.log"); err != nil {
		return n, err
	}
	return n, n.containerd.await(func() error { return run(context.Background(), w.Ctr, n.ctr("version")...) })
}

// configure writes all configurations. The snapshotter's name is what ctr calls it; it is told of the layers before they are fetched if it says that
// it wants to know.
func (n *node) configure() error {
	hosts := n.dir + "/hosts/" + registryHost
	if err := os.MkdirAll(hosts, 0o755); err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, `version = 3
root = "%[1]s/containerd"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]

[grpc]
address = "%[1]s/c.sock"

[plugins."io.containerd.internal.v1.opt"]
path = "%[1]s/opt"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.shim.v1.manager"]
socket_dir = "%[1]s/s"
`, n.dir)
	if n.s.snapshotter != "overlayfs" {
		fmt.Fprintf(&b, `
[proxy_plugins.%[2]s]
type = "snapshot"
address = "%[1]s/s.sock"
[proxy_plugins.%[2]s.exports]
root = "%[1]s/root"
enable_remote_snapshot_annotations = "true"

[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux"
snapshotter = "%[2]s"
`, n.dir, n.s.snapshotter)
	}
	return errors.Join(
		os.WriteFile(n.dir+"/containerd.toml", []byte(b.String()), 0o644),
		os.WriteFile(n.dir+"/lazuli.toml", fmt.Appendf(nil, "socket = %q\nhosts_dir = %q\ncontainerd = %q\n", n.dir+"/s.sock", n.dir+"/hosts", n.dir+"/c.sock"), 0o644),
		os.WriteFile(hosts+"/hosts.toml", fmt.Appendf(nil, "server = \"http://%[1]s\"\n[host.\"http://%[1]s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", registryHost), 0o644))
}

// lazuli returns the arguments for a verb of lazuli on this node.
func (n *node) lazuli(args ...string) []string {
	return append([]string{"--root", n.dir + "/root", "--config", n.dir + "/lazuli.toml"}, args...)
}

// ctr returns the arguments for ctr on this node.
func (n *node) ctr(args ...string) []string {
	return append([]string{"--address", n.dir + "/c.sock", "--namespace", n.w.Cgroup}, args...) // the namespace is the parent of containers' cgroups
}

// pull returns the command that pulls an image, nil if the system does not pull.
func (n *node) pull(ref string) *exec.Cmd {
	if n.s.snapshotter == "" {
		return nil
	}
	return n.w.own.command(n.w.Ctr, n.ctr("image", "pull", "--plain-http", "--snapshotter", n.s.snapshotter, ref)...)
}

// job returns the command that runs an image's job in a container.
func (n *node) job(ref, id string) *exec.Cmd {
	if n.s.snapshotter == "" {
		return n.w.own.command(n.w.Lazuli, n.lazuli("run", "--timeline=json:"+n.timeline(id), ref)...)
	}
	args := n.ctr("run", "--rm", "--snapshotter", n.s.snapshotter, "--runc-root", n.dir+"/runc", "--fifo-dir", n.dir+"/fifo")
	if n.list == "" {
		return n.w.own.command(n.w.Ctr, append(args, ref, id)...)
	}
	for src, dst := range map[string]string{n.w.Read: "/bench-read", n.list: "/bench-list"} {
		args = append(args, "--mount", "type=bind,src="+src+",dst="+dst+",options=bind:ro")
	}
	return n.w.own.command(n.w.Ctr, append(args, ref, id, "/bench-read", "/bench-list")...)
}

// timeline returns where lazuli run writes what it did.
func (n *node) timeline(id string) string { return n.dir + "/" + id + ".json" }

// An account is what lazuli says of itself.
type account struct {
	needed int64 // bytes of files that reads have waited for; -1 if the system does not tell
	phases []mark
	busy   bool // something is being fetched
}

// account asks the daemon, or reads what lazuli run wrote.
func (n *node) account(id string) account {
	var run struct {
		BytesNeeded int64
		Phases      []struct {
			Phase string
			MS    float64
		}
	}
	var status struct {
		Fetched  struct{ Needed int64 }
		Fetching []struct{}
	}
	switch n.s.snapshotter {
	case "":
		if b, err := os.ReadFile(n.timeline(id)); err == nil && json.Unmarshal(b, &run) == nil {
			a := account{needed: run.BytesNeeded}
			for _, p := range run.Phases {
				a.phases = append(a.phases, mark{"lazuli run: " + p.Phase, p.MS / 1000})
			}
			return a
		}
	case "lazuli":
		if b, err := n.ask("/v1/status"); err == nil && json.Unmarshal(b, &status) == nil {
			return account{needed: status.Fetched.Needed, busy: len(status.Fetching) > 0}
		}
	}
	return account{needed: -1}
}

// settle waits until lazuli has fetched nothing for half a second, but not longer than ten.
func (n *node) settle() {
	idle := time.Now()
	for end := idle.Add(10 * time.Second); time.Since(idle) < time.Second/2 && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if n.account("").busy {
			idle = time.Now()
		}
	}
}

// ask asks lazuli's daemon over HTTP.
func (n *node) ask(path string) ([]byte, error) {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", n.dir+"/api.sock")
		}}}
	resp, err := client.Get("http://lazuli" + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, errors.New(resp.Status)
	}
	return io.ReadAll(resp.Body)
}

// logs returns the ends of the processes' logs.
func (n *node) logs() string {
	var b strings.Builder
	for _, p := range []*process{n.daemon, n.containerd} {
		if p != nil {
			fmt.Fprintf(&b, "%s:\n%s\n", filepath.Base(p.log), tail(p.log))
		}
	}
	return b.String()
}
