package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"lazuli/fs/fetch"
	"lazuli/fs/meta"
	"lazuli/fs/pack"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A Startup is the search for an image's startup pack, and then its arrival. Nothing waits for it: what it brings is
// here sooner than it would be otherwise, and that is all.
type Startup struct {
	n      *Node
	ctx    context.Context // ends at Close; the life of what goes on behind
	cancel context.CancelFunc
	work   sync.WaitGroup

	found chan struct{} // closed when blob or err is set
	blob  remote.Blob   // nil if there is no pack
	err   error
	body  *aheadReader // of blob from its beginning
}

// Startup begins to look for the startup pack of the manifest with a digest, in the repository that ref names. The caller closes it.
func (n *Node) Startup(ref remote.Reference, digest v1.Hash) *Startup {
	src, err := n.source(ref)
	if err != nil { // who asks for the image hears of it
		src = nil
	}
	return n.startup(src, digest)
}

func (n *Node) startup(src remote.Source, digest v1.Hash) *Startup {
	s := &Startup{n: n, found: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.work.Go(func() {
		defer close(s.found)
		if src == nil {
			return
		}
		if s.blob, s.err = findPack(s.ctx, src, digest); s.blob == nil {
			return
		}
		body, err := s.blob.Range(s.ctx, 0, s.blob.Size())
		if err != nil {
			s.err = err
			return
		}
		s.body = readAhead(body)
	})
	return s
}

// findPack returns the newest startup pack that refers to a manifest, or nil.
func findPack(ctx context.Context, src remote.Source, digest v1.Hash) (remote.Blob, error) {
	list, err := remote.Referrers(ctx, src, digest, pack.MediaType)
	best, ok := newestPack(list)
	if !ok {
		return nil, err
	}
	return src.Blob(best), nil
}

// newestPack returns the blob of the pack that was made last, of those whose annotations say where it is. One that was recorded
// comes before those that were not.
func newestPack(list []v1.Descriptor) (best v1.Descriptor, ok bool) {
	var made time.Time
	recorded := false
	for _, d := range list {
		blob, named := pack.Named(d.Annotations)
		at, _ := time.Parse(time.RFC3339, d.Annotations[pack.MadeAnnotation]) // who does not say it comes last
		was := d.Annotations[pack.OriginAnnotation] == ""
		if named && (!ok || was && !recorded || was == recorded && at.After(made)) {
			best, made, recorded, ok = blob, at, was, true
		}
	}
	return best, ok
}

// into puts the pack, if there is one, into the store, for layers that were added to the queue.
func (s *Startup) into(layers []*fetch.Layer) (fetch.PackStats, error) {
	select {
	case <-s.found:
	case <-s.ctx.Done():
		return fetch.PackStats{}, context.Cause(s.ctx)
	}
	if s.body == nil {
		return fetch.PackStats{}, s.err
	}
	x, err := pack.ReadIndex(s.body)
	if err == nil && x.Size != s.blob.Size() {
		err = fmt.Errorf("startup pack: its index is of %d bytes, the blob has %d", x.Size, s.blob.Size())
	}
	if err != nil {
		return fetch.PackStats{}, err
	}
	at := x.Start
	for _, t := range x.Tables {
		at += t.Size
	}
	open := func(ctx context.Context, off int64) (io.ReadCloser, error) {
		body := s.body
		s.body = nil
		if body != nil && off-x.Start <= maxSkip {
			if _, err := io.CopyN(io.Discard, body, off-x.Start); err == nil {
				return body, nil
			}
		}
		if body != nil {
			body.Close()
		}
		return s.blob.Range(ctx, off, x.Size-off)
	}
	return s.n.queue.Pack(s.ctx, x, at, open, layers...)
}

// maxSkip is how many bytes of a pack are read over rather than asked around.
const maxSkip = 1 << 20

// Close ends the search or the arrival and waits for its end.
func (s *Startup) Close() {
	s.cancel()
	s.work.Wait()
	if s.body != nil {
		s.body.Close()
	}
}

// behind begins to put the pack into the store behind the caller, and calls f when that has ended.
func (s *Startup) behind(layers []*fetch.Layer, f func()) {
	s.work.Go(func() {
		if _, err := s.into(layers); err != nil && s.ctx.Err() == nil {
			s.n.log.Warn("the startup pack was not of use", "err", err)
		}
		f()
	})
}

// Start brings what the startup pack has of the chain's layers, if there is one, and returns when it is here or of no use, or when ctx
// ends, and s with it.
func (c Chain) Start(ctx context.Context, s *Startup) error {
	defer context.AfterFunc(ctx, s.cancel)()
	release, err := c.Use()
	if err != nil {
		return err
	}
	defer release()
	var layers []*fetch.Layer
	for _, r := range c.Layers {
		_, key, err := c.n.openRecord(r)
		if err != nil {
			return err
		}
		c.n.mu.Lock()
		if u := c.n.used[key]; u != nil {
			layers = append(layers, u.Layer)
		}
		c.n.mu.Unlock()
	}
	_, err = s.into(layers)
	return err
}

// An aheadReader reads a stream before it is asked for, up to a bound, so that the connection is not held up while nobody can
// use the bytes yet. It belongs to one goroutine.
type aheadReader struct {
	body io.ReadCloser
	done chan struct{} // closed when nobody reads body any more

	mu     sync.Mutex
	change sync.Cond // of what follows
	parts  [][]byte  // that came and were not read yet
	bytes  int       // of them
	err    error     // of body, behind parts
	closed bool
}

const (
	aheadBlock = 128 << 10
	// maxAhead is what arrives in 250 ms at 1 Gbit/s, while the tables of contents come and are parsed.
	maxAhead = 32 << 20
)

func readAhead(body io.ReadCloser) *aheadReader {
	r := &aheadReader{body: body, done: make(chan struct{})}
	r.change.L = &r.mu
	go r.loop() // ends at Close
	return r
}

func (r *aheadReader) loop() {
	defer close(r.done)
	var free []byte // of a block
	for {
		if len(free) < aheadBlock/8 { // what is left of a block is lost: not much
			free = make([]byte, aheadBlock)
		}
		n, err := r.body.Read(free)
		r.mu.Lock()
		if n > 0 {
			r.parts = append(r.parts, free[:n:n])
			r.bytes += n
			free = free[n:]
		}
		r.err = err
		r.change.Broadcast()
		for r.bytes >= maxAhead && !r.closed {
			r.change.Wait()
		}
		end := err != nil || r.closed
		r.mu.Unlock()
		if end {
			return
		}
	}
}

func (r *aheadReader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.parts) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		r.change.Wait()
	}
	n := copy(p, r.parts[0])
	if r.parts[0] = r.parts[0][n:]; len(r.parts[0]) == 0 {
		r.parts[0] = nil
		r.parts = r.parts[1:]
	}
	r.bytes -= n
	r.change.Broadcast()
	return n, nil
}

