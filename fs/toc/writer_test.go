package toc

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// build makes a lazy layer of files with a JSONWriter: chunks of chunkSize bytes, each a
// member of its own or, if grouped, all of a file and its header in one.
func build(t testing.TB, files []file, c Compression, chunkSize int, grouped bool) (blob []byte, annotations map[string]string) {
	var out, raw, index bytes.Buffer
	j := NewJSONWriter(&index)
	tw := tar.NewWriter(&raw)
	pack := func(p []byte) []byte {
		var b bytes.Buffer
		if c == Gzip {
			z := gzip.NewWriter(&b)
			z.Write(p)
			z.Close()
		} else {
			z, _ := zstd.NewWriter(&b)
			z.Write(p)
			z.Close()
		}
		return b.Bytes()
	}
	member := func() {
		out.Write(pack(raw.Bytes()))
		raw.Reset()
	}
	for _, f := range files {
		f.Size = int64(len(f.data))
		e, err := EntryFromHeader(&f.Header)
		if err != nil {
			t.Fatal(err)
		}
		if err := tw.WriteHeader(&f.Header); err != nil {
			t.Fatal(err)
		}
		var chunks []Chunk
		for off := 0; off < len(f.data); off += chunkSize {
			if !grouped {
				member()
			}
			data := f.data[off:min(off+chunkSize, len(f.data))]
			chunks = append(chunks, Chunk{
				Digest: sha256.Sum256([]byte(data)), FileOffset: int64(off), Size: int64(len(data)),
				Member: int64(out.Len()), Inner: int64(raw.Len()),
			})
			io.WriteString(tw, data)
		}
		if err := tw.Flush(); err != nil {
			t.Fatal(err)
		}
		member()
		var digest Digest
		if e.Type == Regular {
			digest = sha256.Sum256([]byte(f.data))
		}
		if err := j.Entry(&e, chunks, digest); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	annotations = map[string]string{DigestAnnotation: Digest(sha256.Sum256(index.Bytes())).String()}
	if c == Gzip {
		packed, offset := gzipTOC(t, index.String()), out.Len()
		out.Write(packed)
		out.Write(estargz.CreateGzipFooter(fmt.Appendf([]byte("SG\x16\x00"), "%016xSTARGZ", offset)))
		annotations[PositionAnnotation] = fmt.Sprintf("%d:%d:%d", offset, len(packed), index.Len())
		return out.Bytes(), annotations
	}
	packed := pack(index.Bytes())
	offset := out.Len() + frameHeader
	frame := func(p []byte) {
		out.WriteString(skippable)
		out.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(p))))
		out.Write(p)
	}
	frame(packed)
	var footer []byte
	for _, n := range []int{offset, len(packed), index.Len(), typeCRFS} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	frame(append(footer, zstdMagic...))
	return out.Bytes(), annotations
}

// worst is the sample and what only our JSON keeps.
func worst() []file {
	files := sample()
	for i, name := range []string{"latin1-\xe9", "replaced-\uFFFD", strings.Repeat("n", 255), "a\x01\x7f\u2028<&>"} {
		h := tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Format: tar.FormatPAX}
		h.ModTime = time.Unix(5e9+int64(i), 123456789) // after 2038
		h.PAXRecords = map[string]string{"SCHILY.xattr.user.\xff": "v", "SCHILY.xattr.user.a": "w", "SCHILY.xattr.user.b": ""}
		files = append(files, file{h, "content of " + name})
	}
	before := tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "\xff/\xfe", ModTime: time.Unix(-1e9, 999999999), Format: tar.FormatPAX}
	hard := tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "latin1-\xe9"}
	return append(files, file{Header: before}, file{Header: hard})
}

func TestJSONWriter(t *testing.T) {
	for _, c := range []Compression{Gzip, Zstd} {
		for _, grouped := range []bool{false, true} {
			t.Run(fmt.Sprint(c, grouped), func(t *testing.T) {
				files := worst()
				blob, annotations := build(t, files, c, 7000, grouped)
				byPosition, err := open(blob, annotations)
				if err != nil {
					t.Fatal(err)
				}
				delete(annotations, PositionAnnotation)
				byFooter, err := open(blob, annotations)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(byPosition, byFooter); diff != "" {
					t.Error(diff)
				}
				check(t, byFooter, blob, files)
				if !grouped {
					checkEstargz(t, blob, annotations[DigestAnnotation], files)
				}
			})
		}
	}
}

// checkEstargz reads blob with stargz-snapshotter's library.
func checkEstargz(t *testing.T, blob []byte, digest string, files []file) {
	t.Helper()
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))), estargz.WithDecompressors(new(zstdchunked.Decompressor)))
	if err != nil {
		t.Fatal(err)
	}
	if got := r.TOCDigest().String(); got != digest {
		t.Errorf("estargz: digest %s, want %s", got, digest)
	}
	if _, err := r.Verifiers(); err != nil {
		t.Errorf("estargz: %v", err)
	}
	for _, f := range files {
		name := strings.TrimPrefix(path.Clean("/"+strings.ToValidUTF8(f.Name, "\uFFFD")), "/")
		got, ok := r.Lookup(name)
		if !ok {
			if name != "h" {
				t.Errorf("estargz: no %q", name)
			}
			continue
		}
		if f.Typeflag == tar.TypeLink {
			continue
		}
		if !got.ModTime().Equal(f.ModTime) || got.Mode != f.Mode || got.UID != f.Uid || got.GID != f.Gid ||
			int64(got.DevMajor) != f.Devmajor || int64(got.DevMinor) != f.Devminor {
			t.Errorf("estargz: %q is %+v, want %+v", name, got, f.Header)
		}
		if want := strings.ToValidUTF8(f.Linkname, "\uFFFD"); got.LinkName != want {
			t.Errorf("estargz: %q is a link to %q, want %q", name, got.LinkName, want)
		}
		for k, v := range f.PAXRecords {
			if k, ok := strings.CutPrefix(k, paxXattr); ok && k != "user.\xff" && string(got.Xattrs[k]) != v {
				t.Errorf("estargz: %q: xattr %s is %q, want %q", name, k, got.Xattrs[k], v)
			}
		}
		if f.Typeflag == tar.TypeReg {
			sr, err := r.OpenFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(sr); err != nil || string(b) != f.data {
				t.Errorf("estargz: %q: content of %d bytes (%v), want %d", name, len(b), err, len(f.data))
			}
		}
	}
}

