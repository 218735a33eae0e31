package rootfs

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"lazuli/fs/remote"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// unpack fetches a layer that is not lazy as a whole, puts the contents of its files into the store, and returns its
// table of contents. The objects are named by what is in them, so they are true even if the layer turns out
// not to be what its digest says; the table is returned only if it is.
func (l *layer) unpack(ctx context.Context, n *Node, o *MountOptions) (*toc.TOC, error) {
	select {
	case n.unpacking <- struct{}{}:
		defer func() { <-n.unpacking }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	blob := &wholeBlob{ctx: ctx, blob: l.Blob, o: o, size: l.Size}
	defer blob.Close()
	sum := sha256.New()
	compressed := io.TeeReader(blob, sum)
	tar, err := toc.OpenTar(compressed)
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	files := &fileSink{store: n.store}
	defer files.discard()
	t, err := toc.FromTar(tar, toc.DefaultChunkSize, files.chunk)
	if err != nil {
		return nil, err
	}
	if err := files.end(); err != nil {
		return nil, err
	}
	if _, err := io.Copy(io.Discard, compressed); err != nil { // what the decompressor did not want to see
		return nil, err
	}
	if got := toc.Digest(sum.Sum(nil)); got.String() != l.Digest.String() {
		return nil, fmt.Errorf("the blob's digest is %v", got)
	}
	if l.diffID.Hex != "" && t.Digest.String() != l.diffID.String() {
		return nil, fmt.Errorf("the tar's digest is %v, but the image's config says %v", t.Digest, l.diffID)
	}
	return t, nil
}

// A fileSink puts the files of a tar into the store, as toc.FromTar gives them: chunk by chunk.
type fileSink struct {
	store  *store.Store
	temp   *store.Temp
	chunks []toc.Chunk // of the file in temp
}

func (s *fileSink) chunk(c toc.Chunk, p []byte) error {
	if c.FileOffset == 0 {
		if err := s.end(); err != nil {
			return err
		}
		var err error
		if s.temp, err = s.store.Create(); err != nil {
			return err
		}
	}
	s.chunks = append(s.chunks, c)
	if c.Hole {
		return s.temp.WriteHole(c.Size)
	}
	_, err := s.temp.Write(p)
	return err
}

// end publishes the file whose last chunk has come.
func (s *fileSink) end() error {
	if s.temp == nil {
		return nil
	}
	key := store.Key(toc.ObjectKey(s.chunks))
	if !s.store.Has(key) {
		if err := s.temp.Publish(key); err != nil {
			return err
		}
	}
	s.discard()
	return nil
}

func (s *fileSink) discard() {
	if s.temp != nil {
		s.temp.Discard()
	}
	s.temp, s.chunks = nil, s.chunks[:0]
}

// A wholeBlob reads a blob from beginning to end, and goes on where it was when the connection breaks.
type wholeBlob struct {
	ctx  context.Context // of the call that made it and ends before it does
	blob remote.Blob
	size int64
	off  int64
	body io.ReadCloser
	o    *MountOptions

	failed int // times in a row without a byte
}

func (b *wholeBlob) Read(p []byte) (int, error) {
	for {
		if b.off == b.size {
			return 0, io.EOF
		}
		var n int
		var err error
		if b.body == nil {
			b.body, err = b.blob.Range(b.ctx, b.off, b.size-b.off)
		}
		if err == nil {
			n, err = b.body.Read(p)
		}
		if n > 0 {
			b.failed = 0
			b.off += int64(n)
			b.o.fetched(int64(n))
			return n, nil
		}
		if err == nil {
			continue
		}
		b.Close()
		if b.failed++; b.failed == attempts || b.ctx.Err() != nil {
			return 0, fmt.Errorf("at byte %d of %d: %w", b.off, b.size, noEOF(err))
		}
	}
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (b *wholeBlob) Close() error {
	if b.body != nil {
		b.body.Close()
		b.body = nil
	}
	return nil
}

// A tarReport says what came out of a layer's blob.
type tarReport struct {
	digest, diffID toc.Digest
	lie            string // how the tar and the table of contents differ, "" if they do not
}

// compareTar reads a layer's blob to its end, and holds its table of contents against the tar in it. land gets the chunks that are not
// here, unless it is nil.
func compareTar(ctx context.Context, blob io.Reader, t *toc.TOC, land *landing) (r tarReport, err error) {
	sum := sha256.New()
	compressed := io.TeeReader(blob, sum)
	z, err := toc.OpenTar(compressed)
	if err != nil {
		return r, err
	}
	defer z.Close()
	same := comparison{t: t, land: land}
	tar, err := toc.FromTar(z, toc.DefaultChunkSize, func(c toc.Chunk, data []byte) error {
		same.data(c, data)
		return context.Cause(ctx)
	})
	if err != nil {
		return r, err
	}
	if _, err := io.Copy(io.Discard, compressed); err != nil { // what the decompressor did not want to see
		return r, err
	}
	return tarReport{toc.Digest(sum.Sum(nil)), tar.Digest, same.lie(tar)}, nil
}
