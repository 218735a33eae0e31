package integration

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// TestManual runs the script that shows how Lazuli is used with containerd, to its end, and up to a Ctrl-C. It looks
// itself whether all is gone; here somebody else looks, too.
func TestManual(t *testing.T) {
	needRoot(t)
	needProgram(t, "runc")
	program, err := buildLazuli("test")
	must(t, err)
	lazuli := filepath.Join(t.TempDir(), "lazuli")
	must(t, os.WriteFile(lazuli, program, 0o755))
	tools := buildTools(t, "containerd")
	image := manualImage(t)

	// manual starts the script in a process group of its own, as a terminal does. What it makes is below dir.
	manual := func(t *testing.T) (cmd *exec.Cmd, dir string) {
		dir = shortDir(t)
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		t.Cleanup(cancel)
		cmd = exec.CommandContext(ctx, "../deploy/containerd.sh")
		cmd.Env = append(os.Environ(), "TMPDIR="+dir, "LAZULI="+lazuli, "CONTAINERD_BIN="+tools, "IMAGE=oci:"+image)
		cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGTERM) }
		t.Cleanup(func() { killAll(t, dir); unmountAll(t, dir) })
		return cmd, dir
	}
	// gone shows that nothing is left of it.
	gone := func(t *testing.T, dir, out string) {
		t.Helper()
		left := residue(dir)
		files, err := filepath.Glob(dir + "/*")
		must(t, err)
		name := regexp.MustCompile(regexp.QuoteMeta(dir) + `/(lazuli\.\w+)`).FindStringSubmatch(out)
		if name == nil {
			t.Fatalf("the output does not say where it was:\n%s", out)
		}
		cgroups, err := filepath.Glob("/sys/fs/cgroup/*/" + name[1])
		must(t, err)
		if left = slices.Concat(left, files, cgroups); len(left) > 0 {
			t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
		}
	}

	t.Run("to the end", func(t *testing.T) {
		cmd, dir := manual(t)
		b, err := cmd.CombinedOutput()
		out := string(b)
		if n := strings.Count(out, "\n  ok: "); err != nil || n != 4 {
			t.Errorf("%v, %d things were as they should be, want 4:\n%s", err, n, out)
		}
		gone(t, dir, out)
	})
	for _, step := range []string{"lazuli convert", "ctr run --rm", "kill -9"} {
		t.Run("interrupted at "+step, func(t *testing.T) {
			cmd, dir := manual(t)
			stdout, err := cmd.StdoutPipe()
			must(t, err)
			must(t, cmd.Start())
			var out strings.Builder
			reached := false
			for lines := bufio.NewScanner(io.TeeReader(stdout, &out)); lines.Scan(); {
				if strings.HasPrefix(lines.Text(), "$ "+step) {
					reached = true
					must(t, unix.Kill(-cmd.Process.Pid, unix.SIGINT))
				}
			}
			if cmd.Wait(); !reached || cmd.ProcessState.ExitCode() != 130 {
				t.Errorf("reached %t, %v, want exit code 130:\n%s", reached, cmd.ProcessState, &out)
			}
			gone(t, dir, out.String())
		})
	}
}

// TestFullAtStart: a daemon that starts on a full disk says so, and serves as soon as there is room.
func TestFullAtStart(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	teardown := func() {
		_, err := d.lazuli("daemon", "--teardown")
		must(t, err)
		<-d.process.done
	}
	teardown()
	must(t, unix.Mount("none", d.Root, "tmpfs", 0, "size=1m"))
	defer func() {
		teardown()
		must(t, unix.Unmount(d.Root, 0))
	}()
	fill, err := os.Create(d.Root + "/fill")
	must(t, err)
	defer fill.Close()
	if _, err := io.Copy(fill, zeros{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	d.process = startProcess(t, exec.Command(d.program, "--root", d.Root, "--config", d.Dir+"/config.toml", "daemon"), d.Dir+"/log")
	d.process.await(t, func() error {
		if !strings.Contains(tail(d.Dir+"/log"), "no space left on device: make room") {
			return errors.New("it does not say that there is no room")
		}
		return nil
	})
	must(t, fill.Truncate(0))
	d.process.await(t, func() error { _, err := d.get("/healthz"); return err })
}

// zeros is a file without an end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// manualImage makes an ordinary image for the script, as a layout: the files that it reads are in three folders.
func manualImage(t *testing.T) string {
	layer := func(dir string, seed uint64) v1.Layer {
		return tarLayer(t, func(add func(tar.Header, []byte)) {
			add(tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
			for i := range 5 {
				add(tar.Header{Name: fmt.Sprintf("%s%d", dir, i), Typeflag: tar.TypeReg, Mode: 0o644}, noise(seed+uint64(i), 300_000))
			}
		})
	}
	return runnableLayout(t, nil, layer("usr/bin/", 10), layer("usr/lib/", 20), layer("usr/lib/more/", 30))
}
