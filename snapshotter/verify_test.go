package snapshotter

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/klauspost/compress/zstd"

	"lazuli/convert"
	"lazuli/fs/toc"
)

func wantFile(t *testing.T, dir, name, want string) {
	t.Helper()
	if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
		t.Errorf("%s: %q, %v, want %q", name, b, err, want)
	}
}

// claiming is a layer whose image says that it has another diffID.
type claiming struct {
	v1.Layer
	diffID v1.Hash
}

func (c claiming) DiffID() (v1.Hash, error) { return c.diffID, nil }

// claim makes an image of layers that claims to have the diffIDs of another.
func (h *hub) claim(t *testing.T, repo string, layers []v1.Layer, descriptors []v1.Descriptor, diffIDs []v1.Hash) *img {
	t.Helper()
	image := empty.Image
	for i := range layers {
		var err error
		image, err = mutate.Append(image, mutate.Addendum{
			Layer: claiming{layers[i], diffIDs[i]}, MediaType: descriptors[i].MediaType, Annotations: descriptors[i].Annotations,
		})
		must(t, err)
	}
	defer h.requests()
	return h.push(t, repo, image)
}

// as returns an image with the layers of im and the diffIDs of another.
func (h *hub) as(t *testing.T, repo string, im, other *img) *img {
	t.Helper()
	layers, err := im.image.Layers()
	must(t, err)
	return h.claim(t, repo, layers, im.manifest.Layers, other.diffIDs)
}

func readAll(t *testing.T, dir string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			_, err = os.ReadFile(path)
		}
		return err
	}))
}

func (s *Snapshotter) layerOf(t *testing.T, name string) *layer {
	t.Helper()
	var found *layer
	must(t, s.each(t.Context(), func(id string, info snapshots.Info) (err error) {
		if info.Name == name {
			found, err = s.readLayer(id)
		}
		return err
	}))
	return found
}

// TestVerifyWhole: layers are verified when all of them has arrived and not before, once, with one request each, and what
// lies is marked.
func TestVerifyWhole(t *testing.T) {
	for _, labels := range []string{"containerd 2", "containerd 1"} {
		t.Run(labels, func(t *testing.T) {
			h := newHub(t)
			honest := h.lazy(t, "honest", convert.Options{}, "a", "b")
			liar := h.as(t, "liar", h.lazy(t, "other", convert.Options{}, "a", "not b"), honest)
			s := opened(t, Options{})
			for _, im := range []*img{honest, liar} {
				labelsOf := im.criLabels
				more := 0 // what the config claims must be asked for: manifest and config, for each layer
				if labels == "containerd 1" {
					labelsOf, more = im.oldLabels, 2*len(im.manifest.Layers)
				}
				top := im.pull(t, s, labelsOf)
				dir := start(t, s, im.ref, top)
				h.requests()
				must(t, s.Verify(t.Context(), false))
				if list := h.requests(); len(list) > 0 || s.layerOf(t, top).Verified {
					t.Errorf("verified before it was here: %q", list)
				}
				readAll(t, dir)
				h.requests()
				for range 2 {
					must(t, s.Verify(t.Context(), false))
				}
				ranges := h.requests()
				want := len(im.manifest.Layers) + more
				if im == liar { // the first layer is the honest one's
					want -= want / 2
				}
				if len(ranges) != want {
					t.Errorf("%s: %d requests, want %d: %q", im.ref, len(ranges), want, ranges)
				}
				if l := s.layerOf(t, top); l.Verified != (im == honest) || (l.Bad != "") != (im == liar) {
					t.Errorf("%s: %+v", im.ref, l)
				}
				must(t, s.Remove(t.Context(), im.ref))
				if im == honest { // or the liar would have its snapshots
					must(t, s.Remove(t.Context(), top))
				}
			}
			_, bad, err := s.Status(t.Context())
			must(t, err)
			if len(bad) != 1 || !strings.Contains(bad[0].Image, "/liar@") || bad[0].Layer != liar.manifest.Layers[1].Digest.String() {
				t.Errorf("bad: %+v", bad)
			}
		})
	}
}

