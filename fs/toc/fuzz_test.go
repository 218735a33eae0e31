package toc

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"io"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// sound fails the test unless t is all that TOC, Entry and Chunk document. data
// bounds what may have been made of it.
func sound(t *testing.T, toc *TOC, data int) {
	t.Helper()
	if len(toc.Entries)+len(toc.Chunks) > data {
		t.Errorf("%d entries and %d chunks of %d bytes", len(toc.Entries), len(toc.Chunks), data)
	}
	next := 0
	for i := range toc.Entries {
		e := &toc.Entries[i]
		if e.Name != "" || e.Type != Directory {
			soundName(t, e.Name)
		}
		if reserved(e.Name) {
			t.Errorf("%q is an entry", e.Name)
		}
		switch {
		case e.Type < Regular || e.Type > FIFO, e.Mode > 0o7777, e.MTimeNsec >= 1e9,
			e.Type != Regular && (e.Size != 0 || e.NumChunks != 0),
			(e.Link != "") != (e.Type == Symlink || e.Type == Hardlink),
			len(e.Link) > maxName || strings.Contains(e.Link, "\x00"),
			int(e.FirstChunk) != next:
			t.Errorf("%q: %+v", e.Name, e)
		}
		if e.Type == Hardlink {
			soundName(t, e.Link)
		}
		sum := 0
		for j, x := range e.Xattrs {
			sum += len(x.Name) + len(x.Value)
			if x.Name == "" || j > 0 && e.Xattrs[j-1].Name >= x.Name || strings.HasPrefix(x.Name, "trusted.overlay.") || strings.HasPrefix(x.Name, "user.overlay.") {
				t.Errorf("%q: xattr %q", e.Name, x.Name)
			}
		}
		if sum > MaxXattrs {
			t.Errorf("%q: %d bytes of xattrs", e.Name, sum)
		}
		var off int64
		for _, c := range toc.Content(e) {
			switch {
			case c.FileOffset != off, c.Size <= 0, c.Size > e.Size-off,
				c.Hole != c.Digest.IsZero(),
				c.Hole && (c.Member != 0 || c.Inner != 0),
				!c.Hole && c.Size > MaxChunkSize,
				toc.Compression == Whole && (c.Hole || c.Member != 0 || c.Inner != 0),
				toc.Compression != Whole && !c.Hole && (c.Member < 0 || c.Member >= toc.DataEnd || c.Inner < 0 || c.Inner > MaxChunkSize):
				t.Errorf("%q: %+v", e.Name, c)
			}
			off += c.Size
		}
		if off != e.Size {
			t.Errorf("%q: chunks of %d bytes for %d", e.Name, off, e.Size)
		}
		next += int(e.NumChunks)
	}
	if next != len(toc.Chunks) {
		t.Errorf("%d chunks, %d of entries", len(toc.Chunks), next)
	}
	if toc.PrefetchEnd < 0 || toc.PrefetchEnd > toc.DataEnd {
		t.Errorf("prefetch to %d of %d", toc.PrefetchEnd, toc.DataEnd)
	}
}

func soundName(t *testing.T, name string) {
	t.Helper()
	for elem := range strings.SplitSeq(name, "/") {
		if elem == "" || elem == "." || elem == ".." || len(elem) > maxElement || strings.Contains(elem, "\x00") || len(name) > maxName {
			t.Errorf("name %q", name)
		}
	}
}

