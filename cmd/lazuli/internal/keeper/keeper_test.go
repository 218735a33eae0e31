package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The server is killed while one reader more waits each time. The next one serves the same mount, and in the end each reader has its bytes.
func TestKilledServer(t *testing.T) {
	w := enter(t)
	w.start("server")
	r := w.next(0)
	if r.Resumed || r.Keeper != w.keeper.Pid {
		t.Fatalf("the first server: %+v", r)
	}
	w.want(files - 1)
	w.set("stalled")
	var first map[string]int
	for i := range 10 {
		w.read(i)
		w.waits(i + 1)
		must(t, unix.Kill(r.Pid, unix.SIGKILL))
		if r = w.next(r.Pid); !r.Resumed || r.Keeper != w.keeper.Pid {
			t.Fatalf("server %d: %+v", i, r)
		}
		switch n := w.precious(w.keeper.Pid); {
		case i == 0:
			first = n
		case fmt.Sprint(n) != fmt.Sprint(first):
			t.Errorf("the keeper had open %v, and after %d servers more %v", first, i, n)
		}
		w.precious(r.Pid)
	}
	w.finish()
}

// The keeper is killed, and its server with it. The next one has from systemd what the last one had.
func TestKilledKeeper(t *testing.T) {
	w := enter(t)
	w.withSystemd(w.path("notify"))
	w.start("server")
	r := w.next(0)
	w.want(files - 1)
	w.set("stalled")
	for i := range 3 {
		until(t, "systemd was told", func() bool { return w.systemd.heard("READY=1") == i+1 })
		if names := w.systemd.names(); names != "api fuse grpc init" {
			t.Fatalf("systemd's store has %s", names)
		}
		until(t, "systemd has the status", func() bool { return w.systemd.heard(fmt.Sprintf("STATUS=process %d", r.Pid)) == 1 })
		w.read(i)
		w.waits(i + 1)
		w.kill()
		until(t, "the server is gone", func() bool { return !alive(r.Pid) })
		w.start("server")
		last := r.Pid
		if r = w.next(last); !r.Resumed || r.Keeper != w.keeper.Pid {
			t.Fatalf("server %d: %+v", i, r)
		}
		if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", r.Pid)); err != nil || strings.Contains(string(env), "NOTIFY_SOCKET") {
			t.Errorf("the server could speak to systemd: %v", err)
		}
	}
	w.finish()
	w.stop()
	if w.systemd.heard("STOPPING=1") != 1 {
		t.Error("systemd does not know that it was stopped")
	}
}

