package integration

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long anything may take that talks to this machine only. It takes a second or two on a quiet one; a test
// that waits for what never comes must end.
const patience = time.Minute

// A Containerd is one of its own: own folders, sockets, namespace and cgroup. It is gone when its test ends, with all that it
// started and mounted.
type Containerd struct {
	// Dir holds everything. It is short, since a socket's path must be.
	Dir string
	// Namespace is ctr's. CRI's is always k8s.io.
	Namespace string

	o                    containerdOptions
	program, client, cri string // containerd, ctr, crictl
	process              *process
	pods                 int
}

// containerdOptions say which containerd. The zero value is 2.4 with overlayfs.
type containerdOptions struct {
	// Dir is its folder, made by shortDir, if others must know it before.
	Dir string
	// Old is Debian's 1.6, with its own ctr and shim.
	Old bool
	// Snapshotter is the socket of a snapshotter that is a proxy plugin called lazuli, and Root what it exports as its root. Then
	// images are pulled and run with that.
	Snapshotter, Root string
	// Hosts is a folder like /etc/containerd/certs.d, if there is one.
	Hosts string
	// Pause is the image of pods' sandboxes. If it is set the CRI plugin is on.
	Pause string
	// LocalPull has the CRI plugin pull by itself, as in 1.6, not through the transfer service.
	LocalPull bool
	// ThroughDaemon has crictl ask the daemon for images, not containerd.
	ThroughDaemon bool
}

// startContainerd starts containerd and returns when it answers.
func startContainerd(t testing.TB, o containerdOptions) *Containerd {
	t.Helper()
	needRoot(t)
	needProgram(t, "runc")
	if o.Dir == "" {
		o.Dir = shortDir(t)
	}
	c := &Containerd{Dir: o.Dir, Namespace: filepath.Base(o.Dir), o: o}
	if o.Old {
		needProgram(t, "/usr/bin/containerd")
		c.program, c.client = "/usr/bin/containerd", "/usr/bin/ctr"
	} else {
		tools := buildTools(t, "containerd")
		c.program, c.client = filepath.Join(tools, "containerd"), filepath.Join(tools, "ctr")
	}
	if o.Pause != "" {
		c.cri = filepath.Join(buildTools(t, "crictl"), "crictl")
		must(t, os.WriteFile(c.Dir+"/crictl.yaml", nil, 0o644)) // or it says each time that there is none
		must(t, os.MkdirAll(c.Dir+"/cni", 0o755))
	}
	config := c.config()
	if o.Old {
		config = c.oldConfig()
	}
	must(t, os.WriteFile(c.Dir+"/config.toml", []byte(config), 0o644))
	t.Cleanup(func() { c.remove(t) })
	c.start(t)
	return c
}

// config returns the configuration of 2.x. CRI uses the transfer service there, which wants to be told by which snapshotter it unpacks,
// and asks the proxy plugin's exports whether that wants to know about the layers. disable_snapshot_annotations = false, which 1.x needs,
// would bring back the way in which 1.x pulls. restrict_oom_score_adj is for machines where root may not lower it.
func (c *Containerd) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, `version = 3
root = "%[1]s/root"
state = "%[1]s/state"
`, c.Dir)
	if c.o.Pause == "" {
		b.WriteString(`disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
`)
	}
	fmt.Fprintf(&b, `
[grpc]
address = "%[1]s/c.sock"

[plugins."io.containerd.internal.v1.opt"]
path = "%[1]s/opt"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.shim.v1.manager"]
socket_dir = "%[1]s/s"
`, c.Dir)
	if c.o.Snapshotter != "" {
		fmt.Fprintf(&b, `
[proxy_plugins.lazuli]
type = "snapshot"
address = "%s"
[proxy_plugins.lazuli.exports]
root = "%s"
enable_remote_snapshot_annotations = "true"

[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux"
snapshotter = "lazuli"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux"
snapshotter = "overlayfs"
`, c.o.Snapshotter, c.o.Root)
	}
	if c.o.Pause != "" {
		fmt.Fprintf(&b, `
[plugins."io.containerd.cri.v1.images"]
snapshotter = "%[2]s"
disable_snapshot_annotations = %[3]t
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "%[4]s"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "%[5]s"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
conf_dir = "%[1]s/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
Root = "%[1]s/runc"
`, c.Dir, c.snapshotter(), !c.o.LocalPull, c.o.Pause, c.hosts())
	}
	return b.String()
}

