package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"lazuli/convert"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

// parse returns a reference that is known to be one.
func parse(t testing.TB, ref string) remote.Reference {
	t.Helper()
	r, err := remote.ParseReference(ref)
	must(t, err)
	return r
}

// mountImage mounts an image on a node of its own, for as long as the test runs.
func mountImage(t testing.TB, ref string) *rootfs.Rootfs {
	t.Helper()
	needRoot(t)
	n, err := rootfs.Open(t.TempDir(), rootfs.Options{})
	must(t, err)
	r, err := n.Mount(t.Context(), parse(t, ref), "", rootfs.MountOptions{})
	if err != nil {
		n.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// A layerFile is one file of a layer that a test makes.
type layerFile struct {
	name string
	data []byte
}

// convertedImage makes an image of one layer per list of files and converts it, to a layout.
func convertedImage(t testing.TB, o convert.Options, layers ...[]layerFile) string {
	t.Helper()
	image := empty.Image
	for _, files := range layers {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range files {
			must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644, Size: int64(len(f.data))}))
			_, err := w.Write(f.data)
			must(t, err)
		}
		must(t, w.Close())
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
		must(t, err)
		image, err = mutate.AppendLayers(image, layer)
		must(t, err)
	}
	dir := filepath.Join(t.TempDir(), "plain")
	path, err := layout.Write(dir, empty.Index)
	must(t, err)
	must(t, path.AppendImage(image))
	return convertLayout(t, dir, o)
}

// convertLayout converts the image of a layout to another layout.
func convertLayout(t testing.TB, dir string, o convert.Options) string {
	t.Helper()
	lazy := filepath.Join(t.TempDir(), "lazy")
	_, err := convert.Image(t.Context(), parse(t, "oci:"+dir), parse(t, "oci:"+lazy), o)
	must(t, err)
	return lazy
}

// noise returns n bytes that do not compress, the same for the same seed.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

// TestCountMount: mounting an image of N layers takes at most N+3 requests, none of them a HEAD or a probe, beside the three that look for
// a startup pack.
func TestCountMount(t *testing.T) {
	for _, n := range []int{1, 4, 20} {
		t.Run(fmt.Sprint(n, " layers"), func(t *testing.T) {
			var layers [][]layerFile
			for i := range n {
				layers = append(layers, []layerFile{{fmt.Sprintf("f%d", i), noise(uint64(i), 300_000)}})
			}
			registry := NewRegistry(t, RegistryOptions{})
			ref := registry.Push(t, convertedImage(t, convert.Options{}, layers...), "count")
			registry.Reset()
			mountImage(t, ref)
			log := registry.Log()
			if requests, _ := registry.Traffic(); requests > n+3 || len(log) > requests+3 {
				t.Errorf("%d requests, want at most %d and 3:\n%v", len(log), n+3, log)
			}
			for _, q := range log {
				if q.looksUp() {
					continue
				}
				if q.Method != "GET" || q.Status >= 400 {
					t.Errorf("%+v", q)
				}
			}
		})
	}
}

// blobTraffic returns the bytes that the registry sent of blobs, and the number of requests for a part of one.
func blobTraffic(r *Registry) (ranges int, bytes int64) {
	for _, q := range r.Log() {
		if strings.Contains(q.Path, "/blobs/") {
			ranges++
			bytes += q.Bytes
		}
	}
	return ranges, bytes
}

// TestCountOneByte: one byte of a large file brings its chunk and no more than the readahead window.
func TestCountOneByte(t *testing.T) {
	const window = 1 << 20 // fetch.firstWindow
	registry := NewRegistry(t, RegistryOptions{})
	ref := registry.Push(t, convertedImage(t, convert.Options{}, []layerFile{{"big", noise(1, 30<<20)}}), "byte")
	r := mountImage(t, ref)
	registry.Reset()
	f, err := os.Open(filepath.Join(r.Dir, "big"))
	must(t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], 17<<20)
	must(t, err)
	// The kernel reads ahead too, by 128 KiB, so two chunks may be asked for; noise grows a little in gzip.
	const limit = window + 2*(128<<10+1<<10)
	if requests, bytes := blobTraffic(registry); bytes > limit || requests > 2 {
		t.Errorf("one byte took %d requests and %d bytes, want at most 2 and %d", requests, bytes, limit)
	}
}

