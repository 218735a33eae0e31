package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"lazuli/convert"
	"lazuli/fs/rootfs"
)

// mountOn mounts an image on a node until the returned function is called.
func mountOn(t *testing.T, n *rootfs.Node, ref string) (*rootfs.Rootfs, func()) {
	t.Helper()
	r, err := n.Mount(t.Context(), parse(t, ref), "", rootfs.MountOptions{})
	must(t, err)
	return r, func() { must(t, r.Close()) }
}

// TestSymlinks: the root folder and the mount point may lie behind symbolic links, which the kernel's list of mounts does not have.
func TestSymlinks(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	link := func(name string) (target, path string) {
		target, path = filepath.Join(base, name), filepath.Join(base, name+"-link")
		must(t, os.Mkdir(target, 0o755))
		must(t, os.Symlink(name, path))
		return target, path
	}
	_, root := link("root")
	at, atLink := link("at")
	registry := NewRegistry(t, RegistryOptions{})
	ref := registry.Push(t, convertedImage(t, convert.Options{}, []layerFile{{"file", noise(1, 1000)}}), "a")
	n, err := rootfs.Open(root, rootfs.Options{})
	must(t, err)
	own, closeOwn := mountOn(t, n, ref)
	asked, err := n.Mount(t.Context(), parse(t, ref), atLink, rootfs.MountOptions{})
	must(t, err)
	if asked.Dir != at {
		t.Errorf("mounted at %s, want %s", asked.Dir, at)
	}
	for _, r := range []*rootfs.Rootfs{own, asked} {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.Wait(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%s does not count as mounted: %v", r.Dir, err)
		}
	}
	must(t, rootfs.Unmount("", atLink))
	must(t, asked.Wait(t.Context()))
	must(t, asked.Close())
	closeOwn()
	must(t, n.Close())
	b, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	if strings.Contains(string(b), base) {
		t.Error("something is left mounted")
	}
}

// TestImages: what a node says of its images, and what is left when they are removed.
func TestImages(t *testing.T) {
	needRoot(t)
	shared, mine := noise(1, 2<<20), noise(2, 700_000)
	registry := NewRegistry(t, RegistryOptions{})
	a := registry.Push(t, convertedImage(t, convert.Options{}, []layerFile{{"shared", shared}}, []layerFile{{"mine", mine}}), "a")
	b := registry.Push(t, convertedImage(t, convert.Options{}, []layerFile{{"shared", shared}}, []layerFile{{"other", noise(3, 5)}}), "b")
	root := t.TempDir()
	n, err := rootfs.Open(root, rootfs.Options{})
	must(t, err)
	ra, closeA := mountOn(t, n, a)
	_, closeB := mountOn(t, n, b)
	must(t, ra.Fill(t.Context()))
	list := func(n *rootfs.Node) map[string]rootfs.Image {
		t.Helper()
		images, err := n.Images()
		must(t, err)
		byName := map[string]rootfs.Image{}
		for _, i := range images {
			byName[i.Reference] = i
		}
		return byName
	}
	images := list(n)
	if i := images[a]; i.Bytes != int64(len(shared)+len(mine)) || i.BytesHere != i.Bytes || i.ObjectsHere != 2 {
		t.Errorf("a: %+v", i)
	}
	if i := images[b]; i.Bytes != int64(len(shared)+5) || i.BytesHere != int64(len(shared)) || i.ObjectsHere != 1 || i.Objects != 2 {
		t.Errorf("b, of which a brought one file: %+v", i)
	}

	// Another process, which this node plays, must not take away what is mounted.
	other, err := rootfs.Open(root, rootfs.Options{})
	must(t, err)
	if _, err := other.Remove(a); !errors.Is(err, rootfs.ErrInUse) {
		t.Errorf("Remove of a mounted image: %v", err)
	}
	if !list(other)[a].InUse {
		t.Error("a is not in use")
	}
	closeA()
	closeB()
	must(t, n.Close())
	freed, err := other.Remove(a)
	must(t, err)
	if freed < int64(len(mine)) || freed > int64(len(mine))+200_000 {
		t.Errorf("removing a freed %d bytes, want its own file of %d and some metadata", freed, len(mine))
	}
	if i := list(other)[b]; i.BytesHere != int64(len(shared)) {
		t.Errorf("b after a was removed: %+v", i)
	}
	_, err = other.Remove(b)
	must(t, err)
	must(t, other.Close())
	left := 0
	for _, sub := range []string{"objects", "partial", "layers", "meta", "tmp"} {
		must(t, filepath.Walk(filepath.Join(root, "store", sub), func(_ string, fi os.FileInfo, err error) error {
			if err == nil && !fi.IsDir() {
				left++
			}
			return err
		}))
	}
	if left != 0 {
		t.Errorf("%d files are left in the store", left)
	}
}