// oldConfig returns the configuration of 1.6.
func (c *Containerd) oldConfig() string {
	var b strings.Builder
	fmt.Fprintf(&b, `version = 2
root = "%[1]s/root"
state = "%[1]s/state"
`, c.Dir)
	if c.o.Pause == "" {
		b.WriteString(`disabled_plugins = ["io.containerd.grpc.v1.cri"]
`)
	}
	fmt.Fprintf(&b, `
[grpc]
address = "%[1]s/c.sock"

[plugins."io.containerd.internal.v1.opt"]
path = "%[1]s/opt"
`, c.Dir)
	if c.o.Snapshotter != "" {
		fmt.Fprintf(&b, `
[proxy_plugins.lazuli]
type = "snapshot"
address = "%s"
`, c.o.Snapshotter)
	}
	if c.o.Pause != "" {
		fmt.Fprintf(&b, `
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "%[3]s"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "%[1]s/cni"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "%[4]s"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "%[2]s"
disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "%[1]s/runc"
`, c.Dir, c.snapshotter(), c.o.Pause, c.hosts())
	}
	return b.String()
}

// hosts returns a folder in any case: an empty name would mean /etc/containerd/certs.d.
func (c *Containerd) hosts() string {
	if c.o.Hosts == "" {
		return c.Dir + "/nohosts"
	}
	return c.o.Hosts
}

func (c *Containerd) snapshotter() string {
	if c.o.Snapshotter == "" {
		return "overlayfs"
	}
	return "lazuli"
}

// socket returns the path of its socket, which is also that of CRI.
func (c *Containerd) socket() string { return containerdSocket(c.Dir) }

// containerdSocket is socket for a containerd that is going to be started in dir.
func containerdSocket(dir string) string { return dir + "/c.sock" }

func (c *Containerd) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(c.program, "--config", c.Dir+"/config.toml")
	// The shim is the one that lies beside it.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(c.program)+":"+os.Getenv("PATH"))
	c.process = startProcess(t, cmd, c.Dir+"/log")
	c.process.await(t, func() error {
		if _, err := c.ctr("version"); err != nil || c.cri == "" {
			return err
		}
		_, err := c.crictl("version")
		return err
	})
}

// restart ends it as systemd does, and starts it again. Containers run on.
func (c *Containerd) restart(t testing.TB) {
	t.Helper()
	c.process.end(t, unix.SIGTERM)
	c.start(t)
}

// kill ends it at once. Containers run on.
func (c *Containerd) kill(t testing.TB) {
	t.Helper()
	c.process.end(t, unix.SIGKILL)
}

// remove takes away all that is left of it, whatever state it is in.
func (c *Containerd) remove(t testing.TB) {
	if t.Failed() {
		t.Logf("containerd's log:\n%s", tail(c.Dir+"/log"))
	}
	// 1.6 knows one folder for the sockets of shims.
	addresses, _ := filepath.Glob(c.Dir + "/state/io.containerd.runtime.v2.task/*/*/address")
	for _, name := range addresses {
		if b, err := os.ReadFile(name); err == nil {
			defer os.Remove(strings.TrimPrefix(string(b), "unix://"))
		}
	}
	killAll(t, c.Dir)
	unmountAll(t, c.Dir)
	// Those of containers are gone with them, if all went well; nobody removes the one above.
	for _, top := range []string{"/sys/fs/cgroup/" + c.Namespace, "/sys/fs/cgroup/*/" + c.Namespace} {
		list, _ := filepath.Glob(top)
		for _, dir := range list {
			removeCgroup(dir)
		}
	}
}

func removeCgroup(dir string) {
	list, _ := os.ReadDir(dir)
	for _, e := range list {
		if e.IsDir() {
			removeCgroup(filepath.Join(dir, e.Name()))
		}
	}
	os.Remove(dir)
}

// ctr runs ctr in the namespace of c and returns what it prints.
func (c *Containerd) ctr(args ...string) (string, error) {
	return command(c.client, append([]string{"--address", c.socket(), "--namespace", c.Namespace}, args...)...)
}

// mustCtr is ctr for what has to succeed.
func (c *Containerd) mustCtr(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.ctr(args...)
	must(t, err)
	return out
}

// pull has ctr pull an image.
func (c *Containerd) pull(ref string, options ...string) error {
	args := []string{"image", "pull", "--snapshotter", c.snapshotter()}
	if c.o.Hosts != "" {
		args = append(args, "--hosts-dir", c.o.Hosts)
	} else {
		args = append(args, "--plain-http")
	}
	_, err := c.ctr(slices.Concat(args, options, []string{ref})...)
	return err
}

