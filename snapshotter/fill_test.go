package snapshotter

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"lazuli/convert"
	"lazuli/fs/rootfs"
)

// filling is open for a test, and fetches the rest of what it mounts as soon as a start has come to rest.
func filling(t *testing.T, o Options) *Snapshotter {
	t.Helper()
	needRoot(t)
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	root := t.TempDir()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	node, err := rootfs.Open(root, rootfs.Options{Daemon: true, Logger: log, Fill: rootfs.FillOn})
	must(t, err)
	o.Logger = log
	s, err := Open(node, o)
	must(t, err)
	_, _, err = node.Serve(-1, nil)
	must(t, err)
	t.Cleanup(func() {
		must(t, errors.Join(s.Close(), node.Close()))
		_, err := rootfs.Teardown(root)
		must(t, err)
	})
	return s
}

// text returns n bytes that compress to half of that.
func text(seed byte, n int) string {
	b := make([]byte, n/2)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return fmt.Sprintf("%x", b)
}

// asked returns how many bytes of a layer's blob the requests are for.
func (im *img) asked(t *testing.T, layer int, requests []string) (n int64) {
	t.Helper()
	d := im.manifest.Layers[layer]
	for _, q := range requests {
		f := strings.Fields(q)
		if f[1] != d.Digest.String() {
			continue
		}
		var from, to int64 = 0, d.Size - 1
		if len(f) > 2 {
			if _, err := fmt.Sscanf(f[2], "bytes=%d-%d", &from, &to); err != nil {
				t.Fatalf("%q: %v", q, err)
			}
		}
		n += to - from + 1
	}
	return n
}

// await returns when ok says so.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// chain returns what is written down of the layers from top down to the lowest, which comes first.
func (s *Snapshotter) chain(t *testing.T, top string) (list []*layer) {
	t.Helper()
	for name := top; name != ""; name = s.parent(t, name) {
		list = append([]*layer{s.layerOf(t, name)}, list...)
	}
	return list
}

func (s *Snapshotter) complete(t *testing.T, top string) bool {
	for _, l := range s.chain(t, top) {
		if !s.node.Complete(l.record()) {
			return false
		}
	}
	return true
}

func readABit(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(name)
	must(t, err)
	defer f.Close()
	_, err = f.ReadAt(make([]byte, 10), 1_000_000)
	must(t, err)
}

// inodes returns the numbers of the files with objects.
func (s *Snapshotter) inodes(t *testing.T) map[string]uint64 {
	t.Helper()
	m := map[string]uint64{}
	must(t, filepath.Walk(s.node.Store().Objects(), func(path string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().IsRegular() {
			m[path] = fi.Sys().(*syscall.Stat_t).Ino
		}
		return err
	}))
	return m
}

// TestFillVerifies: the rest of a layer comes by the reading of its blob that verifies it, once; what is here is not written again; and then the registry is
// not needed any more.
func TestFillVerifies(t *testing.T) {
	for _, format := range []convert.Format{convert.EStargz, convert.ZstdChunked} {
		t.Run(fmt.Sprint(format), func(t *testing.T) {
			h := newHub(t)
			var away atomic.Bool
			h.before = func(string) {
				if away.Load() {
					panic(http.ErrAbortHandler)
				}
			}
			im := h.lazy(t, "image", convert.Options{Format: format}, "small", text(1, 5<<20))
			s := filling(t, Options{})
			top := im.pull(t, s, im.criLabels)
			dir := start(t, s, "container", top)
			wantFile(t, dir, "data/f0", "small")
			readABit(t, filepath.Join(dir, "data/f1"))
			started, before := h.requests(), s.inodes(t)
			if len(before) == 0 {
				t.Error("nothing is here before the rest is fetched: the test shows nothing")
			}
			await(t, "all layers verified", func() bool {
				must(t, s.Verify(t.Context(), false)) // reads what is here already, as every half minute
				for _, l := range s.chain(t, top) {
					if !l.Verified {
						return false
					}
				}
				return true
			})
			must(t, s.Verify(t.Context(), false))
			filled := h.requests()
			for i, d := range im.manifest.Layers {
				first, rest := im.asked(t, i, started), im.asked(t, i, filled)
				if rest > d.Size || first+rest < d.Size {
					t.Errorf("layer %d of %d bytes: %d bytes were asked for before the fill, and by it %d", i, d.Size, first, rest)
				}
			}
			if !s.complete(t, top) {
				t.Error("it is verified, and not all of it is here")
			}
			after := s.inodes(t)
			for path, ino := range before {
				if after[path] != ino {
					t.Errorf("%s was written again", path)
				}
			}
			away.Store(true)
			readAll(t, start(t, s, "again", top))
			if list := h.requests(); len(list) > 0 {
				t.Errorf("requests of a start from the store: %q", list)
			}
		})
	}
}

