package toc

import (
	"crypto/sha256"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sampleTOC is a layer of three files: two small ones in one member, one of two
// chunks; and a copy of the first.
func sampleTOC() *TOC {
	d := func(s string) Digest { return sha256.Sum256([]byte(s)) }
	return &TOC{
		Compression: Gzip, DataEnd: 900,
		Chunks: []Chunk{
			{Digest: d("a"), Size: 10, Member: 100},
			{Digest: d("b"), Size: 20, Member: 100, Inner: 1024},
			{Digest: d("c0"), Size: 50, Member: 300},
			{Digest: d("c1"), FileOffset: 50, Size: 5, Member: 500},
			{Digest: d("a"), Size: 10, Member: 700},
		},
		Entries: []Entry{
			{Name: "a", Type: Regular, Size: 10, FirstChunk: 0, NumChunks: 1},
			{Name: "b", Type: Regular, Size: 20, FirstChunk: 1, NumChunks: 1},
			{Name: "empty", Type: Regular},
			{Name: "d", Type: Directory},
			{Name: "c", Type: Regular, Size: 55, FirstChunk: 2, NumChunks: 2},
			{Name: "a2", Type: Regular, Size: 10, FirstChunk: 4, NumChunks: 1},
		},
	}
}

func TestTable(t *testing.T) {
	layer := sampleTOC()
	b, err := MarshalTable(layer)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "table")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	table, err := OpenTable(path)
	if err != nil {
		t.Fatal(err)
	}
	if table.Len() != 3 || table.NumMembers() != 4 {
		t.Fatalf("%d objects in %d members, want 3 in 4", table.Len(), table.NumMembers())
	}
	for i := range layer.Entries {
		e := &layer.Entries[i]
		if e.Size == 0 {
			continue
		}
		key := ObjectKey(layer.Content(e))
		o, ok := table.Find(key)
		if !ok || o.Size != e.Size || o.NumChunks() != int(e.NumChunks) || !o.Verify() {
			t.Errorf("%s: Find = %+v, %v", e.Name, o, ok)
		}
		byPrefix, ok := table.FindPrefix(binary.BigEndian.Uint64(key[:]), 63)
		if !ok || byPrefix.Key != key {
			t.Errorf("%s: FindPrefix = %+v, %v", e.Name, byPrefix, ok)
		}
	}
	if _, ok := table.Find(Digest{1}); ok {
		t.Error("found a key that is not there")
	}
	c, _ := table.Find(ObjectKey(layer.Content(&layer.Entries[4])))
	for off, want := range map[int64]int{0: 0, 49: 0, 50: 1, 54: 1} {
		if got := c.ChunkAt(off); got != want {
			t.Errorf("ChunkAt(%d) = %d, want %d", off, got, want)
		}
	}
	if chunk, m := c.Chunk(1); m != 2 || chunk.Member != 500 || chunk.FileOffset != 50 || chunk.Size != 5 {
		t.Errorf("Chunk(1) = %+v in member %d", chunk, m)
	}
	for m, want := range [][2]int64{{100, 300}, {300, 500}, {500, 700}, {700, 900}} {
		if start, end := table.Member(m); start != want[0] || end != want[1] {
			t.Errorf("Member(%d) = %d, %d, want %v", m, start, end, want)
		}
	}
	if refs := table.MemberRefs(0); len(refs) != 2 || refs[0].Object.Size != 10 || refs[1].Object.Size != 20 {
		t.Errorf("MemberRefs(0) = %+v", refs)
	}
	if refs := table.MemberRefs(3); len(refs) != 0 {
		t.Errorf("the copy's member has refs: %+v", refs)
	}
}

func TestTableOverlap(t *testing.T) {
	layer := sampleTOC()
	layer.Chunks[1].Inner = 9
	if _, err := MarshalTable(layer); err == nil || !strings.Contains(err.Error(), "overlap") {
		t.Errorf("err = %v, want overlap", err)
	}
}

func TestTableDamaged(t *testing.T) {
	whole, err := MarshalTable(sampleTOC())
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole {
		if _, err := newTable(whole[:n]); err == nil {
			t.Fatalf("a table cut to %d of %d bytes was opened", n, len(whole))
		}
	}
	for i := range whole {
		bad := append([]byte(nil), whole...)
		bad[i] ^= 1
		if _, err := newTable(bad); err == nil {
			t.Fatalf("a table with a flipped bit in byte %d of %d was opened", i, len(whole))
		}
	}
}