// run has ctr run a command in a new container called id, to its end if there is no option --detach, and returns what it prints.
func (c *Containerd) run(ref, id string, options []string, args ...string) (string, error) {
	how := []string{"run", "--snapshotter", c.snapshotter(), "--runc-root", c.Dir + "/runc", "--fifo-dir", c.Dir + "/fifo"}
	if !slices.Contains(options, "--detach") {
		how = append(how, "--rm")
	}
	return c.ctr(slices.Concat(how, options, []string{ref, id}, args)...)
}

// exec has ctr run a command in a container that runs.
func (c *Containerd) exec(id string, args ...string) (string, error) {
	how := []string{"task", "exec", "--fifo-dir", c.Dir + "/fifo", "--exec-id", "exec", id}
	return c.ctr(append(how, args...)...)
}

// mount has ctr prepare a snapshot above a chain, as for a container, and mounts it at a folder until undo is called.
func (c *Containerd) mount(t testing.TB, namespace, chain string) (dir string, undo func()) {
	t.Helper()
	dir, err := os.MkdirTemp(c.Dir, "mount")
	must(t, err)
	snapshot := func(args ...string) string {
		t.Helper()
		return c.mustCtr(t, append([]string{"--namespace", namespace, "snapshot", "--snapshotter", c.snapshotter()}, args...)...)
	}
	key := filepath.Base(dir)
	_, err = command("sh", "-ec", snapshot("prepare", "--target", dir, key, chain)) // it prints how to mount it
	must(t, err)
	return dir, func() {
		t.Helper()
		must(t, unix.Unmount(dir, 0))
		snapshot("delete", key)
	}
}

// view has ctr mount an image read-only until undo is called. 1.6's would use overlayfs, whatever it is told.
func (c *Containerd) view(t testing.TB, namespace, image string) (dir string, undo func()) {
	t.Helper()
	dir, err := os.MkdirTemp(c.Dir, "view")
	must(t, err)
	c.mustCtr(t, "--namespace", namespace, "image", "mount", "--snapshotter", c.snapshotter(), image, dir)
	return dir, func() {
		t.Helper()
		c.mustCtr(t, "--namespace", namespace, "image", "unmount", "--rm", "--snapshotter", c.snapshotter(), dir)
	}
}

// snapshots returns the keys of the snapshots in a namespace, in order.
func (c *Containerd) snapshots(t testing.TB, namespace string) []string {
	t.Helper()
	out, err := c.ctr("--namespace", namespace, "snapshot", "--snapshotter", c.snapshotter(), "ls")
	must(t, err)
	return firstFields(out)
}

// content returns the digests of the blobs in a namespace, in order.
func (c *Containerd) content(t testing.TB, namespace string) []string {
	t.Helper()
	out, err := c.ctr("--namespace", namespace, "content", "ls", "--quiet")
	must(t, err)
	return slices.Sorted(strings.FieldsSeq(out))
}

// firstFields returns the first word of each line but the first, in order.
func firstFields(table string) []string {
	var list []string
	for i, line := range strings.Split(table, "\n") {
		if f := strings.Fields(line); i > 0 && len(f) > 0 {
			list = append(list, f[0])
		}
	}
	slices.Sort(list)
	return list
}

// crictl runs crictl and returns what it prints, without newlines at the end.
func (c *Containerd) crictl(args ...string) (string, error) {
	images := c.socket()
	if c.o.ThroughDaemon {
		images = c.o.Snapshotter
	}
	out, err := command(c.cri, append([]string{"--config", c.Dir + "/crictl.yaml", "--timeout", patience.String(),
		"--runtime-endpoint", "unix://" + c.socket(), "--image-endpoint", "unix://" + images}, args...)...)
	return strings.TrimRight(out, "\n"), err
}

// A pod is a sandbox in the host's network, and the containers in it.
type pod struct {
	c          *Containerd
	id, config string
	containers int
}

// pod has crictl start a pod.
func (c *Containerd) pod(t testing.TB) *pod {
	t.Helper()
	c.pods++
	p := &pod{c: c, config: fmt.Sprintf("%s/pod%d.json", c.Dir, c.pods)}
	// 2 is NODE: no network to be set up, so no CNI.
	must(t, os.WriteFile(p.config, fmt.Appendf(nil, `{"metadata": {"name": "pod%d", "namespace": "default", "uid": "%[2]s-%[1]d"},
"log_directory": "%[3]s/pods",
"linux": {"cgroup_parent": "/%[2]s", "security_context": {"namespace_options": {"network": 2}}}}`, c.pods, c.Namespace, c.Dir), 0o644))
	out, err := c.crictl("runp", p.config)
	must(t, err)
	p.id = out
	return p
}

