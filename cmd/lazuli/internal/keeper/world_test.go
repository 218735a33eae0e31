package keeper

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
	"lazuli/fs/serve"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// TestMain is also the keeper, the server and the holder: "PROGRAM ROLE DIR [SERVER]".
func TestMain(m *testing.M) {
	if os.Getenv("KEEPER_TEST") == "" {
		os.Exit(m.Run())
	}
	role, dir := os.Args[1], os.Args[2]
	// Whatever becomes of the test, this process ends.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var err error
	switch role {
	case "keeper":
		if d, err := time.ParseDuration(os.Getenv("KEEPER_STOP")); err == nil {
			stopTimeout = d
		}
		err = Run(ctx, Options{
			Command:     []string{os.Args[0], os.Args[3], dir},
			Sockets:     map[string]string{"grpc": filepath.Join(dir, "run/grpc.sock"), "api": filepath.Join(dir, "run/api.sock")},
			Holder:      filepath.Join(dir, "run/keeper.sock"),
			HoldCommand: []string{os.Args[0], "hold", dir},
			InUse:       func() bool { return exists(filepath.Join(dir, "inuse")) },
			Logger:      slog.New(slog.NewTextHandler(os.Stderr, nil)),
		})
		if errors.Is(err, ErrConfig) {
			os.Exit(ExitConfig)
		}
	case "hold":
		err = os.WriteFile(filepath.Join(dir, "holder"), []byte(strconv.Itoa(os.Getpid())), 0o600)
		if err == nil {
			err = Hold(ctx)
		}
	case "server":
		err = server(ctx, dir)
	case "stubborn":
		err = stubborn(ctx)
	case "fickle":
		err = fickle(ctx)
	case "dying":
		os.Exit(1)
	case "misconfigured":
		os.Exit(ExitConfig)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, role, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A report is what the server says to everybody who connects.
type report struct {
	Pid, Keeper           int
	Program, KeeperProgam int64 // sizes
	Misses                int64
	Resumed               bool
}

// server serves the layer in dir.
func server(ctx context.Context, dir string) error {
	c, err := Inherit()
	if err != nil {
		return err
	}
	for exists(filepath.Join(dir, "closed")) {
		time.Sleep(time.Millisecond)
	}
	s, err := store.Open(filepath.Join(dir, "store"), nil)
	if err != nil {
		return err
	}
	q := fetch.New(s, fetch.Options{})
	table, err := toc.OpenTable(filepath.Join(dir, "table"))
	if err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(dir, "blob"))
	if err != nil {
		return err
	}
	if err := q.Add(&fetch.Layer{Name: "the layer", Table: table, Blob: &blob{data, filepath.Join(dir, "stalled")}}); err != nil {
		return err
	}
	fd, init, resumed := c.FUSE()
	if resumed {
		_, err = serve.Resume(fd, init, q, nil)
	} else {
		var f *serve.Server
		if f, err = serve.Mount(filepath.Join(dir, "mnt"), q, nil); err == nil {
			err = c.Keep(f.File(), f.Init())
		}
	}
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	l, err := c.Listener("grpc")
	if err != nil {
		return err
	}
	if err := errors.Join(c.Status(fmt.Sprintf("process\n%d", os.Getpid())), c.Ready()); err != nil {
		return err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			json.NewEncoder(conn).Encode(report{
				os.Getpid(), os.Getppid(), size("/proc/self/exe"), size(fmt.Sprintf("/proc/%d/exe", os.Getppid())),
				q.Stats().Misses, resumed,
			})
			conn.Close()
		}
	}()
	select {
	case <-stop:
	case <-ctx.Done():
	}
	return nil
}