// While a server lives, nobody else serves its connection.
func TestOneServer(t *testing.T) {
	w := enter(t)
	w.withSystemd(w.path("notify"))
	w.start("server")
	for range 2 { // one that mounted, one that resumed
		r := w.next(0)
		until(t, "systemd's store has it", func() bool { return strings.Contains(w.systemd.names(), initName) })
		var init *os.File
		for _, d := range w.systemd.stored() {
			if d.name == initName {
				var err error
				init, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", d.fd))
				must(t, err)
			}
		}
		if err := unix.Flock(int(init.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
			t.Fatalf("the lock of a server that lives: %v", err)
		}
		must(t, unix.Kill(r.Pid, unix.SIGKILL))
		w.next(r.Pid)
		init.Close()
	}
}

// SIGHUP makes keeper and server the programs that are installed now. The process stays.
func TestUpgrade(t *testing.T) {
	w := enter(t)
	w.withSystemd(fmt.Sprintf("@lazuli-test-%d", os.Getpid()))
	program, err := os.ReadFile(os.Args[0])
	must(t, err)
	w.program = w.path("lazuli")
	install := func() {
		t.Helper()
		program = append(program, 0) // ELF does not mind
		must(t, os.WriteFile(w.program+".new", program, 0o700))
		must(t, os.Rename(w.program+".new", w.program))
	}
	install()
	w.start("server")
	r := w.next(0)
	w.want(files - 1)
	w.set("stalled")
	for i := range 2 {
		until(t, "systemd was told", func() bool { return w.systemd.heard("READY=1") == i+1 })
		w.read(i)
		w.waits(i + 1)
		install()
		must(t, w.keeper.Signal(unix.SIGHUP))
		r = w.next(r.Pid)
		if n := int64(len(program)); !r.Resumed || r.Keeper != w.keeper.Pid || r.Program != n || r.KeeperProgam != n {
			t.Fatalf("after an upgrade to %d bytes: %+v", n, r)
		}
		w.precious(w.keeper.Pid)
		w.precious(r.Pid)
		if w.systemd.heard("RELOADING=1\nMONOTONIC_USEC=") != i+1 {
			t.Error("systemd does not know that it was reloaded")
		}
	}

	// What cannot be started is not an upgrade.
	must(t, os.Rename(w.program, w.program+".old"))
	must(t, w.keeper.Signal(unix.SIGHUP))
	w.says("not upgraded", 1)
	must(t, os.Rename(w.program+".old", w.program))
	r = w.next(r.Pid)
	w.waits(2)
	until(t, "systemd was told", func() bool { return w.systemd.heard("READY=1") == 4 })

	// Many signals, at any time, do not kill the keeper.
	for range 50 {
		must(t, w.keeper.Signal(unix.SIGHUP))
		time.Sleep(time.Millisecond)
	}
	r = w.next(r.Pid)
	if r.Keeper != w.keeper.Pid {
		t.Fatalf("after many signals: %+v", r)
	}
	w.finish()
	if names := w.systemd.names(); names != "api fuse grpc init" {
		t.Errorf("systemd's store has %s", names)
	}
	until(t, "the holder is gone", func() bool { return !alive(w.holder()) })
}

// Nothing is lost when a keeper is stopped while it becomes a new program, at any moment; nor when that one is good for nothing.
func TestUpgradeStopped(t *testing.T) {
	w := enter(t)
	program, err := os.ReadFile(os.Args[0])
	must(t, err)
	w.program = w.path("lazuli")
	install := func(program []byte) {
		t.Helper()
		must(t, os.WriteFile(w.program+".new", program, 0o700))
		must(t, os.Rename(w.program+".new", w.program))
	}
	install(program)
	w.set("inuse")
	w.start("server")
	r := w.next(0)
	w.want(files - 1)
	w.set("stalled")
	w.read(0)
	for i := range 12 {
		must(t, w.keeper.Signal(unix.SIGHUP))
		time.Sleep(time.Duration(i) * 4 * time.Millisecond)
		must(t, w.keeper.Signal(unix.SIGTERM))
		w.end()
		w.start("server")
		if r = w.next(r.Pid); !r.Resumed {
			t.Fatalf("stopped %d ms after SIGHUP: %+v", i*4, r)
		}
	}
	w.waits(1)
	install([]byte("#!/bin/false\n"))
	must(t, w.keeper.Signal(unix.SIGHUP))
	w.says("not upgraded", 1)
	install(program)
	r = w.next(r.Pid)
	install([]byte("#!/bin/sh\n[ $1 != hold ] || exec " + os.Args[0] + " \"$@\"\n")) // which can only hold
	must(t, w.keeper.Signal(unix.SIGHUP))
	w.end()
	install(program)
	w.start("server")
	if r = w.next(r.Pid); !r.Resumed {
		t.Fatalf("after a program that is good for nothing: %+v", r)
	}
	w.finish()
}

// says waits until something was logged n times.
func (w *world) says(what string, n int) (log string) {
	w.t.Helper()
	until(w.t, fmt.Sprintf("the log says %q", what), func() bool {
		b, err := os.ReadFile(w.path("log"))
		log = string(b)
		return err == nil && strings.Count(log, what) >= n
	})
	return log
}

// A keeper that stops while a mount is in use leaves a holder, and the next keeper goes on with the mount.
func TestHolder(t *testing.T) {
	w := enter(t)
	w.start("server")
	r := w.next(0)
	w.want(files - 1)
	w.set("stalled")
	w.set("inuse")
	for i := range 3 {
		w.read(2 * i)
		w.waits(2*i + 1)
		w.stop()
		holder := w.holder()
		if alive(r.Pid) || !alive(holder) {
			t.Fatalf("the server lives: %v; the holder lives: %v", alive(r.Pid), alive(holder))
		}
		for _, name := range []string{"grpc", "api"} {
			if exists(w.path("run/" + name + ".sock")) {
				t.Errorf("%s is still there", name)
			}
		}
		if n := w.precious(holder); n["/dev/fuse"] != 1 || n["/memfd"] != 1 {
			t.Errorf("the holder holds %v", n)
		}
		w.read(2*i + 1) // which nobody hears
		// Whoever connects and does not say thanks gets nothing that the next one misses.
		if i == 1 {
			conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: w.path("run/keeper.sock"), Net: "unixpacket"})
			must(t, err)
			m, err := receive(conn)
			if err != nil || len(m.fds) != 2 {
				t.Fatal(m, err)
			}
			conn.Close()
			for _, fd := range m.fds {
				unix.Close(fd)
			}
		}
		w.start("server")
		if r = w.next(r.Pid); !r.Resumed {
			t.Fatalf("the server of the next keeper: %+v", r)
		}
		if exists(w.path("run/keeper.sock")) {
			t.Error("the holder still listens")
		}
		until(t, "the holder is gone", func() bool { return !alive(holder) })
	}
	w.finish()
}

