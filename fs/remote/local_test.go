package remote

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// layout is what an OCI layout of c's blobs holds, by name; entries are those of its index.json.
func (c *content) layout(entries ...v1.Descriptor) map[string][]byte {
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	for h, b := range c.blobs {
		files[blobName(h)] = b
	}
	index, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, Manifests: entries})
	if err != nil {
		panic(err)
	}
	files["index.json"] = index
	return files
}

func tagged(d v1.Descriptor, annotations ...string) v1.Descriptor {
	d.Annotations = make(map[string]string)
	for i := 0; i < len(annotations); i += 2 {
		d.Annotations[annotations[i]] = annotations[i+1]
	}
	return d
}

func writeDir(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A tarFile is one member; a Name is enough for a header of a regular file.
type tarFile struct {
	tar.Header
	body []byte
}

func writeTar(t *testing.T, members ...tarFile) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		m.Mode, m.Size = 0o644, int64(len(m.body))
		if err := w.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		w.Write(m.body)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return writeFile(t, b.Bytes())
}

func writeFile(t *testing.T, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(p, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func tarOf(t *testing.T, files map[string][]byte) string {
	var members []tarFile
	for name, b := range files {
		members = append(members, tarFile{tar.Header{Name: name}, b})
	}
	return writeTar(t, members...)
}

func openLocal(t *testing.T, ref string) (Source, error) {
	t.Helper()
	r, err := ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	src, err := Open(t.Context(), r, Options{})
	if err == nil {
		t.Cleanup(func() {
			if err := src.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return src, err
}

// TestLayout runs on a layout in a directory and on the same in an archive, as newer dockers write it.
func TestLayout(t *testing.T) {
	a, b := newContent(3, 1000), newContent(2, 500)
	for h, x := range b.blobs {
		a.blobs[h] = x
	}
	one := a.layout(a.manifest)
	two := a.layout(tagged(a.manifest, refName, "a"), tagged(b.manifest, refName, "1.0", containerdName, "docker.io/library/b:1.0"))
	latest := a.layout(tagged(b.manifest, refName, "b"), tagged(a.manifest, refName, "latest"))
	index, _ := a.entries("linux/amd64", "linux/arm64")
	root := a.addJSON(types.OCIImageIndex, index)
	multi := a.layout(root)
	twice := a.layout(tagged(a.manifest, refName, "x"), tagged(b.manifest, refName, "x"))

	for _, tt := range []struct {
		name  string
		files map[string][]byte
		ref   string // after the path
		want  v1.Hash
		errs  []string
	}{
		{"the only one", one, "", a.manifest.Digest, nil},
		{"no such tag", one, ":x", v1.Hash{}, []string{`no image with the tag "x"`, "no tags"}},
		{"tag", two, ":a", a.manifest.Digest, nil},
		{"tag of two names", two, ":1.0", b.manifest.Digest, nil},
		{"whole name", two, ":b:1.0", b.manifest.Digest, nil},
		{"whole name, long", two, ":docker.io/library/b:1.0", b.manifest.Digest, nil},
		{"another name", two, ":c:1.0", v1.Hash{}, []string{"there is a, 1.0"}},
		{"none given", two, "", v1.Hash{}, []string{"2 images", "there is a, 1.0"}},
		{"latest", latest, "", a.manifest.Digest, nil},
		{"digest", two, "@" + b.manifest.Digest.String(), b.manifest.Digest, nil},
		{"digest within", multi, "@" + index.Manifests[1].Digest.String(), index.Manifests[1].Digest, nil},
		{"digest missing", multi, "@sha256:" + strings.Repeat("0", 64), v1.Hash{}, []string{"not found"}},
		{"index", multi, "", root.Digest, nil},
		{"tag twice", twice, ":x", v1.Hash{}, []string{"2 different images", "@sha256:"}},
		{"empty", a.layout(), "", v1.Hash{}, []string{"empty"}},
		{"no layout", map[string][]byte{"x": nil}, "", v1.Hash{}, []string{"not "}},
		{"hostile digest", map[string][]byte{"index.json": []byte(`{"manifests":[{"digest":"sha256:../../etc/passwd","size":3}]}`)}, "", v1.Hash{}, []string{"index.json"}},
		{"bad JSON", map[string][]byte{"index.json": []byte(`{"manifests":`)}, "", v1.Hash{}, []string{"index.json"}},
		{"big index", map[string][]byte{"index.json": bytes.Repeat([]byte(" "), maxManifest+1)}, "", v1.Hash{}, []string{"index.json: 4194305 bytes"}},
	} {
		for kind, path := range map[string]string{"oci:": writeDir(t, tt.files), "docker-archive:": tarOf(t, tt.files)} {
			t.Run(tt.name+"/"+kind, func(t *testing.T) {
				ref := kind + path + tt.ref
				src, err := openLocal(t, ref)
				if tt.errs != nil {
					wantError(t, err, append(tt.errs, "image "+ref)...)
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				d, raw, err := src.Root(t.Context())
				if err != nil || d.Digest != tt.want || sum(raw) != tt.want || d.Size != int64(len(raw)) {
					t.Fatalf("root %+v, %v, want %v", d, err, tt.want)
				}
				img, err := Pick(t.Context(), src, platform("linux/amd64"))
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := img.Config(t.Context()); err != nil {
					t.Error(err)
				}
				for _, l := range img.Layers {
					got, err := readAll(t.Context(), l.Blob, 3, l.Size-5)
					if err != nil || !bytes.Equal(got, a.blobs[l.Digest][3:l.Size-2]) {
						t.Errorf("layer %v: %d bytes, %v", l.Digest, len(got), err)
					}
				}
				if src.Stats() != (Stats{}) {
					t.Errorf("stats %+v", src.Stats())
				}
			})
		}
	}
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func TestLayoutDamaged(t *testing.T) {
	c := newContent(1, 1000)
	layer := c.layers[0]
	for _, kind := range []string{"oci:", "docker-archive:"} {
		open := func(change func(map[string][]byte)) (Source, error) {
			files := c.layout(c.manifest)
			change(files)
			if kind == "oci:" {
				return openLocal(t, kind+writeDir(t, files))
			}
			return openLocal(t, kind+tarOf(t, files))
		}
		_, err := open(func(f map[string][]byte) {
			b := bytes.Clone(c.blobs[c.manifest.Digest])
			b[10] ^= 1
			f[blobName(c.manifest.Digest)] = b
		})
		wantError(t, err, "image "+kind, "blob "+c.manifest.Digest.String(), "digest")
		_, err = open(func(f map[string][]byte) { delete(f, blobName(c.manifest.Digest)) })
		wantError(t, err, "image "+kind, "blob "+c.manifest.Digest.String(), "not complete")

		src, err := open(func(f map[string][]byte) { f[blobName(layer.Digest)] = f[blobName(layer.Digest)][:900] })
		if err != nil {
			t.Fatal(err)
		}
		_, err = readAll(t.Context(), src.Blob(layer), 0, 10)
		wantError(t, err, "image "+kind, "blob "+layer.Digest.String(), "900 bytes", "1000")
		for _, r := range [][2]int64{{-1, 1}, {0, 1001}, {1000, 1}, {1 << 62, 1 << 62}} {
			if _, err := src.Blob(layer).Range(t.Context(), r[0], r[1]); err == nil {
				t.Errorf("range %v: no error", r)
			}
		}
		if _, err := src.Blob(v1.Descriptor{Digest: v1.Hash{Algorithm: "sha256", Hex: "../../index.json"}, Size: 1}).Range(t.Context(), 0, 1); err == nil {
			t.Error("a digest that is a path was read")
		}
	}
}

// TestLayoutStaysInside: links in a layout lead nowhere else, and a fifo does not make it wait.
func TestLayoutStaysInside(t *testing.T) {
	c := newContent(1, 1000)
	outside := writeFile(t, c.blobs[c.layers[0].Digest])
	dir := writeDir(t, c.layout(c.manifest))
	blob := filepath.Join(dir, blobName(c.layers[0].Digest))
	src, err := openLocal(t, "oci:"+dir)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(blob)
	if err := os.Symlink(outside, blob); err != nil {
		t.Fatal(err)
	}
	if _, err := readAll(t.Context(), src.Blob(c.layers[0]), 0, 10); err == nil {
		t.Error("a blob outside of the layout was read")
	}
	os.Remove(blob)
	if err := syscall.Mkfifo(blob, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = readAll(t.Context(), src.Blob(c.layers[0]), 0, 10)
	wantError(t, err, "not a regular file")
	_, err = openLocal(t, "docker-archive:"+blob)
	wantError(t, err, "not a regular file")
	_, err = openLocal(t, "oci:"+filepath.Join(dir, "missing"))
	wantError(t, err, "no such file")
	_, err = openLocal(t, "docker-archive:"+filepath.Join(dir, "missing"))
	wantError(t, err, "no such file")
}

func TestLocalContext(t *testing.T) {
	c := newContent(1, 1000)
	src, err := openLocal(t, "oci:"+writeDir(t, c.layout(c.manifest)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	rc, err := src.Blob(c.layers[0]).Range(ctx, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	cancel()
	if _, err := rc.Read(make([]byte, 1)); !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v", err)
	}
	if _, err := src.Blob(c.layers[0]).Range(ctx, 0, 1000); !errors.Is(err, context.Canceled) {
		t.Errorf("range: %v", err)
	}
}

// oldArchive is what docker save wrote before it wrote layouts: layers under names of their own,
// one of them a link, one compressed.
func oldArchive(layers [][]byte) (members []tarFile, config []byte) {
	config = []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers"}}`)
	var names []string
	for i, l := range layers {
		name := fmt.Sprintf("%d/layer.tar", i)
		members = append(members, tarFile{tar.Header{Name: name}, l})
		names = append(names, name)
	}
	members = append(members,
		tarFile{tar.Header{Name: "again/layer.tar", Typeflag: tar.TypeSymlink, Linkname: "../0/layer.tar"}, nil},
		tarFile{tar.Header{Name: "config.json"}, config},
		tarFile{tar.Header{Name: "manifest.json"}, mustJSON([]savedImage{
			{Config: "config.json", RepoTags: []string{"py:3.12", "py:latest"}, Layers: append(names, "again/layer.tar")},
			{Config: "config.json", RepoTags: []string{"127.0.0.1:5000/other:1"}, Layers: names[:1]},
		})})
	return members, config
}

func TestOldArchive(t *testing.T) {
	plain := bytes.Repeat([]byte("tar "), 1000)
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	w.Write(plain)
	w.Close()
	members, config := oldArchive([][]byte{plain, gz.Bytes(), {}})
	path := writeTar(t, members...)

	for tag, layers := range map[string]int{"": 4, ":py": 4, ":py:3.12": 4, ":3.12": 4, ":docker.io/library/py:3.12": 4, ":127.0.0.1:5000/other:1": 1, ":1": 1} {
		src, err := openLocal(t, "docker-archive:"+path+tag)
		if err != nil {
			t.Error(err)
			continue
		}
		img, err := Pick(t.Context(), src, nil)
		if err != nil {
			t.Errorf("%q: %v", tag, err)
			continue
		}
		if len(img.Layers) != layers {
			t.Errorf("%q: %d layers, want %d", tag, len(img.Layers), layers)
		}
	}

	src, err := openLocal(t, "docker-archive:"+path+":py")
	if err != nil {
		t.Fatal(err)
	}
	img, err := Pick(t.Context(), src, nil)
	if err != nil {
		t.Fatal(err)
	}
	var mediaTypes []types.MediaType
	for i, l := range img.Layers {
		mediaTypes = append(mediaTypes, l.MediaType)
		want := [][]byte{plain, gz.Bytes(), {}, plain}[i]
		got, err := ReadBlob(t.Context(), src, l.Descriptor, 1<<20)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("layer %d: %d bytes, %v", i, len(got), err)
		}
		if len(want) > 10 {
			if got, err := readAll(t.Context(), l.Blob, 5, 5); err != nil || !bytes.Equal(got, want[5:10]) {
				t.Errorf("layer %d: %q, %v", i, got, err)
			}
		}
	}
	if d := cmp.Diff([]types.MediaType{types.DockerUncompressedLayer, types.DockerLayer, types.DockerUncompressedLayer, types.DockerUncompressedLayer}, mediaTypes); d != "" {
		t.Error(d)
	}
	if c, raw, err := img.Config(t.Context()); err != nil || c.Architecture != "amd64" || !bytes.Equal(raw, config) {
		t.Errorf("config %s, %v", raw, err)
	}
	if _, err := openLocal(t, "docker-archive:"+path+":py@"+img.Digest.String()); err != nil {
		t.Errorf("by the digest that it has here: %v", err)
	}
	_, err = openLocal(t, "docker-archive:"+path+":py@sha256:"+strings.Repeat("0", 64))
	wantError(t, err, "has "+img.Digest.String()+" here")
	for tag, words := range map[string]string{":nope": "there is py:3.12, py:latest, 127.0.0.1:5000/other:1"} {
		_, err := openLocal(t, "docker-archive:"+path+tag)
		wantError(t, err, words, "image docker-archive:")
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%v is not ErrNotFound", err)
		}
	}
}

func TestHostileArchives(t *testing.T) {
	good, _ := oldArchive([][]byte{bytes.Repeat([]byte("x"), 2000)})
	file := func(name string, body string) tarFile { return tarFile{tar.Header{Name: name}, []byte(body)} }
	link := func(name, to string) tarFile {
		return tarFile{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}, nil}
	}
	saved := func(s ...savedImage) tarFile { return tarFile{tar.Header{Name: "manifest.json"}, mustJSON(s)} }
	raw, err := os.ReadFile(writeTar(t, good...))
	if err != nil {
		t.Fatal(err)
	}
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	w.Write(raw)
	w.Close()
	for name, tt := range map[string]struct {
		path string
		want string
	}{
		"not a tar":    {writeFile(t, bytes.Repeat([]byte("no"), 5000)), "not a complete tar"},
		"empty":        {writeFile(t, nil), "neither manifest.json nor index.json"},
		"truncated":    {writeFile(t, raw[:1500]), ""},
		"compressed":   {writeFile(t, gz.Bytes()), "gunzip it first"},
		"twice":        {writeTar(t, append(good, good[0])...), "twice in the archive"},
		"long name":    {writeTar(t, file(strings.Repeat("x", maxMemberName+1), "")), "too long names"},
		"bad manifest": {writeTar(t, file("manifest.json", "{")), "manifest.json"},
		"no config":    {writeTar(t, saved(savedImage{Config: "c"})), `config: "c"`},
		"no layer":     {writeTar(t, file("c", "{}"), saved(savedImage{Config: "c", Layers: []string{"l"}})), `layer 1: "l"`},
		"link outside": {writeTar(t, file("c", "{}"), link("l", "../../../../../etc/passwd"), saved(savedImage{Config: "c", Layers: []string{"l"}})), "layer 1"},
		"name outside": {writeTar(t, file("c", "{}"), saved(savedImage{Config: "c", Layers: []string{"/etc/passwd"}})), "layer 1"},
		"link circle":  {writeTar(t, file("c", "{}"), link("l", "m"), link("m", "l"), saved(savedImage{Config: "c", Layers: []string{"l"}})), "too many links"},
		"big config":   {writeTar(t, tarFile{tar.Header{Name: "c"}, make([]byte, maxConfig+1)}, saved(savedImage{Config: "c"})), "config: c: 8388609 bytes"},
		"many layers":  {writeTar(t, file("c", "{}"), file("l", ""), saved(savedImage{Config: "c", Layers: strings.Split(strings.Repeat("l,", maxLayers)+"l", ",")})), "4097 layers"},
		"sparse":       {sparseTar(t), "sparse"},
	} {
		_, err := openLocal(t, "docker-archive:"+tt.path)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		wantError(t, err, tt.want, "image docker-archive:"+tt.path)
	}
	many := make([]tarFile, maxMembers+1)
	for i := range many {
		many[i].Name = fmt.Sprint(i)
	}
	_, err = openLocal(t, "docker-archive:"+writeTar(t, many...))
	wantError(t, err, "too many members")
}

// sparseTar returns an archive with a member whose holes are left out, as GNU tar writes it.
func sparseTar(t *testing.T) string {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "layer"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "layer"), 1<<20); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "a.tar")
	if out, err := exec.Command("tar", "-C", dir, "--sparse", "--format=pax", "-cf", path, "layer").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	return path
}

// FuzzArchive: whatever an archive holds, opening it and reading what it names gives bytes of the archive or
// an error.
func FuzzArchive(f *testing.F) {
	members, _ := oldArchive([][]byte{[]byte("layer")})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		m.Mode, m.Size = 0o644, int64(len(m.body))
		w.WriteHeader(&m.Header)
		w.Write(m.body)
	}
	w.Close()
	f.Add(b.Bytes())
	c := newContent(1, 10)
	b.Reset()
	w = tar.NewWriter(&b)
	for name, body := range c.layout(c.manifest) {
		w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))})
		w.Write(body)
	}
	w.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, raw []byte) {
		src, err := openLocal(t, "docker-archive:"+writeFile(t, raw))
		if err != nil {
			return
		}
		img, err := Pick(t.Context(), src, nil)
		if err != nil {
			return
		}
		img.Config(t.Context())
		for _, l := range img.Layers {
			rc, err := l.Blob.Range(t.Context(), 0, l.Size)
			if err != nil {
				continue
			}
			if n, err := io.Copy(io.Discard, rc); err == nil && (n != l.Size || n > int64(len(raw))) {
				t.Errorf("layer %v: %d bytes of %d, from an archive of %d", l.Digest, n, l.Size, len(raw))
			}
			rc.Close()
		}
	})
}
