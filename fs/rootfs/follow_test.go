package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"lazuli/convert"
	"lazuli/fs/remote"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// closureOf returns a program of this machine and the libraries that it needs, by debug/elf, each by its path and then its content, and
// the symlinks that lead to them.
func closureOf(t *testing.T) (program string, files map[string][]byte, links map[string]string) {
	for _, program = range []string{"/usr/bin/git", "/usr/bin/perl", "/usr/bin/curl", "/usr/bin/ssh", "/usr/bin/bash", "/bin/bash"} {
		program, _ = filepath.EvalSymlinks(program)
		files, links = map[string][]byte{}, map[string]string{}
		queue := []string{program}
		for at := 0; at < len(queue); at++ {
			b, err := os.ReadFile(queue[at])
			if err != nil {
				break
			}
			files[queue[at]] = b
			f, err := elf.NewFile(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			libs, _ := f.ImportedLibraries()
			for _, lib := range libs {
				for _, dir := range []string{"/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"} {
					real, err := filepath.EvalSymlinks(path.Join(dir, lib))
					if err != nil {
						continue
					}
					if links[path.Join(dir, lib)] = real; real == path.Join(dir, lib) {
						delete(links, real)
					}
					if !slices.Contains(queue, real) {
						queue = append(queue, real)
					}
					break
				}
			}
		}
		if len(files) > 3 { // with the C library and two more
			return program, files, links
		}
	}
	t.Skip("no program of this machine needs libraries of its usual folders")
	return "", nil, nil
}

// compiled is a Python file as far as its names go.
func compiled(names ...string) []byte {
	b := append(make([]byte, 16), 0xe3, 0, 0, 0, 0)
	for _, n := range names {
		b = append(append(b, 'z'|0x80, byte(len(n))), n...)
	}
	return b
}

// spread makes a lazy image of files that are far from each other, none a neighbour of another, and returns its layout.
func spread(t *testing.T, files map[string][]byte, links map[string]string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data []byte) {
		h.Size, h.Name = int64(len(data)), strings.TrimPrefix(h.Name, "/")
		must(t, w.WriteHeader(&h))
		_, err := w.Write(data)
		must(t, err)
	}
	for _, dir := range []string{"usr/", "usr/lib/", "usr/lib/python3/", "usr/lib/python3/dist-packages/"} {
		add(tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	for name, to := range links {
		add(tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}, nil)
	}
	i := byte(0)
	for name, data := range files {
		add(tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755}, data)
		gap := make([]byte, 5<<20) // more than a window
		i++
		rand.NewChaCha8([32]byte{i}).Read(gap)
		add(tar.Header{Name: fmt.Sprintf("var/gap%d", i), Typeflag: tar.TypeReg, Mode: 0o644}, gap)
	}
	must(t, w.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	must(t, err)
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"}})
	must(t, err)
	image, err = mutate.AppendLayers(image, layer)
	must(t, err)
	plain, lazy := filepath.Join(t.TempDir(), "plain"), filepath.Join(t.TempDir(), "lazy")
	l, err := layout.Write(plain, empty.Index)
	must(t, err)
	must(t, l.AppendImage(image))
	_, err = convert.Image(t.Context(), parse(t, "oci:"+plain), parse(t, "oci:"+lazy), convert.Options{Level: 1})
	must(t, err)
	return lazy
}

func parse(t *testing.T, s string) remote.Reference {
	t.Helper()
	r, err := remote.ParseReference(s)
	must(t, err)
	return r
}

// TestFollow: of a start that nobody knows, what is read is followed: one read of a program has all libraries brought that it and they need, one of a Python file
// all modules that it and they name, and reading them asks for nothing more. Nothing of it goes on when the node is closed.
func TestFollow(t *testing.T) {
	program, libs, links := closureOf(t)
	const packages = "/usr/lib/python3/dist-packages/"
	modules := map[string][]byte{
		"/app/main.py":  []byte("import alpha\nfrom beta import (one,\n    two)\nprint('gamma')\n"),
		"/app/alpha.py": []byte("def f():\n    from delta.epsilon import zeta # eta\n"),
		packages + "beta/__pycache__/__init__.c-3.pyc":          compiled("sub"),
		packages + "beta/__pycache__/one.c-3.pyc":               compiled("theta.iota"),
		packages + "beta/two.cpython-3.so":                      compiled(),
		packages + "beta/sub.py":                                []byte("from . import one\n"),
		packages + "delta/__init__.py":                          []byte("# nothing\n"),
		packages + "delta/epsilon/__pycache__/__init__.c-3.pyc": compiled("zeta"),
		packages + "delta/epsilon/zeta.py":                      []byte("pass\n"),
		packages + "theta/__init__.py":                          []byte("# nothing at all\n"),
		packages + "theta/iota.py":                              []byte("1\n"),
	}
	others := map[string][]byte{ // that nobody names
		packages + "gamma.py":    []byte("'gamma'\n"),
		packages + "eta.py":      []byte("'eta'\n"),
		packages + "beta/one.py": []byte("'the source of what was compiled'\n"),
	}
	files := map[string][]byte{}
	for _, m := range []map[string][]byte{libs, modules, others} {
		for name, data := range m {
			files[name] = data
		}
	}
	lazy := spread(t, files, links)
	var blobs atomic.Int64
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/") {
			blobs.Add(1)
		}
		handler.ServeHTTP(w, q)
	}))
	defer server.Close()
	index, err := layout.ImageIndexFromPath(lazy)
	must(t, err)
	m, err := index.IndexManifest()
	must(t, err)
	digest := m.Manifests[0].Digest
	image, err := index.Image(digest)
	must(t, err)
	text := strings.TrimPrefix(server.URL, "http://") + "/app:1"
	to, err := name.ParseReference(text, name.Insecure)
	must(t, err)
	must(t, ggcr.Write(to, image))
	ref := parse(t, text)

	n, err := Open(t.TempDir(), Options{Unlearned: true})
	must(t, err)
	closed := false
	defer func() {
		if !closed {
			n.Close()
		}
	}()
	pulled, err := n.Image(t.Context(), ref, digest)
	must(t, err)
	record, table, err := n.Layer(t.Context(), pulled.Layers[0], ref.At(digest), v1.Hash{})
	must(t, err)
	startup := n.Startup(ref, digest, func(context.Context) (*remote.Image, error) { return pulled, nil })
	defer startup.Close()
	chain := n.Chain([]RecordLayer{record})
	release, err := chain.Use()
	must(t, err)
	defer release()
	if err := chain.Start(t.Context(), startup, []*toc.TOC{table}); err != nil && !strings.Contains(err.Error(), "not found") {
		t.Log(err) // there is no pack
	}

	key := func(file string) (store.Key, int64) {
		t.Helper()
		for i := range table.Entries {
			if e := &table.Entries[i]; e.Name == strings.TrimPrefix(file, "/") {
				return store.Key(toc.ObjectKey(table.Content(e))), e.Size
			}
		}
		t.Fatalf("no file %s", file)
		return store.Key{}, 0
	}
	read := func(file string, most int) {
		t.Helper()
		k, _ := key(file)
		id, _, ok := n.queue.Lookup(k)
		if !ok {
			t.Fatalf("%s is not known", file)
		}
		o, err := n.queue.Open(id)
		must(t, err)
		defer o.Close()
		got := make([]byte, min(most, len(files[file])))
		if _, err := o.ReadAt(t.Context(), got, 0); err != nil && err != io.EOF {
			t.Errorf("%s: %v", file, err)
		}
		if !bytes.Equal(got, files[file][:len(got)]) {
			t.Errorf("%s: wrong bytes", file)
		}
	}
	here := func(file string) bool { // what was looked into
		k, size := key(file)
		return n.store.Here(k, size) > 0
	}
	await := func(list map[string][]byte) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			var missing []string
			for file := range list {
				if !here(file) {
					missing = append(missing, file)
				}
			}
			if len(missing) == 0 {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("never brought: %q", missing)
			}
		}
	}
	for _, x := range []struct {
		first string
		list  map[string][]byte
	}{{program, libs}, {"/app/main.py", modules}} {
		read(x.first, 1)
		await(x.list)
		for len(n.queue.Under()) > 0 { // what was brought is decoded when the node is at rest
			time.Sleep(5 * time.Millisecond)
		}
		before, misses := blobs.Load(), n.queue.Stats().Misses
		for file := range x.list {
			if len(x.list[file]) <= maxWholeFile {
				read(file, len(x.list[file]))
			}
		}
		if got := n.queue.Stats().Misses - misses; blobs.Load() != before || got != 0 {
			t.Errorf("reading what %s needs took %d requests, and %d reads waited", x.first, blobs.Load()-before, got)
		}
		t.Logf("%s: %d files, %d requests", x.first, len(x.list), before)
	}
	for file := range others {
		if here(file) {
			t.Errorf("%s was looked into", file)
		}
	}
	release()
	startup.Close()
	must(t, n.Close())
	closed = true
	if got := n.following.files.Load(); got != 0 {
		t.Errorf("%d files are still followed", got)
	}
}