// A keeper that stops while no mount is in use leaves nothing.
func TestStop(t *testing.T) {
	w := enter(t)
	w.start("server")
	r := w.next(0)
	w.want(0)
	w.stop()
	if left, err := os.ReadDir(w.path("run")); err != nil || len(left) > 0 || alive(r.Pid) || w.holder() != 0 {
		t.Errorf("left: %v, the server: %v, a holder: %d, %v", left, alive(r.Pid), w.holder(), err)
	}
	if _, err := os.Stat(w.paths[1]); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("the mount of nobody: %v", err)
	}
	must(t, unix.Unmount(w.path("mnt"), 0))
	w.start("server")
	if r := w.next(0); r.Resumed {
		t.Errorf("resumed from nothing: %+v", r)
	}
}

// A holder whose mount is gone is gone.
func TestHolderEnds(t *testing.T) {
	w := enter(t)
	w.start("server")
	w.next(0)
	w.want(0)
	w.set("inuse")
	w.stop()
	if !alive(w.holder()) {
		t.Fatal("no holder")
	}
	must(t, unix.Unmount(w.path("mnt"), 0))
	until(t, "the holder ends", func() bool { return !alive(w.holder()) && !exists(w.path("run/keeper.sock")) })
	w.start("server")
	if r := w.next(0); r.Resumed {
		t.Errorf("resumed what is gone: %+v", r)
	}
	// Nor does a keeper leave it to anybody.
	must(t, os.Remove(w.path("holder")))
	must(t, unix.Unmount(w.path("mnt"), 0))
	w.stop()
	if w.holder() != 0 {
		t.Error("a holder was to hold what is gone")
	}
}

// No server gets a connection whose mount is gone.
func TestMountGone(t *testing.T) {
	w := enter(t)
	w.withSystemd(w.path("notify"))
	w.start("server")
	r := w.next(0)
	must(t, unix.Unmount(w.path("mnt"), 0))
	must(t, unix.Kill(r.Pid, unix.SIGKILL))
	if r = w.next(r.Pid); r.Resumed {
		t.Errorf("the keeper kept it: %+v", r)
	}
	until(t, "systemd was told", func() bool { return w.systemd.heard("READY=1") == 2 })
	if names := w.systemd.names(); names != "api fuse grpc init" {
		t.Errorf("systemd's store has %s", names)
	}
	w.kill()
	must(t, unix.Unmount(w.path("mnt"), 0))
	w.start("server")
	if r = w.next(r.Pid); r.Resumed {
		t.Errorf("it came from systemd: %+v", r)
	}
	w.want(0)
	until(t, "systemd's store has the new one", func() bool { return w.systemd.heard("READY=1") == 3 })
	if names := w.systemd.names(); names != "api fuse grpc init" {
		t.Errorf("systemd's store has %s", names)
	}
}

