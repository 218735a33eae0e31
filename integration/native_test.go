package integration

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"lazuli/convert"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
	"lazuli/integration/worst"
)

// dropCaches makes the kernel forget pages, dentries and inodes.
func dropCaches(t testing.TB) {
	exec.Command("sync").Run()
	must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

// median returns the middle one of some figures.
func median(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

// compare runs work on two directories in turn, and reports how long it takes in ours over how long it takes in
// the native one: the median over pairs of the ratio, since the machine's speed drifts. Cold runs begin with empty caches.
func compare(b *testing.B, name string, cold bool, ours, native string, work func(dir string)) {
	b.Run(name, func(b *testing.B) {
		const pairs = 7
		timed := func(dir string) float64 {
			if cold {
				dropCaches(b)
			}
			start := time.Now()
			work(dir)
			return time.Since(start).Seconds()
		}
		if !cold {
			work(ours)
			work(native)
		}
		var ratios, a, n []float64
		for i := range pairs {
			var x, y float64
			if i%2 == 0 {
				x, y = timed(ours), timed(native)
			} else {
				y, x = timed(native), timed(ours)
			}
			ratios, a, n = append(ratios, x/y), append(a, x), append(n, y)
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(median(a)*1e3, "ms")
		b.ReportMetric(median(n)*1e3, "native-ms")
		b.ReportMetric(median(ratios), "ratio")
		b.ReportMetric(slices.Min(ratios), "ratio-min")
		b.ReportMetric(slices.Max(ratios), "ratio-max")
	})
}

// BenchmarkNative compares a root of which everything is in the store with overlayfs on the same files, unpacked.
func BenchmarkNative(b *testing.B) {
	needRoot(b)
	b.Run("files", func(b *testing.B) {
		ours, native := bothWays(b, filesImage(b))
		compareFind(b, ours, native)
		compare(b, "10000 small files/cold", true, ours, native, func(dir string) { readFiles(b, filepath.Join(dir, "small")) })
		compare(b, "10000 small files/warm", false, ours, native, func(dir string) { readFiles(b, filepath.Join(dir, "small")) })
		compare(b, "1 GB in sequence/cold", true, ours, native, func(dir string) { readFiles(b, filepath.Join(dir, "big")) })
		compare(b, "1 GB in sequence/warm", false, ours, native, func(dir string) { readFiles(b, filepath.Join(dir, "big")) })
		for _, engine := range []string{"mmap", "psync"} {
			compare(b, "fio randread 4k "+engine+"/cold", true, ours, native, func(dir string) { fio(b, dir, engine, "64m") })
			compare(b, "fio randread 4k "+engine+"/warm", false, ours, native, func(dir string) { fio(b, dir, engine, "1g") })
		}
	})
	b.Run("py", func(b *testing.B) {
		ours, native := bothWays(b, debianImage(b, "py"))
		compareFind(b, ours, native)
		scipy := func(dir string) {
			out, err := exec.Command("chroot", dir, "python3", "-B", "-c", "import scipy.optimize, numpy").CombinedOutput()
			if err != nil {
				b.Fatalf("%v: %s", err, out)
			}
		}
		compare(b, "import scipy/cold", true, ours, native, scipy)
		compare(b, "import scipy/warm", false, ours, native, scipy)
	})
}

// compareFind compares find with stat.
func compareFind(b *testing.B, ours, native string) {
	find := func(dir string) {
		if out, err := exec.Command("find", dir, "-printf", "%s %T@ %U %m\n").Output(); err != nil {
			b.Fatalf("find: %v, %d bytes", err, len(out))
		}
	}
	compare(b, "find with stat/cold", true, ours, native, find)
	compare(b, "find with stat/warm", false, ours, native, find)
}

// readFiles opens and reads every file in dir.
func readFiles(b *testing.B, dir string) {
	buf := make([]byte, 1<<20)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			if _, err := f.Read(buf); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
		}
	})
	must(b, err)
}

