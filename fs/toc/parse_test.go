package toc

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// file is a tar entry and what it holds.
type file struct {
	tar.Header
	data string
}

// sample is a tar with one of everything that a table of contents holds.
func sample() []file {
	at := time.Unix(1700000000, 0)
	h := func(typ byte, name string) tar.Header {
		return tar.Header{Typeflag: typ, Name: name, Mode: 0o644, ModTime: at, Format: tar.FormatPAX}
	}
	root := h(tar.TypeDir, "./")
	root.Mode = 0o755
	usr := h(tar.TypeDir, "usr")
	usr.Mode = 0o755
	dir := h(tar.TypeDir, "./usr/bin/")
	dir.Mode, dir.Uid, dir.Gid = 0o1777, 70000, 4294967294
	small := h(tar.TypeReg, "./usr/bin/small")
	small.Mode = 0o6755
	small.PAXRecords = map[string]string{"SCHILY.xattr.user.b": "2\x00", "SCHILY.xattr.security.capability": "\x01\xff", "comment": "no xattr"}
	large := h(tar.TypeReg, "/usr/bin/large")
	large.ModTime = time.Unix(-1, 0)
	link := h(tar.TypeSymlink, "usr//bin/./link")
	link.Linkname = "../../../etc/\"\\\n<>&\u2028"
	hard := h(tar.TypeLink, "usr/bin/hard")
	hard.Linkname = "./usr/bin/small"
	char := h(tar.TypeChar, "dev/null")
	char.Devmajor, char.Devminor = 1, 1048575
	block := h(tar.TypeBlock, "dev/sda")
	block.Devmajor = 8
	var random strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&random, "%x", sha256.Sum256([]byte{byte(i), byte(i >> 8)}))
	}
	return []file{
		{Header: root}, {Header: usr}, {Header: dir}, {small, "hello"}, {large, random.String()}, {Header: link}, {Header: hard},
		{Header: char}, {Header: block}, {Header: h(tar.TypeFifo, "dev/initctl")},
		{Header: h(tar.TypeReg, "usr/empty")}, {Header: h(tar.TypeReg, "usr/.wh.gone")}, {Header: h(tar.TypeReg, "usr/.wh..wh..opq")},
		{h(tar.TypeReg, "name with space\nand ü"), strings.Repeat("x", 20000)},
		{h(tar.TypeReg, "zeros"), strings.Repeat("\x00", 200000) + "end"},
		{h(tar.TypeReg, "last"), "last"},
	}
}

func makeTar(t testing.TB, files []file) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		f.Size = int64(len(f.data))
		if err := w.WriteHeader(&f.Header); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, f.data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// open finds and parses the table of contents of a blob as a mount does.
func open(blob []byte, annotations map[string]string) (*TOC, error) {
	loc, ok, err := Locate(annotations, int64(len(blob)))
	if err == nil && !ok {
		loc, err = ParseFooter(blob[max(0, len(blob)-64<<10):], int64(len(blob)))
	}
	if err != nil {
		return nil, err
	}
	want, err := Promised(annotations)
	if err != nil {
		return nil, err
	}
	return Parse(bytes.NewReader(blob[loc.Offset:]), loc, want)
}

// content reads a file of a blob by its chunks, and checks their digests.
func content(t testing.TB, toc *TOC, e *Entry, blob []byte) string {
	t.Helper()
	var out strings.Builder
	for _, c := range toc.Content(e) {
		data := make([]byte, c.Size)
		if !c.Hole {
			var r io.Reader
			if toc.Compression == Gzip {
				z, err := gzip.NewReader(bytes.NewReader(blob[c.Member:toc.DataEnd]))
				if err != nil {
					t.Fatalf("%s: %v", e.Name, err)
				}
				z.Multistream(false)
				r = z
			} else {
				z, err := zstd.NewReader(bytes.NewReader(blob[c.Member:toc.DataEnd]))
				if err != nil {
					t.Fatalf("%s: %v", e.Name, err)
				}
				defer z.Close()
				r = z
			}
			if _, err := io.CopyN(io.Discard, r, c.Inner); err != nil {
				t.Fatalf("%s: %v", e.Name, err)
			}
			if _, err := io.ReadFull(r, data); err != nil {
				t.Fatalf("%s: %v", e.Name, err)
			}
			if sha256.Sum256(data) != c.Digest {
				t.Errorf("%s: chunk at byte %d has another digest", e.Name, c.FileOffset)
			}
		}
		out.Write(data)
	}
	return out.String()
}

