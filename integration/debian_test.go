package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// debianImage returns the layout of an image that the program in debian builds. It is built once and kept in the cache directory.
func debianImage(t testing.TB, name string) string {
	t.Helper()
	needRoot(t)
	needProgram(t, "mmdebstrap")
	dir, err := cacheDir()
	must(t, err)
	dir = filepath.Join(dir, "images")
	layout := filepath.Join(dir, name)
	if _, err := os.Stat(filepath.Join(layout, "index.json")); err == nil {
		return layout
	}
	c := exec.Command("go", "run", "./debian", "-dir", dir, name)
	c.Stdout, c.Stderr = os.Stderr, os.Stderr
	must(t, c.Run())
	return layout
}