// TestCountReaders: eight readers of one file cost no more requests than one.
func TestCountReaders(t *testing.T) {
	registry := NewRegistry(t, RegistryOptions{})
	content := noise(2, 20<<20)
	ref := registry.Push(t, convertedImage(t, convert.Options{}, []layerFile{{"big", content}}), "readers")
	count := func(readers int) int {
		r := mountImage(t, ref)
		registry.Reset()
		var group sync.WaitGroup
		for range readers {
			group.Go(func() {
				b, err := os.ReadFile(filepath.Join(r.Dir, "big"))
				if err != nil || !bytes.Equal(b, content) {
					t.Errorf("wrong content, %d bytes, %v", len(b), err)
				}
			})
		}
		group.Wait()
		requests, sent := blobTraffic(registry)
		if sent > int64(len(content))*101/100 {
			t.Errorf("%d readers: %d bytes sent for a file of %d", readers, sent, len(content))
		}
		return requests
	}
	one := count(1)
	if eight := count(8); eight > one+one/4+1 {
		t.Errorf("eight readers cost %d requests, one costs %d", eight, one)
	}
}

// TestCountEverything: reading every file, in any order and by several at once, fetches no byte of a blob twice.
func TestCountEverything(t *testing.T) {
	for _, format := range []convert.Format{convert.EStargz, convert.ZstdChunked} {
		t.Run(string(format), func(t *testing.T) {
			var files []layerFile
			for i := range 2000 {
				files = append(files, layerFile{fmt.Sprintf("d%d/f%d", i%37, i), noise(uint64(i), 1+i*i%9000)})
			}
			files = append(files, layerFile{"big", noise(9999, 9<<20)}, layerFile{"copy", files[5].data})
			registry := NewRegistry(t, RegistryOptions{})
			ref := registry.Push(t, convertedImage(t, convert.Options{Format: format}, files[:1500], files[1500:]), "all")
			r := mountImage(t, ref)
			registry.Reset()
			rand.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
			var group sync.WaitGroup
			for part := range slices.Chunk(files, len(files)/4+1) {
				group.Go(func() {
					for _, f := range part {
						b, err := os.ReadFile(filepath.Join(r.Dir, f.name))
						if err != nil || !bytes.Equal(b, f.data) {
							t.Errorf("%s: wrong content, %v", f.name, err)
							return
						}
					}
				})
			}
			group.Wait()
			fetchedOnce(t, registry)
		})
	}
}

// fetchedOnce shows that the ranges in the registry's log do not overlap.
func fetchedOnce(t *testing.T, registry *Registry) {
	t.Helper()
	type span struct{ from, to int64 }
	spans := map[string][]span{}
	for _, q := range registry.Log() {
		var s span
		if n, _ := fmt.Sscanf(q.Range, "bytes=%d-%d", &s.from, &s.to); n == 2 {
			spans[q.Path] = append(spans[q.Path], s)
		} else {
			t.Errorf("not a range request: %+v", q)
		}
	}
	if len(spans) == 0 {
		t.Error("nothing was fetched")
	}
	for path, list := range spans {
		slices.SortFunc(list, func(a, b span) int { return int(a.from - b.from) })
		for i := 1; i < len(list); i++ {
			if list[i].from <= list[i-1].to {
				t.Errorf("%s: bytes %d to %d were fetched twice", path, list[i].from, min(list[i].to, list[i-1].to))
			}
		}
	}
}

// TestFill: after a fill nothing is asked of the registry any more, whatever is read.
func TestFill(t *testing.T) {
	files := []layerFile{{"a", noise(1, 5<<20)}, {"b", noise(2, 100)}, {"c/d", noise(3, 300_000)}}
	registry := NewRegistry(t, RegistryOptions{})
	ref := registry.Push(t, convertedImage(t, convert.Options{}, files[:1], files[1:]), "fill")
	r := mountImage(t, ref)
	registry.Reset()
	must(t, r.Fill(context.Background()))
	fetchedOnce(t, registry)
	registry.Reset()
	err := filepath.WalkDir(r.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			_, err = os.ReadFile(path)
		}
		return err
	})
	must(t, err)
	if log := registry.Log(); len(log) > 0 {
		t.Errorf("requests after a fill: %v", log)
	}
}
