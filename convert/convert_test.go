package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// worst is a tar with what tars can have.
func worst() []file {
	pax := func(f file) file { f.Format = tar.FormatPAX; return f }
	gnu := func(f file) file { f.Format = tar.FormatGNU; return f }
	x := reg("xattrs", "x")
	x.PAXRecords = map[string]string{"SCHILY.xattr.user.a": "\x00\xff=\n", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02", "VENDOR.thing": "kept"}
	ns := pax(reg("ns", "n"))
	ns.ModTime = time.Unix(1234567890, 123456789)
	ns.AccessTime = time.Unix(5, 6)
	old := pax(reg("before-1970", "o"))
	old.ModTime = time.Unix(-1234567, 500000000)
	late := reg("after-2038", "l")
	late.ModTime = time.Unix(9e9, 0)
	late2 := gnu(reg("after-2242", "l"))
	late2.ModTime = time.Unix(99e8, 0)
	big := reg("ids", "i")
	big.Uid, big.Gid = 3000000, 4000000000
	big2 := gnu(reg("ids-gnu", "i"))
	big2.Uid, big2.Gid = 3000000, 4000000000
	suid := reg("suid", "s")
	suid.Mode = 0o6755
	suid.Uname, suid.Gname = "alice", "bob"
	dev := file{tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: time.Unix(1, 0)}, ""}
	blk := file{tar.Header{Typeflag: tar.TypeBlock, Name: "disk", Mode: 0o600, Devmajor: 259, Devminor: 70000, ModTime: time.Unix(1, 0)}, ""}
	fifo := file{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600, ModTime: time.Unix(1, 0)}, ""}
	sym := file{tar.Header{Typeflag: tar.TypeSymlink, Name: "sym", Linkname: "../../" + strings.Repeat("t/", 200), ModTime: time.Unix(1, 0)}, ""}
	global := file{tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "c0ffee"}, Format: tar.FormatPAX}, ""}
	files := []file{
		dir("."), global, dir("d"), reg("d/f", "content"), reg("empty", ""), x, ns, old, late, late2, big, big2, suid, dev, blk, fifo, sym,
		link("hard", "d/f"), link("d/hard", "big"),
		reg("./dot/./name", "dotted"), reg("/absolute", "abs"), reg("with space\nand newline", "ws"),
		reg(strings.Repeat("n", 255), "255"), reg(strings.Repeat("deep/", 60)+"file", "deep"),
		gnu(reg(strings.Repeat("gnu/", 60)+"file", "gnu")), gnu(reg("bytes-\xff\xfe", "latin")), pax(reg("bytes-pax-\xff", "latin")),
		reg(".wh.gone", ""), reg("d/.wh..wh..opq", ""),
		reg("big", noise("big", 700000)), reg("exact", noise("e", 128<<10)), reg("twice", noise("one", 300000)), reg("twice", "two"),
	}
	for i := range 300 {
		files = append(files, reg(fmt.Sprintf("small/%d", i), strings.Repeat("s", i*7)))
	}
	return files
}

// sparseTar is a tar as GNU tar -S writes it, in the PAX 1.0 and the old GNU form: with a hole of 1 MiB less 7 bytes
// between two pieces of data.
func sparseTar(t *testing.T) []byte {
	b, err := os.ReadFile("testdata/sparse.tar")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

type entry struct {
	Header tar.Header
	Data   string
}

// entries returns what a tar holds, without the entries of lazy formats.
func entries(t testing.TB, b []byte) []entry {
	t.Helper()
	var all []entry
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		switch h.Name {
		case toc.TarName, toc.PrefetchLandmark, toc.NoPrefetchLandmark:
			continue
		}
		e := entry{*h, string(data)}
		if isSparse(h) {
			// That the file had holes is not kept, and with it not how the holes were told.
			e.Header.Typeflag = tar.TypeReg
			for k := range e.Header.PAXRecords {
				if strings.HasPrefix(k, "GNU.sparse.") {
					delete(e.Header.PAXRecords, k)
				}
			}
		}
		all = append(all, e)
	}
}

var shapes = []Options{
	{},
	{GroupSize: 1},
	{ChunkSize: 8 << 10, GroupSize: 20 << 10, Level: 5},
	{ChunkSize: 4 << 20, GroupSize: 1 << 20, Level: 1},
	{Format: ZstdChunked},
	{Format: ZstdChunked, GroupSize: 1, ChunkSize: 16 << 10, Level: 7},
}

func title(o Options) string {
	return fmt.Sprintf("%s,chunk=%d,group=%d", o.Format, o.ChunkSize, o.GroupSize)
}