// Whatever an Entry can hold survives writing and parsing.
func TestRoundTrip(t *testing.T) {
	rnd := rand.New(rand.NewSource(1))
	str := func(n int, not string) string {
		b := make([]byte, 1+rnd.Intn(n))
		for i := range b {
			for b[i] = byte(1 + rnd.Intn(255)); strings.IndexByte(not, b[i]) >= 0; b[i] = byte(1 + rnd.Intn(255)) {
			}
		}
		return string(b)
	}
	for range 200 {
		const dataEnd = 1 << 40
		want := TOC{Compression: Gzip, DataEnd: dataEnd}
		var index bytes.Buffer
		j := NewJSONWriter(&index)
		for range rnd.Intn(20) {
			e := Entry{
				Name: str(255, "/.") + "/" + str(255, "/."), Type: Type(1 + rnd.Intn(int(FIFO))),
				MTime: minTime + rnd.Int63n(maxTime-minTime), MTimeNsec: uint32(rnd.Intn(1e9)),
				Mode: uint32(rnd.Intn(0o10000)), UID: rnd.Uint32() / 2 * 2, GID: rnd.Uint32() / 2 * 2,
				FirstChunk: uint32(len(want.Chunks)),
			}
			for i := range rnd.Intn(3) {
				e.Xattrs = append(e.Xattrs, Xattr{fmt.Sprint("user.", i, str(200, "")), str(1000, "")})
			}
			switch e.Type {
			case Regular:
				for range rnd.Intn(4) {
					c := Chunk{FileOffset: e.Size, Size: 1 + rnd.Int63n(MaxChunkSize), Member: rnd.Int63n(dataEnd), Inner: rnd.Int63n(MaxChunkSize)}
					rnd.Read(c.Digest[:])
					want.Chunks = append(want.Chunks, c)
					e.Size += c.Size
					e.NumChunks++
				}
			case Symlink:
				e.Link = str(4095, "")
			case Hardlink:
				e.Link = str(255, "/.")
			case CharDevice, BlockDevice:
				e.Major, e.Minor = uint32(rnd.Intn(maxMajor+1)), uint32(rnd.Intn(maxMinor+1))
			}
			want.Entries = append(want.Entries, e)
			if err := j.Entry(&e, want.Content(&e), Digest{1}); err != nil {
				t.Fatal(err)
			}
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		want.Digest = sha256.Sum256(index.Bytes())
		packed := gzipTOC(t, index.String())
		got, err := Parse(bytes.NewReader(packed), Location{Compression: Gzip, Size: int64(len(packed)), DataEnd: dataEnd}, Promise{Digest: want.Digest})
		if err != nil {
			t.Fatalf("%v\n%s", err, index.String())
		}
		if diff := cmp.Diff(&want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
	}
}

func TestJSONWriterErrors(t *testing.T) {
	chunk := func(off, size int64) Chunk { return Chunk{Digest: Digest{1}, FileOffset: off, Size: size} }
	for _, tt := range []struct {
		e    Entry
		c    []Chunk
		want string
	}{
		{Entry{Name: "f", Type: Regular, Size: 1}, nil, `entry "f": chunks of 0 bytes for a file of 1`},
		{Entry{Name: "f", Type: Regular, Size: 3}, []Chunk{chunk(0, 1), chunk(2, 1)}, `entry "f": chunk at byte 2, want 1`},
		{Entry{Name: "f", Type: Regular, Size: 3}, []Chunk{chunk(0, 4)}, `entry "f": chunk of 4 bytes at byte 0 of 3`},
		{Entry{Name: "f", Type: Regular, Size: 3}, []Chunk{{Size: 3, Hole: true}}, `entry "f": a hole at byte 0`},
		{Entry{Name: "d", Type: Directory}, []Chunk{chunk(0, 1)}, `entry "d": a dir with content`},
		{Entry{Name: "x"}, nil, `entry "x": type 0`},
	} {
		err := NewJSONWriter(io.Discard).Entry(&tt.e, tt.c, Digest{})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, want %s", err, tt.want)
		}
	}
	full := errors.New("disk full")
	j := NewJSONWriter(failing{full})
	if err := j.Entry(&Entry{Name: "a", Type: FIFO}, nil, Digest{}); err != nil {
		t.Error(err)
	}
	if err := j.Close(); err != full {
		t.Errorf("%v, want %v", err, full)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// No garbage per entry: an image may have millions.
func TestJSONWriterAllocs(t *testing.T) {
	j := NewJSONWriter(io.Discard)
	e := Entry{Name: "usr/lib/a b", Type: Regular, Size: 5, MTime: 1, MTimeNsec: 1, Xattrs: []Xattr{{"user.a", "b"}}}
	c := []Chunk{{Size: 5, Member: 1 << 30, Digest: Digest{1}}}
	if n := testing.AllocsPerRun(10000, func() { j.Entry(&e, c, Digest{1}) }); n > 0 {
		t.Errorf("%v allocations per entry", n)
	}
}