// start has crictl start a container in the pod and returns its id.
func (p *pod) start(t testing.TB, ref string, args ...string) string {
	t.Helper()
	p.containers++
	config := fmt.Sprintf("%s.%d", p.config, p.containers)
	var quoted []string
	for _, a := range args {
		quoted = append(quoted, strconv.Quote(a))
	}
	must(t, os.WriteFile(config, fmt.Appendf(nil, `{"metadata": {"name": "c%d"}, "image": {"image": %q}, "command": [%s], "log_path": %q}`,
		p.containers, ref, strings.Join(quoted, ", "), filepath.Base(config)+".log"), 0o644))
	id, err := p.c.crictl("create", p.id, config, p.config)
	must(t, err)
	_, err = p.c.crictl("start", id)
	must(t, err)
	return id
}

// output waits until a container has ended and returns what it has written.
func (p *pod) output(t testing.TB, id string) string {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		out, err := p.c.crictl("ps", "--all", "--quiet", "--state", "exited", "--id", id)
		must(t, err)
		if out == id {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("container %s has not ended after %v", id, patience)
		}
	}
	out, err := p.c.crictl("logs", id)
	must(t, err)
	return out
}

// remove has crictl stop and remove the pod and its containers.
func (p *pod) remove(t testing.TB) {
	t.Helper()
	_, err := p.c.crictl("rmp", "--force", p.id)
	must(t, err)
}

// A Daemon is a lazuli daemon of its own. It is torn down when its test ends, and then nothing of it may be left.
type Daemon struct {
	// Dir holds everything, Root is its --root.
	Dir, Root string
	// Socket is where containerd finds it, API where HTTP is spoken.
	Socket, API string

	o       daemonOptions
	program string
	process *process
}

// daemonOptions say how a daemon is configured.
type daemonOptions struct {
	// Hosts is a folder like /etc/containerd/certs.d, if there is one.
	Hosts string
	// Containerd is the socket of the containerd whose CRI image service it passes calls on to.
	Containerd string
	// Fill is its key fill. "" is off: tests count requests.
	Fill string
	// More are further lines of its configuration.
	More string
	// Env are further variables of its environment, NAME=value.
	Env []string
}

// startDaemon builds lazuli, starts a daemon and returns when it answers.
func startDaemon(t testing.TB, o daemonOptions) *Daemon {
	t.Helper()
	needRoot(t)
	dir := shortDir(t)
	d := &Daemon{Dir: dir, Root: dir + "/r", Socket: dir + "/l.sock", API: dir + "/api.sock", o: o, program: dir + "/lazuli"}
	d.upgrade(t, "test")
	if o.Hosts == "" {
		o.Hosts = dir + "/nohosts"
	}
	// It would read a layer that is complete once more to verify it, whenever it sees that: tests count requests. Those that are about
	// that ask for it.
	config := fmt.Sprintf("socket = %q\nhosts_dir = %q\nfill = %q\nverify = false\n", d.Socket, o.Hosts, cmp.Or(o.Fill, "off"))
	if o.Containerd != "" {
		config += fmt.Sprintf("containerd = %q\n", o.Containerd)
	}
	must(t, os.WriteFile(dir+"/config.toml", []byte(config+o.More), 0o644))
	t.Cleanup(func() { d.remove(t) })
	d.start(t)
	return d
}

// upgrade puts a build of another version in the place of the program, as a package does: what runs keeps the old one.
func (d *Daemon) upgrade(t testing.TB, version string) {
	t.Helper()
	program, err := buildLazuli(version)
	must(t, err)
	must(t, os.WriteFile(d.program+".new", program, 0o755))
	must(t, os.Rename(d.program+".new", d.program))
}

// lazuli runs a command of lazuli with the root and the configuration of the daemon.
func (d *Daemon) lazuli(args ...string) (string, error) {
	return command(d.program, append([]string{"--root", d.Root, "--config", d.Dir + "/config.toml"}, args...)...)
}

// start starts the daemon. Nothing may be running.
func (d *Daemon) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(d.program, "--root", d.Root, "--config", d.Dir+"/config.toml", "daemon")
	cmd.Env = append(os.Environ(), d.o.Env...)
	d.process = startProcess(t, cmd, d.Dir+"/log")
	d.process.await(t, func() error { _, err := d.get("/healthz"); return err })
}

