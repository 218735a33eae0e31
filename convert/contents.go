package convert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"

	"lazuli/convert/closure"
	"lazuli/fs/meta"
	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// contents are the files of an image whose layers are in DST and lazy, read by ranges and verified. Its methods may be called concurrently.
type contents struct {
	layers []contentLayer
	tree   *meta.Tree

	mu      sync.Mutex
	members map[memberID][]byte // inflated
	kept    []memberID          // in the order in which they came
	bytes   int                 // of members
	reading singleflight.Group  // of members
}

type contentLayer struct {
	blob   remote.Blob
	toc    *toc.TOC
	loc    toc.Location
	want   toc.Promise
	packed []byte  // the table of contents, as it lies in the blob
	starts []int64 // of the members, in bytes of the blob
}

type memberID struct {
	layer  int
	member int64
}

const (
	smallMember = 8 << 20  // bytes of the blob: a member that is read and kept as a whole
	maxRow      = 4 << 20  // bytes of the blob that are read with one request, if more than one member is
	maxMember   = 32 << 20 // bytes of it, inflated
	maxKept     = 64 << 20 // bytes of members, inflated
	maxWindow   = 64 << 20 // bytes, of a zstd frame
)

// openContents reads the tables of contents of layers, the lowest first. The error wraps [toc.ErrNotLazy] if one is not lazy.
func openContents(ctx context.Context, d dest, layers []v1.Descriptor) (*contents, error) {
	c := &contents{layers: make([]contentLayer, len(layers)), members: map[memberID][]byte{}}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(sideBySide)
	for i, desc := range layers {
		group.Go(func() error {
			if err := c.layers[i].open(gctx, d, desc); err != nil {
				return fmt.Errorf("layer %v: %w", desc.Digest, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	tocs := make([]*toc.TOC, len(layers))
	for i := range c.layers {
		tocs[i] = c.layers[i].toc
	}
	var err error
	c.tree, err = meta.Merge(tocs)
	return c, err
}

func (l *contentLayer) open(ctx context.Context, d dest, desc v1.Descriptor) (err error) {
	if l.want, err = toc.Promised(desc.Annotations); err != nil {
		return err
	}
	if l.blob, err = d.blob(ctx, desc); err != nil {
		return err
	}
	loc, known, err := toc.Locate(desc.Annotations, desc.Size)
	if err == nil && !known {
		n := min(desc.Size, toc.FooterSize)
		var tail []byte
		if tail, err = readRange(ctx, l.blob, desc.Size-n, n); err == nil {
			loc, err = toc.ParseFooter(tail, desc.Size)
		}
	}
	if err == nil && loc.Size > maxTOC {
		err = fmt.Errorf("table of contents of %d bytes", loc.Size)
	}
	if err != nil {
		return err
	}
	l.loc = loc
	if l.packed, err = readRange(ctx, l.blob, loc.Offset, loc.Size); err != nil {
		return err
	}
	if l.toc, err = toc.Parse(bytes.NewReader(l.packed), loc, l.want); err != nil {
		return err
	}
	for _, x := range l.toc.Chunks {
		if !x.Hole {
			l.starts = append(l.starts, x.Member)
		}
	}
	slices.Sort(l.starts)
	l.starts = slices.Compact(l.starts)
	return nil
}

func readRange(ctx context.Context, b remote.Blob, off, n int64) ([]byte, error) {
	rc, err := b.Range(ctx, off, n)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	var buf bytes.Buffer // grows with what arrives
	if _, err := io.CopyN(&buf, rc, n); err != nil {
		return nil, noEOF(err)
	}
	return buf.Bytes(), nil
}

// end returns where the member that begins at start ends at the latest.
func (l *contentLayer) end(start int64) int64 {
	i, _ := slices.BinarySearch(l.starts, start+1)
	if i < len(l.starts) {
		return l.starts[i]
	}
	return max(l.toc.DataEnd, start)
}

// small reports whether the member of a chunk is read and kept as a whole.
func (l *contentLayer) small(x toc.Chunk) bool {
	return !x.Hole && l.end(x.Member)-x.Member <= smallMember && x.Inner+x.Size <= maxMember
}

// chunk returns the bytes of a chunk of a layer, which are not to be modified.
func (c *contents) chunk(ctx context.Context, layer int, x toc.Chunk) ([]byte, error) {
	if x.Hole {
		return make([]byte, x.Size), nil
	}
	l := &c.layers[layer]
	id := memberID{layer, x.Member}
	end := l.end(x.Member)
	c.mu.Lock()
	data, kept := c.members[id]
	c.mu.Unlock()
	at := int64(0) // of data, in bytes of the member
	if !kept {
		whole := l.small(x)
		flight := fmt.Sprint(layer, x.Member)
		if !whole { // it is the chunk alone
			at = x.Inner
			flight += fmt.Sprint("+", at)
		}
		v, err, _ := c.reading.Do(flight, func() (any, error) {
			body, err := l.blob.Range(ctx, x.Member, end-x.Member)
			if err != nil {
				return nil, err
			}
			defer body.Close()
			if !whole {
				return l.inflate(body, x.Inner, x.Size)
			}
			data, err := l.inflate(body, 0, maxMember)
			if err == nil {
				c.keep(id, data)
			}
			return data, err
		})
		if err != nil {
			return nil, fmt.Errorf("member at byte %d of the blob: %w", x.Member, err)
		}
		data = v.([]byte)
	}
	if int64(len(data)) < x.Inner-at+x.Size {
		return nil, fmt.Errorf("member at byte %d of the blob: %w", x.Member, io.ErrUnexpectedEOF)
	}
	p := data[x.Inner-at:][:x.Size]
	if sum := sha256.Sum256(p); sum != x.Digest {
		return nil, fmt.Errorf("member at byte %d of the blob: a chunk is %v, not %v as the table of contents says", x.Member, toc.Digest(sum), x.Digest)
	}
	return p, nil
}

// ahead reads small members of a layer that lie in a row, in one request.
func (c *contents) ahead(ctx context.Context, row []memberID) error {
	l, from := &c.layers[row[0].layer], row[0].member
	body, err := l.blob.Range(ctx, from, l.end(row[len(row)-1].member)-from)
	if err != nil {
		return err
	}
	defer body.Close()
	for _, id := range row {
		member := io.LimitReader(body, l.end(id.member)-id.member)
		data, err := l.inflate(member, 0, maxMember)
		if err == nil {
			_, err = io.Copy(io.Discard, member)
		}
		if err != nil {
			return fmt.Errorf("member at byte %d of the blob: %w", id.member, err)
		}
		c.keep(id, data)
	}
	return nil
}

func (c *contents) keep(id memberID, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.members[id]; ok {
		return
	}
	c.members[id] = data
	c.kept = append(c.kept, id)
	c.bytes += len(data)
	for ; c.bytes > maxKept; c.kept = c.kept[1:] {
		c.bytes -= len(c.members[c.kept[0]])
		delete(c.members, c.kept[0])
	}
}

// inflate returns n bytes of a member from byte at on, or as many as there are.
func (l *contentLayer) inflate(member io.Reader, at, n int64) ([]byte, error) {
	r := member
	if l.toc.Compression == toc.Zstd {
		z, err := zstd.NewReader(member, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		defer z.Close()
		r = z
	} else {
		z, err := gzip.NewReader(member)
		if err != nil {
			return nil, noEOF(err)
		}
		z.Multistream(false)
		r = z
	}
	if _, err := io.CopyN(io.Discard, r, at); err != nil {
		return nil, noEOF(err)
	}
	var buf bytes.Buffer
	if _, err := io.CopyN(&buf, r, n); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return buf.Bytes(), nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Lookup, List and ReadAt make contents what the closure is looked for in.
func (c *contents) Lookup(name string) (closure.File, bool) {
	f, ok := c.tree.Lookup(name)
	return closure.File{Name: f.Name, Regular: f.Type == toc.Regular, Exec: f.Mode&0o111 != 0, Size: f.Size}, ok
}

func (c *contents) List(name string) []string { return c.tree.List(name) }

func (c *contents) ReadAt(ctx context.Context, f closure.File, p []byte, off int64) error {
	x, ok := c.tree.Lookup(f.Name)
	if !ok || x.Type != toc.Regular {
		return fmt.Errorf("%s: no such file", f.Name)
	}
	chunks := c.file(x)
	for _, y := range chunks {
		from, to := max(y.FileOffset, off), min(y.FileOffset+y.Size, off+int64(len(p)))
		if from >= to {
			continue
		}
		data, err := c.chunk(ctx, x.Layer, y)
		if err != nil {
			return fmt.Errorf("%s: %w", f.Name, err)
		}
		copy(p[from-off:to-off], data[from-y.FileOffset:])
	}
	return nil
}

// file returns the chunks of a regular file.
func (c *contents) file(f meta.File) []toc.Chunk {
	t := c.layers[f.Layer].toc
	return t.Content(&t.Entries[f.Entry])
}