// stubborn is a server that does not end when it is asked to.
func stubborn(ctx context.Context) error {
	c, err := Inherit()
	if err != nil {
		return err
	}
	signal.Ignore(unix.SIGTERM)
	if err := c.Ready(); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// fickle is a server that keeps one thing and then another, and is ready when the keeper let go of the first.
func fickle(ctx context.Context) error {
	c, err := Inherit()
	if err != nil {
		return err
	}
	var fds [2]int // a pipe is as good as a connection that nobody reads from
	var other *os.File
	for i := range 2 {
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return err
		}
		w := os.NewFile(uintptr(fds[1]), "pipe")
		if err := c.Keep(w, []byte{byte(i)}); err != nil {
			return err
		}
		w.Close()
		if i == 0 {
			other = os.NewFile(uintptr(fds[0]), "pipe")
		}
	}
	if n, err := other.Read(make([]byte, 1)); err != io.EOF {
		return fmt.Errorf("read %d from a pipe that is closed: %v", n, err)
	}
	if err := c.Ready(); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// A blob is a fetch.Blob that waits while a file is there.
type blob struct {
	data    []byte
	stalled string
}

func (b *blob) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	for exists(b.stalled) {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return io.NopCloser(bytes.NewReader(b.data[off : off+n])), nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func size(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return fi.Size()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// need skips the test where it cannot run, unless LAZULI_CI is set: there the machine has everything.
func need(t testing.TB) {
	t.Helper()
	skip := t.Skip
	if os.Getenv("LAZULI_CI") != "" {
		skip = t.Fatal
	}
	if os.Geteuid() != 0 {
		skip("needs root")
	}
	if !exists("/dev/fuse") {
		skip("needs FUSE")
	}
}

// until waits for a condition.
func until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

const files = 25

// A world is a folder with a layer of files, one chunk each, and the processes that serve it at mnt.
type world struct {
	t       testing.TB
	dir     string
	program string
	data    [files][]byte
	paths   [files]string
	systemd *systemd // nil without
	env     []string
	deaf    bool // nobody reads what the processes say
	keeper  *os.Process
	ended   chan *os.ProcessState // of the keeper
	readers sync.WaitGroup
}

func enter(t *testing.T) *world {
	need(t)
	w := &world{t: t, dir: t.TempDir(), program: os.Args[0]}
	table := &toc.TOC{Compression: toc.Gzip}
	var blob bytes.Buffer
	for i := range files {
		w.data[i] = bytes.Repeat([]byte{byte(i)}, 1000+i)
		e := toc.Entry{Name: fmt.Sprint(i), Type: toc.Regular, Size: int64(len(w.data[i])), FirstChunk: uint32(i), NumChunks: 1}
		table.Chunks = append(table.Chunks, toc.Chunk{Digest: sha256.Sum256(w.data[i]), Size: e.Size, Member: int64(blob.Len())})
		z := gzip.NewWriter(&blob)
		z.Write(w.data[i])
		must(t, z.Close())
		table.Entries = append(table.Entries, e)
		w.paths[i] = filepath.Join(w.dir, "mnt", store.Key(toc.ObjectKey(table.Content(&e))).Path())
	}
	table.DataEnd = int64(blob.Len())
	b, err := toc.MarshalTable(table)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(w.dir, "table"), b, 0o600))
	must(t, os.WriteFile(filepath.Join(w.dir, "blob"), blob.Bytes(), 0o600))
	must(t, os.Mkdir(filepath.Join(w.dir, "mnt"), 0o700))
	t.Cleanup(w.leave)
	return w
}

// leave ends everything. What still reads gets an error.
func (w *world) leave() {
	if w.keeper != nil {
		w.kill()
	}
	if pid := w.holder(); alive(pid) {
		unix.Kill(pid, unix.SIGKILL)
	}
	if w.systemd != nil {
		w.systemd.end()
	}
	for unix.Unmount(filepath.Join(w.dir, "mnt"), unix.MNT_DETACH) == nil {
	}
	w.readers.Wait()
	if w.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(w.dir, "log"))
		w.t.Logf("what the processes said:\n%s", log)
	}
}

// holder returns the process number of the last holder, 0 if there never was one.
func (w *world) holder() int {
	b, _ := os.ReadFile(filepath.Join(w.dir, "holder"))
	pid, _ := strconv.Atoi(string(b))
	return pid
}

// alive reports whether a process is there and not a zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	return fields[0] != "Z" && fields[0] != "X"
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// set makes a file that tells the processes something; unset removes it.
func (w *world) set(name string) { must(w.t, os.WriteFile(w.path(name), nil, 0o600)) }

func (w *world) unset(name string) { must(w.t, os.Remove(w.path(name))) }