// check compares what a table of contents says with the tar it was made from.
func check(t *testing.T, toc *TOC, blob []byte, files []file) {
	t.Helper()
	var want, got []Entry
	for _, f := range files {
		f.Size = int64(len(f.data))
		e, err := EntryFromHeader(&f.Header)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, e)
	}
	for i, e := range toc.Entries {
		if e.Type == Regular && blob != nil {
			if i < len(files) && content(t, toc, &e, blob) != files[i].data {
				t.Errorf("%s: content differs", e.Name)
			}
		}
		e.FirstChunk, e.NumChunks = 0, 0
		got = append(got, e)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// others are blobs that other programs make of the sample.
func others(t testing.TB, files []file, opts ...estargz.Option) (blob []byte, digest string) {
	data := makeTar(t, files)
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))), append(opts, estargz.WithChunkSize(10000), estargz.WithParallelism(2))...)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if blob, err = io.ReadAll(b); err != nil {
		t.Fatal(err)
	}
	return blob, b.TOCDigest().String()
}

func TestEstargz(t *testing.T) {
	for name, opts := range map[string][]estargz.Option{
		"each file a member": nil,
		"grouped":            {estargz.WithMinChunkSize(50000)},
		"prioritized":        {estargz.WithPrioritizedFiles([]string{"usr/bin/large"})},
	} {
		t.Run(name, func(t *testing.T) {
			files := sample()
			blob, digest := others(t, files, opts...)
			toc, err := open(blob, map[string]string{DigestAnnotation: digest})
			if err != nil {
				t.Fatal(err)
			}
			if toc.Digest.String() != digest {
				t.Errorf("digest %s, want %s", toc.Digest, digest)
			}
			if name == "prioritized" {
				if toc.PrefetchEnd <= 0 || toc.PrefetchEnd >= toc.DataEnd {
					t.Errorf("prefetch ends at %d of %d", toc.PrefetchEnd, toc.DataEnd)
				}
				byName := func(a, b Entry) int { return strings.Compare(a.Name, b.Name) }
				slices.SortFunc(toc.Entries, byName)
				slices.SortFunc(files, func(a, b file) int {
					x, _ := EntryFromHeader(&a.Header)
					y, _ := EntryFromHeader(&b.Header)
					return byName(x, y)
				})
			} else if toc.PrefetchEnd != 0 {
				t.Errorf("prefetch ends at %d, want 0", toc.PrefetchEnd)
			}
			check(t, toc, blob, files)
		})
	}
}

func TestZstdChunked(t *testing.T) {
	metadata := make(map[string]string)
	blob, digest := others(t, sample(), estargz.WithCompression(struct {
		*zstdchunked.Compressor
		*zstdchunked.Decompressor
	}{&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: metadata}, &zstdchunked.Decompressor{}}))
	for name, annotations := range map[string]map[string]string{
		"footer":     {DigestAnnotation: digest},
		"compressed": {ZstdChecksumAnnotation: metadata[ZstdChecksumAnnotation]},
		"position":   metadata,
		"both":       {DigestAnnotation: digest, ZstdPositionAnnotation: metadata[ZstdPositionAnnotation]},
	} {
		t.Run(name, func(t *testing.T) {
			toc, err := open(blob, annotations)
			if err != nil {
				t.Fatal(err)
			}
			if toc.Digest.String() != digest {
				t.Errorf("digest %s, want %s", toc.Digest, digest)
			}
			check(t, toc, blob, sample())
		})
	}
}