// TestFillFindsLies: a layer that is filled is verified although nobody has read anything of it; what runs goes on with all that it has.
func TestFillFindsLies(t *testing.T) {
	h := newHub(t)
	honest := h.lazy(t, "honest", convert.Options{}, "a", "b")
	liar := h.as(t, "liar", h.lazy(t, "other", convert.Options{}, "a", "not b"), honest)
	s := filling(t, Options{})
	top := liar.pull(t, s, liar.criLabels)
	dir := start(t, s, "container", top)
	await(t, "the lie", func() bool { return s.layerOf(t, top).Bad != "" })
	await(t, "all of the image", func() bool { return s.complete(t, top) })
	await(t, "the layer below", func() bool { return s.chain(t, top)[0].Verified })
	wantFile(t, dir, "data/f1", "not b")
	var bad *BadError
	if _, err := s.Prepare(t.Context(), "new", top); !errors.As(err, &bad) {
		t.Error(err)
	}
}

// TestFillAnotherTree: chunks of a tar that is not that of its table of contents are not taken for those of the table.
func TestFillAnotherTree(t *testing.T) {
	h := newHub(t)
	honest := h.lazy(t, "honest", convert.Options{Format: convert.ZstdChunked}, "su")
	liar := h.retold(t, "liar", honest, strings.NewReplacer(`data/f0`, `data/g0`, `data/g0`, `data/f0`).Replace)
	s := filling(t, Options{})
	top := liar.pull(t, s, liar.criLabels)
	dir := start(t, s, "container", top)
	await(t, "the lie", func() bool { return s.layerOf(t, top).Bad != "" })
	await(t, "all of the image", func() bool { return s.complete(t, top) })
	wantFile(t, dir, "data/f0", "SU")
	wantFile(t, dir, "data/g0", "su")
}

// TestFillUnverified: without verification only what is missing is fetched.
func TestFillUnverified(t *testing.T) {
	h := newHub(t)
	im := h.lazy(t, "image", convert.Options{}, text(1, 5<<20))
	s := filling(t, Options{Unverified: true})
	top := im.pull(t, s, im.criLabels)
	readABit(t, filepath.Join(start(t, s, "container", top), "data/f0"))
	await(t, "all of the image", func() bool { return s.complete(t, top) })
	size := im.manifest.Layers[0].Size
	if n := im.asked(t, 0, h.requests()); n > size || s.layerOf(t, top).Verified {
		t.Errorf("%d of %d bytes were asked for, verified: %v", n, size, s.layerOf(t, top).Verified)
	}
}

// TestFillGoesOn: a fill that ends with its container goes on where it was with the next one.
func TestFillGoesOn(t *testing.T) {
	h := newHub(t)
	im := h.lazy(t, "image", convert.Options{}, text(1, 6<<20))
	size := im.manifest.Layers[0].Size
	s := filling(t, Options{})
	top := im.pull(t, s, im.criLabels)
	h.requests()
	ranges := 0
	stopped := make(chan struct{})
	h.before = func(request string) {
		if !strings.Contains(request, im.manifest.Layers[0].Digest.String()) {
			return
		}
		// They come one after the other.
		if ranges++; ranges == 3 {
			if err := errors.Join(s.Remove(t.Context(), "one"), s.Cleanup(t.Context())); err != nil {
				t.Error(err)
			}
			close(stopped)
		}
	}
	start(t, s, "one", top)
	<-stopped
	if l := s.layerOf(t, top); l.Verified || s.node.Complete(l.record()) {
		t.Error("all is here before it was stopped: the test shows nothing")
	}
	start(t, s, "two", top)
	await(t, "verified", func() bool { return s.layerOf(t, top).Verified })
	await(t, "all of the image", func() bool { return s.complete(t, top) })
	// The range that was asked for when it was stopped is asked for again.
	if n, most := im.asked(t, 0, h.requests()), size+2<<20; n > most {
		t.Errorf("%d bytes were asked for, more than %d", n, most)
	}
}

// TestVerifyPauses: a layer that cannot be verified is not read again whenever it is looked for such layers.
func TestVerifyPauses(t *testing.T) {
	h := newHub(t)
	im := h.lazy(t, "image", convert.Options{}, "a")
	s := opened(t, Options{})
	top := im.pull(t, s, im.criLabels)
	readAll(t, start(t, s, "container", top))
	await(t, "all of the image", func() bool { return s.complete(t, top) })
	table := s.node.Store().Path("layers", s.layerOf(t, top).record().ID, "toc")
	must(t, os.Rename(table, table+".gone"))
	if err := s.Verify(t.Context(), false); err == nil {
		t.Error("verified without a table of contents")
	}
	must(t, os.Rename(table+".gone", table))
	must(t, s.Verify(t.Context(), false))
	if s.layerOf(t, top).Verified {
		t.Error("tried again at once after a failure")
	}
	must(t, s.Verify(t.Context(), true)) // somebody asks
	if !s.layerOf(t, top).Verified {
		t.Error("not verified")
	}
}
