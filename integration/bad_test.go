package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"lazuli/convert"
	"lazuli/fs/rootfs"
)

// tocImage makes a lazy image of one eStargz layer whose table of contents is what write writes; everything else about
// it is sound. The data is one member, the bytes "hello\n".
func tocImage(t testing.TB, size int64, write func(io.Writer)) string {
	t.Helper()
	var blob bytes.Buffer
	z := gzip.NewWriter(&blob)
	z.Write([]byte("hello\n"))
	must(t, z.Close())
	at := blob.Len()
	digest := sha256.New()
	z, _ = gzip.NewWriterLevel(&blob, gzip.BestSpeed)
	w := tar.NewWriter(z)
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "stargz.index.json", Size: size, Format: tar.FormatGNU}))
	write(io.MultiWriter(w, digest))
	must(t, w.Close())
	must(t, z.Close())
	// https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md#footer
	fmt.Fprintf(&blob, "\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00%016xSTARGZ\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00", at)
	image, err := mutate.Append(empty.Image, mutate.Addendum{
		Layer:       static.NewLayer(blob.Bytes(), types.OCILayer),
		Annotations: map[string]string{"containerd.io/snapshot/stargz/toc.digest": fmt.Sprintf("sha256:%x", digest.Sum(nil))},
	})
	must(t, err)
	dir := filepath.Join(t.TempDir(), "image")
	path, err := layout.Write(dir, empty.Index)
	must(t, err)
	must(t, path.AppendImage(image))
	return dir
}

// entriesImage is tocImage for a table of contents with the given entries, JSON without the commas between them.
func entriesImage(t testing.TB, entries ...string) string {
	t.Helper()
	json := `{"version":1,"entries":[` + strings.Join(entries, ",") + `]}`
	return tocImage(t, int64(len(json)), func(w io.Writer) { io.WriteString(w, json) })
}

// helloFile is an entry for a file whose content is the layer's only member; f replaces a part of it.
func helloFile(f ...string) string {
	e := fmt.Sprintf(`{"name":"f","type":"reg","mode":420,"size":6,"offset":0,"digest":"sha256:%[1]x","chunkDigest":"sha256:%[1]x"}`, sha256.Sum256([]byte("hello\n")))
	return strings.NewReplacer(f...).Replace(e)
}

// A world is what a failed mount must leave as it was: what has to do with its root folder.
type world struct {
	mounts, loops string
	goroutines    int
}

func lookAround(t testing.TB, root string) world {
	t.Helper()
	mountinfo, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	var mounts strings.Builder
	for line := range strings.Lines(string(mountinfo)) {
		if strings.Contains(line, root) {
			mounts.WriteString(line)
		}
	}
	var loops []string
	for i := range 64 {
		if b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", i)); err == nil && strings.Contains(string(b), root) {
			loops = append(loops, string(b))
		}
	}
	return world{mounts.String(), strings.Join(loops, ""), runtime.NumGoroutine()}
}

// refused shows that mounting ref fails with an error that says all of want, and leaves nothing behind.
func refused(t *testing.T, ref, dir string, want ...string) {
	t.Helper()
	root := t.TempDir()
	before := lookAround(t, root)
	n, err := rootfs.Open(root, rootfs.Options{})
	must(t, err)
	r, err := n.Mount(t.Context(), parse(t, ref), dir, rootfs.MountOptions{})
	if err == nil {
		r.Close()
		n.Close()
		t.Fatalf("%s was mounted", ref)
	}
	must(t, n.Close())
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not say %q:\n%v", w, err)
		}
	}
	if len(err.Error()) > 1500 {
		t.Errorf("the error has %d bytes", len(err.Error()))
	}
	http.DefaultClient.CloseIdleConnections()
	after := lookAround(t, root)
	if before.mounts != after.mounts || before.loops != after.loops {
		t.Errorf("mounts or loop devices are not as before:\n%s\n%s", after.mounts, after.loops)
	}
	for _, sub := range []string{"run", "store/tmp", "store/meta", "store/partial", "store/layers"} {
		if entries, _ := os.ReadDir(filepath.Join(root, sub)); len(entries) > 0 && !(sub == "store/layers" && len(want) > 0) {
			t.Errorf("%s is not empty: %v", sub, entries)
		}
	}
}