// TestBadStartsNothing: nothing starts from a lie, directly or through a layer above it, what runs goes on, and the chain's name is
// free for who tells the truth.
func TestBadStartsNothing(t *testing.T) {
	h := newHub(t)
	honest := h.lazy(t, "honest", convert.Options{}, "a", "b")
	liar := h.as(t, "liar", h.lazy(t, "other", convert.Options{}, "not a", "b"), honest)
	s := opened(t, Options{})
	top := liar.pull(t, s, liar.criLabels)
	dir := start(t, s, "running", top)
	wantFile(t, dir, "data/f0", "not a")
	must(t, s.Verify(t.Context(), true))
	wantFile(t, dir, "data/f0", "not a")
	for _, parent := range []string{top, s.parent(t, top)} {
		var bad *BadError
		if _, err := s.Prepare(t.Context(), "new", parent); !errors.As(err, &bad) {
			t.Errorf("above %s: %v", parent, err)
		}
	}
	again := honest.pull(t, s, honest.criLabels)
	wantFile(t, start(t, s, "honest", again), "data/f0", "a")
}

func (s *Snapshotter) parent(t *testing.T, name string) string {
	t.Helper()
	info, err := s.Stat(t.Context(), name)
	must(t, err)
	return info.Parent
}

// TestTwoClaims: one blob cannot be two layers. Who is not told the diffIDs by containerd finds out.
func TestTwoClaims(t *testing.T) {
	h := newHub(t)
	honest := h.lazy(t, "honest", convert.Options{}, "a", "b", "c")
	layers, err := honest.image.Layers()
	must(t, err)
	d := honest.manifest.Layers
	liar := h.claim(t, "liar", []v1.Layer{layers[0], layers[1], layers[1]}, []v1.Descriptor{d[0], d[1], d[1]}, honest.diffIDs)
	s := opened(t, Options{})
	top := liar.pull(t, s, liar.oldLabels)
	must(t, s.Verify(t.Context(), true))
	if l := s.layerOf(t, top); l.Bad == "" || l.Verified {
		t.Errorf("%+v", l)
	}
}

// TestRemovedMeanwhile: what is removed while it is verified stays removed.
func TestRemovedMeanwhile(t *testing.T) {
	h := newHub(t)
	im := h.lazy(t, "image", convert.Options{}, "a")
	s := opened(t, Options{})
	top := im.pull(t, s, im.criLabels)
	removed := false
	h.before = func(request string) {
		if removed || !strings.HasPrefix(request, "blobs ") {
			return
		}
		if err := errors.Join(s.Remove(t.Context(), top), s.Cleanup(t.Context())); err != nil {
			t.Error(err)
		}
		removed = true
	}
	must(t, s.Verify(t.Context(), true))
	if left, _ := filepath.Glob(filepath.Join(s.root, "*", "*")); !removed || len(left) > 0 {
		t.Errorf("removed: %v, left %q", removed, left)
	}
}

// TestTwins: a tar that was converted twice is one chain, whichever comes first, and both are sound.
func TestTwins(t *testing.T) {
	h := newHub(t)
	large := strings.Repeat("twins ", 50_000)
	one := h.lazy(t, "one", convert.Options{Format: convert.ZstdChunked}, large)
	two := h.lazy(t, "two", convert.Options{Format: convert.ZstdChunked, ChunkSize: 8 << 10}, large)
	if one.diffIDs[0] != two.diffIDs[0] || one.manifest.Layers[0].Digest == two.manifest.Layers[0].Digest {
		t.Fatal("they are no twins")
	}
	s := opened(t, Options{})
	a := one.pull(t, s, one.criLabels)
	b := two.pull(t, s, two.criLabels)
	if a != b || !s.layerOf(t, a).Verified {
		t.Errorf("snapshots %s and %s: %+v", a, b, s.layerOf(t, a))
	}
	wantFile(t, start(t, s, "container", b), "data/f0", large)
}

