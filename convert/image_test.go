package convert

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"lazuli/fs/remote"
)

// A file is one entry of a test's tar.
type file struct {
	tar.Header
	data string
}

func reg(name, data string) file {
	return file{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: time.Unix(1e9, 0)}, data}
}

func dir(name string) file {
	return file{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: time.Unix(1e9, 0)}, ""}
}

func link(name, to string) file {
	return file{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to, Mode: 0o644, ModTime: time.Unix(1e9, 0)}, ""}
}

func makeTar(t testing.TB, files ...file) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := f.Header
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(f.data))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", f.Name, err)
		}
		if _, err := io.WriteString(w, f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func gzipped(b []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(b)
	w.Close()
	return buf.Bytes()
}

// noise returns n bytes that hardly compress, the same for the same seed.
func noise(seed string, n int) string {
	var b []byte
	for s := sha256.Sum256([]byte(seed)); len(b) < n; s = sha256.Sum256(s[:]) {
		b = append(b, s[:]...)
	}
	return string(b[:n])
}

// A testLayout is an OCI layout that a test fills.
type testLayout struct {
	t   testing.TB
	dir string
}

func newTestLayout(t testing.TB) testLayout {
	dir := filepath.Join(t.TempDir(), "src")
	if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	return testLayout{t, dir}
}

func (l testLayout) blob(typ types.MediaType, b []byte) v1.Descriptor {
	l.t.Helper()
	h := sum(b)
	if err := os.WriteFile(filepath.Join(l.dir, "blobs/sha256", h.Hex), b, 0o644); err != nil {
		l.t.Fatal(err)
	}
	return v1.Descriptor{MediaType: typ, Digest: h, Size: int64(len(b))}
}

func (l testLayout) json(typ types.MediaType, v any) v1.Descriptor {
	b, err := json.Marshal(v)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.blob(typ, b)
}

func (l testLayout) read(d v1.Descriptor) []byte {
	l.t.Helper()
	b, err := os.ReadFile(filepath.Join(l.dir, "blobs/sha256", d.Digest.Hex))
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

// layer adds a gzip layer and returns it with its diffID.
func (l testLayout) layer(files ...file) (v1.Descriptor, v1.Hash) {
	l.t.Helper()
	b := makeTar(l.t, files...)
	return l.blob(types.OCILayer, gzipped(b)), sum(b)
}

// image adds an image of OCI's types, with fields that no specification has.
func (l testLayout) image(arch string, layers []v1.Descriptor, diffIDs []v1.Hash) v1.Descriptor {
	config := l.json(types.OCIConfigJSON, map[string]any{
		"architecture": arch, "os": "linux", "created": "2020-01-02T03:04:05.000000006Z",
		"config":  map[string]any{"Env": []string{"A=<b>&c"}, "Entrypoint": []string{"/bin/true"}, "Labels": map[string]string{"l": "v"}, "Healthcheck": map[string]any{"Interval": 9007199254740993}},
		"history": []any{map[string]any{"created_by": "one"}, map[string]any{"created_by": "two", "empty_layer": true}},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": diffIDs, "x.rootfs": 1},
		"x.made":  map[string]any{"deep": []int{1, 2}},
	})
	return l.json(types.OCIManifestSchema1, map[string]any{
		"schemaVersion": 2, "mediaType": types.OCIManifestSchema1, "config": config, "layers": layers,
		"annotations": map[string]string{"of": "manifest"}, "x.made": "manifest",
	})
}

// root makes desc the image with the tag latest.
func (l testLayout) root(desc v1.Descriptor) remote.Reference {
	index := map[string]any{"schemaVersion": 2, "manifests": []any{map[string]any{
		"mediaType": desc.MediaType, "digest": desc.Digest, "size": desc.Size, "annotations": map[string]string{refName: "latest"}}}}
	b, _ := json.Marshal(index)
	for name, b := range map[string][]byte{"index.json": b, "oci-layout": []byte(layoutVersion)} {
		if err := os.WriteFile(filepath.Join(l.dir, name), b, 0o644); err != nil {
			l.t.Fatal(err)
		}
	}
	return ref(l.t, "oci:"+l.dir)
}

// simple returns an image of the given layers.
func simple(t testing.TB, layers ...[]file) remote.Reference {
	l := newTestLayout(t)
	var descs []v1.Descriptor
	var ids []v1.Hash
	for _, files := range layers {
		d, id := l.layer(files...)
		descs, ids = append(descs, d), append(ids, id)
	}
	return l.root(l.image("amd64", descs, ids))
}

func ref(t testing.TB, s string) remote.Reference {
	t.Helper()
	r, err := remote.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// convertTo converts with temporary files in a directory that must be empty afterwards.
func convertTo(t testing.TB, src, dst remote.Reference, opts Options) (*Result, error) {
	t.Helper()
	opts.TempDir = t.TempDir()
	r, err := Image(t.Context(), src, dst, opts)
	if left, _ := os.ReadDir(opts.TempDir); len(left) > 0 {
		t.Errorf("left in the temporary directory: %v", left)
	}
	return r, err
}

func mustConvert(t testing.TB, src, dst remote.Reference, opts Options) *Result {
	t.Helper()
	r, err := convertTo(t, src, dst, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func newDst(t testing.TB) remote.Reference { return ref(t, "oci:"+filepath.Join(t.TempDir(), "dst")) }

// open returns the root of what a reference names.
func open(t testing.TB, r remote.Reference) (remote.Source, v1.Descriptor, []byte) {
	t.Helper()
	src, err := remote.Open(context.Background(), r, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	desc, raw, err := src.Root(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return src, desc, raw
}

// readImage returns the image, its config, and its layers' blobs.
func readImage(t testing.TB, r remote.Reference) (*remote.Image, *v1.ConfigFile, [][]byte) {
	t.Helper()
	src, desc, _ := open(t, r)
	img, err := remote.ReadImage(context.Background(), src, desc)
	if err != nil {
		t.Fatal(err)
	}
	config, _, err := img.Config(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var blobs [][]byte
	for _, l := range img.Layers {
		b, err := remote.ReadBlob(context.Background(), src, l.Descriptor, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, b)
	}
	return img, config, blobs
}

// unpack inflates a layer as an ordinary client does.
func unpack(t testing.TB, blob []byte) []byte {
	t.Helper()
	var r io.Reader
	if bytes.HasPrefix(blob, []byte{0x1f, 0x8b}) {
		z, err := gzip.NewReader(bytes.NewReader(blob))
		if err != nil {
			t.Fatal(err)
		}
		r = z
	} else {
		z, err := zstd.NewReader(bytes.NewReader(blob))
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		r = z
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func hexSum(s string) string {
	h := sha256.Sum256([]byte(s))
	return "sha256:" + hex.EncodeToString(h[:])
}

// A testRegistry is a registry that counts and can be made to misbehave.
type testRegistry struct {
	host string
	mu   sync.Mutex
	log  []string                          // method and path of what writes
	has  map[string]bool                   // "repository digest": registry.New keeps the blobs of all together
	hook func(r *http.Request) (fail bool) // before each request
}

func newTestRegistry(t testing.TB, o ...registry.Option) *testRegistry {
	reg := &testRegistry{has: map[string]bool{}}
	h := registry.New(append(o, registry.Logger(log.New(io.Discard, "", 0)))...)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reg.mu.Lock()
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			reg.log = append(reg.log, r.Method+" "+r.URL.RequestURI())
		}
		hook := reg.hook
		reg.mu.Unlock()
		if reg.apart(w, r) {
			return
		}
		if hook != nil && hook(r) {
			http.Error(w, "no", http.StatusBadRequest)
			return
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	reg.host = strings.TrimPrefix(s.URL, "http://")
	return reg
}

// apart answers for what keeps repositories apart: whether a blob is there, and mounts.
func (r *testRegistry) apart(w http.ResponseWriter, req *http.Request) bool {
	repo, blob, ok := strings.Cut(strings.TrimPrefix(req.URL.Path, "/v2/"), "/blobs/")
	if !ok {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	q := req.URL.Query()
	switch {
	case req.Method == http.MethodHead && !r.has[repo+" "+blob]:
		http.Error(w, "", http.StatusNotFound)
		return true
	case req.Method == http.MethodPost && q.Get("mount") != "" && r.has[q.Get("from")+" "+q.Get("mount")]:
		r.has[repo+" "+q.Get("mount")] = true
		w.WriteHeader(http.StatusCreated)
		return true
	case req.Method == http.MethodPut:
		r.has[repo+" "+q.Get("digest")] = true
	}
	return false
}

// writes returns what was written since the last call.
func (r *testRegistry) writes() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.log
	r.log = nil
	return l
}