// TestBadImages: images whose tables of contents lie, and what is said about them.
func TestBadImages(t *testing.T) {
	needRoot(t)
	dir := func(name string) string { return fmt.Sprintf(`{"name":%q,"type":"dir","mode":493}`, name) }
	link := func(name, to string) string {
		return fmt.Sprintf(`{"name":%q,"type":"hardlink","linkName":%q}`, name, to)
	}
	for _, c := range []struct {
		name  string
		image func() string
		want  []string
	}{
		{"offset beyond the blob", func() string { return entriesImage(t, helloFile(`"offset":0`, `"offset":99999`)) }, []string{`"f"`}},
		{"offset 2^63", func() string { return entriesImage(t, helloFile(`"offset":0`, `"offset":9223372036854775808`)) }, nil},
		{"size 2^63", func() string { return entriesImage(t, helloFile(`"size":6`, `"size":9223372036854775808`)) }, nil},
		{"size 2^63-1", func() string { return entriesImage(t, helloFile(`"size":6`, `"size":9223372036854775807`)) }, nil},
		{"negative size", func() string { return entriesImage(t, helloFile(`"size":6`, `"size":-6`)) }, []string{`"f"`}},
		{"dot dot", func() string { return entriesImage(t, helloFile(`"f"`, `"../../etc/passwd"`)) }, []string{"../../etc/passwd"}},
		{"dot dot inside", func() string { return entriesImage(t, helloFile(`"f"`, `"a/../../b"`)) }, []string{"a/../../b"}},
		{"through a symlink that leads nowhere", func() string {
			return entriesImage(t, `{"name":"l","type":"symlink","linkName":"l"}`, helloFile(`"f"`, `"l/f"`))
		}, []string{"l/f"}},
		{"hard link to itself", func() string { return entriesImage(t, link("a", "a")) }, []string{`"a"`}},
		{"hard links in a circle", func() string { return entriesImage(t, link("a", "b"), link("b", "a")) }, []string{`"a"`}},
		{"hard link to nothing", func() string { return entriesImage(t, dir("d"), link("a", "d/none")) }, []string{`"a"`, "d/none"}},
		{"trusted.overlay", func() string {
			return entriesImage(t, helloFile(`"mode"`, `"xattrs":{"trusted.overlay.redirect":"L2FiL2Nk"},"mode"`))
		}, []string{`"f"`, "trusted.overlay.redirect"}},
		{"user.overlay", func() string {
			return entriesImage(t, helloFile(`"mode"`, `"xattrs":{"user.overlay.metacopy":""},"mode"`))
		}, []string{`"f"`, "user.overlay.metacopy"}},
		{"not JSON", func() string { return tocImage(t, 5, func(w io.Writer) { io.WriteString(w, "hello") }) }, []string{"toc"}},
		{"10 GB when inflated", func() string {
			spaces := bytes.Repeat([]byte(" "), 1<<20)
			return tocImage(t, 10<<30, func(w io.Writer) {
				io.WriteString(w, `{"version":1,"entries":[`)
				for range 10<<10 - 1 {
					w.Write(spaces)
				}
				w.Write(spaces[:1<<20-len(`{"version":1,"entries":[`)-2])
				io.WriteString(w, `]}`)
			})
		}, []string{"table of contents"}},
		{"10 million entries", func() string {
			const n, first = 10_000_000, `{"version":1,"entries":[{"name":"a","type":"dir"}`
			next := bytes.Repeat([]byte(`,{"name":"a","type":"dir"}`), 1000)
			return tocImage(t, int64(len(first)+n/1000*len(next)+2), func(w io.Writer) {
				io.WriteString(w, first)
				for range n / 1000 {
					w.Write(next)
				}
				io.WriteString(w, "]}")
			})
		}, []string{"entries"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if testing.Short() && strings.HasPrefix(c.name, "10 ") {
				t.Skip("short")
			}
			refused(t, "oci:"+c.image(), "", append(c.want, "layer sha256:")...)
		})
	}
	// What looks bad and is not: an absolute name means the same as a relative one, as for tar.
	t.Run("absolute name", func(t *testing.T) {
		r := mountImage(t, "oci:"+entriesImage(t, helloFile(`"f"`, `"/etc/f"`)))
		b, err := os.ReadFile(filepath.Join(r.Dir, "etc/f"))
		if err != nil || string(b) != "hello\n" {
			t.Errorf("read %q, %v", b, err)
		}
	})
}

// TestBadDirectories: where to mount.
func TestBadDirectories(t *testing.T) {
	needRoot(t)
	image := "oci:" + entriesImage(t, helloFile())
	missing := filepath.Join(t.TempDir(), "missing")
	refused(t, image, missing, missing, "does not exist", "mkdir")
	full := t.TempDir()
	must(t, os.WriteFile(filepath.Join(full, "file"), nil, 0o600))
	refused(t, image, full, full, "not empty")
	file := filepath.Join(full, "file")
	refused(t, image, file, file)
}

