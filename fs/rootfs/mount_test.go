package rootfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMountOverlay: paths with everything that mount options give a meaning to, and long ones.
func TestMountOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, name := range []string{"plain", "a,b", "a:b", `a\b`, `a\,b:c, d`, strings.Repeat("long", 60)} {
		t.Run(name, func(t *testing.T) {
			base := filepath.Join(t.TempDir(), name)
			dir := func(sub string) string {
				d := filepath.Join(base, sub)
				if err := os.MkdirAll(d, 0o755); err != nil {
					t.Fatal(err)
				}
				return d
			}
			parts := overlay{meta: dir("meta"), objects: dir("objects"), server: dir("server")}
			if err := os.WriteFile(filepath.Join(parts.meta, "file"), []byte("content"), 0o644); err != nil {
				t.Fatal(err)
			}
			for _, rw := range []bool{false, true} {
				if rw {
					parts.upper, parts.work = dir("upper"), dir("work")
				}
				at := dir("at")
				if err := mountOverlay(parts, at); err != nil {
					t.Fatal(err)
				}
				if mounted, err := isMounted(at); !mounted || err != nil {
					t.Errorf("isMounted = %v, %v", mounted, err)
				}
				b, err := os.ReadFile(filepath.Join(at, "file"))
				if string(b) != "content" {
					t.Errorf("read %q, %v", b, err)
				}
				err = os.WriteFile(filepath.Join(at, "new"), nil, 0o644)
				if (err == nil) != rw {
					t.Errorf("rw %v: write: %v", rw, err)
				}
				if err := Unmount("", at); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
