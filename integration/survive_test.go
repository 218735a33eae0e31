package integration

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"lazuli/convert"
)

// TestSurvive: what a container sees when everything around it dies, one after the other and together, and is started again. It
// reads, maps, executes and changes files that are not here yet, all the time; nothing of that may fail. After each kind of
// death a new container starts. In the end the machine is started anew, without the network.
func TestSurvive(t *testing.T) {
	needRoot(t)
	s := survive(t)
	n, d := s.node, s.node.daemon

	s.phase("kill the server", false, func() {
		s.link.rate.Store(fast)
		defer s.link.rate.Store(slow)
		for i := range 100 {
			pid := s.serving()
			s.underWay()
			time.Sleep(time.Duration(i%10) * 10 * time.Millisecond) // in which something may arrive
			must(t, unix.Kill(pid, unix.SIGKILL))
			awaitGone(t, pid)
		}
		s.serving()
	})
	s.phase("restart the daemon", true, func() {
		for range 3 {
			s.underWay()
			d.stop(t)
			d.start(t)
		}
	})
	s.phase("stop the daemon for 10 s", true, func() {
		s.underWay()
		d.stop(t)
		time.Sleep(10 * time.Second)
		d.start(t)
	})
	s.phase("upgrade the daemon", false, func() {
		keeper := d.keeper()
		for _, want := range []string{"next", "test", "next"} {
			s.underWay()
			d.upgrade(t, want)
			must(t, unix.Kill(keeper, unix.SIGHUP))
			d.process.await(t, func() error {
				if a, err := s.about(); err != nil || a.Version != want || a.Keeper != keeper {
					return fmt.Errorf("not upgraded to version %q of keeper %d: %+v, %v", want, keeper, a, err)
				}
				return nil
			})
		}
	})
	s.phase("restart containerd", false, func() {
		n.restart(t)
		s.underWay()
		n.kill(t)
		n.start(t)
	})
	systemd := startSystemd(t)
	s.phase("a daemon of systemd", true, func() {
		d.stop(t)
		systemd.start(t, d)
	})
	s.phase("kill keeper and server", false, func() {
		for range 4 {
			s.underWay()
			d.kill(t)
			systemd.start(t, d)
		}
	})
	s.phase("a daemon without systemd", true, func() {
		s.underWay()
		d.stop(t)
		systemd.forget()
		d.start(t)
	})

	n.mustCtr(t, "task", "kill", "--signal", "SIGTERM", "workload")
	s.await("the end of the workload", func() bool { return strings.Contains(s.output("workload"), "DONE all") })
	out := s.output("workload")
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "DONE") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if failed := lines(out, "FAILED"); len(failed) > 0 {
		t.Errorf("%d operations of the container failed:\n%s", len(failed), strings.Join(failed[:min(20, len(failed))], "\n"))
	}
	if done := lines(out, "DONE worker"); len(done) != 4 {
		t.Errorf("the workload's output ends with\n%s", tail(s.log("workload")))
	}
	s.deleteContainer("workload")

	s.reboot()
	s.deleteContainer("again")
	n.mustCtr(t, "image", "delete", "--sync", s.image)
	s.gone()
}

// A survivor is a node with a container that runs the workload.
type survivor struct {
	t        *testing.T
	node     *node
	registry *Registry
	image    string
	link     throttle
	asked    atomic.Int64 // how many ranges of layers
	down     atomic.Bool  // the registry hangs up on everybody
	phases   int
}

