package rootfs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"

	"lazuli/fs/fetch"
	"lazuli/fs/remote"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A layer is one layer of an image that is being mounted.
type layer struct {
	remote.Layer
	diffID v1.Hash // as the config claims it
	// id names what the store keeps of the layer: "toc-" and the digest that the manifest promises of its table of
	// contents, or "blob-" and the layer's own if it is not lazy.
	id      string
	promise toc.Promise
	why     error // why the layer is not lazy, or nil
	table   *toc.Table
}

// newLayer decides from a layer's descriptor whether it is lazy. What its TOC says may change that.
func newLayer(l remote.Layer, diffID v1.Hash) (*layer, error) {
	if l.Digest.Algorithm != "sha256" {
		return nil, fmt.Errorf("layer %v: only sha256 digests are supported", l.Digest)
	}
	x := &layer{Layer: l, diffID: diffID}
	promise, err := toc.Promised(l.Annotations)
	switch {
	case errors.Is(err, toc.ErrNotLazy):
		x.ordinary(err)
	case err != nil:
		return nil, fmt.Errorf("layer %v: %w", l.Digest, err)
	default:
		x.promise = promise
		x.id = "toc-" + hexOf(promise.Digest.String())
	}
	return x, nil
}

func hexOf(digest string) string { return strings.TrimPrefix(digest, "sha256:") }

// ordinary makes l a layer that is fetched whole.
func (l *layer) ordinary(why error) {
	l.why = why
	l.id = "blob-" + l.Digest.Hex
}

func (l *layer) name() string { return "layer " + l.Digest.String() }

// tailGuess is how many bytes of a blob's end to ask for if nothing says how long its table of contents is: 1.6 % of the
// blob. Compressed tables are 0.4 to 1 % of a layer of ordinary files (54 bytes an entry).
func tailGuess(size int64) int64 { return min(size, max(size/64, 256<<10), 16<<20) }

// fetchTOC gets the layer's table of contents from the blob: in one request if the annotations say where it
// is or the guess is large enough, else in two. It returns the bytes that it was made of too.
func (l *layer) fetchTOC(ctx context.Context) (*toc.TOC, *compressedTOC, error) {
	loc, known, err := toc.Locate(l.Annotations, l.Size)
	if err != nil {
		return nil, nil, err
	}
	if known {
		return l.readTOC(ctx, loc, nil, l.Size)
	}
	guess := tailGuess(l.Size)
	tail, err := readRange(ctx, l.Blob, l.Size-guess, guess)
	if err != nil {
		return nil, nil, err
	}
	if loc, err = toc.ParseFooter(tail, l.Size); err != nil {
		return nil, nil, err
	}
	return l.readTOC(ctx, loc, tail, l.Size-guess)
}

// readTOC reads the table at loc, of which tail, at byte at of the blob, may have all or a part. It is parsed while
// it arrives.
func (l *layer) readTOC(ctx context.Context, loc toc.Location, tail []byte, at int64) (*toc.TOC, *compressedTOC, error) {
	var r io.Reader
	if loc.Offset >= at {
		r = bytes.NewReader(tail[loc.Offset-at:])
	} else {
		missing := min(loc.Offset+loc.Size, at) - loc.Offset
		body, err := l.Blob.Range(ctx, loc.Offset, missing)
		if err != nil {
			return nil, nil, err
		}
		defer body.Close()
		r = io.MultiReader(body, bytes.NewReader(tail))
	}
	c := &compressedTOC{Location: loc}
	t, err := toc.Parse(io.TeeReader(r, &c.bytes), loc, l.promise)
	return t, c, err
}

// A compressedTOC is a table of contents as it lies in the blob, which is how the store keeps it.
type compressedTOC struct {
	toc.Location
	bytes bytes.Buffer
}

// attempts is how often something small is asked for before it counts as not to be had: a stream that breaks is not
// retried below.
const attempts = 3