func TestRoundTrip(t *testing.T) {
	l := newTestLayout(t)
	tars := [][]byte{makeTar(t, worst()...), makeTar(t), sparseTar(t), makeTar(t, reg("last", noise("l", 100)))}
	// Without the end that tar should have.
	tars[3] = tars[3][:1024]
	var descs []v1.Descriptor
	var ids []v1.Hash
	for _, b := range tars {
		descs, ids = append(descs, l.blob(types.OCILayer, gzipped(b))), append(ids, sum(b))
	}
	src := l.root(l.image("amd64", descs, ids))
	for _, o := range shapes {
		t.Run(title(o), func(t *testing.T) {
			dst := newDst(t)
			r := mustConvert(t, src, dst, o)
			img, config, blobs := readImage(t, dst)
			if img.Digest != r.Digest {
				t.Errorf("tag names %v, the result says %v", img.Digest, r.Digest)
			}
			for i, b := range blobs {
				d := img.Layers[i].Descriptor
				plain := unpack(t, b)
				if got := config.RootFS.DiffIDs[i]; got != sum(plain) {
					t.Errorf("layer %d: diffID %v, the tar has %v", i, got, sum(plain))
				}
				if got := d.Annotations[toc.UncompressedSizeAnnotation]; got != fmt.Sprint(len(plain)) {
					t.Errorf("layer %d: uncompressed size %s, want %d", i, got, len(plain))
				}
				if diff := cmp.Diff(entries(t, tars[i]), entries(t, plain)); diff != "" {
					t.Errorf("layer %d: entries (-source +converted):\n%s", i, diff)
				}
				checkTOC(t, d, b, tars[i])
				checkStargz(t, d, b, tars[i], o.GroupSize == 1)
			}
		})
	}
}

// checkTOC reads every chunk as fs does: by the annotations, from its member.
func checkTOC(t *testing.T, d v1.Descriptor, blob, plain []byte) {
	t.Helper()
	want, err := toc.Promised(d.Annotations)
	if err != nil {
		t.Fatal(err)
	}
	loc, ok, err := toc.Locate(d.Annotations, d.Size)
	if err != nil || !ok {
		t.Fatalf("Locate: %v, %v", ok, err)
	}
	foot, err := toc.ParseFooter(blob[max(0, len(blob)-toc.FooterSize):], d.Size)
	if err != nil {
		t.Fatal(err)
	}
	if foot.Offset != loc.Offset || foot.Size != loc.Size || foot.Compression != loc.Compression {
		t.Errorf("footer says %+v, annotation %+v", foot, loc)
	}
	table, err := toc.Parse(bytes.NewReader(blob[loc.Offset:]), loc, want)
	if err != nil {
		t.Fatal(err)
	}
	var files []entry
	for _, e := range entries(t, plain) {
		if e.Header.Typeflag != tar.TypeXGlobalHeader {
			files = append(files, e)
		}
	}
	if len(files) != len(table.Entries) {
		t.Fatalf("%d entries in the table of contents, %d in the tar", len(table.Entries), len(files))
	}
	members := map[int64][]byte{}
	ends := []int64{loc.DataEnd}
	for _, c := range table.Chunks {
		ends = append(ends, c.Member)
	}
	slices.Sort(ends)
	for i := range table.Entries {
		e := table.Entries[i]
		wantEntry, err := toc.EntryFromHeader(&files[i].Header)
		if err != nil {
			t.Fatal(err)
		}
		var data []byte
		for _, c := range table.Content(&e) {
			m, ok := members[c.Member]
			if !ok {
				next, _ := slices.BinarySearch(ends, c.Member+1)
				m = unpack(t, blob[c.Member:ends[next]])
				members[c.Member] = m
			}
			data = append(data, m[c.Inner:c.Inner+c.Size]...)
			if got := sum(m[c.Inner : c.Inner+c.Size]).String(); got != c.Digest.String() {
				t.Errorf("%q: chunk at %d: digest %v, want %v", e.Name, c.FileOffset, got, c.Digest)
			}
		}
		if string(data) != files[i].Data {
			t.Errorf("%q: content differs", e.Name)
		}
		e.FirstChunk, e.NumChunks = 0, 0
		if diff := cmp.Diff(wantEntry, e); diff != "" {
			t.Errorf("%q (-tar +toc):\n%s", e.Name, diff)
		}
	}
}

