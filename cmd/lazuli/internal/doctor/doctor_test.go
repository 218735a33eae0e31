package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestExamine(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	findings := Examine(filepath.Join(t.TempDir(), "not", "there"))
	for _, f := range findings {
		if f.Detail == "" || (f.OK || f.Fix != "") == false {
			t.Errorf("%s: says too little: %+v", f.Name, f)
		}
	}
	if after, err := os.Readlink("/proc/self/ns/mnt"); after != before {
		t.Errorf("mount namespace %s, before %s: %v", after, before, err)
	}
	if mounts, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(mounts), "lazuli-doctor-") {
		t.Errorf("still mounted:\n%s", mounts)
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "lazuli-doctor-*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestWorks(t *testing.T) {
	if !Works([]Finding{{OK: true, Required: true}, {OK: false}}) {
		t.Error("something optional is missing: works nevertheless")
	}
	if Works([]Finding{{OK: true}, {OK: false, Required: true}}) {
		t.Error("something required is missing")
	}
}

// Where the machine can do it, the attempt must succeed; this is the one check whose outcome a test can know.
func TestDataOnly(t *testing.T) {
	if _, err := isRoot(); err != nil {
		t.Skip(err)
	}
	if _, major, minor := kernel(); major < 6 || major == 6 && minor < 5 {
		t.Skip("Linux before 6.5")
	}
	if _, err := dataOnly(); err != nil {
		t.Error(err)
	}
}

// Wherever the scheduler begins, the first thread keeps its namespace.
func TestOnThread(t *testing.T) {
	for range 200 {
		if err := onThread(func() error {
			if unix.Gettid() == unix.Getpid() {
				return errors.New("on the first thread")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFolder(t *testing.T) {
	dir := t.TempDir()
	if d, err := folder(filepath.Join(dir, "a/b")); err != nil || !strings.HasPrefix(d, dir) {
		t.Errorf("%q, %v", d, err)
	}
}
