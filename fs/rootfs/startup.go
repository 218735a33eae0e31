package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
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

// A Startup is the search for an image's startup pack, and then its arrival. Nothing depends on it: what it brings is
// here sooner than it would be otherwise, and that is all.
type Startup struct {
	n      *Node
	ctx    context.Context // ends at Close; the life of what goes on behind
	cancel context.CancelFunc
	work   sync.WaitGroup

	ready  chan struct{} // closed when what follows is set
	blob   remote.Blob   // nil if there is no pack
	err    error
	digest v1.Hash // of blob, if it refers to the image's manifest
	guess  bool    // it has what the command can be seen to need, and no more
	index  *pack.Index
	body   *aheadReader // of blob from pos on, or nil
	pos    int64

	// Of a pack that the manifest names:
	tables  map[toc.Digest]*packedTable // that are waited for
	late    chan struct{}               // closed when nobody is to wait for them any more
	arrived atomic.Int64                // bytes of the pack

	pulled bool // what follows the start outlives s

	// Of what the node has learned:
	ref     remote.Reference
	own     chan *Learned // nil if Image was not called; else has one, or is closed
	chain   string        // whose pack it is; set before it arrives
	indexed chan struct{} // closed when chunks is set, or there is no pack
	once    sync.Once     // closes indexed
	chunks  []pack.Chunk  // that the pack has
}

// A packedTable is a layer's table of contents or the config, as a startup pack may bring it.
type packedTable struct {
	size int64         // as the manifest says it
	done chan struct{} // closed when it came or will not come
	data []byte        // unverified; nil if it did not come
}

// Startup begins to look for the startup pack of the manifest with a digest, in the repository that ref names. image returns the image when
// it is known. The caller closes the Startup.
func (n *Node) Startup(ref remote.Reference, digest v1.Hash, image func(context.Context) (*remote.Image, error)) *Startup {
	src, err := n.source(ref)
	if err != nil { // who asks for the image hears of it
		src = nil
	}
	s := n.newStartup(ref)
	s.begin(src, digest, v1.Descriptor{}, image)
	return s
}