// checkStargz reads the layer with stargz-snapshotter's library. Its Reader cannot verify grouped layers: it takes
// the offset of a member for the name of a chunk. (The snapshotter has a verifier of its own.)
func checkStargz(t *testing.T, d v1.Descriptor, blob, plain []byte, verify bool) {
	t.Helper()
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, d.Size), estargz.WithDecompressors(new(zstdchunked.Decompressor)))
	if err != nil {
		t.Fatal(err)
	}
	dgst := digest.Digest(d.Annotations[toc.DigestAnnotation])
	if r.TOCDigest() != dgst {
		t.Errorf("estargz: TOC digest %v, annotation %v", r.TOCDigest(), dgst)
	}
	var v estargz.TOCEntryVerifier
	if verify {
		if v, err = r.VerifyTOC(dgst); err != nil {
			t.Fatalf("estargz: %v", err)
		}
	}
	last := map[string]entry{}
	for _, e := range entries(t, plain) {
		last[strings.Trim(filepath.Clean("/"+e.Header.Name), "/")] = e
	}
	for name, e := range last {
		if e.Header.Typeflag != tar.TypeReg || name == "twice" || strings.Contains(name, "\xff") {
			continue // of a name that comes twice its Reader mixes the chunks
		}
		f, err := r.OpenFile(name)
		if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, f.Size())
		if _, err := io.ReadFull(f, data); err != nil && len(data) > 0 {
			t.Fatalf("estargz: %q: %v", name, err)
		}
		if string(data) != e.Data {
			t.Errorf("estargz: %q: content differs", name)
		}
		if x, _ := r.Lookup(name); len(data) > 0 && x.Digest != hexSum(e.Data) {
			t.Errorf("estargz: %q: digest %s, want %s", name, x.Digest, hexSum(e.Data))
		}
		for off := int64(0); verify && off < int64(len(data)); {
			c, ok := r.ChunkEntryForOffset(name, off)
			if !ok {
				t.Fatalf("estargz: %q: no chunk at %d", name, off)
			}
			w, err := v.Verifier(c)
			if err != nil {
				t.Fatal(err)
			}
			w.Write(data[c.ChunkOffset : c.ChunkOffset+c.ChunkSize])
			if !w.Verified() {
				t.Errorf("estargz: %q: chunk at %d does not verify", name, off)
			}
			off = c.ChunkOffset + c.ChunkSize
		}
	}
	if _, ok := r.Lookup(toc.NoPrefetchLandmark); !ok {
		t.Error("estargz: no landmark")
	}
}

// The digests depend neither on the number of workers nor on what compressed with them before.
func TestDeterministic(t *testing.T) {
	var files []file
	for i := range 400 {
		files = append(files, reg(fmt.Sprint("f", i), strings.Repeat(noise(fmt.Sprint(i), i), 1+i%50)))
	}
	src := simple(t, worst(), files)
	for _, o := range shapes {
		t.Run(title(o), func(t *testing.T) {
			var want v1.Hash
			for _, procs := range []int{1, 2, 7, 1} {
				old := runtime.GOMAXPROCS(procs)
				r := mustConvert(t, src, newDst(t), o)
				runtime.GOMAXPROCS(old)
				if want == (v1.Hash{}) {
					want = r.Digest
				}
				if r.Digest != want {
					t.Errorf("GOMAXPROCS=%d: %v, before %v", procs, r.Digest, want)
				}
			}
		})
	}
}

func TestIdempotent(t *testing.T) {
	base, app := []file{reg("base", noise("base", 200000))}, []file{reg("app", noise("app", 1000))}
	src, src2 := simple(t, base, app), simple(t, base, []file{reg("app", "another")})
	reg := newTestRegistry(t)
	dst := func(s string) string { return reg.host + "/" + s }
	outcomes := func(r *Result) (s []Outcome) {
		for _, l := range r.Layers {
			s = append(s, l.Outcome)
		}
		return s
	}
	cache := Options{Cache: t.TempDir()}
	first := mustConvert(t, src, ref(t, dst("a:1")), cache)
	if len(reg.writes()) == 0 || first.Uploaded == 0 {
		t.Fatal("the first conversion wrote nothing")
	}
	for _, step := range []struct {
		name   string
		to     string
		from   int
		opts   Options
		want   []Outcome
		writes []string // prefixes of the requests that write, but manifests and configs
	}{
		{"again", "a:1", 1, cache, []Outcome{Reused, Reused}, nil},
		{"again without a record", "a:1", 1, Options{}, []Outcome{Reused, Reused}, nil},
		{"a damaged record", "a:1", 1, Options{Cache: damaged(t, cache.Cache)}, []Outcome{Reused, Reused}, nil},
		{"another tag, without a record", "a:2", 2, Options{}, []Outcome{Reused, Converted}, []string{"POST /v2/a/blobs/uploads/", "PATCH", "PUT"}},
		{"another repository", "b:1", 1, cache, []Outcome{Reused, Reused}, []string{
			"POST /v2/b/blobs/uploads/?from=a&mount=", "POST /v2/b/blobs/uploads/?from=a&mount="}},
		{"another shape", "a:1", 1, Options{Cache: cache.Cache, Level: 1}, []Outcome{Converted, Converted}, []string{"POST", "PATCH", "PUT", "POST", "PATCH", "PUT"}},
	} {
		t.Run(step.name, func(t *testing.T) {
			from := src
			if step.from == 2 {
				from = src2
			}
			r := mustConvert(t, from, ref(t, dst(step.to)), step.opts)
			if diff := cmp.Diff(step.want, outcomes(r)); diff != "" {
				t.Errorf("outcomes (-want +got):\n%s", diff)
			}
			if step.to == "a:1" && step.want[1] == Reused {
				if w := reg.writes(); len(w) > 0 || r.Uploaded != 0 {
					t.Errorf("%d bytes uploaded, by %q", r.Uploaded, w)
				}
				if r.Digest != first.Digest {
					t.Errorf("digest %v, at first %v", r.Digest, first.Digest)
				}
				return
			}
			var posts []string
			for _, w := range reg.writes() {
				if strings.HasPrefix(w, "POST") {
					posts = append(posts, w)
				}
			}
			var wantPosts []string
			for _, w := range step.writes {
				if strings.HasPrefix(w, "POST") {
					wantPosts = append(wantPosts, w)
				}
			}
			if len(posts) != len(wantPosts)+1 { // and the config's
				t.Fatalf("uploads: %q", posts)
			}
			n := 0
			for _, p := range posts {
				if slices.ContainsFunc(wantPosts, func(w string) bool { return strings.HasPrefix(p, w) }) {
					n++
				}
			}
			if n < len(wantPosts) {
				t.Errorf("uploads: %q, want %q", posts, wantPosts)
			}
		})
	}

	// A layout and an archive: the second run leaves the very files.
	for _, to := range []string{"oci:" + filepath.Join(t.TempDir(), "l"), "docker-archive:" + filepath.Join(t.TempDir(), "f.tar")} {
		one := mustConvert(t, src, ref(t, to), Options{})
		st, _ := os.Stat(ref(t, to).Path())
		two := mustConvert(t, src, ref(t, to), Options{})
		st2, _ := os.Stat(ref(t, to).Path())
		if !os.SameFile(st, st2) || !st.ModTime().Equal(st2.ModTime()) {
			t.Errorf("%s: written again", to)
		}
		if one.Digest != two.Digest || !slices.Equal(outcomes(two), []Outcome{Reused, Reused}) {
			t.Errorf("%s: %+v", to, two)
		}
	}
}

