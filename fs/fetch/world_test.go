package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// noise returns n bytes that do not compress, the same for the same seed.
func noise(seed uint64, n int) []byte {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// A file is one of a layer's.
type file struct {
	name string
	data []byte
}

// many is a layer's worth of files: small ones, some of several chunks, and empty ones.
func many(n int) []file {
	files := make([]file, n)
	for i := range files {
		size := 1 + i*37%3000
		switch {
		case i%10 == 7:
			size = 40000 + i*100
		case i%10 == 3:
			size = 0
		}
		files[i] = file{fmt.Sprintf("dir%d/file%d", i%7, i), noise(uint64(i), size)}
	}
	return files
}

func makeTar(t testing.TB, files []file) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644, Size: int64(len(f.data))}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		w.Write(f.data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A sample is a layer, as estargz writes it, and what should come out of it.
type sample struct {
	files []file
	blob  []byte
	toc   *toc.TOC
	path  string // of the chunk table
}

const testChunk = 10000

func build(t testing.TB, files []file, opts ...estargz.Option) *sample {
	t.Helper()
	data := makeTar(t, files)
	opts = append([]estargz.Option{estargz.WithChunkSize(testChunk), estargz.WithParallelism(1)}, opts...)
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))), opts...)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := io.ReadAll(b)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	loc, err := toc.ParseFooter(blob, int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	want, err := toc.Promised(map[string]string{toc.DigestAnnotation: b.TOCDigest().String()})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := toc.Parse(bytes.NewReader(blob[loc.Offset:]), loc, want)
	if err != nil {
		t.Fatal(err)
	}
	s := &sample{files: files, blob: blob, toc: parsed}
	s.marshal(t)
	return s
}

// marshal writes the chunk table.
func (s *sample) marshal(t testing.TB) {
	t.Helper()
	table, err := toc.MarshalTable(s.toc)
	if err != nil {
		t.Fatal(err)
	}
	s.path = filepath.Join(t.TempDir(), "table")
	if err := os.WriteFile(s.path, table, 0o600); err != nil {
		t.Fatal(err)
	}
}

// zstdChunked makes estargz.Build write zstd:chunked.
func zstdChunked() estargz.Option {
	return estargz.WithCompression(struct {
		*zstdchunked.Compressor
		*zstdchunked.Decompressor
	}{&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: map[string]string{}}, &zstdchunked.Decompressor{}})
}

// A fault is what goes wrong with one request.
type fault struct {
	err  error           // of Range
	cut  int64           // the stream breaks after so many bytes, if above 0
	flip int64           // the byte at this offset of the blob is another one, if above 0
	gate <-chan struct{} // before the first byte
	hang bool            // before the first byte, until ctx ends
	pace time.Duration   // for each 4 KiB
}

// A blob is a Blob with switches.
type blob struct {
	data  []byte
	fault func(request int, off, n int64) fault // request counts from 0

	mu    sync.Mutex
	asked [][2]int64 // offset and length of each request
	count []byte     // how often each byte was delivered
	bytes int64      // delivered
}

func (b *blob) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if off < 0 || n <= 0 || off+n > int64(len(b.data)) {
		return nil, fmt.Errorf("range %d+%d of %d bytes", off, n, len(b.data))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s := &answer{ctx: ctx, b: b, off: off, end: off + n}
	if b.fault != nil {
		s.fault = b.fault(len(b.asked), off, n)
	}
	b.asked = append(b.asked, [2]int64{off, n})
	if s.fault.cut > 0 {
		s.end = off + s.fault.cut
	}
	return s, s.fault.err
}

// requests returns how many there were.
func (b *blob) requests() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.asked)
}

// delivered returns how many bytes were, and the most often that one of them was.
func (b *blob) delivered() (int64, byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var most byte
	for _, n := range b.count {
		most = max(most, n)
	}
	return b.bytes, most
}

type answer struct {
	ctx context.Context
	b   *blob
	fault
	off, end int64
}