// Close gives up what was not read. It may be called again.
func (r *aheadReader) Close() error {
	r.mu.Lock()
	closed := r.closed
	r.closed = true
	r.change.Broadcast()
	r.mu.Unlock()
	if closed {
		return nil
	}
	err := r.body.Close()
	<-r.done
	return err
}

// tree returns the layers' tables of contents and what they are together.
func (c Chain) tree() (*meta.Tree, []*toc.TOC, error) {
	var tocs []*toc.TOC
	for _, l := range c.parts() {
		t, err := l.load(c.n)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", l.id, err)
		}
		tocs = append(tocs, t)
	}
	t, err := meta.Merge(tocs)
	return t, tocs, err
}

// Profile returns the profile of one run of the chain, of what was read while it was recorded.
func (c Chain) Profile(touches []fetch.Touch) (*profile.Profile, error) {
	tree, tocs, err := c.tree()
	if err != nil {
		return nil, err
	}
	paths := map[toc.Digest]string{}
	for o := range tree.Objects() {
		if _, ok := paths[o.Key]; !ok {
			paths[o.Key] = tocs[o.Layer].Entries[o.Entry].Name
		}
	}
	list := make([]profile.Touch, len(touches))
	for i, t := range touches {
		list[i] = profile.Touch{Key: toc.Digest(t.Key), Off: t.Off, N: t.N, After: t.After}
	}
	return profile.FromTouches(list, paths), nil
}

