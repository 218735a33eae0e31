package bundle

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func mkfifo(p string) error { return unix.Mkfifo(p, 0o600) }

// busybox makes a root that runs, or skips.
func busybox(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("running containers needs root")
	}
	if _, err := Runtime(); err != nil {
		t.Skip(err)
	}
	bb, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("no busybox: apt-get install busybox-static")
	}
	root := tree(t)
	buf, err := os.ReadFile(bb)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), buf, 0o755); err != nil {
		t.Fatal(err)
	}
	os.Remove(filepath.Join(root, "bin/sh"))
	for _, name := range []string{"sh", "cat", "id", "sleep", "ls", "hostname", "kill", "mount", "test", "touch"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// run runs script and checks that nothing is left.
func run(t *testing.T, ctx context.Context, root string, o Options, sio IO, script string) (code int, out string, err error) {
	t.Helper()
	im := image("/bin/sh", "-c", script)
	spec, err := Config(im, root, o)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	sio.Stdout = io.MultiWriter(&buf)
	if sio.Stderr == nil {
		sio.Stderr = os.Stderr
	}
	dir := t.TempDir()
	code, err = Run(ctx, dir, spec, sio)
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/lazuli-[0-9]*", "/sys/fs/cgroup/*/lazuli-[0-9]*"} {
		left, _ := filepath.Glob(pattern)
		for n := 0; len(left) != 0 && n < 200; n++ { // other tests' containers run too, and end
			time.Sleep(50 * time.Millisecond)
			left, _ = filepath.Glob(pattern)
		}
		if len(left) != 0 {
			t.Errorf("left behind: %q", left)
		}
	}
	return code, buf.String(), err
}

func TestRun(t *testing.T) {
	root := busybox(t)
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "in"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	host, _ := os.Hostname()
	for _, tt := range []struct {
		name, script string
		o            Options
		stdin        string
		code         int
		out          string
	}{
		{name: "exit code", script: "exit 42", code: 42},
		{name: "child's signal", script: "sh -c 'kill -9 $$'; exit $?", code: 137},
		{name: "stdin", script: "cat", stdin: "hello", out: "hello"},
		{name: "user", script: "id -u; id -g; id -G; echo $HOME", o: Options{User: "job"}, out: "1000\n100\n100 77\n/home/job\n"},
		{name: "environment and directory", script: "echo $A; pwd", o: Options{Env: []string{"A=b c"}, Dir: "/home/job"}, out: "b c\n/home/job\n"},
		{name: "directory is made", script: "pwd", o: Options{Dir: "/new/dir"}, out: "/new/dir\n"},
		{name: "bind", script: "cat /data/in; touch /data/x && echo written", o: Options{Binds: []Bind{{Source: src, Target: "/data"}}}, out: "from the host\nwritten\n"},
		{name: "read-only bind", script: "cat /ro/in; touch /ro/y 2>/dev/null || echo refused", o: Options{Binds: []Bind{{Source: src, Target: "/ro", ReadOnly: true}}}, out: "from the host\nrefused\n"},
		{name: "own network", script: "ls /sys/class/net", out: "lo\n"},
		{name: "host name", script: "hostname", out: "lazuli\n"},
		{name: "host's host name", script: "hostname", o: Options{HostNetwork: true}, out: host + "\n"},
		{name: "devices", script: "echo x >/dev/null && test -c /dev/urandom && test -d /dev/pts && test -d /dev/shm && echo yes", out: "yes\n"},
		{name: "masked", script: "cat /proc/interrupts | test -s - || echo empty", out: "empty\n"},
		{name: "own processes", script: "echo $$", out: "1\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			started := 0
			sio := IO{Stdin: strings.NewReader(tt.stdin), Started: func(pid int) { started = pid }}
			code, out, err := run(t, t.Context(), root, tt.o, sio, tt.script)
			if err != nil || code != tt.code || out != tt.out {
				t.Errorf("code %d, output %q, error %v; want %d, %q", code, out, err, tt.code, tt.out)
			}
			if started == 0 {
				t.Error("Started was not called")
			}
		})
	}
}

func TestRunReadOnly(t *testing.T) {
	root := busybox(t)
	for _, d := range []string{"proc", "sys", "dev"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	code, out, err := run(t, t.Context(), root, Options{ReadOnly: true}, IO{}, "touch /x 2>/dev/null || echo refused")
	if err != nil || code != 0 || out != "refused\n" {
		t.Errorf("code %d, output %q, error %v", code, out, err)
	}
}

func TestRunSignals(t *testing.T) {
	root := busybox(t)
	t.Run("forwarded", func(t *testing.T) {
		signals := make(chan os.Signal, 1)
		ready, w := firstWrite()
		go func() { <-ready; signals <- unix.SIGTERM }()
		code, _, err := run(t, t.Context(), root, Options{}, IO{Signals: signals, Stderr: w},
			"trap 'exit 7' TERM; echo ready >&2; while :; do sleep 0.1; done")
		if err != nil || code != 7 {
			t.Errorf("code %d, error %v, want 7", code, err)
		}
	})
	t.Run("second kills", func(t *testing.T) {
		signals := make(chan os.Signal, 2)
		ready, w := firstWrite()
		go func() { <-ready; signals <- unix.SIGTERM; signals <- unix.SIGINT }()
		code, _, err := run(t, t.Context(), root, Options{}, IO{Signals: signals, Stderr: w}, "echo ready >&2; sleep 1000")
		if err != nil || code != 137 {
			t.Errorf("code %d, error %v, want 137", code, err)
		}
	})
	t.Run("context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		ready, w := firstWrite()
		go func() { <-ready; cancel() }()
		_, _, err := run(t, ctx, root, Options{}, IO{Stderr: w}, "echo ready >&2; sleep 1000")
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want %v", err, context.Canceled)
		}
	})
	t.Run("context before the start", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := run(t, ctx, root, Options{}, IO{}, "sleep 1000"); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want %v", err, context.Canceled)
		}
	})
}

// firstWrite returns a writer and a channel that is closed at the first write to it.
func firstWrite() (<-chan struct{}, io.Writer) {
	r, w := io.Pipe()
	c := make(chan struct{})
	go func() {
		r.Read(make([]byte, 1))
		close(c)
		io.Copy(io.Discard, r)
	}()
	return c, w
}

func TestRunCannotExecute(t *testing.T) {
	root := busybox(t)
	if err := os.WriteFile(filepath.Join(root, "bin/data"), []byte("\x00\x01"), 0o755); err != nil {
		t.Fatal(err)
	}
	// Only the runtime can tell what a bind brings.
	o := Options{Binds: []Bind{{Source: root, Target: "/mnt"}}, Args: []string{"nothing"}}
	spec, err := Config(image(), root, o)
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	_, err = Run(t.Context(), t.TempDir(), spec, IO{Stderr: &stderr})
	var se *StartError
	if !errors.As(err, &se) || se.Code != 127 {
		t.Errorf("error %v, want a StartError with code 127", err)
	}
}

// The kernel refuses what the runtime has set up: docker's exit codes, not the runtime's.
func TestRunRefused(t *testing.T) {
	root := busybox(t)
	elf, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	foreign := bytes.Clone(elf[:4096])
	foreign[18], foreign[19] = 8, 0 // MIPS
	if err := os.WriteFile(filepath.Join(root, "plain"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, content string
		code          int
		refused       bool
	}{
		{"garbage", "garbage", 126, true},
		{"empty", "", 126, true},
		{"no name", "#! \n", 126, true},
		{"other machine", string(foreign), 126, true},
		{"interpreter missing", "#!/no/such -x\n", 127, true},
		{"interpreter plain", "#!/plain\n", 126, true},
		{"loader missing", loaderMissing(), 127, true},
		{"script fails", "#!/bin/sh\nexit 1\n", 1, false},
		{"script fails badly", "#!/bin/sh\nexit 255\n", 255, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.code == 126 && !strings.HasPrefix(tt.content, "#!") && binfmt() {
				t.Skip("binfmt_misc knows other formats here")
			}
			if err := os.WriteFile(filepath.Join(root, "bin/it"), []byte(tt.content), 0o755); err != nil {
				t.Fatal(err)
			}
			spec, err := Config(image("it"), root, Options{})
			if err != nil {
				t.Fatal(err)
			}
			code, err := Run(t.Context(), t.TempDir(), spec, IO{})
			var start *StartError
			if errors.As(err, &start) != tt.refused || !tt.refused && err != nil {
				t.Fatalf("error %v, refused: want %v", err, tt.refused)
			}
			if start != nil {
				code = start.Code
			}
			if code != tt.code {
				t.Errorf("code %d, want %d (%v)", code, tt.code, err)
			}
		})
	}
}

// loaderMissing returns the ELF file of a program that needs a loader which is nowhere.
func loaderMissing() string {
	machine := map[string]uint16{"amd64": 62, "arm64": 183}[runtime.GOARCH]
	b := make([]byte, 4096)
	le := binary.LittleEndian
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2) // ET_EXEC
	le.PutUint16(b[18:], machine)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64) // e_phoff
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	const loader = "/lib/ld-nowhere.so\x00"
	le.PutUint32(b[64:], 3) // PT_INTERP
	le.PutUint64(b[64+8:], 256)
	le.PutUint64(b[64+32:], uint64(len(loader)))
	copy(b[256:], loader)
	return string(b)
}

// A signal that comes before the runtime listens ends it: that is the signal's end, not a failure.
func TestRunSignalled(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "runc")
	if err := os.WriteFile(bin, []byte("#!/bin/sh\nkill -TERM $$\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", filepath.Dir(bin)+":"+os.Getenv("PATH"))
	spec := &specs.Spec{Process: &specs.Process{Args: []string{"x"}}, Root: &specs.Root{}, Linux: &specs.Linux{}}
	code, err := Run(t.Context(), t.TempDir(), spec, IO{})
	if code != 143 || err != nil {
		t.Errorf("code %d, error %v, want 143", code, err)
	}
}

func TestSweep(t *testing.T) {
	root := busybox(t)
	spec, err := Config(image("sleep", "1000"), root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	bin, _ := Runtime()
	dir := t.TempDir()
	live, err := newBundle(dir, bin, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer live.remove()
	dead, err := newBundle(dir, bin, spec)
	if err != nil {
		t.Fatal(err)
	}
	// Without pipes: the process would keep them open.
	if err := dead.command("run", "--detach", "--bundle", dead.dir, "--pid-file", dead.file("pid"), dead.id).Run(); err != nil {
		dead.remove()
		t.Fatal(err)
	}
	pid := dead.pid()
	dead.unlock() // as the end of its process would

	if err := Sweep(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dead.dir); !os.IsNotExist(err) {
		t.Errorf("the dead one's bundle: %v", err)
	}
	// A killed orphan may still wait for process 1 to reap it; it has no memory then.
	if buf, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); len(buf) > 0 {
		t.Errorf("process %d still runs: %q", pid, buf)
	}
	if _, err := os.Stat(live.file("config.json")); err != nil {
		t.Errorf("the live one's bundle: %v", err)
	}
	if err := Sweep(filepath.Join(dir, "missing")); err != nil {
		t.Error(err)
	}
}
