package convert

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"slices"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"lazuli/fs/toc"
)

// A blob is a finished lazy layer: its bytes in a spool file, and what a manifest says of it.
type blob struct {
	file        *os.File // unlinked already
	size        int64
	digest      v1.Hash
	diffID      v1.Hash
	annotations map[string]string // those of the format
}

func (b *blob) open() io.ReadCloser { return io.NopCloser(io.NewSectionReader(b.file, 0, b.size)) }
func (b *blob) Close() error        { return b.file.Close() }

// A blobWriter turns a stream of tar entries into a lazy layer. One goroutine calls
// entry and data; run writes what they made, in order.
type blobWriter struct {
	shape
	pool  *pool
	dir   string       // of spools
	queue chan *member // in the order of the tar
	cur   *member
	pos   int64 // of the new tar, in bytes

	// Of run's goroutine:
	out     *spool
	diffID  hash.Hash
	tarSize int64
	content hash.Hash   // of a file of more than one chunk, as far as it came
	chunks  []toc.Chunk // of the same
	json    *spool
	toc     *toc.JSONWriter
}

func newBlobWriter(s shape, p *pool, dir string) (*blobWriter, error) {
	w := &blobWriter{shape: s, pool: p, dir: dir, diffID: sha256.New(), content: sha256.New(),
		// As many as there are members: a full queue never keeps one from the workers.
		queue: make(chan *member, cap(p.free))}
	var err error
	if w.out, err = newSpool(dir); err != nil {
		return nil, err
	}
	if w.json, err = newSpool(dir); err != nil {
		w.out.Close()
		return nil, err
	}
	w.toc = toc.NewJSONWriter(w.json)
	return w, nil
}

// entry appends the header blocks of one tar entry, and e to the table of contents; e is nil for
// headers that make no file. For a regular file with content, data follows.
//
// Headers stay in the member of what came before them, as in stargz-snapshotter's
// layers: a member begins with a chunk, unless a long run of headers filled the one before.
func (w *blobWriter) entry(ctx context.Context, header []byte, e *toc.Entry) error {
	pad := -w.pos & 511
	if err := w.room(ctx, int(pad)+len(header), w.memberSize()); err != nil {
		return err
	}
	w.cur.data = append(w.cur.data, zeros[:pad]...)
	w.cur.data = append(w.cur.data, header...)
	w.pos += pad + int64(len(header))
	if e != nil && e.Size == 0 {
		w.cur.pieces = append(w.cur.pieces, piece{entry: e})
	}
	return nil
}