func readRange(ctx context.Context, b remote.Blob, off, n int64) ([]byte, error) {
	var err error
	for range attempts {
		var body io.ReadCloser
		if body, err = b.Range(ctx, off, n); err != nil {
			return nil, err
		}
		p := make([]byte, n)
		_, err = io.ReadFull(body, p)
		body.Close()
		if err == nil {
			return p, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

// open returns the layer's TOC: the one that the store keeps, else that of a startup pack, else from the blob, or if the layer is not lazy from all
// of it, whose files are then in the store.
func (l *layer) open(ctx context.Context, n *Node, o *MountOptions, s *Startup) (*toc.TOC, error) {
	if t, err := l.load(n); err == nil {
		return t, nil
	}
	if l.why == nil {
		t, err := l.fromPack(ctx, n, s)
		if t == nil && err == nil {
			t, err = l.fetch(ctx, n)
		}
		if !errors.Is(err, toc.ErrNotLazy) {
			return t, err
		}
		l.ordinary(err)
		if t, err := l.load(n); err == nil {
			return t, nil
		}
	}
	o.notice(fmt.Sprintf("%s is not lazy (%v): fetching all of it, %s", l.name(), reason(l.why), megabytes(l.Size)))
	t, err := l.unpack(ctx, n, o)
	if err != nil {
		if l.promise != (toc.Promise{}) { // it was said to be lazy
			err = fmt.Errorf("%w; it was fetched whole because %s", err, reason(l.why))
		}
		return nil, fmt.Errorf("%s: %w", l.name(), err)
	}
	return t, l.keepWhole(n, t)
}

// keepWhole writes down the TOC of a layer that is not lazy.
func (l *layer) keepWhole(n *Node, t *toc.TOC) error {
	return l.keep(n, func(f *os.File) error {
		// It is what Go's gob makes of it: the file is ours, and read by this program only.
		z, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
		if err != nil {
			return err
		}
		return errors.Join(gob.NewEncoder(z).Encode(t), z.Close())
	})
}

// fetch returns the layer's TOC from the blob, and keeps it in the store.
func (l *layer) fetch(ctx context.Context, n *Node) (t *toc.TOC, err error) {
	var c *compressedTOC
	for range attempts { // a table that does not verify may have been damaged on the way
		t, c, err = l.fetchTOC(ctx)
		if err == nil || errors.Is(err, toc.ErrNotLazy) || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.name(), err)
	}
	return t, l.keepTOC(n, c.Location, c.bytes.Bytes())
}

// fromPack returns the layer's TOC if the startup pack brings it soon, and else nil. The pack says nothing that is believed: where the
// table lies in the blob is what the layer's annotations say, and its bytes are what they promise.
func (l *layer) fromPack(ctx context.Context, n *Node, s *Startup) (*toc.TOC, error) {
	packed := s.table(ctx, l.promise.Digest)
	if packed == nil {
		return nil, nil
	}
	loc, known, err := toc.Locate(l.Annotations, l.Size)
	if err != nil || !known || loc.Size != int64(len(packed)) {
		return nil, nil
	}
	t, err := toc.Parse(bytes.NewReader(packed), loc, l.promise)
	if err != nil {
		if errors.Is(err, toc.ErrNotLazy) {
			return nil, err
		}
		n.log.Debug("startup pack", "layer", l.id, "err", err)
		return nil, nil
	}
	return t, l.keepTOC(n, loc, packed)
}

// keepTOC writes down a TOC as it lies in the blob.
func (l *layer) keepTOC(n *Node, loc toc.Location, packed []byte) error {
	return l.keep(n, func(f *os.File) error {
		if err := json.NewEncoder(f).Encode(loc); err != nil { // one line
			return err
		}
		_, err := f.Write(packed)
		return err
	})
}

// keep writes down what the layer's TOC can be made from again, for other images that use the layer.
func (l *layer) keep(n *Node, write func(*os.File) error) error {
	if err := os.MkdirAll(n.store.Path("layers", l.id), 0o700); err != nil {
		return err
	}
	return n.store.WriteFile(write, "layers", l.id, "toc")
}

// load returns the TOC that the store keeps.
func (l *layer) load(n *Node) (*toc.TOC, error) {
	f, err := os.Open(n.store.Path("layers", l.id, "toc"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size := 1 << 18
	if fi, err := f.Stat(); err == nil {
		size = int(min(fi.Size()+1, int64(size))) // there may be a hundred small ones
	}
	r := bufio.NewReaderSize(f, size)
	t := new(toc.TOC)
	if l.why == nil {
		var line []byte
		if line, err = r.ReadBytes('\n'); err == nil {
			var loc toc.Location
			if err = json.Unmarshal(line, &loc); err == nil {
				t, err = toc.Parse(r, loc, l.promise)
			}
		}
	} else {
		var z *zstd.Decoder
		if z, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1)); err == nil {
			defer z.Close()
			err = gob.NewDecoder(bufio.NewReaderSize(z, size)).Decode(t)
		}
	}
	if err != nil {
		n.log.Warn("a table of contents in the store is damaged; it is fetched again", "layer", l.id, "err", err)
		return nil, err
	}
	return t, nil
}

// reason is what err says after the sentinel's own words.
func reason(err error) string {
	s := err.Error()
	if _, why, ok := strings.Cut(s, toc.ErrNotLazy.Error()+": "); ok {
		return why
	}
	return s
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// openTable looks for the layer's chunk table in the store.
func (l *layer) openTable(n *Node) bool {
	var err error
	l.table, err = toc.OpenTable(n.store.Path("layers", l.id, "table"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log.Warn("a chunk table in the store cannot be used; it is made again", "err", err)
	}
	return err == nil
}

// makeTable makes the layer's chunk table from its TOC, and keeps it in the store.
func (l *layer) makeTable(n *Node, t *toc.TOC) error {
	b, err := toc.MarshalTable(t)
	if err != nil {
		return fmt.Errorf("%s: toc: %w", l.name(), err)
	}
	if err := os.MkdirAll(n.store.Path("layers", l.id), 0o700); err != nil {
		return err
	}
	if err := n.store.WriteFile(write(b), "layers", l.id, "table"); err != nil {
		return err
	}
	l.table, err = toc.OpenTable(n.store.Path("layers", l.id, "table"))
	return err
}

func write(b []byte) func(*os.File) error {
	return func(f *os.File) error { _, err := f.Write(b); return err }
}

// source returns the layer as the fetcher wants it.
func (l *layer) source(n *Node, o *MountOptions) *fetch.Layer {
	return &fetch.Layer{
		Name:  l.name(),
		Table: l.table,
		Blob:  l.Blob,
		Whole: func(ctx context.Context) error { _, err := l.unpack(ctx, n, o); return err },
	}
}

// objectsOf calls f for each object of a layer that the store knows, until f returns false.
func (n *Node) objectsOf(id string, f func(key store.Key, size int64) bool) error {
	table, err := toc.OpenTable(n.store.Path("layers", id, "table"))
	if err != nil {
		return err
	}
	for i := range table.Len() {
		if o := table.At(i); !f(store.Key(o.Key), o.Size) {
			break
		}
	}
	return nil
}