// TestAnotherTree: a table of contents that tells of another tree than the tar is a lie too, although the diffID is right.
func TestAnotherTree(t *testing.T) {
	for name, change := range map[string]func(s string) string{
		"names swapped": strings.NewReplacer(`data/f0`, `data/g0`, `data/g0`, `data/f0`).Replace,
		"contents swapped": func(s string) string {
			f, g := fmt.Sprintf("%x", sha256.Sum256([]byte("su"))), fmt.Sprintf("%x", sha256.Sum256([]byte("SU")))
			return strings.NewReplacer(f, g, g, f).Replace(s)
		},
		"set-uid bit": func(s string) string { return strings.Replace(s, `"mode":420`, `"mode":2541`, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			honest := h.lazy(t, "honest", convert.Options{Format: convert.ZstdChunked}, "su")
			liar := h.retold(t, "liar", honest, change)
			s := opened(t, Options{})
			first := liar.pull(t, s, liar.criLabels)
			second := honest.pull(t, s, honest.criLabels)
			if first == second {
				t.Error("the honest image has the liar's snapshot")
			}
			if l := s.layerOf(t, first); l.Bad == "" || l.Verified {
				t.Errorf("the liar's layer: %+v", l)
			}
			dir := start(t, s, "container", second)
			wantFile(t, dir, "data/f0", "su")
			wantFile(t, dir, "data/g0", "SU")
		})
	}
}

// retold returns an image with the same tar as a zstd:chunked one of a single layer, and a changed table of contents.
func (h *hub) retold(t *testing.T, repo string, im *img, change func(string) string) *img {
	t.Helper()
	layers, err := im.image.Layers()
	must(t, err)
	r, err := layers[0].Compressed()
	must(t, err)
	blob, err := io.ReadAll(r)
	must(t, err)
	d := *im.manifest.Layers[0].DeepCopy()
	loc, known, err := toc.Locate(d.Annotations, d.Size)
	if err != nil || !known {
		t.Fatal("the annotations do not say where the table of contents is", err)
	}
	z, err := zstd.NewReader(nil)
	must(t, err)
	defer z.Close()
	old, err := z.DecodeAll(blob[loc.Offset:loc.Offset+loc.Size], nil)
	must(t, err)
	said := change(string(old))
	if said == string(old) || !json.Valid([]byte(said)) {
		t.Fatalf("nothing was changed in %s", old)
	}
	w, err := zstd.NewWriter(nil)
	must(t, err)
	defer w.Close()
	packed := w.EncodeAll([]byte(said), nil)
	var b bytes.Buffer
	b.Write(blob[:loc.Offset-8]) // up to the header of the skippable frame
	b.WriteString("\x50\x2a\x4d\x18")
	must(t, binary.Write(&b, binary.LittleEndian, uint32(len(packed))))
	b.Write(packed)
	for key, v := range map[string]string{
		toc.ZstdPositionAnnotation: fmt.Sprintf("%d:%d:%d:1", loc.Offset, len(packed), len(said)),
		toc.ZstdChecksumAnnotation: fmt.Sprintf("sha256:%x", sha256.Sum256(packed)),
		toc.DigestAnnotation:       fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(said))),
	} {
		for _, key := range []string{key, strings.Replace(key, "io.containers", "io.github.containers", 1)} {
			if d.Annotations[key] != "" {
				d.Annotations[key] = v
			}
		}
	}
	return h.claim(t, repo, []v1.Layer{static.NewLayer(b.Bytes(), d.MediaType)}, []v1.Descriptor{d}, im.diffIDs)
}

// TestNobodyElse: only root gets to what containers have written: their roots can make set-uid programs there.
func TestNobodyElse(t *testing.T) {
	s := opened(t, Options{})
	must(t, os.Chmod(s.root, 0o711)) // as it may have been
	must(t, s.Close())
	again, err := Open(s.node, Options{})
	must(t, err)
	defer again.Close()
	if fi, err := os.Stat(again.root); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%s: %v, %v", again.root, fi.Mode(), err)
	}
}
