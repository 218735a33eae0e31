package toc

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
)

// tree is 100,000 entries as a Debian has them, in the proportions of a Python image.
func tree() (entries []Entry, chunks []Chunk) {
	for i := range 100000 {
		e := Entry{
			Name: fmt.Sprintf("usr/lib/python3/dist-packages/package%d/module%d.py", i/50, i),
			Type: Regular, Mode: 0o644, Size: int64(i%20000 + 1), MTime: 1700000000 + int64(i), NumChunks: 1, FirstChunk: uint32(len(chunks)),
		}
		switch i % 10 {
		case 0:
			e.Type, e.Size, e.NumChunks = Directory, 0, 0
		case 1:
			e.Type, e.Size, e.NumChunks, e.Link = Symlink, 0, 0, "../../../x86_64-linux-gnu/libsomething.so.3"
		default:
			chunks = append(chunks, Chunk{Digest: sha256.Sum256([]byte(e.Name)), Size: e.Size, Member: int64(i) * 5000})
		}
		entries = append(entries, e)
	}
	return entries, chunks
}

func BenchmarkParse(b *testing.B) {
	entries, chunks := tree()
	t := TOC{Entries: entries, Chunks: chunks}
	var ours bytes.Buffer
	j := NewJSONWriter(&ours)
	theirs := estargz.JTOC{Version: 1}
	for i := range entries {
		e := &entries[i]
		d := Digest{}
		old := &estargz.TOCEntry{
			Name: e.Name, Type: typeNames[e.Type], Mode: int64(e.Mode), LinkName: e.Link, Size: e.Size, Uname: "root", Gname: "root",
			ModTime3339: time.Unix(e.MTime, 0).UTC().Format(time.RFC3339),
		}
		if e.NumChunks > 0 {
			c := t.Content(e)[0]
			d = c.Digest
			old.Digest, old.ChunkDigest, old.Offset = d.String(), d.String(), c.Member
		}
		j.Entry(e, t.Content(e), d)
		theirs.Entries = append(theirs.Entries, old)
	}
	j.Close()
	indented, err := json.MarshalIndent(theirs, "", "\t")
	if err != nil {
		b.Fatal(err)
	}
	loc := Location{Compression: Gzip, DataEnd: 1 << 40}
	for name, index := range map[string][]byte{"ours": ours.Bytes(), "estargz": indented} {
		// Without inflating: hash and parse alone, which is what is ours.
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(index)))
			b.ReportAllocs()
			for b.Loop() {
				r := &hashing{r: struct{ io.Reader }{bytes.NewReader(index)}, h: sha256.New(), limit: MaxInflated}
				if err := newParser(r, loc, int64(len(index))).toc(); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+".gz", func(b *testing.B) {
			packed := gzipTOC(b, string(index))
			want := Promise{Digest: sha256.Sum256(index)}
			loc.Size = int64(len(packed))
			b.SetBytes(int64(len(index)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Parse(bytes.NewReader(packed), loc, want); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("encoding/json", func(b *testing.B) {
		b.SetBytes(int64(len(indented)))
		b.ReportAllocs()
		for b.Loop() {
			var t estargz.JTOC
			if err := json.Unmarshal(indented, &t); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("inflate", func(b *testing.B) {
		packed := gzipTOC(b, string(indented))
		b.SetBytes(int64(len(indented)))
		for b.Loop() {
			z, _ := gzip.NewReader(bytes.NewReader(packed))
			io.Copy(io.Discard, z)
		}
	})
}

func BenchmarkJSONWriter(b *testing.B) {
	entries, chunks := tree()
	t := TOC{Entries: entries, Chunks: chunks}
	b.ReportAllocs()
	for b.Loop() {
		j := NewJSONWriter(io.Discard)
		for i := range entries {
			j.Entry(&entries[i], t.Content(&entries[i]), Digest{1})
		}
		j.Close()
	}
}