// stop ends the daemon as systemd does. What is mounted stays mounted.
func (d *Daemon) stop(t testing.TB) {
	t.Helper()
	d.process.end(t, unix.SIGTERM)
}

// kill ends keeper and server at once.
func (d *Daemon) kill(t testing.TB) {
	t.Helper()
	server := d.server()
	d.process.end(t, unix.SIGKILL)
	if server != 0 {
		unix.Kill(server, unix.SIGKILL)
		awaitGone(t, server)
	}
}

// keeper returns the process id of the keeper.
func (d *Daemon) keeper() int { return d.process.cmd.Process.Pid }

// server returns the process id of the server, 0 while there is none.
func (d *Daemon) server() int {
	for pid, p := range processes() {
		if p.parent == d.keeper() && strings.HasPrefix(p.command, d.program+" ") && strings.Contains(p.command+" ", " --serve ") {
			return pid
		}
	}
	return 0
}

// get asks the daemon by HTTP and returns the answer.
func (d *Daemon) get(path string) (string, error) {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", d.API)
		}}}
	resp, err := client.Get("http://lazuli" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %.200s", path, resp.Status, b)
	}
	return string(b), err
}

// remove tears the daemon down and shows that nothing is left of it.
func (d *Daemon) remove(t testing.TB) {
	if t.Failed() {
		t.Logf("the daemon's log:\n%s", tail(d.Dir+"/log"))
	}
	if out, err := d.lazuli("daemon", "--teardown"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if d.process != nil {
		select {
		case <-d.process.done:
		case <-time.After(patience):
			t.Error("the daemon still runs after its teardown")
		}
	}
	// A process that held the connection to the kernel ends a little after the mount is gone.
	left := residue(d.Dir)
	for end := time.Now().Add(10 * time.Second); len(left) > 0 && time.Now().Before(end); left = residue(d.Dir) {
		time.Sleep(20 * time.Millisecond)
	}
	for _, s := range left {
		t.Errorf("left after the teardown: %s", s)
	}
	killAll(t, d.Dir)
	unmountAll(t, d.Dir)
}

// residue returns what has to do with a folder and outlives a test that does not clean up: mounts, loop devices, processes.
func residue(dir string) []string {
	list := []string{}
	mountinfo, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mountinfo)) {
		if strings.Contains(line, dir+"/") {
			list = append(list, "mount "+strings.TrimSpace(line))
		}
	}
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range files {
		if b, _ := os.ReadFile(name); strings.HasPrefix(string(b), dir+"/") {
			list = append(list, strings.Split(name, "/")[3]+" "+strings.TrimSpace(string(b)))
		}
	}
	for pid, p := range processes() {
		if strings.Contains(p.command, dir+"/") {
			list = append(list, fmt.Sprintf("process %d %s", pid, p.command))
		}
	}
	slices.Sort(list)
	return list
}

// shortDir makes a folder for the test whose name is short enough for sockets in it. It is removed when the test ends, after what
// uses it.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lazuli")
	must(t, err)
	t.Cleanup(func() {
		// A mount that is left in it must not be emptied.
		if left := residue(dir); len(left) > 0 {
			t.Errorf("%s is not removed: %s", dir, strings.Join(left, "\n"))
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A process is a program that a test runs beside itself.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

// startProcess starts cmd, whose output is added to the file log.
func startProcess(t testing.TB, cmd *exec.Cmd, log string) *process {
	t.Helper()
	f, err := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	must(t, err)
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	must(t, cmd.Start())
	p := &process{cmd, log, make(chan struct{})}
	go func() { cmd.Wait(); close(p.done) }()
	return p
}

// await returns when ready does so without an error.
func (p *process) await(t testing.TB, ready func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := ready()
		if err == nil {
			return
		}
		select {
		case <-p.done:
			t.Fatalf("%s has ended: %v\n%s", p.cmd, p.cmd.ProcessState, tail(p.log))
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v\n%s", p.cmd, err, tail(p.log))
		}
	}
}

// end sends a signal and waits for the end.
func (p *process) end(t testing.TB, s syscall.Signal) {
	t.Helper()
	p.cmd.Process.Signal(s)
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Fatalf("%s has not ended %v after %v", p.cmd, patience, s)
	}
}

// tail returns the end of a log.
func tail(name string) string {
	b, _ := os.ReadFile(name)
	return string(b[max(0, len(b)-8000):])
}

// command runs a program and returns what it prints. The error says how it was called and what it wrote to standard error.
func command(program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return commandFor(ctx, program, args...)
}

func commandFor(ctx context.Context, program string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, program, args...)
	c.Stdout, c.Stderr = &stdout, &stderr
	c.WaitDelay = 5 * time.Second // for children that have its output
	err := c.Run()
	if err != nil {
		err = fmt.Errorf("%s %q: %w\n%s", filepath.Base(program), args, errors.Join(err, ctx.Err()), &stderr)
	}
	return stdout.String(), err
}

