package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// cacheDir is where things stay that take long to make: LAZULI_CACHE, or lazuli in the user's cache directory.
func cacheDir() (string, error) {
	dir := os.Getenv("LAZULI_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(user, "lazuli")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// buildPeers builds the program of peers, once for each run of the tests.
var buildPeers = sync.OnceValues(func() (string, error) {
	dir, err := cacheDir()
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "peers")
	out, err := exec.Command("go", "build", "-C", "peers", "-o", program, ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("peers: %w\n%s", err, out)
	}
	return program, nil
})

// peers runs a verb of the peers program to its end and returns what it prints.
func peers(t testing.TB, args ...string) string {
	t.Helper()
	program, err := buildPeers()
	must(t, err)
	return run(t, program, args...)
}

func run(t testing.TB, program string, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	c := exec.Command(program, args...)
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", program, args, err, &stderr)
	}
	return string(out)
}

// unpacked holds what containerd and umoci have made, by layout: it takes them longer than reading it.
var unpacked sync.Map

func once(key string, unpack func() Tree) Tree {
	if tree, ok := unpacked.Load(key); ok {
		return tree.(Tree)
	}
	tree := unpack()
	unpacked.Store(key, tree)
	return tree
}

// containerd unpacks an image as containerd's overlayfs snapshotter does, mounts it and returns what is to be seen.
func containerd(t testing.TB, layout string) Tree {
	t.Helper()
	needRoot(t)
	return once("containerd "+layout, func() Tree {
		dir := t.TempDir()
		mountOverlay(t, dir, unpackLayers(t, layout)...)
		tree, err := Snapshot(dir)
		must(t, err)
		return tree
	})
}

// unpackLayers returns the directories that overlayfs puts together, the highest first, and last an empty one:
// without an upper directory overlayfs wants two.
func unpackLayers(t testing.TB, layout string) []string {
	t.Helper()
	dir := t.TempDir()
	out := peers(t, "unpack", layout, filepath.Join(dir, "layers"))
	lower := strings.Split(strings.TrimPrefix(strings.TrimSpace(out), "lowerdir="), ":")
	empty := filepath.Join(dir, "empty")
	must(t, os.Mkdir(empty, 0o755))
	return append(lower, empty)
}

// mountOverlay mounts lower, the highest first, read-only at dir until the test ends.
func mountOverlay(t testing.TB, dir string, lower ...string) {
	t.Helper()
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	for _, l := range lower {
		if err := unix.FsconfigSetString(fd, "lowerdir+", l); err != nil {
			t.Fatalf("overlay on %s: %v", l, err)
		}
	}
	must(t, unix.FsconfigCreate(fd))
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	must(t, err)
	defer unix.Close(m)
	must(t, unix.MoveMount(m, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(errors.Join(fmt.Errorf("unmount %s: %w", dir, err), unix.Unmount(dir, unix.MNT_DETACH)))
		}
	})
}

// umoci unpacks an image as umoci does, into one directory, and returns what is to be seen.
func umoci(t testing.TB, layout string) Tree {
	t.Helper()
	needRoot(t)
	needProgram(t, "umoci")
	return once("umoci "+layout, func() Tree {
		dir := filepath.Join(t.TempDir(), "root")
		run(t, "umoci", "raw", "unpack", "--image", layout+":latest", dir)
		tree, err := Snapshot(dir)
		must(t, err)
		return tree
	})
}