// damaged returns a copy of a cache whose records are cut off.
func damaged(t *testing.T, cache string) string {
	dir := t.TempDir()
	all, _ := filepath.Glob(filepath.Join(cache, "*.json"))
	if len(all) != 2 {
		t.Fatalf("records: %v", all)
	}
	for _, name := range all {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), b[:len(b)/2], 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestPairings(t *testing.T) {
	src := simple(t, []file{dir("d"), reg("d/a", noise("a", 1000))}, []file{reg("b", "b")})
	reg := newTestRegistry(t)
	places := func(i string) []string {
		return []string{reg.host + "/r" + i + ":tag", "oci:" + filepath.Join(t.TempDir(), "l") + ":tag", "docker-archive:" + filepath.Join(t.TempDir(), "f.tar") + ":example.com/x:tag"}
	}
	var want v1.Hash
	for i, from := range places("") {
		// A lazy image goes over as it is, so the digest must be the same everywhere.
		r := mustConvert(t, src, ref(t, from), Options{})
		if want == (v1.Hash{}) {
			want = r.Digest
		}
		for _, to := range places(fmt.Sprint(i)) {
			r := mustConvert(t, ref(t, from), ref(t, to), Options{})
			if r.Digest != want {
				t.Errorf("%s to %s: %v, want %v", from, to, r.Digest, want)
			}
			for _, l := range r.Layers {
				if l.Outcome != Kept {
					t.Errorf("%s to %s: %+v", from, to, l)
				}
			}
			img, _, _ := readImage(t, ref(t, to))
			if img.Digest != want {
				t.Errorf("%s: %v, want %v", to, img.Digest, want)
			}
		}
	}
}

func TestIndex(t *testing.T) {
	l := newTestLayout(t)
	shared, sharedID := l.layer(reg("shared", "s"))
	var manifests []any
	var digests []v1.Hash
	for _, arch := range []string{"amd64", "arm64"} {
		own, id := l.layer(reg(arch, arch))
		m := l.image(arch, []v1.Descriptor{shared, own}, []v1.Hash{sharedID, id})
		digests = append(digests, m.Digest)
		manifests = append(manifests, map[string]any{"mediaType": m.MediaType, "digest": m.Digest, "size": m.Size, "x.made": arch,
			"platform": map[string]any{"os": "linux", "architecture": arch, "variant": "x"}, "annotations": map[string]string{"of": arch}})
	}
	statement := l.blob("application/vnd.in-toto+json", []byte(`{"subject": "the original"}`))
	for i, d := range digests[:2] {
		config := l.blob(types.OCIConfigJSON, fmt.Appendf(nil, `{"rootfs":{"diff_ids":[]},"n":%d}`, i))
		att := l.json(types.OCIManifestSchema1, map[string]any{"schemaVersion": 2, "mediaType": types.OCIManifestSchema1, "config": config, "layers": []any{statement}})
		manifests = append(manifests, map[string]any{"mediaType": att.MediaType, "digest": att.Digest, "size": att.Size,
			"platform":    map[string]any{"os": "unknown", "architecture": "unknown"},
			"annotations": map[string]string{attestationType: "attestation-manifest", attestationDigest: d.String()}})
	}
	src := l.root(l.json(types.OCIImageIndex, map[string]any{"schemaVersion": 2, "mediaType": types.OCIImageIndex, "manifests": manifests, "annotations": map[string]string{"of": "index"}, "x.made": 1}))

	reg := newTestRegistry(t)
	for _, to := range []string{reg.host + "/i:tag", "oci:" + filepath.Join(t.TempDir(), "l"), "docker-archive:" + filepath.Join(t.TempDir(), "f")} {
		r := mustConvert(t, src, ref(t, to), Options{})
		if len(r.Layers) != 3 {
			t.Errorf("layers: %+v", r.Layers)
		}
		from, _, rawFrom := open(t, src)
		got, _, rawGot := open(t, ref(t, to))
		var was, is v1.IndexManifest
		if err := errors.Join(json.Unmarshal(rawFrom, &was), json.Unmarshal(rawGot, &is)); err != nil {
			t.Fatal(err)
		}
		if len(is.Manifests) != 4 || is.Annotations["of"] != "index" || !bytes.Contains(rawGot, []byte(`"x.made":"arm64"`)) || !bytes.Contains(rawGot, []byte(`"x.made":1`)) {
			t.Fatalf("index: %s", rawGot)
		}
		for i := range is.Manifests {
			a, b := was.Manifests[i], is.Manifests[i]
			if diff := cmp.Diff(a.Platform, b.Platform); diff != "" {
				t.Error(diff)
			}
			rawA, err1 := from.Manifest(t.Context(), a)
			rawB, err2 := got.Manifest(t.Context(), b)
			if err := errors.Join(err1, err2); err != nil {
				t.Fatal(err)
			}
			if i >= 2 {
				if !bytes.Equal(rawA, rawB) {
					t.Error("attestation changed")
				}
				if got, want := b.Annotations[attestationDigest], is.Manifests[i-2].Digest.String(); got != want {
					t.Errorf("attestation of %s, want %s", got, want)
				}
				if _, err := got.Blob(statement).Range(t.Context(), 0, 1); err != nil {
					t.Error(err)
				}
				continue
			}
			if a.Digest == b.Digest {
				t.Error("image not converted")
			}
			if diff := cmp.Diff(strip(t, rawA, "digest", "size", "annotations"), strip(t, rawB, "digest", "size", "annotations")); diff != "" {
				t.Errorf("manifest (-source +converted):\n%s", diff)
			}
			if !bytes.Contains(rawB, []byte(`"of":"manifest"`)) {
				t.Error("annotations of the manifest are gone")
			}
		}
		// Only one platform, with its attestation.
		one := newDst(t)
		mustConvert(t, src, one, Options{Platforms: []v1.Platform{{OS: "linux", Architecture: "arm64"}}})
		_, _, raw := open(t, one)
		var index v1.IndexManifest
		if err := json.Unmarshal(raw, &index); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]v1.Descriptor{is.Manifests[1], is.Manifests[3]}, index.Manifests); diff != "" {
			t.Errorf("arm64 alone (-want +got):\n%s", diff)
		}
	}
	if _, err := convertTo(t, src, newDst(t), Options{Platforms: []v1.Platform{{OS: "linux", Architecture: "riscv64"}}}); err == nil || !strings.Contains(err.Error(), "linux/amd64") {
		t.Errorf("riscv64: %v", err)
	}
}

