package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
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

// Startup begins to look for the startup pack of the manifest with a digest, in the repository that ref names. image returns the image when
// it is known. The caller closes the Startup.
func (n *Node) Startup(ref remote.Reference, digest v1.Hash, image func(context.Context) (*remote.Image, error)) *Startup {
	src, err := n.source(ref)
	if err != nil { // who asks for the image hears of it
		src = nil
	}
	return n.startup(src, ref, digest, image)
}

func (n *Node) startup(src remote.Source, ref remote.Reference, digest v1.Hash, image func(context.Context) (*remote.Image, error)) *Startup {
	s := &Startup{n: n, ref: ref, found: make(chan struct{}), indexed: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.work.Go(func() {
		defer close(s.found)
		if src == nil {
			return
		}
		if s.blob, s.digest, s.err = s.find(src, digest, image); s.blob == nil {
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

// find returns the newest startup pack that refers to a manifest, else the newest of the repository, if that is of an image
// that runs the same command; or nil. It returns the digest of the pack only if that refers to the manifest.
func (s *Startup) find(src remote.Source, digest v1.Hash, image func(context.Context) (*remote.Image, error)) (remote.Blob, v1.Hash, error) {
	ctx := s.ctx
	var last v1.Descriptor
	var lastErr error
	both := make(chan struct{})
	s.work.Go(func() {
		defer close(both)
		last, lastErr = remote.Artifact(ctx, src, pack.Tag, pack.MediaType)
	})
	list, listErr := remote.Referrers(ctx, src, digest, pack.MediaType)
	best, ok := newestPack(list)
	if ok {
		return src.Blob(best), best.Digest, nil
	}
	<-both
	if best, ok = newestPack([]v1.Descriptor{last}); !ok {
		return nil, v1.Hash{}, errors.Join(listErr, lastErr)
	}
	i, err := image(ctx)
	if err != nil {
		return nil, v1.Hash{}, err
	}
	config, _, err := i.Config(ctx)
	if err != nil || pack.Command(config.Config.Entrypoint, config.Config.Cmd) != last.Annotations[pack.CommandAnnotation] {
		return nil, v1.Hash{}, err
	}
	return src.Blob(best), v1.Hash{}, nil
}

// newestPack returns the blob of the pack that was made last, of those whose annotations say where it is.
func newestPack(list []v1.Descriptor) (best v1.Descriptor, ok bool) {
	var made time.Time
	for _, d := range list {
		hash, herr := v1.NewHash(d.Annotations[pack.DigestAnnotation])
		size, serr := strconv.ParseInt(d.Annotations[pack.SizeAnnotation], 10, 64)
		at, _ := time.Parse(time.RFC3339, d.Annotations[pack.MadeAnnotation]) // who does not say it comes last
		if herr == nil && serr == nil && size > 0 && size <= maxPack && (!ok || at.After(made)) {
			best, made, ok = v1.Descriptor{Digest: hash, Size: size}, at, true
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
	s.index(x)
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

// behind begins to bring what a start wants behind the caller.
func (s *Startup) behind(own <-chan *Learned, layers []*fetch.Layer, tocs []*toc.TOC) {
	s.work.Go(func() {
		if err := s.arrive(own, layers, tocs); err != nil && s.ctx.Err() == nil {
			s.n.log.Warn("the startup pack was not of use", "err", err)
		}
	})
}

// Start brings what the startup pack has of the chain's layers, if there is one, and what the node has learned that the image's starts
// want besides. It returns when it is here or of no use, or when ctx ends, and s with it. tocs are the layers' tables of contents.
func (c Chain) Start(ctx context.Context, s *Startup, tocs []*toc.TOC) error {
	defer context.AfterFunc(ctx, s.cancel)()
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