// The sample as podman writes it; see testdata/podman/main.go.
func TestPodman(t *testing.T) {
	blob, err := os.ReadFile("testdata/podman/layer.tar.zst")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("testdata/podman/annotations.json")
	if err != nil {
		t.Fatal(err)
	}
	var annotations map[string]string
	if err := json.Unmarshal(b, &annotations); err != nil {
		t.Fatal(err)
	}
	for name, annotations := range map[string]map[string]string{
		"position": annotations,
		"footer":   {PodmanChecksumAnnotation: annotations[PodmanChecksumAnnotation]},
	} {
		t.Run(name, func(t *testing.T) {
			toc, err := open(blob, annotations)
			if err != nil {
				t.Fatal(err)
			}
			check(t, toc, blob, sample())
			holes := 0
			for _, c := range toc.Chunks {
				if c.Hole {
					holes++
				}
			}
			if holes == 0 || len(toc.Chunks) < 7 {
				t.Errorf("%d holes among %d chunks", holes, len(toc.Chunks))
			}
		})
	}
}

// A layer of before eStargz: a footer of 47 bytes, no landmark, no chunk digests.
func TestLegacy(t *testing.T) {
	digest := sha256.Sum256([]byte("hello"))
	index := fmt.Sprintf(`{"version":1,"entries":[{"name":"a/","type":"dir","modtime":"2019-01-01T00:00:00Z","mode":493},`+
		`{"name":"a/b","type":"reg","size":5,"offset":3,"digest":"%s"}]}`, Digest(digest))
	blob := gzipBlob(t, index, 100)
	blob = append(blob[:len(blob)-estargz.FooterSize], legacyFooter(100)...)
	toc, err := open(blob, map[string]string{DigestAnnotation: Digest(sha256.Sum256([]byte(index))).String()})
	if err != nil {
		t.Fatal(err)
	}
	want := &TOC{
		Digest: sha256.Sum256([]byte(index)), Compression: Gzip, DataEnd: 100,
		Entries: []Entry{
			{Name: "a", Type: Directory, Mode: 0o755, MTime: 1546300800},
			{Name: "a/b", Type: Regular, Size: 5, NumChunks: 1},
		},
		Chunks: []Chunk{{Digest: digest, Size: 5, Member: 3}},
	}
	if diff := cmp.Diff(want, toc); diff != "" {
		t.Error(diff)
	}
}

// gzipBlob returns a blob of dataEnd bytes of nothing, a table of contents and a footer.
func gzipBlob(t testing.TB, index string, dataEnd int64) []byte {
	b := bytes.NewBuffer(make([]byte, dataEnd))
	b.Write(gzipTOC(t, index))
	extra := fmt.Appendf([]byte("SG\x16\x00"), "%016xSTARGZ", dataEnd)
	b.Write(estargz.CreateGzipFooter(extra))
	return b.Bytes()
}

func gzipTOC(t testing.TB, index string) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: TarName, Size: int64(len(index))}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, index)
	w.Close()
	z.Close()
	return b.Bytes()
}

func legacyFooter(offset int64) []byte {
	return estargz.CreateGzipFooter(fmt.Appendf(nil, "%016xSTARGZ", offset))
}

// parseJSON parses a table of contents of the given JSON, of a blob with 1000 bytes of files.
func parseJSON(t testing.TB, index string) (*TOC, error) {
	packed := gzipTOC(t, index)
	loc := Location{Compression: Gzip, Offset: 1000, Size: int64(len(packed)), DataEnd: 1000}
	return Parse(bytes.NewReader(packed), loc, Promise{Digest: sha256.Sum256([]byte(index))})
}