// strip returns JSON without the given fields at any depth.
func strip(t *testing.T, raw []byte, fields ...string) any {
	var v any
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, f := range fields {
				delete(v, f)
			}
			for _, x := range v {
				walk(x)
			}
		case []any:
			for _, x := range v {
				walk(x)
			}
		}
	}
	walk(v)
	return v
}

func TestConfigKept(t *testing.T) {
	src, dst := simple(t, []file{reg("a", "a")}), newDst(t)
	mustConvert(t, src, dst, Options{})
	a, _, _ := readImage(t, src)
	b, _, _ := readImage(t, dst)
	_, rawA, err1 := a.Config(t.Context())
	_, rawB, err2 := b.Config(t.Context())
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strip(t, rawA, "diff_ids"), strip(t, rawB, "diff_ids")); diff != "" {
		t.Errorf("config (-source +converted):\n%s", diff)
	}
}

// Docker's media types become OCI's, which have annotations; what is not to be distributed or no tar stays.
func TestMediaTypes(t *testing.T) {
	l := newTestLayout(t)
	tar1, tar2 := makeTar(t, reg("a", "a")), makeTar(t, reg("b", "b"))
	foreign := v1.Descriptor{MediaType: types.DockerForeignLayer, Digest: sum([]byte("elsewhere")), Size: 9, URLs: []string{"http://127.0.0.1:1/x"}}
	wasm := l.blob("application/wasm", []byte("wasm"))
	ids := []v1.Hash{sum(tar1), sum(tar2), sum([]byte("f")), sum([]byte("w"))}
	config := l.json(types.DockerConfigJSON, map[string]any{"os": "linux", "rootfs": map[string]any{"diff_ids": ids}})
	src := l.root(l.json(types.DockerManifestSchema2, map[string]any{"schemaVersion": 2, "mediaType": types.DockerManifestSchema2, "config": config,
		"layers": []any{l.blob(types.DockerLayer, gzipped(tar1)), l.blob(types.DockerUncompressedLayer, tar2), foreign, wasm}}))
	dst := newDst(t)
	mustConvert(t, src, dst, Options{})
	_, _, raw := open(t, dst)
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	var got []types.MediaType
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		got = append(got, d.MediaType)
	}
	want := []types.MediaType{types.OCIConfigJSON, types.OCILayer, types.OCILayer, types.OCIRestrictedLayer, "application/wasm"}
	if diff := cmp.Diff(want, got); diff != "" || m.MediaType != types.OCIManifestSchema1 {
		t.Errorf("media types (-want +got):\n%s", diff)
	}
	if m.Layers[2].Digest != foreign.Digest || len(m.Layers[2].URLs) != 1 || m.Layers[3].Digest != wasm.Digest {
		t.Errorf("layers: %+v", m.Layers)
	}
}