// survive makes the image, pulls it and starts the workload, and a container that has read what it needs.
func survive(t *testing.T) *survivor {
	s := &survivor{t: t}
	begin := time.Now()
	dir := t.TempDir()
	program := filepath.Join(dir, "workload")
	_, err := command("env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./workload")
	must(t, err)
	b, err := os.ReadFile(program)
	must(t, err)
	written := func(what string) v1.Layer {
		file := filepath.Join(dir, what)
		_, err := command(program, what, file)
		must(t, err)
		b, err := os.ReadFile(file)
		must(t, err)
		return static.NewLayer(b, types.OCIUncompressedLayer)
	}
	ordinary := runnableLayout(t, nil, tarLayer(t, func(add func(tar.Header, []byte)) {
		add(tar.Header{Name: "bin/workload", Typeflag: tar.TypeReg, Mode: 0o755}, b)
	}), written("layer"), written("never"))
	s.registry = NewRegistry(t, RegistryOptions{Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if s.down.Load() {
				panic(http.ErrAbortHandler)
			}
			if q.Header.Get("Range") != "" {
				s.asked.Add(1)
				w = &throttled{w, &s.link}
			}
			next.ServeHTTP(w, q)
		})
	}})
	s.image = s.registry.Push(t, convertLayout(t, ordinary, convert.Options{Level: 1}), "survive")
	s.node = startNode(t, daemonOptions{}, containerdOptions{})
	must(t, s.node.pull(s.image))
	_, err = s.node.run(s.image, "whole", nil, "sha256sum", "/bin/busybox") // reads all of it, so that it runs without the network
	must(t, err)
	s.detach("again", append([]string{"workload", "again"}, hereFiles...)...)
	s.await("the files are here", func() bool { return strings.Contains(s.output("again"), "RUN 1\n") })
	s.link.rate.Store(slow)
	s.detach("workload", "workload", "run", "4")
	s.progress(0)
	t.Logf("ready after %.1f s", time.Since(begin).Seconds())
	return s
}

// What soleName of the workload calls its files.
var hereFiles = []string{"here/0-300000", "here/7-300000", "here/19-300000"}

func freshFile(i int) string { return fmt.Sprintf("fresh/%d-300000", i) }

func neverFile(i int) string { return fmt.Sprintf("/never/%d-300000", i) }

// phase has something done to the node, and shows that the workload goes on, that it lacks files still, and that a new container starts
// and has files that were not here. away says that the daemon's socket was away meanwhile.
func (s *survivor) phase(name string, away bool, f func()) {
	s.t.Helper()
	begin, operations, asked := time.Now(), s.operations(), s.asked.Load()
	f()
	took := time.Since(begin)
	s.progress(s.operations())
	if s.asked.Load() == asked {
		s.t.Errorf("%s: nothing was asked of the registry meanwhile: the test shows nothing", name)
	}
	s.phases++
	start := func() (string, error) {
		return s.node.run(s.image, fmt.Sprint("new", s.phases), nil, "workload", "check", hereFiles[0], freshFile(s.phases))
	}
	out, err := start()
	if away {
		// If containerd has noticed, it lets calls fail until it tries to connect again, after 3 s at most.
		s.await("containerd connects again", func() bool {
			if err == nil || !strings.Contains(err.Error(), "connection error") {
				return true
			}
			out, err = start()
			return false
		})
	}
	if err != nil || out != "RIGHT 2 files\n" {
		s.t.Errorf("%s: a new container: %v, output %q", name, err, out)
	}
	s.t.Logf("%s: %.1f s, with the new container %.1f s, %d operations, %d ranges", name, took.Seconds(), time.Since(begin).Seconds(),
		s.operations()-operations, s.asked.Load()-asked)
	if failed := lines(s.output("workload"), "FAILED"); len(failed) > 0 {
		s.t.Fatalf("%s: operations of the container failed:\n%s", name, strings.Join(failed[:min(20, len(failed))], "\n"))
	}
}