// TestFollowsNot: an image with too many files is not followed, and the others are when there is room again.
func TestFollowsNot(t *testing.T) {
	n, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer n.Close()
	table := &toc.TOC{Entries: []toc.Entry{{Name: "a.py", Type: toc.Regular, Size: 1, NumChunks: 1}}, Chunks: []toc.Chunk{{Size: 1}}}
	n.following.files.Store(maxTrees)
	s := n.newStartup(remote.Reference{})
	s.pulled = true
	chain := n.Chain(kept(t, n, 1).Layers)
	release, err := chain.Use()
	must(t, err)
	defer release()
	layers, err := chain.queued()
	must(t, err)
	s.follow(layers, []*toc.TOC{table})
	if got := n.following.files.Load(); got != maxTrees {
		t.Errorf("%d files", got)
	}
	n.following.files.Store(maxTrees - 1)
	s.follow(layers, []*toc.TOC{table})
	if got := n.following.files.Load(); got != maxTrees {
		t.Errorf("%d files", got)
	}
}

func TestTree(t *testing.T) {
	layer := func(entries ...toc.Entry) *toc.TOC {
		l := new(toc.TOC)
		for i, e := range entries {
			if e.Type == 0 {
				e.Type, e.Size, e.NumChunks, e.FirstChunk = toc.Regular, 1, 1, uint32(len(l.Chunks))
				l.Chunks = append(l.Chunks, toc.Chunk{Digest: toc.Digest{byte(i + 1)}, Size: 1})
			}
			l.Entries = append(l.Entries, e)
		}
		return l
	}
	link := func(name, to string) toc.Entry { return toc.Entry{Name: name, Link: to, Type: toc.Symlink} }
	low := layer(link("lib", "usr/lib"), toc.Entry{Name: "usr/lib/libx.so.1.2"}, link("usr/lib/libx.so.1", "libx.so.1.2"), link("usr/lib/liby.so", "/etc/alternatives/liby"),
		link("etc/alternatives/liby", "../../lib/./libx.so.1"), link("loop", "loop"), link("round/a", "b"), link("round/b", "../round/a/c"),
		toc.Entry{Name: "usr/lib/hidden.so"}, toc.Entry{Name: "usr/lib/p/__init__.py"}, toc.Entry{Name: "usr/lib/p/__pycache__/__init__.c-3.pyc"},
		toc.Entry{Name: "usr/lib/p/q.abi3.so"}, toc.Entry{Name: "hard.so", Link: "usr/lib/libx.so.1.2", Type: toc.Hardlink},
		toc.Entry{Name: "usr/lib/text"}, toc.Entry{Name: "usr/lib/python3/dist-packages", Type: toc.Directory})
	high := layer(link("usr/lib/hidden.so", "p/q.abi3.so"), toc.Entry{Name: "usr/lib/p/__init__.py"})
	tree := newTree([]*toc.TOC{low, high})
	for path, want := range map[string]string{
		"/lib/libx.so.1": "usr/lib/libx.so.1.2", "usr/lib/../../lib/liby.so": "usr/lib/libx.so.1.2", "/../../usr/lib/libx.so.1.2": "usr/lib/libx.so.1.2",
		"loop": "", "round/a": "", "round/a/x": "", "lib/hidden.so": "usr/lib/p/q.abi3.so", "hard.so": "usr/lib/libx.so.1.2", "usr/lib/text": "", "": "", "/": "",
	} {
		got := ""
		if file, ok := tree.file(path); ok {
			got = tree.files[file].name
		}
		if got != want {
			t.Errorf("%q is %q, want %q", path, got, want)
		}
	}
	for module, want := range map[string]string{"usr/lib/p": "usr/lib/p/__pycache__/__init__.c-3.pyc", "usr/lib/p/q": "usr/lib/p/q.abi3.so"} {
		if got := tree.files[tree.modules[tree.hash(module)]].name; got != want {
			t.Errorf("module %s is in %s, want %s", module, got, want)
		}
	}
	if diff := cmp.Diff([]string{"usr/lib/python3/dist-packages"}, tree.roots); diff != "" {
		t.Error(diff)
	}
}