// A layer that is lazy, but whose manifest lost the annotations, is kept and gets them again.
func TestAnnotationsLost(t *testing.T) {
	for _, format := range []Format{EStargz, ZstdChunked} {
		lazy := newDst(t)
		mustConvert(t, simple(t, worst()), lazy, Options{Format: format})
		img, config, blobs := readImage(t, lazy)
		l := newTestLayout(t)
		src := l.root(l.image("amd64", []v1.Descriptor{l.blob(img.Layers[0].MediaType, blobs[0])}, config.RootFS.DiffIDs))
		dst := newDst(t)
		r := mustConvert(t, src, dst, Options{})
		if r.Layers[0].Outcome != Kept || r.Layers[0].Target != img.Layers[0].Digest {
			t.Fatalf("%+v", r.Layers)
		}
		again, _, _ := readImage(t, dst)
		a, b := img.Layers[0].Annotations, again.Layers[0].Annotations
		for _, k := range []string{toc.DigestAnnotation, toc.PositionAnnotation, toc.ZstdPositionAnnotation} {
			if a[k] != b[k] {
				t.Errorf("%s: %q, was %q", k, b[k], a[k])
			}
		}
	}
}

func TestProfile(t *testing.T) {
	base := []file{dir("d"), reg("d/late", noise("l", 200000)), reg("d/x", "x"), link("d/hard", "d/x"), reg("twice", "1"), reg("twice", "2"),
		dir("gone"), reg("gone/f", "f"), reg(".wh.gone", ""), reg("other", "o"), reg("first", noise("f", 300000))}
	src := simple(t, base, []file{reg("upper", "u")})
	profile, err := ParseProfile(strings.NewReader("# what starts\n/first\n{\"path\": \"d/hard\", \"chunks\": [0]}\n\ntwice\ngone/f\nmissing\nd//x\nfirst\n"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"first", "d/hard", "twice", "gone/f", "missing", "d/x"}, profile); diff != "" {
		t.Fatal(diff)
	}
	for _, format := range []Format{EStargz, ZstdChunked} {
		dst := newDst(t)
		r := mustConvert(t, src, dst, Options{Profile: profile, Format: format})
		if diff := cmp.Diff([]string{"twice", "gone/f", "missing"}, r.Missed); diff != "" {
			t.Errorf("missed (-want +got):\n%s", diff)
		}
		img, _, blobs := readImage(t, dst)
		var order []string
		tr := tar.NewReader(bytes.NewReader(unpack(t, blobs[0])))
		for {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.Name != toc.TarName {
				order = append(order, h.Name)
			}
		}
		want := []string{"first", "d/", "d/x", "d/hard", toc.PrefetchLandmark, "d/late", "twice", "twice", "gone/", "gone/f", ".wh.gone", "other"}
		if diff := cmp.Diff(want, order); diff != "" {
			t.Errorf("order (-want +got):\n%s", diff)
		}
		if !bytes.Contains(unpack(t, blobs[1]), []byte(toc.NoPrefetchLandmark)) {
			t.Error("the layer without files of the profile has no landmark that says so")
		}
		// What is before the landmark's member is what is fetched ahead: all of the profile.
		lr, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blobs[0]), 0, img.Layers[0].Size), estargz.WithDecompressors(new(zstdchunked.Decompressor)))
		if err != nil {
			t.Fatal(err)
		}
		mark, _ := lr.Lookup(toc.PrefetchLandmark)
		late, _ := lr.Lookup("d/late")
		x, _ := lr.Lookup("d/x")
		if mark.InnerOffset != 0 || x.Offset >= mark.Offset || late.Offset < mark.Offset {
			t.Errorf("offsets: x %d, landmark %d+%d, late %d", x.Offset, mark.Offset, mark.InnerOffset, late.Offset)
		}
	}
	if _, err := ParseProfile(strings.NewReader("{\"path\":\n")); err == nil {
		t.Error("a line that is no JSON was read")
	}
}