// reboot ends all processes and mounts, keeps the disk, and shows what works without the network.
func (s *survivor) reboot() {
	t, n, d := s.t, s.node, s.node.daemon
	t.Helper()
	before := lines(s.output("again"), "RUN")
	s.down.Store(true)
	killAll(t, n.Dir)
	killAll(t, d.Dir)
	for _, dir := range []string{n.Dir, d.Dir} {
		unmountAll(t, dir)
	}
	left := func() []string { return append(residue(n.Dir), residue(d.Dir)...) }
	for end := time.Now().Add(patience); len(left()) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("left after all was killed and unmounted:\n%s", strings.Join(left(), "\n"))
		}
	}
	// What lies below /run.
	for _, path := range []string{n.Dir + "/state", n.Dir + "/s", n.Dir + "/runc", n.Dir + "/fifo", n.socket(), d.Socket, d.API, d.Dir + "/keeper.sock"} {
		must(t, os.RemoveAll(path))
	}
	config, err := os.ReadFile(d.Dir + "/config.toml")
	must(t, err)
	must(t, os.WriteFile(d.Dir+"/config.toml", append(config, "read_timeout = \"4s\"\n"...), 0o644))
	d.start(t)
	n.start(t)

	n.mustCtr(t, "task", "start", "--detach", "--fifo-dir", n.Dir+"/fifo", "--log-uri", "file://"+s.log("again"), "again")
	s.await("the old container runs again", func() bool { return strings.Contains(s.output("again"), "RUN 2\n") })
	if !slices.Equal(before, []string{"RUN 1"}) || len(lines(s.output("again"), "FAILED")) > 0 {
		t.Errorf("the old container:\n%s", s.output("again"))
	}
	out, err := n.run(s.image, "new", nil, append([]string{"workload", "check"}, hereFiles...)...)
	if err != nil || out != fmt.Sprintf("RIGHT %d files\n", len(hereFiles)) {
		t.Errorf("a new container: %v, output %q", err, out)
	}

	// One reads what is not here, and another one is killed while it does so.
	const script = "cat %s; echo ENDED $?"
	begin := time.Now()
	s.detach("eio", "sh", "-c", fmt.Sprintf(script, neverFile(3)))
	s.detach("killed", "sh", "-c", fmt.Sprintf(script, neverFile(12)))
	var reader int
	s.await("a read waits", func() bool {
		for pid, p := range processes() {
			if p.command == "cat "+neverFile(12) && waits(pid) {
				reader = pid
			}
		}
		return reader != 0
	})
	must(t, unix.Kill(reader, unix.SIGKILL))
	s.await("a reader that waits is killed", func() bool { return strings.Contains(s.output("killed"), "ENDED") })
	if out := s.output("killed"); !strings.Contains(out, fmt.Sprintf("ENDED %d\n", 128+unix.SIGKILL)) {
		t.Errorf("the reader that was killed: %q", out)
	}
	if out, err := d.lazuli("status"); err != nil || !strings.Contains(out, s.image) {
		t.Errorf("lazuli status: %v\n%s", err, out)
	}
	// The kernel asks again for a page that it did not get ahead, and so does cat, which tries sendfile(2) first.
	s.await("a read fails", func() bool {
		out := s.output("eio") // of two streams
		return strings.Contains(out, "ENDED 1\n") && (strings.Contains(out, "I/O error") || strings.Contains(out, "Input/output error"))
	})
	t.Logf("reboot: the read failed after %.1f s", time.Since(begin).Seconds())
	s.deleteContainer("eio")
	s.deleteContainer("killed")

	s.down.Store(false)
	out, err = n.run(s.image, "new", nil, "workload", "check", neverFile(3)[1:], neverFile(12)[1:])
	if err != nil || out != "RIGHT 2 files\n" {
		t.Errorf("a new container, when the network is back: %v, output %q", err, out)
	}
}

// gone shows that nothing is left of containers and images.
func (s *survivor) gone() {
	t, n, d := s.t, s.node, s.node.daemon
	t.Helper()
	if snapshots, content := n.snapshots(t, n.Namespace), n.content(t, n.Namespace); len(snapshots) > 0 || len(content) > 0 {
		t.Errorf("left behind: snapshots %v, blobs %v", snapshots, content)
	}
	var left []string
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		left = slices.DeleteFunc(n.traces(), func(line string) bool {
			return strings.Contains(line, d.Root+"/server ") || strings.HasSuffix(line, "/metadata.db") || strings.HasPrefix(line, "process") && !strings.Contains(line, "containerd-shim")
		})
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind:\n%s", strings.Join(left, "\n"))
		}
	}
}

