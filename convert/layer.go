package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// maxDrain is how much of a layer is read, in bytes, only to tell a damaged blob from a bad tar.
const maxDrain = 64 << 20

// convertLayer reads a layer and returns it as a lazy layer. Nothing is left
// of it if there is an error, which does not name the layer.
func (c *conversion) convertLayer(ctx context.Context, desc v1.Descriptor, p *pool, read func(int)) (*blob, error) {
	w, err := newBlobWriter(c.shape, p, c.opts.TempDir)
	if err != nil {
		return nil, err
	}
	var b *blob
	g, ctx := errgroup.WithContext(ctx)
	in := newSource(ctx, c.src.Blob(desc), read)
	defer in.Close()
	g.Go(func() (err error) {
		b, err = w.run(ctx)
		return err
	})
	g.Go(func() error {
		err := c.rewrite(ctx, w, in)
		if err != nil && (ctx.Err() != nil || desc.Size-in.pos > maxDrain) {
			return err
		}
		// Bytes that are not the layer explain every other error.
		if err2 := in.verify(desc); err2 != nil {
			return err2
		}
		if err != nil {
			return err
		}
		return w.end(ctx)
	})
	if err := g.Wait(); err != nil {
		if b != nil {
			b.Close()
		}
		return nil, err
	}
	return b, nil
}

// rewrite reads a compressed tar from in and writes its entries to w.
func (c *conversion) rewrite(ctx context.Context, w *blobWriter, in io.Reader) error {
	r, err := toc.OpenTar(in)
	if err != nil {
		return err
	}
	defer r.Close()
	if len(c.opts.Profile) > 0 {
		return c.reorder(ctx, w, r)
	}
	if err := landmark(ctx, w, toc.NoPrefetchLandmark); err != nil {
		return err
	}
	t := newTarReader(r)
	for {
		x, err := t.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := put(ctx, w, x); err != nil {
			return err
		}
	}
	// To the end: the checksums of the compressed stream are there.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("after the last entry: %w", err)
	}
	return nil
}

// put writes one entry to w.
func put(ctx context.Context, w *blobWriter, x *tarEntry) error {
	if err := w.entry(ctx, x.header, x.entry); err != nil {
		return err
	}
	if x.entry == nil {
		return nil
	}
	if err := w.data(ctx, x.entry, x.data, false); err != nil {
		return fmt.Errorf("entry %.300q: %w", x.entry.Name, err)
	}
	return nil
}

// landmark writes one of the files that say whether anything before them is worth fetching at once.
func landmark(ctx context.Context, w *blobWriter, name string) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: 1}
	header, err := encode(h)
	if err != nil {
		return err
	}
	e, err := toc.EntryFromHeader(h)
	if err != nil {
		return err
	}
	if err := w.entry(ctx, header, &e); err != nil {
		return err
	}
	return w.data(ctx, &e, bytes.NewReader([]byte{0xf}), true)
}

// A tarEntry is one entry of the tar that is read. It is valid until the next.
type tarEntry struct {
	header []byte     // header blocks, for the new tar
	entry  *toc.Entry // nil for a header that makes no file
	data   io.Reader
}

// A tarReader reads the entries of a tar together with the very bytes of their
// headers: what is copied loses nothing.
type tarReader struct {
	in  recorder
	tar *tar.Reader
}

func newTarReader(r io.Reader) *tarReader {
	t := &tarReader{in: recorder{r: r}}
	t.tar = tar.NewReader(&t.in)
	return t
}

