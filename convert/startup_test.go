package convert

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"lazuli/fs/meta"
	"lazuli/fs/pack"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// startImage is an image whose entrypoint is a script, in two layers.
func startImage(t testing.TB) remote.Reference {
	exec := func(f file) file { f.Mode = 0o755; return f }
	return simple(t,
		[]file{dir("bin"), exec(reg("bin/sh", noise("sh", 300000))), reg("etc/passwd", "root:x:0:0"), reg("late", noise("late", 400000))},
		[]file{exec(reg("bin/true", "#!/bin/sh\n:\n")), reg("data", noise("data", 200000)), link("data2", "data"), reg("empty", "")})
}

// A packed is what a pack has.
type packed struct {
	Files  map[string]int // chunks by the file's name
	Tables []string
}

// readPack reads a pack with everything in it verified against the image.
func readPack(t *testing.T, r remote.Reference, img *remote.Image, d v1.Descriptor) packed {
	t.Helper()
	src, _, _ := open(t, r)
	raw, err := remote.ReadBlob(t.Context(), src, d, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	in := bytes.NewReader(raw)
	x, err := pack.ReadIndex(in)
	if err != nil || x.Size != d.Size {
		t.Fatalf("index: %v, of %d bytes, not %d", err, x.Size, d.Size)
	}
	p := packed{Files: map[string]int{}}
	for _, table := range x.Tables {
		b := make([]byte, table.Size)
		if _, err := io.ReadFull(in, b); err != nil {
			t.Fatal(err)
		}
		if toc.Digest(mustDecode(sum(b))) == table.Digest {
			p.Tables = append(p.Tables, "config")
			if table.Digest.String() != img.Manifest.Config.Digest.String() {
				t.Error("the config is another")
			}
			continue
		}
		for _, l := range img.Layers {
			want, _ := toc.Promised(l.Annotations)
			if want.Digest != table.Digest {
				continue
			}
			loc, _, _ := toc.Locate(l.Annotations, l.Size)
			if _, err := toc.Parse(bytes.NewReader(b), loc, want); err != nil {
				t.Error(err)
			}
			p.Tables = append(p.Tables, l.Digest.String())
		}
	}
	var tocs []*toc.TOC
	for _, l := range img.Layers {
		blob, err := remote.ReadBlob(t.Context(), src, l.Descriptor, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		want, _ := toc.Promised(l.Annotations)
		loc, _, _ := toc.Locate(l.Annotations, l.Size)
		x, err := toc.Parse(bytes.NewReader(blob[loc.Offset:][:loc.Size]), loc, want)
		if err != nil {
			t.Fatal(err)
		}
		tocs = append(tocs, x)
	}
	tree, err := meta.Merge(tocs)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range x.Frames {
		b := make([]byte, f.Size)
		if _, err := io.ReadFull(in, b); err != nil {
			t.Fatal(err)
		}
		data, err := f.Inflate(b, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range f.Chunks {
			found := false
			for o := range tree.Objects() {
				e := &tocs[o.Layer].Entries[o.Entry]
				if num(o.Key) != c.Object {
					continue
				}
				y := tocs[o.Layer].Content(e)[c.Index]
				if int64(len(data)) < y.Size || toc.Digest(mustDecode(sum(data[:y.Size]))) != y.Digest {
					t.Fatalf("chunk %d of %s is another", c.Index, e.Name)
				}
				data, found = data[y.Size:], true
				p.Files[e.Name]++
				break
			}
			if !found {
				t.Fatalf("a chunk of object %x, which the image does not have", c.Object)
			}
		}
	}
	if in.Len() > 0 {
		t.Errorf("%d bytes are left", in.Len())
	}
	return p
}

func num(d toc.Digest) (n uint64) {
	for _, b := range d[:8] {
		n = n<<8 | uint64(b)
	}
	return n
}

// referrers returns the packs beside an image.
func referrers(t *testing.T, r remote.Reference, image v1.Hash) []v1.Descriptor {
	t.Helper()
	src, _, _ := open(t, r)
	list, err := remote.Referrers(t.Context(), src, image, pack.MediaType)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestClosure: an image in a registry gets a pack of what its command needs, once, and the same from everybody.
func TestClosure(t *testing.T) {
	src := startImage(t)
	for _, format := range []Format{EStargz, ZstdChunked} {
		reg := newTestRegistry(t)
		dst := ref(t, reg.host+"/a:1")
		one := mustConvert(t, src, dst, Options{Format: format})
		img, _, _ := readImage(t, dst)
		list := referrers(t, dst, one.Digest)
		if len(list) != 1 || len(one.Packs) != 1 || len(one.Warnings) > 0 {
			t.Fatalf("%d packs beside the image; %+v", len(list), one)
		}
		if list[0].Annotations[pack.OriginAnnotation] == "" || list[0].Annotations[pack.MadeAnnotation] != "" {
			t.Errorf("annotations %v", list[0].Annotations)
		}
		blob, ok := pack.Named(list[0].Annotations)
		if !ok || blob.Digest != one.Packs[0].Digest {
			t.Fatalf("annotations %v", list[0].Annotations)
		}
		got := readPack(t, dst, img, blob)
		if diff := cmp.Diff(packed{Files: map[string]int{"bin/true": 1, "bin/sh": 2, "etc/passwd": 1}}, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if _, ok := pack.Named(img.Manifest.Annotations); ok {
			t.Error("the manifest names it")
		}

		reg.writes()
		again := mustConvert(t, src, dst, Options{Format: format})
		if w := reg.writes(); len(w) > 0 || again.Digest != one.Digest || again.Uploaded != 0 {
			t.Errorf("the second conversion wrote %q, and is %v after %v", w, again.Digest, one.Digest)
		}
		other := ref(t, newTestRegistry(t).host+"/b:1")
		two := mustConvert(t, src, other, Options{Format: format, Workers: 1})
		if list2 := referrers(t, other, two.Digest); len(list2) != 1 || list2[0].Digest != list[0].Digest {
			t.Errorf("another time it is %v, not %v", list2, list)
		}
		off := ref(t, newTestRegistry(t).host+"/c:1")
		if r := mustConvert(t, src, off, Options{Format: format, NoPack: true}); len(r.Packs) > 0 || len(referrers(t, off, r.Digest)) > 0 {
			t.Error("there is a pack although none was wanted")
		}
	}
}

// counted is a destination whose blobs count the ranges that are read of them.
type counted struct {
	dest
	ranges atomic.Int64
	wait   time.Duration // for each
}

type countedBlob struct {
	remote.Blob
	of *counted
}

func (d *counted) blob(ctx context.Context, desc v1.Descriptor) (remote.Blob, error) {
	b, err := d.dest.blob(ctx, desc)
	return countedBlob{b, d}, err
}

func (b countedBlob) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	b.of.ranges.Add(1)
	time.Sleep(b.of.wait)
	return b.Blob.Range(ctx, off, n)
}

// TestPackRequests: what a pack has is read with few requests, each byte once.
func TestPackRequests(t *testing.T) {
	files := []file{reg("first", noise("first", 100<<10)), reg("large", noise("large", 12<<20)), reg("last", noise("last", 100<<10))}
	for _, format := range []Format{EStargz, ZstdChunked} {
		dst := newDst(t)
		mustConvert(t, simple(t, files), dst, Options{Format: format, ChunkSize: 256 << 10})
		img, _, _ := readImage(t, dst)
		under, err := openDest(t.Context(), dst, &Options{})
		if err != nil {
			t.Fatal(err)
		}
		d := &counted{dest: under}
		c, err := openContents(t.Context(), d, []v1.Descriptor{img.Layers[0].Descriptor})
		if err != nil {
			t.Fatal(err)
		}
		d.ranges.Store(0)
		x, err := c.pack(t.Context(), new(pack.Builder), c.all([]string{"last", "large"}), pack.OriginClosure)
		if err != nil {
			t.Fatal(err)
		}
		// The large file in rows of 4 MiB, of two batches at most, and the last one.
		if n := d.ranges.Load(); x.Content != 12<<20+100<<10 || n > 12<<20/maxRow+2+1 {
			t.Errorf("%v: %d bytes with %d requests", format, x.Content, n)
		}

		// What several readers want at the same time is read once.
		d.ranges.Store(0)
		d.wait = time.Second
		synctest.Test(t, func(t *testing.T) {
			f, _ := c.Lookup("first")
			var group errgroup.Group
			for range 8 {
				group.Go(func() error { return c.ReadAt(t.Context(), f, make([]byte, 1), 1000) })
			}
			if err := group.Wait(); err != nil || d.ranges.Load() != 1 {
				t.Errorf("%v: %d requests: %v", format, d.ranges.Load(), err)
			}
		})
	}
}

// TestClosureWarns: a registry that does not take packs has the image nevertheless.
func TestClosureWarns(t *testing.T) {
	reg := newTestRegistry(t)
	reg.hook = func(r *http.Request) bool {
		return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/sha256")
	}
	dst := ref(t, reg.host+"/a:1")
	r := mustConvert(t, startImage(t), dst, Options{})
	if len(r.Warnings) != 1 || len(r.Packs) > 0 {
		t.Errorf("warnings %q, packs %v", r.Warnings, r.Packs)
	}
	if _, desc, _ := open(t, dst); desc.Digest != r.Digest {
		t.Errorf("the tag is %v, not %v", desc.Digest, r.Digest)
	}
}

// TestPackNamed: a profile's pack is named by the manifest, wherever that goes.
func TestPackNamed(t *testing.T) {
	src := startImage(t)
	reg := newTestRegistry(t)
	names := []string{"data2", "gone", "bin/sh"}
	pieces := &profile.Profile{Pieces: []profile.Piece{{Path: "bin/sh", Share: 1}, {Path: "data2", Index: 3, Share: 1}, {Path: "late", Share: 0.01}}}
	for _, test := range []struct {
		name string
		opts Options
		want map[string]int
	}{
		{"names", Options{Profile: names}, map[string]int{"data": 2, "bin/sh": 2}},
		{"pieces", Options{Profile: names, Pieces: pieces}, map[string]int{"data": 1, "bin/sh": 1}},
		{"zstd:chunked", Options{Profile: names, Pieces: pieces, Format: ZstdChunked}, map[string]int{"data": 1, "bin/sh": 1}},
	} {
		for _, to := range []string{"oci:" + t.TempDir(), "docker-archive:" + t.TempDir() + "/a.tar", reg.host + "/" + strings.ReplaceAll(test.name, ":", "") + ":1"} {
			t.Run(test.name+" to "+to[:3], func(t *testing.T) {
				dst := ref(t, to)
				one := mustConvert(t, src, dst, test.opts)
				img, _, _ := readImage(t, dst)
				if one.Digest != img.Digest || len(one.Packs) != 1 || one.Packs[0].Image != img.Digest || len(one.Warnings) > 0 {
					t.Errorf("%+v", one)
				}
				blob, ok := pack.Named(img.Manifest.Annotations)
				if !ok {
					t.Fatalf("annotations %v", img.Manifest.Annotations)
				}
				if img.Manifest.Annotations["of"] != "manifest" {
					t.Error("an annotation is lost")
				}
				got := readPack(t, dst, img, blob)
				want := packed{test.want, []string{"config", img.Layers[0].Digest.String(), img.Layers[1].Digest.String()}}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				reg.writes()
				again := mustConvert(t, src, dst, test.opts)
				if w := reg.writes(); len(w) > 0 || again.Digest != one.Digest {
					t.Errorf("the second conversion wrote %q, and is %v after %v", w, again.Digest, one.Digest)
				}
				if dst.Kind() == remote.Registry {
					// Garbage collection knows artifacts and not annotations.
					list := referrers(t, dst, one.Digest)
					if found, ok := pack.Named(list[0].Annotations); len(list) != 1 || !ok || found.Digest != blob.Digest {
						t.Errorf("beside the image: %v", list)
					}
				}
				// It goes along when the image is copied, and is not named any more when the layers are others.
				copied := newDst(t)
				if r := mustConvert(t, dst, copied, Options{}); r.Digest != one.Digest {
					t.Errorf("a copy is %v, not %v", r.Digest, one.Digest)
				}
				readPack(t, copied, img, blob)
			})
		}
	}
}

// TestPackStale: a name in the manifest of an image whose layers become others is taken away.
func TestPackStale(t *testing.T) {
	l := newTestLayout(t)
	layer, id := l.layer(reg("f", "f"))
	desc := l.image("amd64", []v1.Descriptor{layer}, []v1.Hash{id})
	raw := strings.Replace(string(l.read(desc)), `"of":"manifest"`, `"of":"manifest","lazuli.pack.digest":"`+sum(nil).String()+`","lazuli.pack.size":"7"`, 1)
	dst := newDst(t)
	mustConvert(t, l.root(l.blob(desc.MediaType, []byte(raw))), dst, Options{})
	img, _, _ := readImage(t, dst)
	if diff := cmp.Diff(map[string]string{"of": "manifest"}, img.Manifest.Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
}

// TestReferrersAPI: a registry that has the API needs no tag.
func TestReferrersAPI(t *testing.T) {
	reg := newTestRegistry(t, registry.WithReferrersSupport(true))
	dst := ref(t, reg.host+"/a:1")
	r := mustConvert(t, startImage(t), dst, Options{})
	if list := referrers(t, dst, r.Digest); len(list) != 1 {
		t.Errorf("%v", list)
	}
}