// A PackReport says what a startup pack was made of.
type PackReport struct {
	Pieces  int   `json:"pieces"`  // of the profile
	Chunks  int   `json:"chunks"`  // in the pack
	Content int64 `json:"content"` // bytes of files
	Size    int64 `json:"size"`    // of the pack
	Missing int   `json:"missing"` // files that the profile names and the image does not have
}

// Pack writes the startup pack of the chain for what a profile says of at least a share of the runs. What is not here is fetched. It is
// an error if there is nothing to put into it. It takes as much memory as the pack has bytes.
func (c Chain) Pack(ctx context.Context, p *profile.Profile, share float64, w io.Writer) (r PackReport, err error) {
	tree, tocs, err := c.tree()
	if err != nil {
		return r, err
	}
	files := map[string]meta.Object{}
	for o := range tree.Objects() {
		files[tocs[o.Layer].Entries[o.Entry].Name] = o
	}
	missing := map[string]bool{}
	chunks := p.Chunks(share, func(path string) []toc.Chunk {
		o, ok := files[path]
		if !ok {
			missing[path] = true
			return nil
		}
		if tocs[o.Layer].Compression == toc.Whole { // it is fetched whole, with or without a pack
			return nil
		}
		return tocs[o.Layer].Content(&tocs[o.Layer].Entries[o.Entry])
	})
	r.Pieces, r.Chunks, r.Missing = len(p.Pieces), len(chunks), len(missing)
	if len(chunks) == 0 {
		return r, errors.New("startup pack: no lazy layer of the image has any of the profile's files: convert the image (lazuli convert), or record another profile")
	}
	release, err := c.Use()
	if err != nil {
		return r, err
	}
	defer release()
	var b pack.Builder
	for part := range slices.Chunk(chunks, chunksAtOnce) {
		data := make([][]byte, len(part))
		group, gctx := errgroup.WithContext(ctx)
		for i, x := range part {
			group.Go(func() (err error) {
				data[i], err = c.n.read(gctx, x.Key, x.FileOffset, x.Size)
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return r, err
		}
		for i, x := range part {
			if err := b.Chunk(x.Key, x.Index, data[i]); err != nil {
				return r, err
			}
			r.Content += x.Size
		}
	}
	r.Size, err = b.WriteTo(w)
	return r, err
}

// chunksAtOnce is how many chunks of a pack are read side by side: they may have to be fetched.
const chunksAtOnce = 16

// read returns n bytes of an object at off.
func (n *Node) read(ctx context.Context, key toc.Digest, off, size int64) ([]byte, error) {
	id, _, ok := n.queue.Lookup(store.Key(key))
	if !ok {
		return nil, fmt.Errorf("object %v is unknown", key)
	}
	o, err := n.queue.Open(id)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	p := make([]byte, size)
	m, err := o.ReadAt(ctx, p, off)
	if int64(m) == size {
		err = nil
	}
	return p, err
}

// Chain returns the chain of a rootfs's layers.
func (r *Rootfs) Chain() Chain { return r.n.Chain(r.record.Layers) }

// Recorded ends the recording of a rootfs that was mounted with MountOptions.Record, and returns what was read.
func (r *Rootfs) Recorded() []fetch.Touch {
	if r.recorded == nil {
		return nil
	}
	return r.recorded()
}
