package bundle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// IO is how a running container is tied to its caller. The zero value gives it
// no input, no output and no signals.
type IO struct {
	// Stdin, Stdout and Stderr as [exec.Cmd] takes them: an *os.File goes to the
	// runtime as it is. A container with a terminal needs files.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Signals are forwarded. The second of SIGINT and SIGTERM kills: a first process without
	// a handler for them is deaf to them, as every process 1 is.
	Signals <-chan os.Signal
	// Started is called once, when the process has been started, with its id on the host.
	Started func(pid int)
}

// Runtime returns the path of the OCI runtime that [Run] uses: runc, else crun.
// The error says how to get one.
func Runtime() (string, error) {
	for _, name := range []string{"runc", "crun"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", errors.New("no OCI runtime: neither runc nor crun is in PATH: apt-get install runc")
}

// Run runs the container that spec describes until its process ends, and
// returns its exit code: 128+n if signal n ended it. dir is where the bundles of
// all containers are; Run makes one of its own in it and leaves neither it nor
// the container behind, whatever happened. When ctx ends, the container is killed. If the
// process never ran, the error is a [*StartError], and the runtime may
// have said why on Stderr.
func Run(ctx context.Context, dir string, spec *specs.Spec, sio IO) (code int, err error) {
	bin, err := Runtime()
	if err != nil {
		return 0, &StartError{Code: 125, Err: err}
	}
	b, err := newBundle(dir, bin, spec)
	if err != nil {
		return 0, &StartError{Code: 125, Err: err}
	}
	defer func() {
		if e := b.remove(); e != nil {
			err = errors.Join(err, e)
		}
	}()
	return b.run(ctx, sio)
}

// A bundle is one container's directory: config.json, the runtime's log and
// state, and the id of the process. It is locked while its owner lives.
type bundle struct {
	dir, id string
	runtime string
	spec    *specs.Spec
	lock    *os.File
}

func newBundle(parent, runtime string, spec *specs.Spec) (_ *bundle, err error) {
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, err
	}
	if parent, err = filepath.Abs(parent); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(parent, prefix)
	if err != nil {
		return nil, err
	}
	b := &bundle{dir: dir, id: filepath.Base(dir), runtime: runtime, spec: spec}
	defer func() {
		if err != nil {
			b.unlock()
			os.RemoveAll(dir)
		}
	}()
	if b.lock, err = lock(dir); err != nil {
		return nil, err
	}
	s := *spec
	l := *s.Linux
	l.CgroupsPath = "/" + b.id // a leaf: nothing is left above it
	s.Linux = &l
	buf, err := json.Marshal(&s)
	if err != nil {
		return nil, err
	}
	return b, os.WriteFile(b.file("config.json"), buf, 0o600)
}

const prefix = "lazuli-"

func (b *bundle) file(name string) string { return filepath.Join(b.dir, name) }

// command is the runtime's, with its state and log in the bundle.
func (b *bundle) command(arg ...string) *exec.Cmd {
	return exec.Command(b.runtime, append([]string{
		"--root", b.file("state"), "--log", b.file("log"), "--log-format", "json"}, arg...)...)
}

func (b *bundle) run(ctx context.Context, sio IO) (int, error) {
	cmd := b.command("run", "--bundle", b.dir, "--pid-file", b.file("pid"), b.id)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = sio.Stdin, sio.Stdout, sio.Stderr
	cmd.WaitDelay = 5 * time.Second // pipes that a process of the host inherited
	// The keyboard sends its signals to the group in the terminal's foreground. A
	// runtime that reads from the terminal must be in it, and has got them when we
	// get them; any other must not be, or each would come twice.
	keyboard := isTerminal(sio.Stdin)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: !keyboard, Pdeathsig: unix.SIGTERM}

	watch, err := b.watchPid()
	if err != nil {
		return 0, &StartError{Code: 125, Err: err}
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer watch.Close()

	// Pdeathsig is about the thread that forked.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, &StartError{Code: 125, Err: err}
	}

	wg.Go(func() {
		if pid := watch.wait(); pid > 0 && sio.Started != nil {
			sio.Started(pid)
		}
	})
	done := make(chan struct{})
	wg.Go(func() { b.forward(ctx, cmd.Process, sio.Signals, keyboard, done) })
	err = cmd.Wait()
	close(done)

	code := cmd.ProcessState.ExitCode()
	stopped := false // by a signal that we handed on before the runtime listened
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		code = 128 + int(ws.Signal())
		stopped = ws.Signal() != unix.SIGKILL
	}
	if code != 0 {
		if err := b.startError(); err != nil {
			return 0, err
		}
		if (code == 1 || code == 255) && b.pid() > 0 {
			if err := unexecuted(b.spec); err != nil {
				return 0, err
			}
		}
		if b.pid() == 0 && ctx.Err() == nil && !stopped {
			return 0, &StartError{Code: 125, Err: fmt.Errorf("%s ended with exit code %d before the process was started", filepath.Base(b.runtime), code)}
		}
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return code, err
	}
	if ctx.Err() != nil {
		return code, context.Cause(ctx)
	}
	return code, nil
}