// TestBadRegistries: who is asked for the image.
func TestBadRegistries(t *testing.T) {
	needRoot(t)
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	lazy := entriesImage(t, helloFile())
	registry := NewRegistry(t, RegistryOptions{})
	ref := registry.Push(t, lazy, "image")
	repo := strings.TrimSuffix(ref, ":latest")
	refused(t, registry.Addr+"/nobody/knows:latest", "", "nobody/knows", "not found")
	refused(t, repo+":other", "", "other", "not found")
	refused(t, "oci:"+t.TempDir(), "", "oci:")

	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	l.Close()
	refused(t, l.Addr().String()+"/image:latest", "", l.Addr().String(), "refused")

	protected := NewRegistry(t, RegistryOptions{User: "me", Password: "secret"})
	refused(t, protected.Push(t, lazy, "image"), "", protected.Addr, "login")
	untrusted := NewRegistry(t, RegistryOptions{TLS: true})
	refused(t, untrusted.Push(t, lazy, "image"), "", untrusted.Addr, "certificate")
}

// A spoiler damages what a registry sends.
type spoiler struct {
	match func(q *http.Request) bool
	// spoil gets an answer's body, whose first byte is byte at of the blob.
	spoil func(body []byte, at int64) []byte
}

func (s *spoiler) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Method != http.MethodGet || s.match == nil || !s.match(q) {
			next.ServeHTTP(w, q)
			return
		}
		a := &answer{header: w.Header(), status: http.StatusOK}
		next.ServeHTTP(a, q)
		var at int64
		fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-", &at)
		body := s.spoil(a.body.Bytes(), at)
		w.WriteHeader(a.status)
		w.Write(body)
	})
}

// An answer is what a handler wrote.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(status int)      { a.status = status }
func (a *answer) Write(p []byte) (int, error) { return a.body.Write(p) }

// TestBadBytes: what comes from the registry is not what was pushed.
func TestBadBytes(t *testing.T) {
	needRoot(t)
	content := noise(5, 3<<20)
	lazy := convertedImage(t, convert.Options{}, []layerFile{{"f", content}, {"g", []byte("fine")}})
	report, err := rootfs.Inspect(t.Context(), parse(t, "oci:"+lazy), rootfs.InspectOptions{})
	must(t, err)
	layer := report.Layers[0]
	toc := layer.Size - layer.TOCSize // where the table begins, in bytes of the blob
	flip := func(where int64) func([]byte, int64) []byte {
		return func(b []byte, at int64) []byte {
			if i := where - at; i >= 0 && i < int64(len(b)) {
				b = bytes.Clone(b)
				b[i] ^= 0x40
			}
			return b
		}
	}
	ofLayer := func(q *http.Request) bool { return strings.Contains(q.URL.Path, layer.Digest) }
	s := &spoiler{}
	registry := NewRegistry(t, RegistryOptions{Wrap: s.wrap})
	ref := registry.Push(t, lazy, "spoilt")

	s.match, s.spoil = func(q *http.Request) bool { return strings.Contains(q.URL.Path, "/manifests/") }, flip(10)
	refused(t, strings.TrimSuffix(ref, ":latest")+"@"+report.Digest, "", report.Digest)
	s.match, s.spoil = ofLayer, flip(toc+200)
	refused(t, ref, "", layer.Digest)
	s.spoil = func(b []byte, _ int64) []byte { return b[:len(b)/2] }
	refused(t, ref, "", layer.Digest)

	// A byte of a file: that chunk cannot be read, everything else can, and so can the chunk when the registry is well again.
	s.match = nil
	r := mountImage(t, ref)
	s.match, s.spoil = ofLayer, flip(1<<20)
	f, err := os.Open(filepath.Join(r.Dir, "f"))
	must(t, err)
	defer f.Close()
	b := make([]byte, 4096)
	failed := 0
	for off := int64(0); off < int64(len(content)); off += int64(len(b)) {
		n, err := f.ReadAt(b, off)
		switch {
		case errors.Is(err, syscall.EIO):
			failed++
		case err != nil && err != io.EOF:
			t.Fatal(err)
		case !bytes.Equal(b[:n], content[off:off+int64(n)]):
			t.Fatalf("wrong bytes at %d", off)
		}
	}
	if failed == 0 || failed > 128 {
		t.Errorf("%d of %d reads failed, want those of one or two chunks", failed, len(content)/4096)
	}
	s.match = nil
	all, err := os.ReadFile(filepath.Join(r.Dir, "f"))
	if err != nil || !bytes.Equal(all, content) {
		t.Errorf("with a healthy registry: %v", err)
	}
}

