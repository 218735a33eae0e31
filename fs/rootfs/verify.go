package rootfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"lazuli/fs/fetch"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// An ErrDiffID says that a layer is not what the image's config claims: the tar is another, or it is the one and
// the table of contents tells of another tree, which then has no diffID at all.
type ErrDiffID struct {
	Layer, Claimed, Is string
	Tree               string // how the table of contents and the tar differ, "" if that is not it
}

func (e *ErrDiffID) Error() string {
	if e.Tree != "" {
		return fmt.Sprintf("layer %s: its table of contents is not that of its tar: %s", e.Layer, e.Tree)
	}
	return fmt.Sprintf("layer %s: the image's config claims the diffID %s, but its tar has %s", e.Layer, e.Claimed, e.Is)
}

// VerifyDiffID reads a lazy layer's blob from beginning to end, when nobody waits for the link, and compares it with
// its digest, its tar with the diffID that the image's config claims, and the tar's files with the table of contents, which is what
// is mounted. What is not here of the layer is put into the store as it goes by, while the layer is in use. The error is an [*ErrDiffID] if the tar or the
// table is wrong; others say that it could not be found out. What was read before ctx ended is not read again soon.
func (n *Node) VerifyDiffID(ctx context.Context, r RecordLayer) error {
	_, err := n.pass(ctx, r, func(ctx context.Context) error { return context.Cause(ctx) })
	return err
}

// pass is VerifyDiffID that calls turn before each request. It reports whether the pass has come to its end: else it goes on
// where it was when the layer is verified again.
func (n *Node) pass(ctx context.Context, r RecordLayer, turn func(context.Context) error) (ended bool, err error) {
	l, key, err := n.openRecord(r)
	if err != nil {
		return false, err
	}
	if l.Blob == nil {
		return false, fmt.Errorf("%s: no registry has it", l.id)
	}
	key = passKey(key, r)
	p := n.passes.take(key)
	if p == nil {
		t, err := l.load(n)
		if err != nil {
			return false, fmt.Errorf("%s: its table of contents: %w: remove the image and pull it again", l.name(), err)
		}
		p, err = n.passes.begin(key, l.Size, func(ctx context.Context, blob io.Reader) (tarReport, error) {
			return compareTar(ctx, blob, t, &landing{n: n})
		})
		if err != nil {
			return false, err
		}
	}
	if err := p.run(ctx, n.queue.Behind(l.Blob), turn); err != nil {
		n.passes.keep(p)
		return false, fmt.Errorf("%s: %w", l.name(), err)
	}
	n.passes.forget(key)
	is := p.is
	switch {
	case p.err != nil:
		return true, fmt.Errorf("%s: %w", l.name(), p.err)
	case is.digest.String() != l.Digest.String():
		return true, fmt.Errorf("%s: the registry sent a blob with the digest %v", l.name(), is.digest)
	case is.diffID.String() != r.DiffID:
		return true, &ErrDiffID{Layer: r.Digest, Claimed: r.DiffID, Is: is.diffID.String()}
	case is.lie != "":
		return true, &ErrDiffID{Layer: r.Digest, Claimed: r.DiffID, Is: r.DiffID, Tree: is.lie}
	}
	return true, nil
}

// passKey names the pass of a layer that is called key.
func passKey(key string, r RecordLayer) string { return key + " " + r.Digest }

// unfinished reports whether a pass of the layer was begun and dropped.
func (n *Node) unfinished(r RecordLayer) bool {
	_, key, err := n.openRecord(r)
	n.passes.mu.Lock()
	defer n.passes.mu.Unlock()
	return err == nil && n.passes.dropped[passKey(key, r)]
}

const (
	// passRun is how many bytes of the blob one request of a pass asks for: a demand read finds no more than that on the link.
	passRun = 2 << 20
	// passRead is how many are taken from the link before it is looked again whether somebody waits.
	passRead = 64 << 10
	// keptPasses is how many passes wait to be gone on with, each with two tables of contents and a decompressor in memory. If there are more, those go
	// that have come least far.
	keptPasses = 2
	// keptFor is for how long.
	keptFor = 2 * lastRetry
)

// A pass is a layer's blob that goes by once, from its beginning to its end: it is compared, and what is not here of it lands in the store. Who reads
// the blob gives it the bytes (run), and may stop and go on later, also in another call: a pass that waits has a goroutine, but no
// connection. One call has it at a time.
type pass struct {
	key  string // of the layer, its blob, and where that lies
	size int64  // of the blob
	off  int64  // of the blob, how far it was given

	in    chan []byte // the bytes from there on; closed behind the last
	free  chan []byte // buffers for them, passRead long
	given bool        // in is closed
	drop  context.CancelCauseFunc

	expiry *time.Timer // drops it; of one that is kept

	done chan struct{} // closed when the rest is set
	is   tarReport
	err  error
}