func (n *Node) newStartup(ref remote.Reference) *Startup {
	s := &Startup{n: n, ref: ref, ready: make(chan struct{}), indexed: make(chan struct{}), late: make(chan struct{}), tables: map[toc.Digest]*packedTable{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// startupOf is Startup for an image whose manifest is here, which it took some time to get: a pack that it names is asked for at once.
func (n *Node) startupOf(src remote.Source, ref remote.Reference, image *remote.Image, took time.Duration) *Startup {
	s := n.newStartup(ref)
	named, ok := pack.Named(image.Manifest.Annotations)
	if ok {
		want := func(d toc.Digest, size int64) {
			if size <= 0 || size > maxTable {
				return
			}
			s.tables[d] = &packedTable{size: size, done: make(chan struct{})}
		}
		if d, err := toc.ParseDigest(image.Manifest.Config.Digest.String()); err == nil {
			want(d, image.Manifest.Config.Size)
		}
		for _, l := range image.Layers {
			promise, err := toc.Promised(l.Annotations)
			if loc, known, lerr := toc.Locate(l.Annotations, l.Size); err == nil && lerr == nil && known {
				want(promise.Digest, loc.Size)
			}
		}
		s.watch(took)
	}
	s.begin(src, image.Digest, named, func(context.Context) (*remote.Image, error) { return image, nil })
	return s
}

// begin looks for the pack, or takes the one that is named, and reads it up to its first frame.
func (s *Startup) begin(src remote.Source, digest v1.Hash, named v1.Descriptor, image func(context.Context) (*remote.Image, error)) {
	s.work.Go(func() {
		defer close(s.ready)
		defer s.noMore()
		if src == nil {
			return
		}
		var body io.ReadCloser
		s.err = remote.ErrNotFound
		if named.Size > 0 {
			s.blob = src.Blob(named)
			s.digest = named.Digest
			body, s.err = s.blob.Range(s.ctx, 0, named.Size)
		}
		if errors.Is(s.err, remote.ErrNotFound) { // the image was copied without it, or names none
			s.noMore()
			if s.blob, s.digest, s.err = s.find(src, digest, image); s.blob != nil {
				body, s.err = s.blob.Range(s.ctx, 0, s.blob.Size())
			}
		}
		if body == nil {
			return
		}
		s.body = readAhead(countedBody{body, &s.arrived})
		if s.index, s.err = pack.ReadIndex(s.body); s.err == nil && s.index.Size != s.blob.Size() {
			s.err = fmt.Errorf("startup pack: its index is of %d bytes, the blob has %d", s.index.Size, s.blob.Size())
		}
		if s.err == nil {
			s.pos = s.index.Start
			s.readTables()
		}
	})
}

type countedBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

// readTables reads the tables that are waited for. Others are read over.
func (s *Startup) readTables() {
	at := s.index.Start
	for _, t := range s.index.Tables {
		begin := at
		at += t.Size
		want := s.tables[t.Digest]
		if want == nil || want.size != t.Size || want.data != nil {
			continue
		}
		if begin-s.pos > maxSkip {
			return
		}
		var buf bytes.Buffer // grows with what arrives
		n, err := io.CopyN(io.Discard, s.body, begin-s.pos)
		s.pos += n
		if err == nil {
			n, err = io.CopyN(&buf, s.body, t.Size)
			s.pos += n
		}
		if err != nil {
			s.body.Close()
			s.body = nil // who wants the frames asks again
			return
		}
		want.data = buf.Bytes()
		close(want.done)
	}
}

// noMore says that tables that did not come will not come.
func (s *Startup) noMore() {
	for _, t := range s.tables {
		if t.data == nil {
			select {
			case <-t.done:
			default:
				close(t.done)
			}
		}
	}
}

var errNoTable = errors.New("not in the startup pack")

// table returns the table of contents, or the config, with a digest if the pack brings it soon, unverified, and else nil. A nil
// Startup has none.
func (s *Startup) table(ctx context.Context, digest toc.Digest) []byte {
	if s == nil || s.tables[digest] == nil {
		return nil
	}
	t := s.tables[digest]
	select {
	case <-t.done:
	case <-s.late:
	case <-ctx.Done():
	}
	select {
	case <-t.done:
		return t.data
	default:
		return nil
	}
}

// maxTable is how large a table may be that is taken from a pack, in bytes: it is in memory until it is verified.
const maxTable = 64 << 20

const (
	// A table is waited for as long as the pack comes along: looked at every two round trips, there has to be something new, and
	// it has to be fast, or faster than the time before, as a connection is that has just begun.
	leastPatience = 150 * time.Millisecond
	mostPatience  = 500 * time.Millisecond // when the manifest took long for other reasons
	leastRate     = 1 << 20                // bytes a second: less is faster asked for, layers side by side
)

// watch closes s.late when the pack does not come along. rtt is about a round trip, or more.
func (s *Startup) watch(rtt time.Duration) {
	every := min(max(2*rtt, leastPatience), mostPatience)
	total := int64(0)
	for _, t := range s.tables {
		total += t.size
	}
	end := time.Now().Add(4*every + time.Duration(total)*time.Second/leastRate) // whatever else is in it
	s.work.Go(func() {
		ticks := time.NewTicker(every)
		defer ticks.Stop()
		defer close(s.late)
		var last, before int64
		for {
			select {
			case <-s.ready:
				return
			case <-s.ctx.Done():
				return
			case <-ticks.C:
			}
			arrived := s.arrived.Load()
			got := arrived - last
			if got == 0 || got < int64(every.Seconds()*leastRate) && got < before*3/2 || time.Now().After(end) {
				return
			}
			last, before = arrived, got
		}
	})
}

// find returns the newest startup pack that refers to a manifest. If none was recorded, or given as a profile, the newest of the
// repository goes before it, if that is of an image that runs the same command. It is nil if there is no pack. It returns the digest
// of the pack only if that refers to the manifest.
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
	best, rank := newestPack(list)
	if rank > guessed {
		return src.Blob(best), best.Digest, nil
	}
	<-both
	other, otherRank := newestPack([]v1.Descriptor{last})
	if otherRank > rank {
		var config *v1.ConfigFile
		i, err := image(ctx)
		if err == nil {
			config, _, err = i.Config(ctx)
		}
		if err == nil && pack.Command(config.Config.Entrypoint, config.Config.Cmd) == last.Annotations[pack.CommandAnnotation] {
			return src.Blob(other), v1.Hash{}, nil
		}
		lastErr = err
	}
	if rank == noPack {
		return nil, v1.Hash{}, errors.Join(listErr, lastErr)
	}
	s.guess = true
	return src.Blob(best), best.Digest, nil
}

// What a pack was made of, the best last.
const (
	noPack = iota
	guessed
	given
	measured
)

// newestPack returns the blob of the best pack, and of those as good the one that was made last, of those whose annotations say where
// it is.
func newestPack(list []v1.Descriptor) (best v1.Descriptor, rank int) {
	var made time.Time
	for _, d := range list {
		blob, ok := pack.Named(d.Annotations)
		if !ok {
			continue
		}
		is := guessed
		switch origin := d.Annotations[pack.OriginAnnotation]; origin {
		case "":
			is = measured
		case pack.OriginProfile:
			is = given
		}
		at, _ := time.Parse(time.RFC3339, d.Annotations[pack.MadeAnnotation]) // who does not say it comes last
		if is > rank || is == rank && at.After(made) {
			best, made, rank = blob, at, is
		}
	}
	return best, rank
}

// into puts the pack, if there is one, into the store, for layers that were added to the queue, and beside it what is now where its files
// were if it is of another build.
func (s *Startup) into(layers []*fetch.Layer, tocs []*toc.TOC) (fetch.PackStats, error) {
	select {
	case <-s.ready:
	case <-s.ctx.Done():
		return fetch.PackStats{}, context.Cause(s.ctx)
	}
	if s.err != nil || s.index == nil {
		return fetch.PackStats{}, s.err
	}
	s.noteIndex(s.index)
	at := s.index.Start
	for _, t := range s.index.Tables {
		at += t.Size
	}
	open := func(ctx context.Context, off int64) (io.ReadCloser, error) {
		body := s.body
		s.body = nil
		if body != nil && off-s.pos <= maxSkip {
			if _, err := io.CopyN(io.Discard, body, off-s.pos); err == nil {
				return body, nil
			}
		}
		if body != nil {
			body.Close()
		}
		return s.blob.Range(ctx, off, s.index.Size-off)
	}
	if s.digest == (v1.Hash{}) && s.index.Paths != nil {
		s.work.Go(func() { s.ahead(changed(s.index, tocs), layers) })
	}
	stats, err := s.n.queue.Pack(s.ctx, s.index, at, open, s.guess, layers...)
	if s.body != nil { // nobody wanted it
		s.body.Close()
	}
	return stats, err
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
	s.chain, s.pulled = c.ID(), true
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
			if err := b.Chunk(x.Key, x.Index, x.Path, data[i]); err != nil {
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