// TestCheck says which byte of what is wrong.
func TestCheck(t *testing.T) {
	lazy := convertedImage(t, convert.Options{}, []layerFile{{"f", noise(5, 3<<20)}, {"g", []byte("fine")}})
	check := func() *rootfs.Report {
		t.Helper()
		r, err := rootfs.Check(t.Context(), parse(t, "oci:"+lazy), rootfs.InspectOptions{})
		must(t, err)
		return r
	}
	r := check()
	if r.Problems() != 0 || r.Layers[0].Checked < 16 {
		t.Fatalf("a sound image: %+v", r.Layers)
	}
	blob := filepath.Join(lazy, "blobs/sha256", strings.TrimPrefix(r.Layers[0].Digest, "sha256:"))
	sound, err := os.ReadFile(blob)
	must(t, err)
	for where, want := range map[int64][]string{
		1 << 20: {"blob's digest", `"f", bytes`, "of the blob"},
		r.Layers[0].Size - r.Layers[0].TOCSize + 150: {"blob's digest", "toc"},
		r.Layers[0].Size - 30:                        {"blob's digest", "footer"},
	} {
		spoilt := bytes.Clone(sound)
		spoilt[where] ^= 0x10
		must(t, os.WriteFile(blob, spoilt, 0o600))
		got := strings.Join(check().Layers[0].Problems, "\n")
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("byte %d: the problems do not say %q:\n%s", where, w, got)
			}
		}
	}
}

// TestDiskFull: a store that cannot grow costs requests, not wrong bytes; one that cannot even hold the metadata is an error.
func TestDiskFull(t *testing.T) {
	needRoot(t)
	lazy := convertedImage(t, convert.Options{}, []layerFile{{"f", noise(5, 20<<20)}, {"g", noise(6, 100_000)}})
	small := func(size string) string {
		dir := t.TempDir()
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		return dir
	}
	n, err := rootfs.Open(filepath.Join(small("6m"), "root"), rootfs.Options{})
	must(t, err)
	r, err := n.Mount(t.Context(), parse(t, "oci:"+lazy), "", rootfs.MountOptions{})
	must(t, err)
	for name, want := range map[string][]byte{"f": noise(5, 20<<20), "g": noise(6, 100_000)} {
		b, err := os.ReadFile(filepath.Join(r.Dir, name))
		if err != nil || !bytes.Equal(b, want) {
			t.Errorf("%s on a full disk: %d bytes, %v", name, len(b), err)
		}
	}
	must(t, r.Close())
	must(t, n.Close())

	root := filepath.Join(small("4k"), "root")
	before := lookAround(t, root)
	n, err = rootfs.Open(root, rootfs.Options{})
	if err == nil {
		_, err = n.Mount(t.Context(), parse(t, "oci:"+lazy), "", rootfs.MountOptions{})
		n.Close()
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("err = %v, want no space left on device", err)
	}
	if after := lookAround(t, root); after.mounts != before.mounts || after.loops != before.loops {
		t.Errorf("left mounted:\n%s", after.mounts)
	}
}

// TestTimeout: a registry that accepts and never answers makes a read fail after the time that was said, and a reader can be
// killed before.
func TestTimeout(t *testing.T) {
	needRoot(t)
	stalled := make(chan struct{})
	s := &spoiler{}
	registry := NewRegistry(t, RegistryOptions{Wrap: s.wrap})
	ref := registry.Push(t, convertedImage(t, convert.Options{}, []layerFile{{"f", noise(5, 1<<20)}}), "stalled")
	n, err := rootfs.Open(t.TempDir(), rootfs.Options{ReadTimeout: 2 * time.Second})
	must(t, err)
	defer func() { must(t, n.Close()) }()
	r, err := n.Mount(t.Context(), parse(t, ref), "", rootfs.MountOptions{})
	must(t, err)
	defer r.Close()
	defer close(stalled)
	s.match = func(*http.Request) bool { <-stalled; return false }
	if _, err := os.ReadFile(filepath.Join(r.Dir, "f")); !errors.Is(err, syscall.EIO) {
		t.Errorf("read from a registry that does not answer: %v", err)
	}
}