// run gives the pass what it has not got of the blob, a range at a time, and returns when it has ended. An error says that it has not, and
// can be gone on with.
func (p *pass) run(ctx context.Context, blob fetch.Blob, turn func(context.Context) error) error {
	for failed := 0; p.off < p.size && !p.ended(); {
		if err := turn(ctx); err != nil {
			return err
		}
		before := p.off
		err := p.give(ctx, blob, min(passRun, p.size-p.off))
		if p.off > before {
			failed = 0
		}
		if err == nil {
			continue
		}
		if failed++; failed == attempts || ctx.Err() != nil {
			return fmt.Errorf("at byte %d of %d: %w", p.off, p.size, noEOF(err))
		}
	}
	if !p.given {
		p.given = true
		close(p.in)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (p *pass) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// give gives the pass the next size bytes of the blob.
func (p *pass) give(ctx context.Context, blob fetch.Blob, size int64) error {
	body, err := blob.Range(ctx, p.off, size)
	if err != nil {
		return err
	}
	defer body.Close()
	for end := p.off + size; p.off < end; {
		var b []byte
		select {
		case b = <-p.free:
		case <-p.done: // it has seen enough
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		n, err := body.Read(b[:min(passRead, end-p.off)])
		p.off += int64(n)
		if n > 0 {
			p.in <- b[:n]
		} else {
			p.free <- b
		}
		if err != nil && p.off < end {
			return err
		}
	}
	return nil
}

// A passing is the reader on the other side.
type passing struct {
	ctx  context.Context // ends when the pass is dropped, which made it
	p    *pass
	b    []byte // what is read
	rest []byte // of it
}

func (r *passing) Read(b []byte) (int, error) {
	if len(r.rest) == 0 {
		if r.b != nil {
			r.p.free <- r.b[:passRead]
			r.b = nil
		}
		select {
		case r.b = <-r.p.in:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
		if r.rest = r.b; r.b == nil {
			return 0, io.EOF
		}
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// A passes has the passes that were stopped before their ends.
type passes struct {
	work sync.WaitGroup // all of them

	mu      sync.Mutex
	closed  bool
	kept    []*pass
	dropped map[string]bool // keys of those that were begun and will not be gone on with
}

var errForgotten = errors.New("the reading of the blob was given up")

// begin begins a pass, of which compare reads the blob until ctx ends.
func (x *passes) begin(key string, size int64, compare func(ctx context.Context, blob io.Reader) (tarReport, error)) (*pass, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return nil, errForgotten
	}
	const buffers = 2 // one is filled while the other is read
	ctx, cancel := context.WithCancelCause(context.Background())
	p := &pass{
		key: key, size: size, drop: cancel,
		in: make(chan []byte, buffers), free: make(chan []byte, buffers), done: make(chan struct{}),
	}
	for range buffers {
		p.free <- make([]byte, passRead)
	}
	x.work.Go(func() {
		defer cancel(nil)
		defer close(p.done)
		p.is, p.err = compare(ctx, &passing{ctx: ctx, p: p})
	})
	return p, nil
}

// take returns the pass that was kept of a blob, or nil.
func (x *passes) take(key string) *pass {
	x.mu.Lock()
	defer x.mu.Unlock()
	i := slices.IndexFunc(x.kept, func(p *pass) bool { return p.key == key })
	if i < 0 {
		return nil
	}
	p := x.kept[i]
	p.expiry.Stop()
	x.kept = slices.Delete(x.kept, i, i+1)
	return p
}

// keep keeps a pass to be gone on with, or drops it if there are others that have come further.
func (x *passes) keep(p *pass) {
	x.mu.Lock()
	defer x.mu.Unlock()
	p.expiry = time.AfterFunc(keptFor, func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.drop(func(y *pass) bool { return y == p })
	})
	x.kept = append(x.kept, p)
	if len(x.kept) > keptPasses {
		least := slices.MinFunc(x.kept, func(a, b *pass) int { return cmp.Compare(a.off, b.off) })
		x.drop(func(y *pass) bool { return y == least })
	}
	if x.closed {
		x.drop(func(*pass) bool { return true })
	}
}

// forget forgets that an earlier pass was dropped.
func (x *passes) forget(key string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.dropped, key)
}

// drop drops those passes that which accepts. The caller holds x.mu.
func (x *passes) drop(which func(*pass) bool) {
	x.kept = slices.DeleteFunc(x.kept, func(p *pass) bool {
		gone := which(p)
		if gone {
			p.expiry.Stop()
			p.drop(errForgotten)
			if x.dropped == nil {
				x.dropped = map[string]bool{}
			}
			x.dropped[p.key] = true
		}
		return gone
	})
}

// close drops all of them and waits.
func (x *passes) close() {
	x.mu.Lock()
	x.closed = true
	x.drop(func(*pass) bool { return true })
	x.mu.Unlock()
	x.work.Wait()
}

// A landing is where the chunks of a pass go that are not here.
type landing struct {
	n    *Node
	left int64 // bytes that may come before it is looked again whether the disk has room
	full bool
}

// roomEvery is how many bytes land before it is looked again whether the disk has room: a blob may be inflated to much more than it is.
const roomEvery = 64 << 20

// lacks reports whether a chunk is to land.
func (l *landing) lacks(key store.Key, i int) bool {
	if l.left <= 0 {
		l.left = roomEvery
		l.full = l.n.o.Fill != FillOn && !l.n.room()
	}
	return !l.full && l.n.queue.Lacks(key, i)
}

// take puts a chunk into the store, if it is what its name says, and returns its digest. What the store does not get is fetched like all that is
// missing.
func (l *landing) take(key store.Key, i int, p []byte) toc.Digest {
	l.left -= int64(len(p))
	sum, err := l.n.queue.Offer(key, i, p)
	if err != nil {
		l.n.log.Debug("a chunk that came by", "err", err)
	}
	return sum
}