// forward hands signals on to the runtime, which hands them to the process,
// until done; it kills at the second or when ctx ends.
func (b *bundle) forward(ctx context.Context, p *os.Process, signals <-chan os.Signal, keyboard bool, done <-chan struct{}) {
	stops := 0
	for {
		select {
		case <-done:
			return
		case <-ctx.Done():
			b.kill(p, done)
			return
		case s, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			if s == unix.SIGINT || s == unix.SIGTERM {
				if stops++; stops > 1 {
					b.kill(p, done)
					return
				}
			}
			if !keyboard || (s != unix.SIGINT && s != unix.SIGQUIT && s != unix.SIGWINCH) {
				p.Signal(s)
			}
		}
	}
}

// kill ends the container's first process, and with it all of them. One that is not
// there yet is waited for, a little: killing the runtime while it starts one would leave it behind.
func (b *bundle) kill(p *os.Process, done <-chan struct{}) {
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for range 500 {
		if pid := b.pid(); pid > 0 {
			unix.Kill(pid, unix.SIGKILL)
		} else {
			p.Signal(unix.SIGTERM)
		}
		select {
		case <-done:
			return
		case <-t.C:
		}
	}
	p.Kill() // remove takes care of the rest
}

func (b *bundle) pid() int {
	buf, _ := os.ReadFile(b.file("pid"))
	pid, err := strconv.Atoi(strings.TrimSpace(string(buf)))
	if err != nil {
		return 0
	}
	return pid
}

// startError returns the runtime's last error, if it wrote one: a container whose
// process merely failed writes none.
func (b *bundle) startError() error {
	buf, err := os.ReadFile(b.file("log"))
	if err != nil {
		return nil
	}
	msg := ""
	for line := range strings.Lines(string(buf)) {
		var e struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &e) == nil && (e.Level == "error" || e.Level == "fatal") {
			msg = e.Msg
		}
	}
	if msg == "" {
		return nil
	}
	code := 125
	switch {
	case strings.Contains(msg, "executable file not found"), strings.Contains(msg, "exec: ") && strings.Contains(msg, "no such file or directory"):
		code = 127
	case strings.Contains(msg, "exec: ") && strings.Contains(msg, "permission denied"), strings.Contains(msg, "exec format error"):
		code = 126
	}
	return &StartError{Code: code, Said: true, Err: fmt.Errorf("%s: %s", filepath.Base(b.runtime), msg)}
}

// remove deletes the container, if the runtime did not, and the bundle.
func (b *bundle) remove() error {
	defer b.unlock()
	if _, err := os.Stat(filepath.Join(b.file("state"), b.id)); err == nil {
		if out, err := b.command("delete", "--force", b.id).CombinedOutput(); err != nil {
			return fmt.Errorf("container %s: %s delete --force: %w: %s", b.id, b.runtime, err, out)
		}
	}
	return os.RemoveAll(b.dir)
}

// Sweep removes the containers in dir whose owner was killed and could not.
// A dir that is not there has none.
func Sweep(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, prefix+"*"))
	if err != nil || len(names) == 0 {
		return err
	}
	bin, err := Runtime()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		// A young one without a config may be about to be locked.
		if _, err := os.Stat(filepath.Join(name, "config.json")); err != nil {
			if st, err := os.Stat(name); err != nil || time.Since(st.ModTime()) < time.Minute {
				continue
			}
		}
		f, err := lock(name)
		if err != nil {
			continue // its owner lives, or has just removed it
		}
		b := &bundle{dir: name, id: filepath.Base(name), runtime: bin, lock: f}
		errs = append(errs, b.remove())
	}
	return errors.Join(errs...)
}

func lock(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: lock: %w", dir, err)
	}
	return f, nil
}

func (b *bundle) unlock() {
	if b.lock != nil {
		b.lock.Close()
	}
}

// pidWatch waits for the runtime to write the process's id, which it does when
// the process has been started.
type pidWatch struct {
	b *bundle
	f *os.File
}

func (b *bundle) watchPid() (*pidWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	if _, err := unix.InotifyAddWatch(fd, b.dir, unix.IN_MOVED_TO|unix.IN_CLOSE_WRITE); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("inotify %s: %w", b.dir, err)
	}
	return &pidWatch{b, os.NewFile(uintptr(fd), "inotify")}, nil
}

// wait returns the id, or 0 if there was none before Close.
func (w *pidWatch) wait() int {
	buf := make([]byte, 4096)
	var err error
	for {
		if pid := w.b.pid(); pid > 0 || err != nil {
			return pid
		}
		_, err = w.f.Read(buf)
	}
}

func (w *pidWatch) Close() error { return w.f.Close() }

func isTerminal(r any) bool {
	f, ok := r.(*os.File)
	if !ok || f == nil {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