// A server that always dies is started again, after longer and longer pauses, and its keeper can be stopped.
func TestBackoff(t *testing.T) {
	w := enter(t)
	w.start("dying")
	log := w.says("started again", 6)
	var pauses []string
	for _, m := range regexp.MustCompile(`pause=(\S+)`).FindAllStringSubmatch(log, 6) {
		pauses = append(pauses, m[1])
	}
	if got := strings.Join(pauses, " "); got != "0s 10ms 20ms 40ms 80ms 160ms" {
		t.Errorf("pauses: %s", got)
	}
	w.stop()
	for _, x := range []struct {
		deaths int
		ready  bool
		want   time.Duration
	}{{0, false, 0}, {1000, false, longest}, {0, true, 0}, {4, true, 80 * time.Millisecond}, {1000, true, longestReady}} {
		if got := backoff(x.deaths, x.ready); got != x.want {
			t.Errorf("after %d deaths, ready %v: %v, not %v", x.deaths, x.ready, got, x.want)
		}
	}
}

// A keeper whose log nobody reads goes on.
func TestDeaf(t *testing.T) {
	w := enter(t)
	w.deaf = true
	w.start("server")
	r := w.next(0)
	for range 3 {
		must(t, unix.Kill(r.Pid, unix.SIGKILL))
		r = w.next(r.Pid)
	}
	if r.Keeper != w.keeper.Pid {
		t.Errorf("the keeper is another one: %+v", r)
	}
}

func TestMisconfigured(t *testing.T) {
	w := enter(t)
	w.start("misconfigured")
	if code := w.end(); code != ExitConfig {
		t.Errorf("exit code %d", code)
	}
	if left, err := os.ReadDir(w.path("run")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A server that does not end is killed.
func TestStubborn(t *testing.T) {
	w := enter(t)
	w.env = []string{"KEEPER_STOP=20ms"}
	w.withSystemd(w.path("notify"))
	w.start("stubborn")
	until(t, "it is ready", func() bool { return w.systemd.heard("READY=1") == 1 })
	w.stop()
	w.says("did not end in time", 1)
}

// What is kept instead of something else is kept alone, here and in systemd's store.
func TestKeepAnother(t *testing.T) {
	w := enter(t)
	w.withSystemd(w.path("notify"))
	w.start("fickle")
	until(t, "it is ready", func() bool { return w.systemd.heard("READY=1") == 1 })
	if names := w.systemd.names(); names != "api fuse grpc init" {
		t.Fatalf("systemd's store has %s", names)
	}
	for _, d := range w.systemd.stored() {
		if d.name == initName {
			p := make([]byte, 2)
			if n, err := unix.Pread(d.fd, p, 0); n != 1 || p[0] != 1 {
				t.Errorf("systemd has the INIT %v, %v", p[:n], err)
			}
			if _, err := unix.Pwrite(d.fd, p[:1], 0); err != unix.EPERM {
				t.Errorf("INIT can be written to: %v", err)
			}
		}
	}
}

// Who connects while there is no server is answered by the next one.
func TestClientWaits(t *testing.T) {
	w := enter(t)
	w.start("server")
	r := w.next(0)
	w.set("closed")
	must(t, unix.Kill(r.Pid, unix.SIGKILL))
	until(t, "the server is gone", func() bool { return !alive(r.Pid) })
	type answer struct {
		report
		err error
	}
	answers := make(chan answer, 5)
	for range cap(answers) {
		go func() {
			r, err := w.ask()
			answers <- answer{r, err}
		}()
	}
	w.read(0)
	w.unset("closed")
	for range cap(answers) {
		if a := <-answers; a.err != nil || a.Pid == r.Pid {
			t.Errorf("%+v", a)
		}
	}
	w.readers.Wait()
}

func TestListen(t *testing.T) {
	defer func(d time.Duration) { lingering = d }(lingering)
	lingering = 50 * time.Millisecond
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "socket")
	for range 2 { // the second one replaces a dead one's file
		fd, err := listen(path, unix.SOCK_STREAM)
		must(t, err)
		for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o711} {
			if fi, err := os.Stat(name); err != nil || fi.Mode().Perm() != want {
				t.Errorf("%s has %v, not %v: %v", name, fi.Mode(), want, err)
			}
		}
		if !listens(fd, path) || listens(fd, dir) {
			t.Error("not where it should listen")
		}
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET} {
			if _, err := listen(path, kind); err == nil || !strings.Contains(err.Error(), "listens on "+path+" already") {
				t.Errorf("where somebody listens: %v", err)
			}
		}
		must(t, unix.Close(fd))
	}
	must(t, os.Remove(path))
	must(t, os.WriteFile(path, nil, 0o600))
	if _, err := listen(path, unix.SOCK_STREAM); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("where a file is: %v", err)
	}
	if _, err := listen(filepath.Join(path, "x"), unix.SOCK_STREAM); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
	if _, err := listen(filepath.Join(dir, strings.Repeat("x", 120)), unix.SOCK_STREAM); err == nil || !strings.Contains(err.Error(), "107 bytes") {
		t.Errorf("with a long name: %v", err)
	}
}

