package convert

import (
	"crypto/sha256"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"lazuli/fs/toc"
)

// A member is one compressed stream of a layer in the making. It is filled by
// the goroutine that reads the tar, compressed by one of the pool's workers, and written by the
// layer's writer, in this order and never by two at once; then it is used again.
type member struct {
	data   []byte // of the new tar
	pieces []piece
	out    []byte        // data, compressed
	done   chan struct{} // gets one value when out and the pieces' digests are there
}

// A piece is what a member adds to the table of contents: one chunk, or an entry that has none.
type piece struct {
	entry  *toc.Entry
	at     int64 // of the chunk, in bytes of the file
	inner  int   // of the chunk, in bytes of the member
	size   int   // of the chunk, in bytes; 0 for an entry without content
	digest toc.Digest
}

// last reports whether no chunk of the same file follows.
func (p *piece) last() bool { return p.at+int64(p.size) == p.entry.Size }

// A pool is what all layers of a conversion share: the workers that compress, and
// a fixed number of members. Together they bound the memory: whoever wants to read on
// waits for a member, and members come back when they are written. One member is
// enough to get on, since no one holds one while waiting for another.
type pool struct {
	free chan *member
	work chan *member
	wg   sync.WaitGroup
}

const (
	// memberBudget is how many bytes all members together may hold, uncompressed. As many
	// again are their compressed form at worst.
	memberBudget = 64 << 20
	// memberSlack is room for tar headers and padding beside a chunk.
	memberSlack = 8 << 10
)

func newPool(s shape, workers int) *pool {
	n := min(16*workers, int(memberBudget/s.memberSize()))
	n = max(n, workers+2)
	p := &pool{free: make(chan *member, n), work: make(chan *member)}
	for range n {
		p.free <- nil // made when first taken
	}
	for range workers {
		p.wg.Go(func() {
			c := s.compressor()
			for m := range p.work {
				for i := range m.pieces {
					if x := &m.pieces[i]; x.size > 0 {
						x.digest = sha256.Sum256(m.data[x.inner : x.inner+x.size])
					}
				}
				m.out = c(m.out[:0], m.data)
				m.done <- struct{}{}
			}
		})
	}
	return p
}

// close waits for the workers. Nobody may send work any more.
func (p *pool) close() {
	close(p.work)
	p.wg.Wait()
}

// recycle gives a member back that was written.
func (p *pool) recycle(m *member, s shape) {
	if int64(cap(m.data)) > s.memberSize() {
		m = nil // grown for headers of a megabyte: not to be kept
	} else {
		m.data, m.pieces = m.data[:0], m.pieces[:0]
	}
	p.free <- m
}

// A compress appends the compressed form of src to dst, as one gzip member or zstd frame that
// depends on src alone. It is not for concurrent use.
type compress func(dst, src []byte) []byte

func (s shape) compressor() compress {
	if s.format == ZstdChunked {
		e, err := zstd.NewWriter(nil,
			zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(s.level)),
			zstd.WithEncoderConcurrency(1),
			zstd.WithLowerEncoderMem(true),
			// Chunks have a SHA-256 and the blob has one.
			zstd.WithEncoderCRC(false))
		if err != nil {
			panic(err) // options are constants
		}
		return func(dst, src []byte) []byte { return e.EncodeAll(src, dst) }
	}
	var out appender
	w, err := gzip.NewWriterLevel(&out, s.level)
	if err != nil {
		panic(err) // the level was checked
	}
	return func(dst, src []byte) []byte {
		out = dst
		w.Reset(&out)
		w.Write(src) // an appender has no errors
		w.Close()
		return out
	}
}

type appender []byte

func (a *appender) Write(p []byte) (int, error) {
	*a = append(*a, p...)
	return len(p), nil
}