// FuzzParse reads JSON. What it accepts is sound, and written again is the same.
func FuzzParse(f *testing.F) {
	for _, tt := range badJSON {
		if len(tt.index) < 1<<16 {
			f.Add([]byte(tt.index))
		}
	}
	f.Add([]byte(rows(`"name":"a","type":"reg","size":5,"offset":3,"digest":`+sha,
		`"name":"b","type":"reg","size":9,"offset":3,"innerOffset":7,"chunkSize":4,"xattrs":{"user.a":"eA=="},"chunkDigest":`+sha,
		`"type":"chunk","chunkOffset":4,"chunkSize":5,"chunkType":"zeros"`,
		`"name":"c/\"","type":"symlink","linkName":"/x","modtime":"2026-01-02T03:04:05.000000006Z"`)))
	f.Fuzz(func(t *testing.T, index []byte) {
		loc := Location{Compression: Gzip, DataEnd: 1000}
		p := newParser(bytes.NewReader(index), loc, int64(len(index)))
		if err := p.toc(); err != nil {
			if len(err.Error()) > 4000 || !utf8.ValidString(err.Error()) {
				t.Errorf("error of %d bytes: %q", len(err.Error()), err)
			}
			return
		}
		sound(t, p.t, len(index))
		var again bytes.Buffer
		j := NewJSONWriter(&again)
		for i := range p.t.Entries {
			e := &p.t.Entries[i]
			for _, c := range p.t.Content(e) {
				if c.Hole {
					return // which are not written
				}
			}
			if err := j.Entry(e, p.t.Content(e), Digest{}); err != nil {
				t.Fatal(err)
			}
		}
		j.Close()
		q := newParser(&again, loc, 0)
		if err := q.toc(); err != nil {
			t.Fatal(err)
		}
		q.t.PrefetchEnd = p.t.PrefetchEnd
		if diff := cmp.Diff(p.t, q.t, cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
	})
}

// FuzzFooter reads the end of a blob, and what annotations say about it.
func FuzzFooter(f *testing.F) {
	for _, tt := range footers {
		f.Add(tt.footer, int64(0), "900:49:3000")
		f.Add(tt.footer, int64(1000-len(tt.footer)), "900:28:300:1")
	}
	f.Add([]byte{}, int64(1<<62), "9223372036854775807:9223372036854775807:0")
	f.Fuzz(func(t *testing.T, tail []byte, before int64, position string) {
		blobSize := int64(len(tail)) + before
		loc, err := ParseFooter(tail, blobSize)
		soundLocation(t, loc, err, blobSize)
		for _, key := range []string{PositionAnnotation, ZstdPositionAnnotation} {
			loc, _, err := Locate(map[string]string{key: position}, blobSize)
			soundLocation(t, loc, err, blobSize)
		}
	})
}

func soundLocation(t *testing.T, loc Location, err error, blobSize int64) {
	t.Helper()
	if err != nil {
		if loc != (Location{}) {
			t.Errorf("%+v with %v", loc, err)
		}
		return
	}
	if loc.Offset < 0 || loc.Size <= 0 || loc.Offset > blobSize || loc.Size > blobSize-loc.Offset ||
		loc.DataEnd < 0 || loc.DataEnd > loc.Offset || loc.Inflated < 0 || loc.Inflated > MaxInflated {
		t.Errorf("%+v of %d", loc, blobSize)
	}
}

// FuzzCompressed reads what a registry sends: nothing comes of it that was not promised.
func FuzzCompressed(f *testing.F) {
	index := rows(`"name":"a","type":"reg","size":5,"digest":` + sha)
	f.Add(gzipTOC(f, index), uint8(Gzip))
	f.Add(zstdTOC(index), uint8(Zstd))
	f.Add([]byte(tarHeader(TarName, 1<<62)), uint8(Gzip))
	f.Fuzz(func(t *testing.T, packed []byte, c uint8) {
		loc := Location{Compression: Compression(c), Size: int64(len(packed)), DataEnd: 1000}
		if toc, err := Parse(bytes.NewReader(packed), loc, Promise{Digest: Digest{1}}); err == nil {
			t.Errorf("%+v", toc)
		}
		toc, err := Parse(bytes.NewReader(packed), loc, Promise{Digest: sha256.Sum256(packed), Compressed: true})
		if err == nil {
			sound(t, toc, 2000*len(packed))
		}
	})
}

// FuzzTar reads an ordinary layer.
func FuzzTar(f *testing.F) {
	f.Add(makeTar(f, []file{{tar.Header{Typeflag: tar.TypeReg, Name: "./a"}, "hello"}, {Header: tar.Header{Typeflag: tar.TypeDir, Name: "d/"}}}))
	f.Add([]byte(tarHeader("a", 1<<62)))
	f.Add(makeTar(f, worst()[:3]))
	f.Add(sparseTars()["old"])
	f.Add(sparseTars()["new"])
	for _, tt := range badHeaders {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		h := tt.h
		h.Size = 0
		if w.WriteHeader(&h) == nil && w.Close() == nil && b.Len() < 1<<16 {
			f.Add(b.Bytes())
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		// A mutated header has a wrong checksum: mend it, or nothing behind it is reached.
		data = bytes.Clone(data)
		for h := data; len(h) >= 512; h = h[512:] {
			if string(h[257:262]) == "ustar" {
				rehash(h[:512])
			}
		}
		const size = 4 << 10
		var chunks int64
		toc, err := FromTar(bytes.NewReader(data), size, func(c Chunk, p []byte) error {
			if c.Size != int64(len(p)) || sha256.Sum256(p) != c.Digest {
				t.Errorf("%+v of %d bytes", c, len(p))
			}
			if chunks++; chunks > 100 {
				return io.ErrShortWrite // sparse files have no end that the input bounds
			}
			return nil
		})
		if err != nil {
			return
		}
		sound(t, toc, len(data)+int(chunks))
		if want := Digest(sha256.Sum256(data)); toc.Digest != want {
			t.Errorf("digest %s, want %s", toc.Digest, want)
		}
	})
}