func TestPythonNames(t *testing.T) {
	for _, c := range []struct {
		compiled bool
		text     string
		want     []string
	}{
		{false, "import a.b, c as d # e\n  from .f import (g,\n h,\n i)\nj = k\nfrom l import m\\\n, n\nimportant\n", []string{"import", "a.b", "c", "as", "d", "from", "f", "g", "h", "i", "l", "m", "n"}},
		{true, string(compiled("numpy.linalg", "a b", "_x1", "", "numpy.linalg", "ü")), []string{"numpy.linalg", "_x1"}},
		{true, "z\xffshort", nil}, {true, "z", nil}, {true, "", nil}, {false, "import (", []string{"import"}},
	} {
		if diff := cmp.Diff(c.want, pythonNames([]byte(c.text), c.compiled)); diff != "" {
			t.Errorf("%q:\n%s", c.text, diff)
		}
	}
}

// FuzzReferences: whatever a file has in it, what it names is in the tree, and what it costs is bounded.
func FuzzReferences(f *testing.F) {
	f.Add([]byte("import a.b.c, d\nfrom .. import e"), "a/__init__.py", "a")
	f.Add(compiled("a", "b", "c.d"), "lib-dynload/b.pyc", "/")
	if b, err := os.ReadFile("/bin/true"); err == nil {
		f.Add(b, "lib/libc.so.6", "lib/../lib")
	}
	f.Fuzz(func(t *testing.T, b []byte, name, to string) {
		l := &toc.TOC{Chunks: []toc.Chunk{{Size: 1}}}
		for _, n := range []string{name, "a/__init__.py", "__init__.py", "a/b.so", "x.py"} {
			l.Entries = append(l.Entries, toc.Entry{Name: n, Type: toc.Regular, Size: 1, NumChunks: 1, Mode: 0o755})
		}
		l.Entries = append(l.Entries, toc.Entry{Name: to, Link: name, Type: toc.Symlink}, toc.Entry{Name: "l", Link: to, Type: toc.Symlink},
			toc.Entry{Name: path.Dir(name), Type: toc.Directory})
		tree := newTree([]*toc.TOC{l})
		tree.file("l/" + to)
		var r references
		read := func(off, n int64) []byte { return b[off : off+n] }
		for i := range tree.files {
			named := r.python(tree, int32(i), int64(len(b)), read)
			libs, parts := r.elf(tree, int32(i), int64(len(b)), read)
			for _, file := range append(named, libs...) {
				if int(file) >= len(tree.files) {
					t.Errorf("file %d of %d", file, len(tree.files))
				}
			}
			for _, p := range parts {
				if p.Off < 0 || p.Size < 0 || p.Size > int64(len(b))-p.Off {
					t.Errorf("%+v of %d bytes", p, len(b))
				}
			}
		}
	})
}
