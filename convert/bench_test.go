package convert

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"golang.org/x/sync/errgroup"

	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// benchImage is the image that benchmarks convert: an OCI layout's reference in LAZULI_BENCH_IMAGE.
func benchImage(b *testing.B) remote.Reference {
	s := os.Getenv("LAZULI_BENCH_IMAGE")
	if s == "" {
		b.Skip("LAZULI_BENCH_IMAGE names no image, such as oci:DIR")
	}
	ref, err := remote.ParseReference(s)
	if err != nil {
		b.Fatal(err)
	}
	return ref
}

// benchTars returns the tars of the image's layers as files, and how large its layers are.
func benchTars(b *testing.B) (tars []*os.File, size int64) {
	ctx := context.Background()
	src, err := remote.Open(ctx, benchImage(b), remote.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer src.Close()
	img, err := remote.Pick(ctx, src, nil)
	if err != nil {
		b.Fatal(err)
	}
	for _, l := range img.Layers {
		size += l.Size
		in := newSource(ctx, l.Blob, func(int) {})
		r, err := toc.OpenTar(in)
		if err != nil {
			b.Fatal(err)
		}
		f, err := os.Create(filepath.Join(b.TempDir(), l.Digest.Hex))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(f, r); err != nil {
			b.Fatal(err)
		}
		r.Close()
		in.Close()
		tars = append(tars, f)
	}
	return tars, size
}

// cpu is the time that this process has computed.
func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// report adds the metrics that docs/convert.md has.
func report(b *testing.B, since time.Duration, out, plain int64) {
	b.ReportMetric((cpu()-since).Seconds()/float64(b.N), "cpu-s/op")
	b.ReportMetric(float64(out)/1e6, "MB")
	b.ReportMetric(float64(out)/float64(plain), "size/plain")
}

// A touch is what a start touches of one file, in pages: a line of testdata/py.trace. That is the start of the
// lab's image py: its job in a chroot from a cold page cache, read-ahead off, then mincore(2) of every file.
type touch struct {
	Path   string
	Ranges [][2]int64 // offset and length
}

// startCost returns what a start of an image fetches, if a member is fetched when a byte of one of
// its chunks is touched: members, runs of neighbouring members, and bytes of blobs.
func startCost(b *testing.B, image remote.Reference) (members, runs int, size int64) {
	raw, err := os.ReadFile(cmp.Or(os.Getenv("LAZULI_BENCH_TRACE"), "testdata/py.trace"))
	if err != nil {
		b.Fatal(err)
	}
	src, err := remote.Open(b.Context(), image, remote.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer src.Close()
	img, err := remote.Pick(b.Context(), src, nil)
	if err != nil {
		b.Fatal(err)
	}
	type place struct {
		layer  int
		chunks []toc.Chunk
	}
	files := map[string]place{}
	starts := make([][]int64, len(img.Layers)) // of members
	for i, l := range img.Layers {
		want, err := toc.Promised(l.Annotations)
		if err != nil {
			b.Fatal(err)
		}
		loc, _, err := toc.Locate(l.Annotations, l.Size)
		if err != nil {
			b.Fatal(err)
		}
		r, err := l.Blob.Range(b.Context(), loc.Offset, loc.Size)
		if err != nil {
			b.Fatal(err)
		}
		t, err := toc.Parse(r, loc, want)
		if err != nil {
			b.Fatal(err)
		}
		r.Close()
		for j := range t.Entries {
			e := &t.Entries[j]
			files[e.Name] = place{i, t.Content(e)}
			if e.Type == toc.Hardlink {
				files[e.Name] = files[e.Link]
			}
		}
		starts[i] = []int64{loc.DataEnd}
		for _, c := range t.Chunks {
			starts[i] = append(starts[i], c.Member)
		}
		slices.Sort(starts[i])
		starts[i] = slices.Compact(starts[i])
	}
	touched := make([]map[int]bool, len(img.Layers))
	for i := range touched {
		touched[i] = map[int]bool{}
	}
	for line := range bytes.Lines(raw) {
		var x touch
		if err := json.Unmarshal(line, &x); err != nil {
			b.Fatal(err)
		}
		p := files[x.Path]
		for _, c := range p.chunks {
			for _, r := range x.Ranges {
				if r[0] < c.FileOffset+c.Size && c.FileOffset < r[0]+r[1] {
					at, _ := slices.BinarySearch(starts[p.layer], c.Member)
					touched[p.layer][at] = true
				}
			}
		}
	}
	for i, m := range touched {
		for at := range m {
			members++
			size += starts[i][at+1] - starts[i][at]
			if !m[at-1] {
				runs++
			}
		}
	}
	return members, runs, size
}

// BenchmarkConvert converts the image with every combination of level, chunk size and group size. The size is against
// the image's own layers, which should be what "gzip -6" makes.
func BenchmarkConvert(b *testing.B) {
	src := benchImage(b)
	type combination struct {
		format       Format
		level        int
		chunk, group int64
	}
	var all []combination
	for _, level := range []int{5, 6, 7, 8, 9} {
		all = append(all, combination{EStargz, level, 128 << 10, 128 << 10})
	}
	for _, kib := range [][2]int64{{64, 64}, {64, 128}, {160, 160}, {192, 128}, {128, 192}, {128, 256}, {256, 128}, {256, 256}, {4096, 4096}, {128, 0}, {4096, 0}} {
		all = append(all, combination{EStargz, 7, kib[0] << 10, max(1, kib[1]<<10)})
	}
	for _, level := range []int{1, 3, 7, 11} {
		all = append(all, combination{ZstdChunked, level, 192 << 10, 128 << 10})
	}
	for _, kib := range [][2]int64{{192, 0}, {64, 64}, {128, 128}, {256, 256}} {
		all = append(all, combination{ZstdChunked, 3, kib[0] << 10, max(1, kib[1]<<10)})
	}
	for _, c := range all {
		b.Run(fmt.Sprintf("%s/level=%d/chunk=%d/group=%d", c.format, c.level, c.chunk>>10, c.group>>10), func(b *testing.B) {
			since := cpu()
			var in, out int64
			var last remote.Reference
			for range b.N {
				last, _ = remote.ParseReference("oci:" + filepath.Join(b.TempDir(), "out"))
				r, err := Image(b.Context(), src, last, Options{Format: c.format, Level: c.level, ChunkSize: c.chunk, GroupSize: c.group})
				if err != nil {
					b.Fatal(err)
				}
				in, out = 0, 0
				for _, l := range r.Layers {
					in += l.SourceSize
					out += l.TargetSize
				}
			}
			report(b, since, out, in)
			members, runs, size := startCost(b, last)
			b.ReportMetric(float64(members), "start-members")
			b.ReportMetric(float64(runs), "start-runs")
			b.ReportMetric(float64(size)/1e6, "start-MB")
		})
	}
}

// BenchmarkPlain compresses the same tars without making them lazy.
func BenchmarkPlain(b *testing.B) {
	tars, plain := benchTars(b)
	run := func(name string, compress func(io.Writer) io.WriteCloser) {
		b.Run(name, func(b *testing.B) {
			since := cpu()
			var c counter
			for range b.N {
				c = counter{}
				for _, f := range tars {
					w := compress(countingWriter{&c})
					if _, err := f.Seek(0, io.SeekStart); err != nil {
						b.Fatal(err)
					}
					if _, err := io.Copy(w, f); err != nil {
						b.Fatal(err)
					}
					w.Close()
				}
			}
			report(b, since, c.n, plain)
		})
	}
	for _, level := range []int{5, 6, 7, 8, 9} {
		run(fmt.Sprintf("klauspost-gzip/level=%d", level), func(w io.Writer) io.WriteCloser {
			z, _ := kgzip.NewWriterLevel(w, level)
			return z
		})
	}
	for _, level := range []int{6, 9} {
		run(fmt.Sprintf("compress-gzip/level=%d", level), func(w io.Writer) io.WriteCloser {
			z, _ := gzip.NewWriterLevel(w, level)
			return z
		})
	}
	for _, level := range []int{1, 3, 7} {
		run(fmt.Sprintf("zstd/level=%d", level), func(w io.Writer) io.WriteCloser {
			z, _ := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)), zstd.WithEncoderConcurrency(1))
			return z
		})
	}
}