// TestAgain: the second mount of an image asks for the manifest and the config only, and a layer that another image brought is not
// asked for either.
func TestAgain(t *testing.T) {
	needRoot(t)
	base := []layerFile{{"base", noise(1, 300_000)}}
	registry := NewRegistry(t, RegistryOptions{})
	a := registry.Push(t, convertedImage(t, convert.Options{}, base, []layerFile{{"a", noise(2, 1000)}}), "a")
	b := registry.Push(t, convertedImage(t, convert.Options{}, base, []layerFile{{"b", noise(3, 1000)}}), "b")
	n, err := rootfs.Open(t.TempDir(), rootfs.Options{})
	must(t, err)
	defer func() { must(t, n.Close()) }()
	for _, c := range []struct {
		ref  string
		want int
	}{{a, 2 + 2}, {a, 2}, {b, 2 + 1}} {
		registry.Reset()
		_, done := mountOn(t, n, c.ref)
		if requests, _ := registry.Traffic(); requests != c.want {
			t.Errorf("%s: %d requests, want %d: %v", c.ref, requests, c.want, registry.Log())
		}
		done()
	}
}

// TestDeadProcess: what a killed process had mounted for itself is gone when the next one opens the root folder.
func TestDeadProcess(t *testing.T) {
	needRoot(t)
	const variable = "LAZULI_TEST_MOUNT" // root, a space, image: the process that is going to be killed
	if args := os.Getenv(variable); args != "" {
		root, image, _ := strings.Cut(args, " ")
		n, err := rootfs.Open(root, rootfs.Options{})
		must(t, err)
		r, _ := mountOn(t, n, image)
		must(t, r.Fill(t.Context()))
		fmt.Println("MOUNTED", r.Dir)
		select {}
	}
	root := t.TempDir()
	image := "oci:" + convertedImage(t, convert.Options{}, []layerFile{{"f", noise(1, 300_000)}})
	c := exec.Command(os.Args[0], "-test.run=^TestDeadProcess$")
	c.Env = append(os.Environ(), variable+"="+root+" "+image)
	out, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "MOUNTED ") {
	}
	dir := strings.TrimPrefix(lines.Text(), "MOUNTED ")
	b, err := os.ReadFile(filepath.Join(dir, "f"))
	if err != nil || !bytes.Equal(b, noise(1, 300_000)) {
		t.Errorf("while it lives: %v", err)
	}
	must(t, c.Process.Kill())
	c.Wait()
	if before := lookAround(t, root); before.mounts == "" {
		t.Error("nothing was left to be cleaned up: the test shows nothing")
	}
	// What is in the store can be read while nobody serves, unless it was opened before it was there.
	if b, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || !bytes.Equal(b, noise(1, 300_000)) {
		t.Errorf("while nobody serves: %v", err)
	}
	n, err := rootfs.Open(root, rootfs.Options{})
	must(t, err)
	defer func() { must(t, n.Close()) }()
	if after := lookAround(t, root); after.mounts != "" || after.loops != "" {
		t.Errorf("left behind: %+v", after)
	}
	r, done := mountOn(t, n, image)
	defer done()
	if b, err := os.ReadFile(filepath.Join(r.Dir, "f")); err != nil || !bytes.Equal(b, noise(1, 300_000)) {
		t.Errorf("mounted again: %v", err)
	}
}
