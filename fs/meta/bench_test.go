package meta

import (
	"encoding/binary"
	"fmt"
	"io"
	"runtime"
	"testing"

	"lazuli/fs/toc"
)

// sample returns layers with n entries in all, shaped like a root file system: ten files to a
// directory, in the order of a tar, and a smaller layer above that replaces some of them.
func sample(n int) []*toc.TOC {
	lower, upper := &toc.TOC{}, &toc.TOC{}
	file := func(l *toc.TOC, name string, i int) {
		var c toc.Chunk
		binary.BigEndian.PutUint64(c.Digest[:], uint64(i))
		c.Size = int64(i%50_000 + 1)
		l.Entries = append(l.Entries, toc.Entry{
			Name: name, Type: toc.Regular, Mode: 0o644, Size: c.Size, MTime: int64(i),
			FirstChunk: uint32(len(l.Chunks)), NumChunks: 1,
		})
		l.Chunks = append(l.Chunks, c)
	}
	for i := 0; len(lower.Entries)+len(upper.Entries) < n; i++ {
		dir := fmt.Sprintf("usr/lib/python3/dist-packages/package%d/module%d", i/100, i/10)
		if i%10 == 0 {
			lower.Entries = append(lower.Entries, toc.Entry{Name: dir, Type: toc.Directory, Mode: 0o755})
		}
		name := fmt.Sprintf("%s/file%d.py", dir, i)
		file(lower, name, i)
		if i%20 == 0 {
			file(upper, name, i)
		}
	}
	return []*toc.TOC{lower, upper}
}

func BenchmarkBuild(b *testing.B) {
	layers := sample(100_000)
	b.Run("merge", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := Merge(layers); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("write", func(b *testing.B) {
		b.ReportAllocs()
		tree, err := Merge(layers)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(tree.Stats().Bytes)
		for b.Loop() {
			if _, err := tree.WriteTo(io.Discard); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("memory", func(b *testing.B) {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		var tree *Tree
		for b.Loop() {
			tree, _ = Merge(layers)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc), "B/tree")
		runtime.KeepAlive(tree)
	})
}