// next returns the next entry, without those that the lazy formats reserve.
func (t *tarReader) next() (*tarEntry, error) {
	for {
		pad := -t.in.pos & 511
		t.in.raw = t.in.raw[:0]
		t.in.on = true
		h, err := t.tar.Next()
		t.in.on = false
		if err == io.EOF {
			return nil, err
		}
		if err != nil {
			return nil, fmt.Errorf("tar at byte %d: %w", t.in.pos, err)
		}
		x := &tarEntry{header: t.in.raw, data: t.tar}
		// The raw bytes begin with the padding of the entry before. A sparse file's headers describe a
		// form that is not kept.
		if isSparse(h) || int64(len(x.header)) < pad {
			if x.header, err = encode(h); err != nil {
				return nil, fmt.Errorf("entry %.300q: %w", h.Name, err)
			}
		} else {
			x.header = x.header[pad:]
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			return x, nil
		}
		e, err := toc.EntryFromHeader(h)
		if err != nil {
			return nil, err
		}
		switch e.Name {
		case toc.TarName, toc.PrefetchLandmark, toc.NoPrefetchLandmark:
			if _, err := io.Copy(io.Discard, t.tar); err != nil {
				return nil, fmt.Errorf("entry %.300q: %w", h.Name, err)
			}
			continue
		}
		x.entry = &e
		return x, nil
	}
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// encode returns the header blocks of h, in the format that it came in if it can be.
func encode(h *tar.Header) ([]byte, error) {
	c := *h
	if c.Typeflag == tar.TypeGNUSparse {
		c.Typeflag = tar.TypeReg
	}
	var buf bytes.Buffer
	if err := tar.NewWriter(&buf).WriteHeader(&c); err != nil {
		buf.Reset()
		c.Format = tar.FormatPAX
		if err := tar.NewWriter(&buf).WriteHeader(&c); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), nil
}

// maxHeaders is how many bytes of headers one entry may have. The reader of archive/tar takes 1 MiB for
// each long name or PAX header, but any number of them.
const maxHeaders = 8 << 20

// A recorder counts what is read through it, and keeps it while it is on.
type recorder struct {
	r   io.Reader
	pos int64
	on  bool
	raw []byte
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.pos += int64(n)
	if r.on {
		if len(r.raw) > maxHeaders {
			return n, fmt.Errorf("more than %d bytes of headers for one entry", maxHeaders)
		}
		r.raw = append(r.raw, p[:n]...)
	}
	return n, err
}

// A source reads a blob from its beginning to its end. A stream that breaks is taken up again
// where it broke; digest and length are counted.
type source struct {
	ctx    context.Context // of the conversion, which the source does not outlive
	blob   remote.Blob
	stream io.ReadCloser
	pos    int64
	fails  int // in a row
	hash   hash.Hash
	read   func(int)
}

func newSource(ctx context.Context, b remote.Blob, read func(int)) *source {
	return &source{ctx: ctx, blob: b, hash: sha256.New(), read: read}
}

// maxFails is how often a stream may break without a byte in between.
const maxFails = 5

func (s *source) Read(p []byte) (int, error) {
	for {
		if s.pos == s.blob.Size() {
			return 0, io.EOF
		}
		if s.stream == nil {
			// Range retries by itself what can be retried.
			var err error
			if s.stream, err = s.blob.Range(s.ctx, s.pos, s.blob.Size()-s.pos); err != nil {
				return 0, err
			}
		}
		n, err := s.stream.Read(p)
		s.pos += int64(n)
		s.hash.Write(p[:n])
		s.read(n)
		if n > 0 {
			s.fails = 0
			return n, nil
		}
		if err == nil {
			continue
		}
		s.Close()
		if s.fails++; s.fails == maxFails || s.ctx.Err() != nil {
			return 0, err
		}
	}
}

func (s *source) Close() error {
	if s.stream != nil {
		s.stream.Close()
		s.stream = nil
	}
	return nil
}

// verify reads on to the end and compares what came with the descriptor.
func (s *source) verify(desc v1.Descriptor) error {
	if _, err := io.Copy(io.Discard, s); err != nil {
		return fmt.Errorf("at byte %d of %d: %w", s.pos, desc.Size, err)
	}
	if have := hex.EncodeToString(s.hash.Sum(nil)); desc.Digest.Algorithm != "sha256" || have != desc.Digest.Hex {
		return fmt.Errorf("what came has the digest sha256:%s: %w", have, errDigest)
	}
	return nil
}

// A checked is a source that ends with an error instead of io.EOF if it was not the blob that desc names.
type checked struct {
	*source
	desc v1.Descriptor
}

func newChecked(s *source, desc v1.Descriptor) *checked { return &checked{s, desc} }

func (c *checked) Read(p []byte) (int, error) {
	n, err := c.source.Read(p)
	if err == io.EOF {
		if err := c.verify(c.desc); err != nil {
			return n, err
		}
	}
	return n, err
}

var errDigest = errors.New("the blob is damaged where it lies or on the way")