func (s *answer) Read(p []byte) (int, error) {
	switch {
	case s.ctx.Err() != nil:
		return 0, s.ctx.Err()
	case s.hang:
		<-s.ctx.Done()
		return 0, s.ctx.Err()
	case s.gate != nil:
		select {
		case <-s.gate:
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
	}
	if s.pace > 0 {
		p = p[:min(len(p), 4096)]
		time.Sleep(s.pace)
	}
	if s.off == s.end {
		if s.cut > 0 {
			return 0, io.ErrUnexpectedEOF
		}
		return 0, io.EOF
	}
	n := copy(p, s.b.data[s.off:s.end])
	if i := s.flip - s.off; s.flip > 0 && i >= 0 && i < int64(n) {
		p[i] ^= 0xff
	}
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	if s.b.count == nil {
		s.b.count = make([]byte, len(s.b.data))
	}
	for i := range n {
		s.b.count[s.off+int64(i)]++
	}
	s.b.bytes += int64(n)
	s.off += int64(n)
	return n, nil
}

func (s *answer) Close() error { return nil }

// A world is a store, a queue, and one layer.
type world struct {
	*sample
	t     testing.TB
	store *store.Store
	q     *Queue
	layer *Layer
	blob  *blob
}

// tempDir is a folder in memory, if there is such a thing: a busy disk takes seconds for an fsync.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "lazuli-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// enter makes a world in a fresh folder, which ends with the test.
func (s *sample) enter(t testing.TB) *world { return s.enterIn(t, tempDir(t)) }

func (s *sample) enterIn(t testing.TB, dir string) *world {
	t.Helper()
	st, err := store.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{sample: s, t: t, store: st, q: New(st, Options{})}
	w.layer, w.blob = w.add(s, "layer one")
	t.Cleanup(func() {
		if err := errors.Join(w.q.Close(), st.Close()); err != nil {
			t.Error(err)
		}
		if n := len(w.q.flights); n > 0 {
			t.Errorf("%d flights never ended", n)
		}
		for _, slots := range []chan struct{}{w.q.demandSlots, w.q.aheadSlots, w.q.fillSlots, w.q.decoders} {
			if len(slots) > 0 {
				t.Errorf("%d slots were not given back", len(slots))
			}
		}
		if n := w.q.waiting.Load(); n != 0 {
			t.Errorf("%d reads wait", n)
		}
	})
	return w
}

func (w *world) add(s *sample, name string) (*Layer, *blob) {
	w.t.Helper()
	table, err := toc.OpenTable(s.path)
	if err != nil {
		w.t.Fatal(err)
	}
	b := &blob{data: s.blob}
	l := &Layer{Name: name, Table: table, Blob: b}
	if err := w.q.Add(l); err != nil {
		w.t.Fatal(err)
	}
	return l, b
}

// key returns the object key of a file.
func (s *sample) key(name string) store.Key {
	for i := range s.toc.Entries {
		if e := &s.toc.Entries[i]; e.Name == name && e.Type == toc.Regular {
			return store.Key(toc.ObjectKey(s.toc.Content(e)))
		}
	}
	panic("no file " + name)
}

// member returns the span of the member that holds the first chunk of a file.
func (w *world) member(name string) (start, end int64) {
	o, _ := w.layer.Table.Find(toc.Digest(w.key(name)))
	_, m := o.Chunk(0)
	return w.layer.Table.Member(m)
}

// read reads n bytes of a file as the kernel does.
func (w *world) read(ctx context.Context, name string, off int64, n int) ([]byte, error) {
	id, _, ok := w.q.Lookup(w.key(name))
	if !ok {
		return nil, os.ErrNotExist
	}
	o, err := w.q.Open(id)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	p := make([]byte, n)
	n, err = o.ReadAt(ctx, p, off)
	if err == io.EOF {
		err = nil
	}
	return p[:n], err
}

// want reads n bytes of file f and compares them.
func (w *world) want(f file, off int64, n int) {
	w.t.Helper()
	got, err := w.read(context.Background(), f.name, off, n)
	if err != nil {
		w.t.Errorf("%s at %d: %v", f.name, off, err)
	} else if !bytes.Equal(got, f.data[off:min(off+int64(n), int64(len(f.data)))]) {
		w.t.Errorf("%s at %d: wrong bytes", f.name, off)
	}
}

// wantAll reads every file of the layer, in pieces of 7000 bytes, shuffled.
func (w *world) wantAll(rnd *rand.Rand) {
	type piece struct {
		f   file
		off int64
	}
	var all []piece
	for _, f := range w.files {
		for off := 0; off < len(f.data); off += 7000 {
			all = append(all, piece{f, int64(off)})
		}
	}
	if rnd != nil {
		rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	}
	for _, p := range all {
		w.want(p.f, p.off, 7000)
	}
}

func sha(p []byte) [32]byte { return sha256.Sum256(p) }
