package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/spf13/cobra"

	"lazuli/cmd/lazuli/internal/registry"
	"lazuli/fs/bundle"
)

// lazuli runs a command line as a shell would.
func lazuli(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func TestCommandLines(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := write("good.toml", "root = \"/r\"\nread_timeout = \"30s\"\nlog_level = \"debug\"\n")
	unknown := write("unknown.toml", "root = \"/r\"\nmax_sise = 1\n")
	broken := write("broken.toml", "\nroot = \n")
	timeout := write("timeout.toml", "read_timeout = \"-1s\"\n")
	for _, tt := range []struct {
		args string
		code int
		want string // in stderr, or stdout if code is 0
	}{
		{"", 0, "Usage:"},
		{"--help", 0, "Available Commands"},
		{"version", 0, "lazuli devel linux/"},
		{"completion bash", 0, "bash completion"},
		{"--config " + good + " version", 0, "lazuli"},
		{"bogus", 2, `unknown command "bogus"`},
		{"mout", 2, "did you mean mount"},
		{"--bogus", 2, "--bogus"},
		{"mount x", 2, "usage: lazuli mount [flags] IMAGE DIR"},
		{"run", 2, "usage: lazuli run"},
		{"version x", 2, "usage: lazuli version"},
		{"run --net bridge x", 2, "want host or none"},
		{"run -e =x x", 2, "want NAME=value, or NAME"},
		{"run --timeline=csv x", 2, "want text, json or json:FILE"},
		{"run -v /nothing/here:/x x", 125, "/nothing/here"},
		{"registry", 2, "--dir"},
		{"profile pack", 2, "usage: lazuli profile pack"},
		{"daemon --print-config --teardown", 2, "say one of them"},
		{"--log-level loud version", 2, `log level "loud"`},
		{"--config " + filepath.Join(dir, "missing") + " version", 1, "missing: no such file"},
		{"--config " + unknown + " version", 1, "unknown key max_sise: lazuli daemon --print-config shows those that there are"},
		{"--config " + broken + " version", 1, "line 2"},
		{"--config " + timeout + " version", 1, "want more than 0"},
		{"inspect oci:" + dir, 1, dir},
		{"inspect UPPER", 2, "want NAME[:TAG]"},
		{"inspect a\x1b[31mb", 2, `a\x1b[31mb`},
		{"umount " + dir, 1, "is not an image that lazuli mounted"},
	} {
		code, stdout, stderr := lazuli(t, strings.Fields(tt.args)...)
		got := stderr
		if tt.code == 0 {
			got = stdout
		}
		if code != tt.code || !strings.Contains(got, tt.want) {
			t.Errorf("lazuli %s: code %d, want %d; %q is not in\n%s%s", tt.args, code, tt.code, tt.want, stdout, stderr)
		}
		if code != 0 && (!strings.HasPrefix(stderr, "lazuli: ") || strings.Count(stderr, "lazuli: ") != 1) {
			t.Errorf("lazuli %s: the error is not printed once: %q", tt.args, stderr)
		}
	}
}

// Flags override the file, the file overrides the defaults.
// What is printed of names from elsewhere does not steer a terminal.
func TestPrintable(t *testing.T) {
	var b bytes.Buffer
	in := "é\tok\n\x1b]0;title\a\r\u009b2J\u202e\xff\n"
	n, err := printable(&b).Write([]byte(in))
	if want := "é\tok\n" + `\x1b]0;title\x07\x0d\u009b2J\u202e\xff` + "\n"; n != len(in) || err != nil || b.String() != want {
		t.Errorf("%d, %v, %q, want %q", n, err, b.String(), want)
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("LAZULI_HERE", "a=b")
	got, err := environment([]string{"A=1", "B=", "LAZULI_HERE", "LAZULI_NOT_HERE"})
	if diff := cmp.Diff([]string{"A=1", "B=", "LAZULI_HERE=a=b"}, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

func TestConfigPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(file, []byte("root = \"/file\"\nread_timeout = \"30s\"\nlog_level = \"error\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	load := func(args ...string) config {
		a := &app{}
		cmd := &cobra.Command{Use: "x", RunE: func(cmd *cobra.Command, _ []string) error { return a.load(cmd.Flags()) }}
		a.flags(cmd.Flags())
		cmd.SetArgs(append(args, "--config", file))
		if err := cmd.Execute(); err != nil {
			t.Fatal(err)
		}
		return a.config
	}
	if c := load(); c.Root != "/file" || c.ReadTimeout.Duration != 30*time.Second || c.LogLevel != "error" {
		t.Errorf("from the file: %+v", c)
	}
	if c := load("--root", defaultRoot, "--log-level=info"); c.Root != defaultRoot || c.LogLevel != "info" {
		t.Errorf("flags above the file: %+v", c)
	}
}

// Every verb has an example and says what it does.
func TestHelp(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Example == "" || c.Short == "" {
			t.Errorf("%s: has no example or no description", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRootCommand(&app{}))
}

// The thread from end to end: convert, inspect, check, run, mount, images, rmi.
func TestEndToEnd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := bundle.Runtime(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	writeImage(t, filepath.Join(dir, "original"))
	reg, err := registry.Open(filepath.Join(dir, "registry"))
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	server := httptest.NewServer(reg)
	defer server.Close()
	image := strings.TrimPrefix(server.URL, "http://") + "/busybox:lazy"
	ok := func(args ...string) string {
		t.Helper()
		code, stdout, stderr := lazuli(t, append([]string{"--root", filepath.Join(dir, "root")}, args...)...)
		if code != 0 {
			t.Fatalf("lazuli %q: code %d: %s", args, code, stderr)
		}
		return stdout
	}
	ok("convert", "--cache", "", "oci:"+filepath.Join(dir, "original"), image)
	if out := ok("inspect", image); !strings.Contains(out, "1 of 1 layers are lazy") {
		t.Errorf("inspect: %s", out)
	}
	if out := ok("check", image); !strings.HasPrefix(out, "ok ") {
		t.Errorf("check: %s", out)
	}
	timeline := filepath.Join(dir, "timeline.json")
	out := ok("run", "--timeline=json:"+timeline, "-e", "A=b", image, "-c", "echo $A; cat /greeting; touch /x")
	if want := "b\nhello\n"; out != want {
		t.Errorf("run: output %q, want %q", out, want)
	}
	var tl struct {
		Phases []struct {
			Phase string
			MS    float64
		}
		Requests, BytesFetched, BytesNeeded, ExitCode int64
	}
	b, err := os.ReadFile(timeline)
	if err == nil {
		err = json.Unmarshal(b, &tl)
	}
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for i, p := range tl.Phases {
		names = append(names, p.Phase)
		if i > 0 && p.MS < tl.Phases[i-1].MS {
			t.Errorf("%s ended before %s: %s", p.Phase, tl.Phases[i-1].Phase, b)
		}
	}
	if d := cmp.Diff(phaseNames[:], names); d != "" {
		t.Errorf("phases (-want +got):\n%s", d)
	}
	if tl.Requests == 0 || tl.BytesFetched == 0 || tl.BytesNeeded == 0 {
		t.Errorf("nothing was counted: %s", b)
	}
	if code, _, stderr := lazuli(t, "--root", filepath.Join(dir, "root"), "run", image, "-c", "exit 42"); code != 42 || stderr != "" {
		t.Errorf("exit 42: code %d, stderr %q", code, stderr)
	}

	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	served := make(chan int, 1)
	go func() {
		served <- run([]string{"--root", filepath.Join(dir, "root"), "mount", image, mnt}, strings.NewReader(""), w, os.Stderr)
		w.Close()
	}()
	if _, err := r.Read(make([]byte, 4096)); err != nil {
		t.Fatalf("mount ended with code %d", <-served)
	}
	go io.Copy(io.Discard, r)
	if b, err := os.ReadFile(filepath.Join(mnt, "greeting")); string(b) != "hello\n" {
		t.Errorf("greeting: %q, %v", b, err)
	}
	if code, _, stderr := lazuli(t, "--root", filepath.Join(dir, "root"), "rmi", image); code != 1 || !strings.Contains(stderr, "in use") {
		t.Errorf("rmi of a mounted image: code %d, %s", code, stderr)
	}
	if !regexp.MustCompile(`busybox:lazy .* now`).MatchString(ok("images")) {
		t.Errorf("images: %s", ok("images"))
	}
	ok("umount", mnt)
	if code := <-served; code != 0 {
		t.Errorf("mount ended with code %d", code)
	}
	ok("rmi", image)
	if out := ok("images"); strings.Contains(out, "busybox") {
		t.Errorf("images after rmi: %s", out)
	}
	ok("prune")
	if left, _ := filepath.Glob(filepath.Join(dir, "root", "run", "*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	if strings.Contains(string(mounts), dir) {
		t.Errorf("still mounted:\n%s", mounts)
	}
}

// writeImage writes an OCI layout with one image: busybox, whose sh is the entrypoint, and a file.
func writeImage(t *testing.T, dir string) {
	t.Helper()
	bb, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("no busybox: apt-get install busybox-static")
	}
	program, err := os.ReadFile(bb)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	add(tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	add(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, program)
	for _, name := range []string{"sh", "cat", "touch"} {
		add(tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
	}
	add(tar.Header{Name: "greeting", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("hello\n"))
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err == nil {
		img, err = mutate.Config(img, v1.Config{Entrypoint: []string{"/bin/sh"}})
	}
	if err != nil {
		t.Fatal(err)
	}
	p, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "latest"}))
	}
	if err != nil {
		t.Fatal(err)
	}
}