func TestBadInput(t *testing.T) {
	good := gzipped(makeTar(t, reg("some/file", noise("s", 300000))))
	flip := bytes.Clone(good)
	flip[len(flip)/2] ^= 1
	xattr := reg("evil/file", "e")
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.trusted.overlay.redirect": "/x"}
	cut := makeTar(t, reg("some/file", noise("s", 3000)))[:2000]
	for _, c := range []struct {
		name  string
		layer []byte
		lie   []byte // what the blob is instead of layer
		want  string
	}{
		{"damaged", good, flip, "damaged"},
		{"truncated", good, good[:len(good)-100], "truncated"},
		{"bad gzip", flip, nil, ""},
		{"no tar", gzipped([]byte(noise("n", 5000))), nil, "tar at byte"},
		{"cut tar", gzipped(cut), nil, "some/file"},
		{"cut gzip", good[:len(good)-100], nil, "some/file"},
		{"xattr", gzipped(makeTar(t, reg("a", "a"), xattr)), nil, `"evil/file": xattr "trusted.overlay.redirect"`},
		{"name", gzipped(makeTar(t, reg("a/../../b", "a"))), nil, `"a/../../b"`},
		{"text", []byte("hello, this is no layer at all"), nil, "tar at byte"},
	} {
		for _, profile := range [][]string{nil, {"some/file"}} {
			t.Run(fmt.Sprint(c.name, profile), func(t *testing.T) {
				l := newTestLayout(t)
				fine, id := l.layer(reg("fine", "f"))
				bad := l.blob(types.OCILayer, c.layer)
				if c.lie != nil {
					if err := os.WriteFile(filepath.Join(l.dir, "blobs/sha256", bad.Digest.Hex), c.lie, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				src := l.root(l.image("amd64", []v1.Descriptor{fine, bad}, []v1.Hash{id, id}))
				reg := newTestRegistry(t)
				dst := t.TempDir()
				for _, to := range []string{reg.host + "/x:tag", "oci:" + dst + "/l", "docker-archive:" + dst + "/f"} {
					_, err := convertTo(t, src, ref(t, to), Options{Profile: profile})
					if err == nil || !strings.Contains(err.Error(), "layer "+bad.Digest.String()) || !strings.Contains(err.Error(), c.want) {
						t.Errorf("error %v, want one with the layer and %q", err, c.want)
					}
				}
				if left, _ := os.ReadDir(dst); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
				for _, w := range reg.writes() {
					if strings.Contains(w, "/manifests/") {
						t.Errorf("written: %s", w)
					}
				}
			})
		}
	}
	if _, err := convertTo(t, ref(t, "oci:"+t.TempDir()), newDst(t), Options{}); err == nil {
		t.Error("an image that is not there was converted")
	}
	for _, o := range []Options{{Format: "zip"}, {Level: 10}, {ChunkSize: 1}, {GroupSize: -1}} {
		if _, err := convertTo(t, simple(t), newDst(t), o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}

// Whenever a conversion is canceled, nothing has a tag and nothing temporary is left.
func TestCancel(t *testing.T) {
	src := simple(t, []file{reg("a", noise("a", 3000000))}, []file{reg("b", noise("b", 100000))})
	for _, at := range []string{"POST", "PATCH", "HEAD", "PUT"} {
		t.Run(at, func(t *testing.T) {
			reg := newTestRegistry(t)
			ctx, cancel := context.WithCancel(t.Context())
			reg.hook = func(r *http.Request) bool {
				if r.Method == at {
					cancel()
				}
				return false
			}
			tmp := t.TempDir()
			_, err := Image(ctx, src, ref(t, reg.host+"/x:tag"), Options{TempDir: tmp})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
			if left, _ := os.ReadDir(tmp); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			for _, w := range reg.writes() {
				if strings.Contains(w, "/manifests/tag") {
					t.Errorf("written: %s", w)
				}
			}
		})
	}
	dir := t.TempDir()
	for _, to := range []string{"oci:" + dir + "/new", "docker-archive:" + dir + "/new.tar"} {
		ctx, cancel := context.WithCancel(t.Context())
		p := new(Progress)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for p.Status().Read == 0 && ctx.Err() == nil {
				runtime.Gosched()
			}
			cancel()
		}()
		if _, err := Image(ctx, src, ref(t, to), Options{TempDir: dir, Progress: p}); err == nil {
			t.Log("was faster than the cancel") // which leaves what was asked for
			os.RemoveAll(ref(t, to).Path())
		}
		cancel()
		<-done
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%s: left: %v", to, left)
		}
	}
}

// Memory is that of the pool, whatever the layers are: one member is enough for many large layers, and
// all of them together stay within the budget.
func TestMemory(t *testing.T) {
	src := simple(t, []file{reg("a", noise("a", 2000000))}, []file{reg("b", noise("b", 2000000))}, worst())
	in, desc, raw := open(t, src)
	c := &conversion{src: in, opts: Options{TempDir: t.TempDir(), Progress: new(Progress)}, layers: map[v1.Hash]*layerTask{}, copies: map[v1.Hash]v1.Descriptor{}}
	c.shape, _ = c.opts.shape()
	if _, err := c.plan(t.Context(), desc, raw, 0); err != nil {
		t.Fatal(err)
	}
	pool := newPool(c.shape, 1)
	for len(pool.free) > 1 {
		<-pool.free
	}
	done := make(chan error)
	for _, task := range c.order {
		go func() {
			b, err := c.convertLayer(t.Context(), task.desc, pool, func(int) {})
			if err == nil {
				b.Close()
			}
			done <- err
		}()
	}
	for range c.order {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if len(pool.free) != 1 {
		t.Errorf("%d members came back, want 1", len(pool.free))
	}
	pool.close()

	for _, chunk := range []int64{minChunk, defaultChunk, 4 << 20, maxChunk} {
		for _, workers := range []int{1, 2, 64} {
			s := shape{EStargz, 1, chunk, 1 << 20}
			p := newPool(s, workers)
			n := int64(cap(p.free))
			p.close()
			if n*s.memberSize() > memberBudget && n > int64(workers)+2 {
				t.Errorf("chunk %d, %d workers: %d members of %d bytes", chunk, workers, n, s.memberSize())
			}
		}
	}
}

// A memory is a source with one blob. Its streams break after so many bytes, if that is not 0.
type memory struct {
	remote.Source
	data   []byte
	breaks int
}

func (m *memory) Blob(v1.Descriptor) remote.Blob { return m }
func (m *memory) Size() int64                    { return int64(len(m.data)) }
func (m *memory) Range(_ context.Context, off, n int64) (io.ReadCloser, error) {
	r := io.Reader(bytes.NewReader(m.data[off : off+n]))
	if m.breaks > 0 && n > int64(m.breaks) {
		r = io.MultiReader(io.LimitReader(r, int64(m.breaks)), iotest.ErrReader(io.ErrUnexpectedEOF))
	}
	return io.NopCloser(r), nil
}

// convertMemory converts one layer, by itself.
func convertMemory(t testing.TB, m *memory) (*blob, error) {
	c := &conversion{src: m, opts: Options{TempDir: t.TempDir(), Level: 1, Progress: new(Progress)}}
	var err error
	if c.shape, err = c.opts.shape(); err != nil {
		t.Fatal(err)
	}
	p := newPool(c.shape, 1)
	defer p.close()
	return c.convertLayer(t.Context(), v1.Descriptor{Digest: sum(m.data), Size: m.Size()}, p, func(int) {})
}

// A stream that breaks is taken up again where it broke.
func TestResume(t *testing.T) {
	data := gzipped(makeTar(t, worst()...))
	want, err := convertMemory(t, &memory{data: data})
	if err != nil {
		t.Fatal(err)
	}
	defer want.Close()
	got, err := convertMemory(t, &memory{data: data, breaks: 100_000})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if got.digest != want.digest {
		t.Errorf("%v, without breaks %v", got.digest, want.digest)
	}
	if _, err := convertMemory(t, &memory{data: data, breaks: 1}); err != nil {
		t.Error(err) // slow is not broken
	}
}

// FuzzLayer converts any bytes as a layer: an error, or a lazy layer that can be read.
func FuzzLayer(f *testing.F) {
	f.Add(makeTar(f, worst()[:20]...))
	f.Add(gzipped(makeTar(f, reg("a", "a"), link("b", "a"))))
	f.Add([]byte{})
	if b, err := os.ReadFile("testdata/sparse.tar"); err == nil {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := convertMemory(t, &memory{data: data})
		if err != nil {
			return
		}
		defer b.Close()
		raw, err := io.ReadAll(b.open())
		if err != nil {
			t.Fatal(err)
		}
		if b.digest != sum(raw) || b.diffID != sum(unpack(t, raw)) {
			t.Error("digest or diffID")
		}
		want, _ := toc.Promised(b.annotations)
		loc, _, err := toc.Locate(b.annotations, b.size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := toc.Parse(bytes.NewReader(raw[loc.Offset:]), loc, want); err != nil {
			t.Error(err)
		}
	})
}