// detach has ctr start a container that writes into the log of that name.
func (s *survivor) detach(id string, args ...string) {
	s.t.Helper()
	_, err := s.node.run(s.image, id, []string{"--detach", "--log-uri", "file://" + s.log(id)}, args...)
	must(s.t, err)
}

func (s *survivor) deleteContainer(id string) {
	s.t.Helper()
	s.node.mustCtr(s.t, "task", "delete", "--force", id)
	s.node.mustCtr(s.t, "container", "delete", id)
}

func (s *survivor) log(id string) string { return s.node.Dir + "/" + id + ".log" }

func (s *survivor) output(id string) string {
	b, _ := os.ReadFile(s.log(id))
	return string(b)
}

// lines returns the lines of a container's output that begin so.
func lines(out, prefix string) (list []string) {
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, prefix) {
			list = append(list, strings.TrimSpace(line))
		}
	}
	return list
}

// operations returns how many operations the workload has reported.
func (s *survivor) operations() int {
	most := map[string]int{}
	for line := range strings.Lines(s.output("workload")) {
		var worker, n int
		if _, err := fmt.Sscanf(line, "worker %d: %d operations", &worker, &n); err == nil {
			most[fmt.Sprint(worker)] = n
		}
	}
	sum := 0
	for _, n := range most {
		sum += n
	}
	return sum
}

// progress waits until there are more.
func (s *survivor) progress(than int) {
	s.t.Helper()
	s.await("the workload goes on", func() bool { return s.operations() > than || len(lines(s.output("workload"), "FAILED")) > 0 })
}

// await waits for a condition.
func (s *survivor) await(what string, condition func() bool) {
	s.t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("in vain: %s. The workload's output ends with\n%s", what, tail(s.log("workload")))
		}
	}
}

// underWay waits until the registry is asked for something, so that there is a read that waits for it. If all that is asked for was here
// at the moment it does not wait for long.
func (s *survivor) underWay() {
	asked := s.asked.Load()
	for end := time.Now().Add(200 * time.Millisecond); s.asked.Load() == asked && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
}

type about struct {
	Version string `json:"version"`
	Server  int    `json:"serverPID"`
	Keeper  int    `json:"keeperPID"`
}

// about asks the daemon which it is.
func (s *survivor) about() (a about, err error) {
	out, err := s.node.daemon.get("/v1/about")
	if err == nil {
		err = json.Unmarshal([]byte(out), &a)
	}
	return a, err
}

// serving waits for a server that answers and returns its process id.
func (s *survivor) serving() (pid int) {
	s.t.Helper()
	s.node.daemon.process.await(s.t, func() error {
		a, err := s.about()
		pid = a.Server
		return err
	})
	return pid
}

// waits reports whether a process waits for a page of a file, uninterruptibly but for its death.
func waits(pid int) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/wchan", pid))
	return strings.Contains(string(b), "folio")
}

// A throttle is a link that all answers share.
type throttle struct {
	rate atomic.Int64 // bytes a second; 0 is no limit
	mu   sync.Mutex
	free time.Time // when the link has carried all that it was given
}

// The image has 210 MB, and there must be something to fetch until the end. While servers live for a moment only, most of what
// the link carries is in vain.
const (
	slow = 6 << 20
	fast = 12 << 20
)

func (l *throttle) carry(n int) {
	rate := l.rate.Load()
	if rate == 0 {
		return
	}
	l.mu.Lock()
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(n) * time.Second / time.Duration(rate))
	wait := time.Until(l.free)
	l.mu.Unlock()
	time.Sleep(wait)
}

type throttled struct {
	http.ResponseWriter
	link *throttle
}

func (w *throttled) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		piece := p[:min(len(p), 16<<10)]
		w.link.carry(len(piece))
		var m int
		m, err = w.ResponseWriter.Write(piece)
		n, p = n+m, p[m:]
	}
	return n, err
}

