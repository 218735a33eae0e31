package rootfs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// boundFile is the size of the files in TestBound: a multiple of every file system's block.
const boundFile = 1 << 20

// kept puts files into the store, each made from its seed, and returns the record of the one layer that they are.
func kept(t *testing.T, n *Node, seeds ...uint64) Record {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, seed := range seeds {
		content := make([]byte, boundFile)
		rand.NewChaCha8([32]byte{byte(seed)}).Read(content)
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(seed), Mode: 0o644, Size: boundFile}))
		_, err := w.Write(content)
		must(t, err)
	}
	must(t, w.Close())
	sink := &fileSink{store: n.store}
	table, err := toc.FromTar(&b, toc.DefaultChunkSize, sink.chunk)
	must(t, err)
	must(t, sink.end())
	l, err := n.Keep(table)
	must(t, err)
	c := n.Chain([]RecordLayer{l})
	_, err = c.Build(nil)
	must(t, err)
	return c.Record()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestBound: objects that no image needs stay while the store is not larger than it may be; then the longest unused goes first, after
// all of these the image that was not used for longest. What is mounted or what containerd has stays.
func TestBound(t *testing.T) {
	n, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer n.Close()

	// 1 is in all images and in no image any more.
	removed := kept(t, n, 1, 2, 3, 4)
	write := func(path string, r Record) {
		t.Helper()
		path = filepath.Join(n.root, path)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, r.Write(path))
	}
	image := func(reference string, unused time.Duration, seeds ...uint64) Record {
		r := kept(t, n, seeds...)
		r.Reference, r.Used = reference, time.Now().Add(-unused)
		must(t, r.Write(n.recordPath(reference)))
		return r
	}
	newer := image("newer", time.Hour, 1, 10)
	older := image("older", 2*time.Hour, 1, 11)
	mounted := image("mounted", 3*time.Hour, 1, 12)
	mounted.Dir = "/somewhere"
	write("mounts/1/x.json", mounted)
	layer := kept(t, n, 1, 13)
	write("snapshots/1/layer.json", Record{Layers: layer.Layers})
	top := kept(t, n, 1, 14)
	write("snapshots/2/root.json", top)

	keys := map[uint64]store.Key{}
	for _, seed := range []uint64{1, 2, 3, 4, 10, 11, 12, 13, 14} {
		must(t, n.objectsOf(kept(t, n, seed).Layers[0].ID, func(key store.Key, _ int64) bool { keys[seed] = key; return true }))
	}
	// The file system says when the files were made, which was now; so some are used later.
	for i, seed := range []uint64{3, 2, 4} {
		path := filepath.Join(n.store.Objects(), keys[seed].Path())
		must(t, os.Chtimes(path, time.Now().Add(time.Duration(i+1)*time.Hour), time.Time{}))
	}
	all, err := n.store.Size()
	must(t, err)
	if all != 9*boundFile {
		t.Fatalf("nine files take %d bytes", all)
	}

	for _, c := range []struct {
		name  string
		limit int64
		here  []uint64
		known []Record
		gone  []Record
	}{
		{"as much as there is", all, []uint64{1, 2, 3, 4, 10, 11, 12, 13, 14}, []Record{removed, newer, older, mounted, layer, top}, nil},
		{"a byte less", all - 1, []uint64{1, 2, 4, 10, 11, 12, 13, 14}, []Record{newer, older, mounted, layer, top}, []Record{removed}},
		{"two files less", all - 2*boundFile, []uint64{1, 4, 10, 11, 12, 13, 14}, []Record{newer, older, mounted, layer, top}, nil},
		{"an image that is kept", all - 4*boundFile, []uint64{1, 10, 12, 13, 14}, []Record{newer, mounted, layer, top}, []Record{older}},
		{"all that is in use", all - 5*boundFile, []uint64{1, 12, 13, 14}, []Record{mounted, layer, top}, []Record{newer}},
		{"nothing", 0, []uint64{1, 12, 13, 14}, []Record{mounted, layer, top}, nil},
	} {
		before, err := n.store.Size()
		must(t, err)
		freed, left, err := n.Bound(c.limit)
		must(t, err)
		size, err := n.store.Size()
		must(t, err)
		if left != size || size != int64(len(c.here))*boundFile || freed < before-size {
			t.Errorf("%s: %d bytes freed and %d left, %d were there and %d are", c.name, freed, left, before, size)
		}
		want := map[uint64]bool{}
		for _, seed := range c.here {
			want[seed] = true
		}
		for seed, key := range keys {
			if n.store.Has(key) != want[seed] {
				t.Errorf("%s: file %d is here: %v, want %v", c.name, seed, !want[seed], want[seed])
			}
		}
		for _, r := range c.known {
			if _, err := os.Stat(n.store.Path("layers", r.Layers[0].ID, "table")); err != nil {
				t.Errorf("%s: what a layer in use needs is gone: %v", c.name, err)
			}
		}
		for _, r := range c.gone {
			for _, path := range []string{n.store.Path("layers", r.Layers[0].ID), n.store.Path("meta", r.Chain+".erofs"), n.recordPath(r.Reference)} {
				if _, err := os.Stat(path); !os.IsNotExist(err) {
					t.Errorf("%s: %s is left: %v", c.name, path, err)
				}
			}
		}
	}
}