// A running process, as /proc shows it; zombies are none.
type running struct {
	parent  int
	command string // the arguments with spaces between them
}

// processes returns all processes of this machine that have a command line, by their ids.
func processes() map[int]running {
	all := map[int]running{}
	dirs, _ := os.ReadDir("/proc")
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		// The name, in parentheses, may have spaces and parentheses. Then come the state and the parent.
		f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(args) == 0 || len(f) < 2 || f[0] == "Z" {
			continue
		}
		parent, _ := strconv.Atoi(f[1])
		all[pid] = running{parent, strings.ReplaceAll(strings.TrimSuffix(string(args), "\x00"), "\x00", " ")}
	}
	return all
}

// killAll kills the processes whose arguments name dir, and all that come from them: shims and what runs in their containers.
func killAll(t testing.TB, dir string) {
	all := processes()
	doomed := map[int]bool{}
	for pid, p := range all {
		doomed[pid] = strings.Contains(p.command, dir+"/") && pid != os.Getpid()
	}
	for more := true; more; {
		more = false
		for pid, p := range all {
			if doomed[p.parent] && !doomed[pid] {
				doomed[pid], more = true, true
			}
		}
	}
	for pid, d := range doomed {
		if d {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
	for pid, d := range doomed {
		if d {
			awaitGone(t, pid)
		}
	}
}

// awaitGone returns when there is no process pid any more, or only what its parent has not yet taken note of.
func awaitGone(t testing.TB, pid int) {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		p, ok := processes()[pid]
		if !ok {
			return
		}
		if time.Now().After(end) {
			t.Errorf("process %d %s was killed and still runs", pid, p.command)
			return
		}
	}
}

// unmountAll unmounts what is mounted below dir, the last first.
func unmountAll(t testing.TB, dir string) {
	mountinfo, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Error(err)
	}
	for _, line := range slices.Backward(strings.Split(string(mountinfo), "\n")) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", f[4], err)
			}
		}
	}
}

// buildTools builds the programs of a module below this folder and returns where they are. It takes minutes, so they stay in the
// cache directory as long as the module is the same.
func buildTools(t testing.TB, module string) string {
	t.Helper()
	dir, err := toolsOf[module]()
	must(t, err)
	return dir
}

var toolsOf = map[string]func() (string, error){
	"containerd": sync.OnceValues(func() (string, error) { return cachedTools("containerd") }),
	"crictl":     sync.OnceValues(func() (string, error) { return cachedTools("crictl") }),
}

func cachedTools(module string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	out, err := commandFor(ctx, "../deploy/tools.sh", module)
	lines := strings.Fields(out)
	if err != nil || len(lines) == 0 {
		return "", fmt.Errorf("deploy/tools.sh %s: %w", module, err)
	}
	return lines[len(lines)-1], nil
}

// buildLazuli builds lazuli as make does, once for each version in a run of the tests, and returns the program.
func buildLazuli(version string) ([]byte, error) {
	build, _ := lazulis.LoadOrStore(version, sync.OnceValues(func() (program []byte, err error) {
		cache, err := cacheDir()
		if err != nil {
			return nil, err
		}
		name := filepath.Join(cache, "lazuli")
		// Another checkout may be tested at the same time, so the file is not what is used.
		err = locked(name+".lock", func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
			defer cancel()
			_, err := commandFor(ctx, "env", "CGO_ENABLED=0", "go", "build", "-C", "..", "-trimpath", "-ldflags", "-s -w -X main.version="+version,
				"-o", name, "./cmd/lazuli")
			if err == nil {
				program, err = os.ReadFile(name)
			}
			return err
		})
		return program, err
	}))
	return build.(func() ([]byte, error))()
}

var lazulis sync.Map // of functions, by version

// locked calls f while no other process does so with the same lock.
func locked(lock string, f func() error) error {
	l, err := os.OpenFile(lock, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock, err)
	}
	return f()
}