// A systemd is what systemd is to the keeper: somebody who keeps descriptors and gives them to the next one.
type systemd struct {
	address string
	conn    *net.UnixConn
	done    chan struct{}
	mu      sync.Mutex
	kept    []keptDescriptor
}

type keptDescriptor struct {
	name string
	fd   int
}

func startSystemd(t testing.TB) *systemd {
	t.Helper()
	s := &systemd{address: filepath.Join(shortDir(t), "notify"), done: make(chan struct{})}
	var err error
	s.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.address, Net: "unixgram"})
	must(t, err)
	go s.listen()
	t.Cleanup(s.end)
	return s
}

func (s *systemd) end() {
	s.conn.Close()
	<-s.done
	s.forget()
}

// forget lets go of everything, as systemd does when a service is stopped and not about to be started again.
func (s *systemd) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.kept {
		unix.Close(d.fd)
	}
	s.kept = nil
}

// listen takes what comes with sd_notify(3), as long as the socket is open.
func (s *systemd) listen() {
	defer close(s.done)
	text, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(16*4))
	for {
		n, r, _, _, err := s.conn.ReadMsgUnix(text, rights)
		if err != nil {
			return
		}
		var fds []int
		messages, _ := unix.ParseSocketControlMessage(rights[:r])
		for _, m := range messages {
			list, _ := unix.ParseUnixRights(&m)
			fds = append(fds, list...)
		}
		s.take(string(text[:n]), fds)
	}
}

func (s *systemd) take(state string, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	said := map[string]string{}
	for line := range strings.Lines(state) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		said[name] = value
	}
	if said["FDSTOREREMOVE"] == "1" {
		s.kept = slices.DeleteFunc(s.kept, func(d keptDescriptor) bool {
			if d.name == said["FDNAME"] {
				unix.Close(d.fd)
			}
			return d.name == said["FDNAME"]
		})
	}
	for _, fd := range fds {
		known := slices.ContainsFunc(s.kept, func(d keptDescriptor) bool { return sameFile(d.fd, fd) })
		if known || said["FDSTORE"] != "1" {
			unix.Close(fd)
			continue
		}
		s.kept = append(s.kept, keptDescriptor{said["FDNAME"], fd})
	}
}

// sameFile is how systemd finds out whether it has a descriptor already: kcmp(2) with KCMP_FILE.
func sameFile(a, b int) bool {
	pid := uintptr(os.Getpid())
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, 0, uintptr(a), uintptr(b), 0)
	return errno == 0 && order == 0
}

// start starts a daemon as systemd does, with what it keeps. It is not exec.Command: that wants files, and the runtime would poll them.
func (s *systemd) start(t testing.TB, d *Daemon) {
	t.Helper()
	log, err := os.OpenFile(d.Dir+"/log", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	must(t, err)
	defer log.Close()
	files := []uintptr{log.Fd(), log.Fd(), log.Fd()}
	var names []string
	s.mu.Lock()
	for _, k := range s.kept {
		names = append(names, k.name)
		files = append(files, uintptr(k.fd))
	}
	s.mu.Unlock()
	args := []string{"/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, d.program, "--root", d.Root, "--config", d.Dir + "/config.toml", "daemon"}
	pid, err := syscall.ForkExec(args[0], args, &syscall.ProcAttr{Files: files, Env: slices.Concat(os.Environ(), d.o.Env, []string{
		"NOTIFY_SOCKET=" + s.address, fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES=" + strings.Join(names, ":")})})
	must(t, err)
	cmd := &exec.Cmd{Path: args[0], Args: args}
	cmd.Process, err = os.FindProcess(pid)
	must(t, err)
	d.process = &process{cmd, d.Dir + "/log", make(chan struct{})}
	go func(p *process) {
		p.cmd.ProcessState, _ = p.cmd.Process.Wait()
		close(p.done)
	}(d.process)
	d.process.await(t, func() error { _, err := d.get("/healthz"); return err })
}