// A keeper does not take away the sockets of one that lives; it takes those of a socket unit, and no others.
func TestSockets(t *testing.T) {
	w := enter(t)
	w.start("server")
	r := w.next(0)
	first, ended := w.keeper, w.ended
	w.start("server")
	if code := w.end(); code != 1 {
		t.Errorf("the second keeper's exit code is %d", code)
	}
	w.says("already: stop it", 1)
	w.keeper, w.ended = first, ended
	if r2, err := w.ask(); err != nil || r2.Pid != r.Pid {
		t.Errorf("after a second keeper was started: %+v, %v", r2, err)
	}
	w.stop()

	w.withSystemd(w.path("notify"))
	for name, path := range map[string]string{"grpc": "run/grpc.sock", "api": "run/elsewhere.sock", "other": "run/other.sock"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: w.path(path), Net: "unix"})
		must(t, err)
		defer l.Close()
		raw, err := l.SyscallConn()
		must(t, err)
		raw.Control(func(fd uintptr) {
			fd2, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
			must(t, err)
			w.systemd.store = append(w.systemd.store, descriptor{name, fd2})
		})
	}
	before, err := os.Stat(w.path("run/grpc.sock"))
	must(t, err)
	must(t, unix.Unmount(w.path("mnt"), 0))
	w.start("server")
	w.next(0)
	until(t, "systemd was told", func() bool { return w.systemd.heard("READY=1") == 1 })
	if after, err := os.Stat(w.path("run/grpc.sock")); err != nil || !os.SameFile(before, after) {
		t.Errorf("the socket that systemd gave was replaced: %v", err)
	}
	if !exists(w.path("run/api.sock")) {
		t.Error("a socket that listens elsewhere was taken for the right one")
	}
	if names := w.systemd.names(); names != "api fuse grpc init" {
		t.Errorf("systemd's store has %s", names)
	}
}

func TestInheritNothing(t *testing.T) {
	if _, err := Inherit(); err == nil {
		t.Error("a keeper started the test")
	}
	t.Setenv(variable, "fuse=x")
	if _, err := Inherit(); err == nil || !strings.Contains(err.Error(), variable) {
		t.Error(err)
	}
	t.Setenv(variable, "keeper=12345")
	if _, err := Inherit(); !errors.Is(err, syscall.EBADF) {
		t.Error(err)
	}
	t.Setenv("LISTEN_PID", "1")
	t.Setenv("LISTEN_FDS", "1")
	if held, err := inherited(); err != nil || len(held) > 0 {
		t.Errorf("took what is for another process: %v, %v", held, err)
	}
}