// start starts a keeper as systemd does.
func (w *world) start(server string) {
	w.t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	must(w.t, err)
	defer null.Close()
	log, err := os.OpenFile(w.path("log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(w.t, err)
	defer log.Close()
	if w.deaf {
		unread, pipe, err := os.Pipe()
		must(w.t, err)
		unread.Close()
		defer pipe.Close()
		log = pipe
	}
	fds := []uintptr{null.Fd(), log.Fd(), log.Fd()}
	env := append(os.Environ(), append(w.env, "KEEPER_TEST=1", "GORACE=atexit_sleep_ms=0")...)
	script := `exec "$0" "$@"`
	if w.systemd != nil {
		env = append(env, "NOTIFY_SOCKET="+w.systemd.address)
		var names []string
		for _, d := range w.systemd.stored() {
			names = append(names, d.name)
			fds = append(fds, uintptr(d.fd))
		}
		if len(names) > 0 {
			env = append(env, fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
			script = "export LISTEN_PID=$$; " + script
		}
	}
	pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", script, w.program, "keeper", w.dir, server},
		&syscall.ProcAttr{Env: env, Files: fds, Sys: &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}})
	must(w.t, err)
	w.keeper, err = os.FindProcess(pid)
	must(w.t, err)
	ended := make(chan *os.ProcessState, 1)
	w.ended = ended
	go func(p *os.Process) {
		state, _ := p.Wait()
		ended <- state
	}(w.keeper)
}

// end waits for the keeper's end and returns its exit code.
func (w *world) end() int {
	w.t.Helper()
	select {
	case state := <-w.ended:
		w.keeper = nil
		return state.ExitCode()
	case <-time.After(30 * time.Second):
		w.t.Fatal("the keeper does not end")
		return -1
	}
}

// stop stops the keeper as systemd does.
func (w *world) stop() {
	w.t.Helper()
	must(w.t, w.keeper.Signal(unix.SIGTERM))
	if code := w.end(); code != 0 {
		w.t.Fatalf("the keeper's exit code is %d", code)
	}
}

// kill kills the keeper, and returns when it is gone.
func (w *world) kill() {
	w.keeper.Kill()
	w.end()
}

// ask asks the server, whichever it is.
func (w *world) ask() (report, error) {
	var r report
	conn, err := net.Dial("unix", w.path("run/grpc.sock"))
	if err != nil {
		return r, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	return r, json.NewDecoder(conn).Decode(&r)
}

// next returns what a server says of itself that is not the one with that process number.
func (w *world) next(pid int) (r report) {
	w.t.Helper()
	until(w.t, "the next server answers", func() bool {
		var err error
		r, err = w.ask()
		return err == nil && r.Pid != pid
	})
	return r
}

// read reads file i while the test goes on. One file must have been read before, see serve's TestTakenOver.
func (w *world) read(i int) { w.readers.Go(func() { w.want(i) }) }

// want reads file i and compares.
func (w *world) want(i int) {
	w.t.Helper()
	// Not os.Open: it would ask whether the file can be polled, in a system call that Go's scheduler does not expect to wait.
	fd, err := unix.Open(w.paths[i], unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		w.t.Error(err)
		return
	}
	defer unix.Close(fd)
	p := make([]byte, 2000)
	n, err := unix.Read(fd, p)
	if err != nil || !bytes.Equal(p[:n], w.data[i]) {
		w.t.Errorf("file %d: %d bytes, not the right ones: %v", i, n, err)
	}
}

// waits returns when n reads wait for the network.
func (w *world) waits(n int) {
	w.t.Helper()
	until(w.t, fmt.Sprintf("%d reads wait", n), func() bool {
		r, err := w.ask()
		return err == nil && r.Misses >= int64(n)
	})
}

// finish lets the network answer, and waits for all readers.
func (w *world) finish() {
	w.t.Helper()
	w.unset("stalled")
	done := make(chan struct{})
	go func() { w.readers.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		w.t.Fatal("readers wait for ever")
	}
}

// precious returns what a process has open that nobody else is to have, by what it is.
func (w *world) precious(pid int) map[string]int {
	w.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	must(w.t, err)
	n := map[string]int{}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		kind, _, _ := strings.Cut(link, ":")
		if kind != "socket" && kind != "/memfd" && kind != "/dev/fuse" {
			continue
		}
		n[kind]++
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, e.Name()))
		must(w.t, err)
		_, flags, _ := strings.Cut(string(b), "flags:")
		flags, _, _ = strings.Cut(flags, "\n")
		if v, err := strconv.ParseInt(strings.TrimSpace(flags), 8, 64); err != nil || v&unix.O_CLOEXEC == 0 {
			w.t.Errorf("process %d would pass on descriptor %s, %s", pid, e.Name(), link)
		}
	}
	return n
}

// A systemd is what systemd is to the keeper: somebody to tell, and a store of descriptors.
type systemd struct {
	address string
	conn    *net.UnixConn
	done    chan struct{}
	mu      sync.Mutex
	store   descriptors
	said    []string
}

func (w *world) withSystemd(address string) {
	w.t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	must(w.t, err)
	w.systemd = &systemd{address: address, conn: conn, done: make(chan struct{})}
	go w.systemd.listen()
}

func (s *systemd) end() {
	s.conn.Close()
	<-s.done
	for _, d := range s.store {
		unix.Close(d.fd)
	}
}

func (s *systemd) listen() {
	defer close(s.done)
	for {
		m, err := receive(s.conn)
		if err != nil {
			return
		}
		s.take(m)
	}
}

func (s *systemd) take(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.said = append(s.said, m.text)
	_, name, _ := strings.Cut(m.text, "FDNAME=")
	if strings.HasPrefix(m.text, "FDSTOREREMOVE=1\n") {
		s.store = slices.DeleteFunc(s.store, func(d descriptor) bool {
			if d.name == name {
				unix.Close(d.fd)
			}
			return d.name == name
		})
	}
	for _, fd := range m.fds {
		if slices.ContainsFunc(s.store, func(d descriptor) bool { return same(d.fd, fd) }) {
			unix.Close(fd)
			continue
		}
		s.store = append(s.store, descriptor{name, fd})
	}
}

// same is what systemd finds out so too: kcmp(2) with KCMP_FILE.
func same(a, b int) bool {
	pid := uintptr(os.Getpid())
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, 0, uintptr(a), uintptr(b), 0)
	return errno == 0 && r == 0
}

func (s *systemd) stored() descriptors {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.store)
}

// names returns the names in the store.
func (s *systemd) names() string {
	var names []string
	for _, d := range s.stored() {
		names = append(names, d.name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// heard returns how often something was said that begins so.
func (s *systemd) heard(prefix string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, text := range s.said {
		if strings.HasPrefix(text, prefix) {
			n++
		}
	}
	return n
}