// fio reads size bytes of the big file at random.
func fio(b *testing.B, dir, engine, size string) {
	out, err := exec.Command("fio", "--name=read", "--readonly", "--rw=randread", "--bs=4k", "--ioengine="+engine, "--invalidate=0",
		"--randseed=1", "--io_size="+size, "--filename="+filepath.Join(dir, "big", "big")).CombinedOutput()
	if err != nil {
		b.Fatalf("fio: %v: %s", err, out)
	}
}

// filesImage makes an image of 10,000 small files, 90,000 smaller ones, and one of 1 GiB, whose layer is an uncompressed tar.
func filesImage(b *testing.B) string {
	path := filepath.Join(b.TempDir(), "layer.tar")
	f, err := os.Create(path)
	must(b, err)
	w := tar.NewWriter(f)
	add := func(name string, size int64, r io.Reader) {
		must(b, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, Format: tar.FormatPAX}))
		_, err := io.CopyN(w, r, size)
		must(b, err)
	}
	random := rand.NewChaCha8([32]byte{1})
	for i := range 10_000 {
		add(fmt.Sprintf("small/%02d/%d", i%100, i), 200+int64(i*7919%16000), random)
	}
	for i := range 90_000 {
		add(fmt.Sprintf("many/%03d/%d", i%500, i), 100, random)
	}
	add("big/big", 1<<30, random)
	must(b, w.Close())
	must(b, f.Close())
	layer, err := tarball.LayerFromFile(path, tarball.WithCompressionLevel(1))
	must(b, err)
	return writeLayout(b, layer)
}

// writeLayout writes an image of one layer as a layout.
func writeLayout(t testing.TB, layers ...v1.Layer) string {
	image, err := mutate.AppendLayers(empty.Image, layers...)
	must(t, err)
	dir := filepath.Join(t.TempDir(), "layout")
	l, err := layout.Write(dir, empty.Index)
	must(t, err)
	must(t, l.AppendImage(image))
	return dir
}

// bothWays mounts an image as Lazuli does, with everything in the store, and as overlayfs does.
func bothWays(b *testing.B, image string) (ours, native string) {
	native = b.TempDir()
	mountOverlay(b, native, unpackLayers(b, image)...)
	r := mountImage(b, "oci:"+image)
	must(b, r.Fill(b.Context()))
	return r.Dir, native
}

// BenchmarkMount says how long it takes from verified tables of contents to a mounted root of 100,000 entries, and what
// memory the process needs for it.
func BenchmarkMount(b *testing.B) {
	needRoot(b)
	plain, _ := worstImage(b, worst.Options{Many: true})
	lazy := convertLayout(b, plain, convert.Options{})
	for b.Loop() {
		b.StopTimer()
		n, err := rootfs.Open(b.TempDir(), rootfs.Options{})
		must(b, err)
		heap, rss := memory()
		ref, err := remote.ParseReference("oci:" + lazy)
		must(b, err)
		r, err := n.Mount(b.Context(), ref, "", rootfs.MountOptions{})
		must(b, err)
		heapAfter, rssAfter := memory()
		entries := 0
		must(b, filepath.WalkDir(r.Dir, func(string, fs.DirEntry, error) error { entries++; return nil }))
		b.ReportMetric(float64(r.Mounted.Sub(r.Parsed).Milliseconds()), "ms-to-mounted")
		b.ReportMetric(float64(r.Parsed.Sub(r.Resolved).Milliseconds()), "ms-to-parse")
		b.ReportMetric(float64(entries), "entries")
		b.ReportMetric(float64(heapAfter-heap)/1024/float64(entries)*100_000, "heap-KiB/100k-entries")
		b.ReportMetric(float64(rssAfter-rss)/1024/float64(entries)*100_000, "anon-KiB/100k-entries")
		must(b, r.Close())
		must(b, n.Close())
		b.StartTimer()
	}
}

// memory returns what the process has allocated and not freed, and its anonymous resident memory, in bytes.
func memory() (heap, anon int64) {
	runtime.GC()
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			anon = kb << 10
		}
	}
	return int64(m.HeapAlloc), anon
}
