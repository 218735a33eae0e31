package worst

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestDeterministic also shows that archive/tar reads every layer, and that each size and each content is what was meant.
func TestDeterministic(t *testing.T) {
	var indexes [2]string
	for i := range indexes {
		dir := t.TempDir()
		img, err := Write(dir, Options{LowerLinks: true, GNUSparse: true})
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "index.json"))
		if err != nil {
			t.Fatal(err)
		}
		indexes[i] = string(b)
		if i == 0 {
			readAll(t, dir, img)
		}
	}
	if diff := cmp.Diff(indexes[0], indexes[1]); diff != "" {
		t.Errorf("written twice:\n%s", diff)
	}
}

func readAll(t *testing.T, dir string, img *Image) {
	var index struct{ Manifests []descriptor }
	var manifest struct{ Layers []descriptor }
	read(t, filepath.Join(dir, "index.json"), &index)
	read(t, blob(dir, index.Manifests[0].Digest), &manifest)
	if len(manifest.Layers) != img.Layers {
		t.Errorf("%d layers, want %d", len(manifest.Layers), img.Layers)
	}
	sums := map[string][32]byte{}
	for _, l := range manifest.Layers {
		f, err := os.Open(blob(dir, l.Digest))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		r := tar.NewReader(z)
		for {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(h.Name, "sparse/") || h.Typeflag == tar.TypeDir {
				continue
			}
			b, err := io.ReadAll(r)
			if err != nil || int64(len(b)) != h.Size {
				t.Errorf("%q: %d bytes of %d, %v", h.Name, len(b), h.Size, err)
			}
			sums[h.Name] = sha256.Sum256(b)
		}
	}
	n := 0
	for name, sum := range sums {
		kind, found := strings.CutPrefix(name, "sparse/gnu ")
		if !found {
			continue
		}
		n++
		for _, other := range []string{"sparse/pax 0.1 ", "sparse/pax 1.0 "} {
			if got, ok := sums[other+kind]; !ok || got != sum {
				t.Errorf("%q and %q: not the same content", name, other+kind)
			}
		}
	}
	if n != 6 {
		t.Errorf("%d old GNU sparse files, want 6", n)
	}
	if want := sha256.Sum256([]byte("full")); sums["sparse/gnu dense"] != want {
		t.Error("sparse/gnu dense: another content")
	}
}

func TestHugeReader(t *testing.T) {
	const size = 10_000_001
	whole := make([]byte, size)
	if _, err := io.ReadFull(&hugeReader{size: size}, whole); err != nil {
		t.Fatal(err)
	}
	r := &hugeReader{size: size}
	var pieces []byte
	for p := make([]byte, 7777); ; {
		n, err := r.Read(p)
		pieces = append(pieces, p[:n]...)
		if err == io.EOF {
			break
		}
	}
	if string(pieces) != string(whole) {
		t.Error("read in pieces it is another content")
	}
}

func read(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func blob(dir, digest string) string {
	return filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
}
