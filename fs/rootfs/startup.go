package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"

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

	found  chan struct{} // closed when blob or err is set
	blob   remote.Blob   // nil if there is no pack
	digest v1.Hash       // of blob
	err    error
	body   *aheadReader // of blob from its beginning

	ref     remote.Reference
	own     chan *Learned // nil if Image was not called; else has one, or is closed
	chain   string        // whose pack it is; set before it arrives
	indexed chan struct{} // closed when chunks is set, or there is no pack
	once    sync.Once     // closes indexed
	chunks  []pack.Chunk  // that the pack has
}

// Startup begins to look for the startup pack of the manifest with a digest, in the repository that ref names. The caller closes it.
func (n *Node) Startup(ref remote.Reference, digest v1.Hash) *Startup {
	src, err := n.source(ref)
	if err != nil { // who asks for the image hears of it
		src = nil
	}
	return n.startup(src, ref, digest)
}

func (n *Node) startup(src remote.Source, ref remote.Reference, digest v1.Hash) *Startup {
	s := &Startup{n: n, ref: ref, found: make(chan struct{}), indexed: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.work.Go(func() {
		defer close(s.found)
		if src == nil {
			return
		}
		if s.blob, s.digest, s.err = findPack(s.ctx, src, digest); s.blob == nil {
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

// maxPack is how large a startup pack may be, in bytes.
const maxPack = 16 << 30

// findPack returns the newest startup pack that refers to a manifest and its digest, or nil.
func findPack(ctx context.Context, src remote.Source, digest v1.Hash) (remote.Blob, v1.Hash, error) {
	list, err := remote.Referrers(ctx, src, digest, pack.MediaType)
	var best v1.Descriptor
	made := ""
	for _, d := range list {
		hash, herr := v1.NewHash(d.Annotations[pack.DigestAnnotation])
		size, serr := strconv.ParseInt(d.Annotations[pack.SizeAnnotation], 10, 64)
		if herr != nil || serr != nil || size <= 0 || size > maxPack || d.Annotations[pack.MadeAnnotation] < made {
			continue
		}
		best, made = v1.Descriptor{Digest: hash, Size: size}, d.Annotations[pack.MadeAnnotation]
	}
	if best.Size == 0 {
		return nil, v1.Hash{}, err
	}
	return src.Blob(best), best.Digest, nil
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
	s.index(x)
	at := x.Start
	for _, t := range x.Tables {
		at += t.Size
	}
	pos := x.Start
	open := func(ctx context.Context, off int64) (io.ReadCloser, error) {
		body := s.body
		s.body = nil
		if body != nil && off >= pos && off-pos <= 1<<20 {
			if _, err := io.CopyN(io.Discard, body, off-pos); err == nil {
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

// Close ends the search or the arrival and waits for its end.
func (s *Startup) Close() {
	s.cancel()
	s.work.Wait()
	if s.body != nil {
		s.body.Close()
	}
}

// behind begins to bring what a start wants behind the caller.
func (s *Startup) behind(own <-chan *Learned, layers []*fetch.Layer, tocs []*toc.TOC) {
	s.work.Go(func() {
		if err := s.arrive(own, layers, tocs); err != nil && s.ctx.Err() == nil {
			s.n.log.Warn("the startup pack was not of use", "err", err)
		}
	})
}

// Start brings what the startup pack has of the chain's layers, if there is one, and what the node has learned that the image's starts
// want besides. It returns when it is here or of no use. tocs are the layers' tables of contents.
func (c Chain) Start(s *Startup, tocs []*toc.TOC) error {
	release, err := c.Use()
	if err != nil {
		return err
	}
	defer release()
	layers, err := c.queued()
	if err != nil {
		return err
	}
	s.chain = c.ID()
	return s.arrive(s.own, layers, tocs)
}

// An aheadReader reads a stream before it is asked for, up to a bound, so that the connection is not held up while nobody can
// use the bytes yet.
type aheadReader struct {
	body   io.ReadCloser
	blocks chan []byte
	err    error // of body, set before blocks is closed
	stop   chan struct{}
	done   chan struct{}
	once   sync.Once
	rest   []byte
}

const (
	aheadBlock  = 128 << 10
	aheadBlocks = 512 // 64 MiB in all
)

func readAhead(body io.ReadCloser) *aheadReader {
	r := &aheadReader{body: body, blocks: make(chan []byte, aheadBlocks), stop: make(chan struct{}), done: make(chan struct{})}
	go r.loop() // ends at Close
	return r
}

func (r *aheadReader) loop() {
	defer close(r.done)
	defer close(r.blocks)
	for {
		b := make([]byte, aheadBlock)
		n, err := r.body.Read(b)
		if n > 0 {
			select {
			case r.blocks <- b[:n]:
			case <-r.stop:
				r.err = errors.New("closed")
				return
			}
		}
		if err != nil {
			r.err = err
			return
		}
	}
}

func (r *aheadReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		b, ok := <-r.blocks
		if !ok {
			return 0, r.err
		}
		r.rest = b
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *aheadReader) Close() error {
	var err error
	r.once.Do(func() {
		close(r.stop)
		err = r.body.Close()
		<-r.done
	})
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
	return profile.FromTouches(profileTouches(touches), paths), nil
}

func profileTouches(touches []fetch.Touch) []profile.Touch {
	list := make([]profile.Touch, len(touches))
	for i, t := range touches {
		list[i] = profile.Touch{Key: toc.Digest(t.Key), Off: t.Off, N: t.N, After: t.After}
	}
	return list
}

// A PackReport says what a startup pack was made of.
type PackReport struct {
	Pieces  int   `json:"pieces"`  // of the profile
	Chunks  int   `json:"chunks"`  // in the pack
	Content int64 `json:"content"` // bytes of files
	Size    int64 `json:"size"`    // of the pack
	Missing int   `json:"missing"` // files that the profile names and the image does not have
}

// Pack writes the startup pack of the chain for what a profile says of at least a share of the runs. What is not here is fetched.
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
		return tocs[o.Layer].Content(&tocs[o.Layer].Entries[o.Entry])
	})
	r.Pieces, r.Chunks, r.Missing = len(p.Pieces), len(chunks), len(missing)
	release, err := c.Use()
	if err != nil {
		return r, err
	}
	defer release()
	var b pack.Builder
	for _, x := range chunks {
		data, err := c.n.read(ctx, x.Key, x.FileOffset, x.Size)
		if err != nil {
			return r, err
		}
		if err := b.Chunk(x.Key, x.Index, data); err != nil {
			return r, err
		}
		r.Content += x.Size
	}
	r.Size, err = b.WriteTo(w)
	return r, err
}

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
	m, err := o.Peek(ctx, p, off)
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