// data appends the content of e, cut into chunks. A chunk shares a member with what came before it if
// the group's size allows that and alone is false; otherwise it begins a new one.
func (w *blobWriter) data(ctx context.Context, e *toc.Entry, r io.Reader, alone bool) error {
	for at := int64(0); at < e.Size; {
		n := int(min(w.chunk, e.Size-at))
		limit := w.group
		if alone {
			limit = 0
		}
		if err := w.room(ctx, n, limit); err != nil {
			return err
		}
		m := w.cur
		have := len(m.data)
		m.pieces = append(m.pieces, piece{entry: e, at: at, inner: have, size: n})
		m.data = slices.Grow(m.data, n)[:have+n]
		if _, err := io.ReadFull(r, m.data[have:]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		at += int64(n)
		w.pos += int64(n)
	}
	return nil
}

var zeros [1024]byte

// room makes sure that there is a current member, and that n more bytes keep it within limit
// unless it is empty.
func (w *blobWriter) room(ctx context.Context, n int, limit int64) error {
	if w.cur != nil && len(w.cur.data) > 0 && int64(len(w.cur.data)+n) > limit {
		if err := w.flush(ctx); err != nil {
			return err
		}
	}
	if w.cur != nil {
		return nil
	}
	select {
	case w.cur = <-w.pool.free:
	case <-ctx.Done():
		return ctx.Err()
	}
	if w.cur == nil {
		w.cur = &member{data: make([]byte, 0, w.memberSize()), done: make(chan struct{}, 1)}
	}
	return nil
}

// flush sends the current member on its way, if there is anything in it.
func (w *blobWriter) flush(ctx context.Context) error {
	m := w.cur
	if m == nil || len(m.data) == 0 {
		return nil
	}
	w.cur = nil
	w.queue <- m
	select {
	case w.pool.work <- m:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// end says that the last entry was written.
func (w *blobWriter) end(ctx context.Context) error {
	pad := -w.pos & 511
	if w.format == ZstdChunked {
		pad += int64(len(zeros)) // in the other format these follow the table of contents
	}
	if pad > 0 {
		if err := w.room(ctx, int(pad), w.memberSize()); err != nil {
			return err
		}
		w.cur.data = append(w.cur.data, make([]byte, pad)...)
		w.pos += pad
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	if w.cur != nil {
		w.pool.recycle(w.cur, w.shape)
		w.cur = nil
	}
	close(w.queue)
	return nil
}

// run writes members until end was called or ctx ends, and returns the layer.
func (w *blobWriter) run(ctx context.Context) (*blob, error) {
	defer w.json.Close()
	b, err := w.write(ctx)
	if err != nil {
		w.out.Close()
	}
	return b, err
}

func (w *blobWriter) write(ctx context.Context) (*blob, error) {
	for {
		select {
		case m, ok := <-w.queue:
			if !ok {
				return w.finish()
			}
			select {
			case <-m.done:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			if err := w.append(m); err != nil {
				return nil, err
			}
			w.pool.recycle(m, w.shape)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// append writes one compressed member to the spool, and what is in it to the table of contents.
func (w *blobWriter) append(m *member) error {
	w.diffID.Write(m.data)
	w.tarSize += int64(len(m.data))
	for i := range m.pieces {
		p := &m.pieces[i]
		var file toc.Digest
		if p.size > 0 {
			w.chunks = append(w.chunks, toc.Chunk{Digest: p.digest, FileOffset: p.at, Size: int64(p.size),
				Member: w.out.size, Inner: int64(p.inner)})
			file = p.digest
			if int64(p.size) < p.entry.Size {
				w.content.Write(m.data[p.inner : p.inner+p.size])
				if !p.last() {
					continue
				}
				w.content.Sum(file[:0])
				w.content.Reset()
			}
		}
		if err := w.toc.Entry(p.entry, w.chunks, file); err != nil {
			return err
		}
		w.chunks = w.chunks[:0]
	}
	_, err := w.out.Write(m.out)
	return err
}

// finish writes the table of contents and the footer.
func (w *blobWriter) finish() (*blob, error) {
	if err := w.toc.Close(); err != nil {
		return nil, err
	}
	if err := w.json.Flush(); err != nil {
		return nil, err
	}
	b := &blob{annotations: map[string]string{toc.DigestAnnotation: w.json.digest().String()}}
	write := w.finishGzip
	if w.format == ZstdChunked {
		write = w.finishZstd
	}
	if err := write(b); err != nil {
		return nil, err
	}
	if err := w.out.Flush(); err != nil {
		return nil, err
	}
	b.annotations[toc.UncompressedSizeAnnotation] = strconv.FormatInt(w.tarSize, 10)
	b.file, b.size, b.digest = w.out.file, w.out.size, w.out.digest()
	b.diffID = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(w.diffID.Sum(nil))}
	return b, nil
}

// finishGzip writes the table of contents as the last entry of the tar, in a member of its own, and
// the empty gzip member whose header says where that is.
// https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md
func (w *blobWriter) finishGzip(b *blob) error {
	start := w.out.size
	zw, err := gzip.NewWriterLevel(w.out, w.level)
	if err != nil {
		return err
	}
	both := io.MultiWriter(zw, w.diffID)
	tw := tar.NewWriter(both)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: toc.TarName, Size: w.json.size}); err != nil {
		return err
	}
	if _, err := io.Copy(tw, w.json.reader()); err != nil {
		return err
	}
	if err := tw.Close(); err != nil {
		return err
	}
	if err := zw.Close(); err != nil {
		return err
	}
	w.tarSize += 512 + (w.json.size+511)&^511 + int64(len(zeros))
	b.annotations[toc.PositionAnnotation] = fmt.Sprintf("%d:%d:%d", start, w.out.size-start, w.json.size)
	_, err = w.out.Write(estargz.CreateGzipFooter(fmt.Appendf([]byte{'S', 'G', 16 + 6, 0}, "%016xSTARGZ", start)))
	return err
}

// finishZstd writes the table of contents and the footer as skippable frames.
// The footer is stargz-snapshotter's; containers/storage reads none, but annotations.
func (w *blobWriter) finishZstd(b *blob) error {
	packed, err := newSpool(w.dir)
	if err != nil {
		return err
	}
	defer packed.Close()
	zw, err := zstd.NewWriter(packed, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(w.level)),
		zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	if _, err := io.Copy(zw, w.json.reader()); err != nil {
		return err
	}
	if err := zw.Close(); err != nil {
		return err
	}
	if err := packed.Flush(); err != nil {
		return err
	}
	if packed.size > math.MaxUint32 {
		return fmt.Errorf("table of contents of %d bytes: zstd:chunked holds at most %d", packed.size, math.MaxUint32)
	}
	start := w.out.size + 8
	if _, err := w.out.Write(skippable(packed.size)); err != nil {
		return err
	}
	if _, err := io.Copy(w.out, packed.reader()); err != nil {
		return err
	}
	if w.group == 1 {
		// Readers that go by this key are of containers/storage until v1.50. They know nothing of groups; without
		// the key they take the layer as a whole.
		b.annotations[toc.ZstdChecksumAnnotation] = packed.digest().String()
	}
	b.annotations[toc.ZstdPositionAnnotation] = fmt.Sprintf("%d:%d:%d:1", start, packed.size, w.json.size)
	footer := skippable(zstdchunked.FooterSize)
	for _, n := range []int64{start, packed.size, w.json.size, 1} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	_, err = w.out.Write(append(footer, "GnUlInUx"...))
	return err
}

// skippable returns the header of a zstd frame of n bytes that decoders skip (RFC 8878, section 3.1.2).
func skippable(n int64) []byte {
	return binary.LittleEndian.AppendUint32([]byte{0x50, 0x2a, 0x4d, 0x18}, uint32(n))
}

// A spool is a temporary file that has no name, with the length and the digest of what was
// written to it.
type spool struct {
	file *os.File
	buf  *bufio.Writer
	hash hash.Hash
	size int64
}

func newSpool(dir string) (*spool, error) {
	f, err := os.CreateTemp(dir, "lazuli-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return &spool{file: f, buf: bufio.NewWriterSize(f, 256<<10), hash: sha256.New()}, nil
}

func (s *spool) Write(p []byte) (int, error) {
	n, err := s.buf.Write(p)
	s.hash.Write(p[:n])
	s.size += int64(n)
	return n, err
}

func (s *spool) Flush() error { return s.buf.Flush() }

// reader reads what was written and flushed, from the beginning.
func (s *spool) reader() io.Reader { return io.NewSectionReader(s.file, 0, s.size) }

func (s *spool) digest() v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s.hash.Sum(nil))}
}

func (s *spool) Close() error { return s.file.Close() }