type countingWriter struct{ c *counter }

func (w countingWriter) Write(p []byte) (int, error) {
	w.c.n += int64(len(p))
	return len(p), nil
}

// BenchmarkStargz makes eStargz layers as stargz-snapshotter's converter does: from the compressed layers,
// side by side, with chunks of 4 MiB and one file to a member; and with its groups.
func BenchmarkStargz(b *testing.B) {
	src, err := remote.Open(b.Context(), benchImage(b), remote.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer src.Close()
	img, err := remote.Pick(b.Context(), src, nil)
	if err != nil {
		b.Fatal(err)
	}
	var plain int64
	var layers []*io.SectionReader
	for _, l := range img.Layers {
		f, err := os.Create(filepath.Join(b.TempDir(), l.Digest.Hex))
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		r, err := l.Blob.Range(b.Context(), 0, l.Size)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(f, r); err != nil {
			b.Fatal(err)
		}
		r.Close()
		layers = append(layers, io.NewSectionReader(f, 0, l.Size))
		plain += l.Size
	}
	for _, group := range []int{0, 50000} {
		b.Run(fmt.Sprintf("group=%d", group), func(b *testing.B) {
			since := cpu()
			var out counter
			for range b.N {
				out = counter{}
				var g errgroup.Group
				for _, l := range layers {
					g.Go(func() error {
						l := io.NewSectionReader(l, 0, l.Size()) // Build goes on where it stands
						blob, err := estargz.Build(l, estargz.WithMinChunkSize(group))
						if err != nil {
							return err
						}
						defer blob.Close()
						n, err := io.Copy(io.Discard, blob)
						out.add(n)
						return err
					})
				}
				if err := g.Wait(); err != nil {
					b.Fatal(err)
				}
			}
			report(b, since, out.n, plain)
		})
	}
}
