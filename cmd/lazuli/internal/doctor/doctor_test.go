package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestExamine(t *testing.T) {
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	findings := Examine(filepath.Join(t.TempDir(), "not", "there"))
	for _, f := range findings {
		if f.Detail == "" || (f.OK || f.Fix != "") == false {
			t.Errorf("%s: says too little: %+v", f.Name, f)
		}
	}
	after, _ := os.ReadFile("/proc/self/mountinfo")
	if string(before) != string(after) {
		t.Errorf("mounts changed:\n%s\n%s", before, after)
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

func TestFolder(t *testing.T) {
	dir := t.TempDir()
	if d, err := folder(filepath.Join(dir, "a/b")); err != nil || !strings.HasPrefix(d, dir) {
		t.Errorf("%q, %v", d, err)
	}
}
